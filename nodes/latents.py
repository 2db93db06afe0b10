"""Conversion to and from LATENT, the type that ComfyUI's own latent nodes work on."""

from __future__ import annotations

from typing import Any

import torch

from ..ming_core.checks import MAX_DEPTH, check_tensor, described, whole_number

LATENT_TYPE = "mingtok"
DEPTH = "ming_depth"  # how many times the image was drawn or edited, so that the next round gets new noise


def to_latent(latents: torch.Tensor, depth: int = 0) -> dict[str, Any]:
    """Wrap a copy of normalized latents [B, C, h, w]; core nodes may change it in place."""
    samples = latents.detach().to("cpu", torch.float32, copy=True)
    return {"samples": samples, "type": LATENT_TYPE} | ({DEPTH: depth} if depth else {})


def from_latent(latent: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Return a float32 copy of the samples, and the depth. Raises ValueError for a LATENT of another kind of model."""
    kind = latent.get("type", LATENT_TYPE)
    if not isinstance(kind, str) or kind != LATENT_TYPE:
        raise ValueError(f"this LATENT is of type {described(kind)}: connect one from MingTok Encode")
    samples = latent.get("samples")
    if isinstance(samples, torch.Tensor):
        found = str(list(check_tensor("the tensor in this LATENT", samples).shape))
    else:
        found = "nothing" if samples is None else type(samples).__name__
    if not isinstance(samples, torch.Tensor) or samples.ndim != 4:
        raise ValueError(
            f"this LATENT holds {found}, not images [batch, channels, height, width]: connect one from MingTok Encode"
        )
    depth = whole_number(f"{DEPTH} of this LATENT", latent.get(DEPTH, 0), 0, MAX_DEPTH)
    return samples.detach().to("cpu", torch.float32, copy=True), depth
