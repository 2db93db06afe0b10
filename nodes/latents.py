"""Core's LATENT: what goes into one here, and what is taken from one."""

from __future__ import annotations

from typing import Any

import torch

LATENT_TYPE = "mingtok"
DEPTH = "ming_depth"  # how many drawings lie behind the picture, so that its next round has new noise


def to_latent(latents: torch.Tensor, depth: int = 0) -> dict[str, Any]:
    """A LATENT of normalised latents [B, C, h, w], on which core's own nodes work. The samples are theirs to change."""
    samples = latents.detach().to("cpu", torch.float32, copy=True)
    return {"samples": samples, "type": LATENT_TYPE} | ({DEPTH: depth} if depth else {})


def from_latent(latent: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """(a float32 copy of the samples, depth). Raises ValueError for a LATENT of another model, or of a video."""
    kind = latent.get("type", LATENT_TYPE)
    if kind != LATENT_TYPE:
        raise ValueError(f"this LATENT is of type {kind!r}: connect one from MingTok Encode")
    samples = latent.get("samples")
    if not isinstance(samples, torch.Tensor) or samples.ndim != 4:
        found = list(samples.shape) if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise ValueError(
            f"this LATENT holds {found}, not pictures [batch, channels, height, width]: connect one from MingTok Encode"
        )
    return samples.detach().to("cpu", torch.float32, copy=True), latent.get(DEPTH, 0)
