"""The formats of quantized weights: int8 with a scale for each row, int4 with a scale and an offset for each group.

    int8   values int8 [.., N, K], scale [.., N]:                  w = value * scale
    int4   values uint8 [.., N, K/2], scale [.., K/g, N, 2]:       w = (value - 8) * scale[0] + scale[1]
           two values per byte, the first half of the columns in the high bits; g columns share scale and offset

Scales are rounded to bf16 before the weights are divided by them, so the integers are the same in every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FORMATS = ("int8", "int4")
GROUPS = (64, 32)  # columns of an int4 group; the first that divides the width
ROW_BLOCK = 64  # int4 kernels keep the rows of such a block together, so int4 needs a multiple of it
CHUNK = 1 << 20  # values converted at once: they stay in a processor's cache


def group_of(rows: int, width: int) -> int | None:
    """Columns of an int4 group in weights [rows, width]. None: no kernel takes this shape, and int8 is stored instead.

    Every layer of the published size has a group of 64.
    """
    return None if rows % ROW_BLOCK else next((g for g in GROUPS if width % g == 0), None)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [N, K] -> values int8 [N, K], scale bf16 [N]."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = weight.new_empty(weight.shape[0], dtype=torch.bfloat16)
    for rows in row_chunks(weight):
        w = weight[rows].float()
        scale[rows] = w.abs().amax(1) / 127
        values[rows] = (w * _inverse(scale[rows])[:, None]).round_().clamp_(-127, 127)
    return values, scale


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Weights [N, K] -> values uint8 [N, K/2], scale bf16 [K/group, N, 2] (step and offset)."""
    n, k = weight.shape
    values = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scale = weight.new_empty(k // group, n, 2, dtype=torch.bfloat16)
    for rows in row_chunks(weight):
        w = weight[rows].float().view(-1, k // group, group)
        low, high = w.amin(-1), w.amax(-1)  # faster than aminmax
        step = ((high - low) / 15).bfloat16()
        offset = (low + 8 * step.float()).bfloat16()
        scale[:, rows] = torch.stack([step, offset], dim=-1).transpose(0, 1)
        w = (w - offset[..., None]).mul_(_inverse(step)[..., None]).round_().add_(8).clamp_(0, 15)
        values[rows] = join_nibbles(w.to(torch.uint8).view(-1, k))
    return values, scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """Weights [.., N, K] in the dtype of `scale`, one or several stacked. Each weight is rounded once."""
    if values.dtype == torch.int8:
        return values.to(scale.dtype) * scale[..., None]
    nibbles = split_nibbles(values).to(torch.int8).sub_(8).to(scale.dtype).unflatten(-1, (scale.shape[-3], -1))
    step, offset = scale.transpose(-3, -2).unbind(-1)  # (.., N, K/g)
    return torch.addcmul(offset[..., None], nibbles, step[..., None]).flatten(-2)


def row_chunks(weight: Tensor, size: int = CHUNK) -> Iterator[slice]:
    """Slices that take the rows of a weight apart, about `size` values each."""
    step = max(1, size // weight.shape[1])
    return (slice(i, min(i + step, len(weight))) for i in range(0, len(weight), step))


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale in float32, and 0 for a row or group of equal weights."""
    scale = scale.float()
    return torch.where(scale > 0, 1 / scale, 0)


def join_nibbles(nibbles: Tensor) -> Tensor:
    """Values uint8 0..15 [.., K] -> two in a byte, uint8 [.., K/2]."""
    high, low = nibbles.chunk(2, dim=-1)
    return high << 4 | low


def split_nibbles(values: Tensor) -> Tensor:
    """The inverse of `join_nibbles`: uint8 [.., K/2] -> uint8 0..15 [.., K]."""
    return torch.cat([values >> 4, values & 15], dim=-1)


def width_of(values: Tensor) -> int:
    """Columns of the weights that these values stand for."""
    return values.shape[-1] * (2 if values.dtype == torch.uint8 else 1)
