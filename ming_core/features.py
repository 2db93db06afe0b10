"""Features: images as Ming-UniVision sees, draws and hands them on.

A image has two equivalent forms: compact latents, and the semantic tokens they expand to. `Features` carries both,
so that a round can follow a round without pixels and without expanding anything twice. What identifies an image is
its latents, not its tokens: equality and hash go by them.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHANGED = 0.15  # from which difference on a token counts as changed: docs/TRAINING.md says how it was chosen


def to_tokens(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w, C], row by row."""
    return latents.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h*w, C] -> [B, C, h, w]; the inverse of `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def digest_of(*parts: bytes) -> bytes:
    """32 bytes that identify these parts in this order."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def tensor_digest(tensor: Tensor) -> bytes:
    """32 bytes that identify shape and float32 values."""
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    return digest_of(str(tuple(values.shape)).encode(), values.numpy().tobytes())


class ContentHashed:
    """Equality and hash by content digest, for named tuples whose tensors cannot be compared by ==."""

    __slots__ = ()

    def digest(self) -> bytes:
        """32 bytes that identify the content."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContentHashed) and type(other) is type(self) and self.digest() == other.digest()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int.from_bytes(self.digest()[:8], "big", signed=True)


class _Features(NamedTuple):
    tokens: Tensor
    latents: Tensor
    grid: tuple[int, int]
    tokenizer: str
    depth: int = 0


class Features(ContentHashed, _Features):
    """A batch of B images of one grid, in host memory.

    tokens     float32 [B, h*w, D], semantic features, row by row
    latents    float32 [B, C, h, w], the normalised latents that `tokens` were expanded from
    grid       (h, w)
    tokenizer  fingerprint of the MingTok that both belong to
    depth      0 for an image that was encoded, +1 for every drawing that lies behind it
    """

    __slots__ = ()

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def split(self) -> list[Features]:
        """One Features of batch 1 for each image."""
        return [
            self._replace(tokens=self.tokens[i : i + 1], latents=self.latents[i : i + 1]) for i in range(self.batch)
        ]

    def copied(self) -> Features:
        """The same with memory of its own: it keeps no batch alive, and no one else can write to it."""
        return self._replace(tokens=self.tokens.clone(), latents=self.latents.clone())

    def digest(self) -> bytes:
        return digest_of(tensor_digest(self.latents), f"{self.grid}|{self.tokenizer}|{self.depth}".encode())

    def __repr__(self) -> str:
        h, w = self.grid
        return f"Features({self.batch} x {h}x{w}, {self.tokens.shape[-1]} wide, depth {self.depth})"


def require_comparable(a: Features, b: Features) -> None:
    """Raises ValueError unless both have one tokenizer, one grid and equally many images."""
    for what, of_a, of_b in (
        ("tokenizer", a.tokenizer[:12], b.tokenizer[:12]),
        ("grid", a.grid, b.grid),
        ("number of images", a.batch, b.batch),
    ):
        if of_a != of_b:
            raise ValueError(
                f"these features cannot be compared: their {what} differs ({of_a} and {of_b}); encode both with one "
                "MingTok and one detail, as many images of each"
            )


def change(a: Features, b: Features) -> Tensor:
    """How much each token differs: 1 - cosine similarity of the semantic tokens, float32 [B, 1, h, w], 0 to 2.

    Raises ValueError unless both have one tokenizer, one grid and equally many images.
    """
    require_comparable(a, b)
    difference = 1 - F.cosine_similarity(a.tokens, b.tokens, dim=-1)
    difference = difference.masked_fill((a.tokens == b.tokens).all(-1), 0)  # rounding would leave a little
    return to_grid(difference[..., None], a.grid).clamp(0, 2)


def joined(*features: Features) -> Features:
    """Several batches of one tokenizer and one grid as one, in their order; its depth is the largest of theirs.

    Raises ValueError for features of different tokenizers or grids.
    """
    first = features[0]
    for other in features[1:]:
        if other.tokenizer != first.tokenizer:
            raise ValueError(
                f"these features come from different tokenizers ({first.tokenizer[:12]} and {other.tokenizer[:12]}): "
                "encode both pictures with one MingTok"
            )
        if other.grid != first.grid:
            sizes = " and ".join("x".join(map(str, f.grid)) for f in (first, other))
            raise ValueError(
                f"these features have different grids ({sizes} tokens): encode both pictures with one detail; drawn "
                "pictures have that of detail `standard`"
            )
    return first._replace(
        tokens=torch.cat([f.tokens for f in features]),
        latents=torch.cat([f.latents for f in features]),
        depth=max(f.depth for f in features),
    )


def principal_colors(features: Features) -> Tensor:
    """The three principal components of all tokens as red, green and blue: float32 [B, 3, h, w], 0..1."""
    tokens = features.tokens.flatten(0, 1).double()
    tokens = tokens - tokens.mean(0)
    _, axes = torch.linalg.eigh(tokens.T @ tokens)  # in rising order
    axes = axes[:, -3:].flip(1)
    # an axis has no sign of its own: point it to where its largest entry is positive
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    values = (tokens @ axes).float()
    low, high = values.amin(0), values.amax(0)
    colors = (values - low) / (high - low).clamp_min(1e-12)
    return to_grid(colors.unflatten(0, (features.batch, -1)), features.grid)
