"""What MingTok is trained to do.

It reconstructs images from latents with noise on them (near latents must mean near images, because a flow head draws
them with small errors), and expands latents to features from which a linear layer reads what each patch shows (shape,
color, which part of the shape). In a procedural world these labels take the place of the teacher that the published
recipe aligns features with. For some images a share of the latents is masked, and the labels must still be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ming_core.mingtok import MingTok

from ..world import LABEL_CLASSES
from .images import LABELS
from .sequences import IGNORE

MASKED = 0.3  # share of the latents that masked modelling masks


@dataclass(frozen=True)
class MingTokWeights:
    """Weights of the terms of the loss, and strengths of what is done to the latents.

    labels         of the labels
    latents        of the mean square of the raw latents, which keeps them near 1
    noise          in standard deviations of the latents; drawn from 0 to this for each image
    masked_images  share of the images used for masked modelling
    """

    labels: float = 0.15
    latents: float = 2e-3
    noise: float = 0.5
    masked_images: float = 0.125


class MingTokLoss(nn.Module):
    """MingTok with its loss, and the layer that reads labels from its features, which is thrown away afterwards."""

    def __init__(self, mingtok: MingTok, weights: MingTokWeights | None = None) -> None:
        super().__init__()
        self.mingtok, self.weights = mingtok, weights or MingTokWeights()
        width = mingtok.config.semantic_decoder.embed_dim
        self.label_head = nn.Linear(width, sum(LABEL_CLASSES[name] for name in LABELS))

    def forward(self, pixels: Tensor, labels: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """pixels [B, 3, H, W] in [-1, 1]; labels int64 [B, N], IGNORE where unknown. Returns "loss" and its terms."""
        tok, weights = self.mingtok, self.weights
        raw = tok.low_level_encoder(pixels)[:, :-1]  # (B, N, C)
        strength = torch.rand(len(raw), 1, 1, generator=generator).to(raw) * weights.noise * raw.detach().std()
        noisy = raw + strength * torch.randn(raw.shape, generator=generator).to(raw)
        masked = round(weights.masked_images * len(raw))
        keep = torch.rand(masked, raw.shape[1], 1, generator=generator).to(raw) >= MASKED
        semantic = tok.semantic_decoder(torch.cat([noisy[:masked] * keep, noisy[masked:]]))
        grid = (pixels.shape[2] // tok.patch_size, pixels.shape[3] // tok.patch_size)
        error = tok.assemble(tok.patches(semantic[masked:]), grid) - pixels[masked:]
        terms = {"l1": error.abs().mean(), "l2": error.square().mean()}
        terms["labels"] = self.label_loss(semantic, labels)
        terms["latents"] = raw.square().mean()
        terms["loss"] = (
            terms["l1"] + terms["l2"] + weights.labels * terms["labels"] + weights.latents * terms["latents"]
        )
        return terms

    def label_logits(self, semantic: Tensor) -> dict[str, Tensor]:
        """Logits [B, N, classes] of each kind of label."""
        logits = self.label_head(semantic).split([LABEL_CLASSES[name] for name in LABELS], dim=-1)
        return dict(zip(LABELS, logits, strict=True))

    def label_loss(self, semantic: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """The sum over the kinds of labels of the mean over the patches whose label is known; 0 if there is none."""
        total = semantic.new_zeros(())
        for name, logits in self.label_logits(semantic).items():
            targets = labels[name].flatten()
            losses = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
            total = total + losses / (targets != IGNORE).sum().clamp_min(1)
        return total
