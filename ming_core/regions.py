"""Regions: where a drawn image marks another one, read from features alone.

Asked for the region of an edit, a model may draw it bright on a dark copy of the image, as the built-in model does, or
mark it in a copy that is the image itself everywhere else. Both are read without decoding anything, from the compact
latents, which encode what pixels look like:

- In a marked copy the region is where the latents differ from those of the image.
- In a dark copy most tokens are ground. What is only dimmed is nearer to it than it was in the image, as a dark copy
  has less contrast; what is marked is not. And where the image has a plain, light ground, what is marked lies on the
  way from the dark ground back to the light one, and what is only dimmed does not. The marked tokens that are farthest
  from the ground show the direction from dark to bright, and each token lies somewhere along it. Features do not say
  what is bright, so the ground is what covers more of the image.

Measured at the default threshold and without growing on 300 regions that the built-in model drew for unseen edits of
one of several objects, in comparison with their pixels: 10 of 1,608 tokens of which 12 % or more are bright are
overlooked (26 by contrast alone), and one is taken that shows nothing bright (17). In 16 with a large object beside
the small one that is edited it is one, too (18). Widened by one token, every region is covered. Two clusters
overlooked 59 of 1,213 tokens, of a move often one of its two places. Of the tokens that 32 drawn edits change 99 %
differ by 0.8 or more, of those that they do not change 95 % by less than 0.12. The semantic tokens serve worse, as
they describe what is shown rather than how it looks: they take dark objects for the region, and overlook tinted ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Features, require_comparable, to_tokens

MARKED = 0.3  # from which score on a token belongs to the region
UNCHANGED_SHARE = 0.5  # a copy of an image leaves at least this share of its tokens as they are
FAR = 0.6  # share of the farthest token's distance from the ground from which on a token is surely in the region
LIGHT = 0.87  # a plain ground that has moved farther, where 1 is the distance of two unrelated tokens, was light
# Cosine with the way back to a light ground: what is only dimmed has less than the first, what is marked mostly more
# than the second.
BACK = (0.15, 0.5)


def region_mask(before: Features, region: Features, threshold: float = MARKED, grow: int = 1) -> Tensor:
    """The tokens that `region` marks in `before`: float32 [B, h, w], 0 or 1.

    before     B images
    region     one drawn region for each: bright on a dark copy of the image, or a marked copy of it
    threshold  which tokens count, 0..1: those with a higher score. In a marked copy the score is the distance of the
               latents from those of the image, where 1 is that of two unrelated tokens; in a dark copy it is how far
               the token lies on the way from dark (0) to bright (1)
    grow       by how many tokens the region is then widened in every direction, 0 or more

    A region that covers more than half of an image on a dark ground is taken for the ground: invert the mask.
    Raises ValueError unless both have one tokenizer, one grid and equally many images.
    """
    require_comparable(before, region)
    scores = torch.stack(
        [
            _score(image.float(), marked.float())
            for image, marked in zip(to_tokens(before.latents), to_tokens(region.latents), strict=True)
        ]
    )
    mask = (scores > threshold).float().unflatten(1, region.grid)
    return F.max_pool2d(mask, 2 * grow + 1, stride=1, padding=grow)


def _score(image: Tensor, marked: Tensor) -> Tensor:
    """How much each of N tokens [N, C] belongs to the region: [N]."""
    changed = (image - marked).norm(dim=-1) / _unrelated(image)
    return changed if _mostly_alike(changed) else _brightness(image, marked)


def _brightness(image: Tensor, marked: Tensor) -> Tensor:
    """Where each of N tokens [N, C] of a dark copy of the image lies from dark (0) to bright (1): [N]."""
    ground, dark = image.median(0).values, marked.median(0).values
    before, after, back = image - ground, marked - dark, ground - dark
    distance = after.norm(dim=-1)
    if distance.max() <= MARKED * _unrelated(marked):  # all tokens are alike
        return torch.zeros_like(distance)
    contrast = (distance / before.norm(dim=-1).clamp(min=1e-6)).clamp(max=1) ** 2
    if _mostly_alike(before.norm(dim=-1) / _unrelated(image)) and back.norm() > LIGHT * _unrelated(marked):
        dimmed, lit = BACK
        cosine = F.cosine_similarity(after, back[None], dim=-1)
        contrast = contrast * ((cosine - dimmed) / (lit - dimmed)).clamp(0, 1)
    far = distance * contrast
    axis = after[far >= FAR * far.max()].mean(0)
    return (after @ axis / (axis @ axis)).clamp(0, 1) * contrast


def _mostly_alike(distances: Tensor) -> bool:
    """Whether few of these distances [N], where 1 is that of two unrelated tokens, are more than nothing."""
    return bool((distances <= MARKED).float().mean() >= UNCHANGED_SHARE)


def _unrelated(latents: Tensor) -> float:
    """The distance of two unrelated tokens [N, C]: latents are normalised to a variance of about 1."""
    return (2 * latents.shape[-1]) ** 0.5
