"""Weights of eight and four bits: what the numbers mean, and products with them.

    int8   values int8 [.., N, K], scale [.., N]:                  w = value * scale
    int4   values uint8 [.., N, K/2], scale [.., K/g, N, 2]:       w = (value - 8) * scale[0] + scale[1]
           two values a byte, the first half of the columns in the high bits; g columns share scale and offset

Scales are rounded to bf16 before the weights are divided by them, so the integers are the same in every dtype.

Products run in torch's own weight-only kernels. A kernel is used on a device once it has given the right numbers there
(`kernel_works`); otherwise weights are dequantised piece by piece and multiplied as usual, which also serves gradients.
The int4 kernels want the values in an order of their own, which depends on the processor (`packed_for_kernel`).

On CUDA int8 goes through the int4 kernel too: a value is 16 * high + low - 128, two halves of four bits, so a product
with twice the rows takes the very same weights, and reads each byte once. Torch's own int8 kernel for CUDA gives every
output to one thread (up to 2.13; pytorch/pytorch#190529), and was measured at a twentieth of an H20's bandwidth
(flagos-ai/FlagGems#5371).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..offload import needs_gradient

log = logging.getLogger(__name__)

GROUPS = (64, 32)  # columns; the first that divides the width
CHUNK = 1 << 20  # values quantised at once: they stay in a processor's cache
PIECE = 1 << 23  # values dequantised at once for a product: at most 200 MB beside them
INT8_ROWS = 32  # of x; from more on, dequantising once costs less than the CPU's kernel, which reads all for every row
BLOCK = 64  # rows of weights that an int4 kernel's order stays within
K_TILES = 8  # of the CUDA kernel: widths must be multiples of 16 * 8
HALVES_GROUPS = (256, 128, 64, 32)  # that the int4 kernels know; for int8 any will do, so the largest


# --- Numbers --------------------------------------------------------------------------------------------------------


def group_of(rows: int, width: int) -> int | None:
    """The int4 group of weights [rows, width]; None: no kernel takes such a shape, and int8 is stored instead.

    Every layer of the published size has a group of 64.
    """
    return None if rows % BLOCK else next((g for g in GROUPS if width % g == 0), None)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> values int8 [N, K], scale bf16 [N]."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = weight.new_empty(weight.shape[0], dtype=torch.bfloat16)
    for rows in _chunks(weight):
        w = weight[rows].float()
        scale[rows] = w.abs().amax(1) / 127
        values[rows] = (w * _inverse(scale[rows])[:, None]).round_().clamp_(-127, 127)
    return values, scale


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """[N, K] -> values uint8 [N, K/2], scale bf16 [K/group, N, 2] (step and offset)."""
    n, k = weight.shape
    values = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scale = weight.new_empty(k // group, n, 2, dtype=torch.bfloat16)
    for rows in _chunks(weight):
        w = weight[rows].float().view(-1, k // group, group)
        low, high = w.amin(-1), w.amax(-1)  # faster than aminmax
        step = ((high - low) / 15).bfloat16()
        offset = (low + 8 * step.float()).bfloat16()
        scale[:, rows] = torch.stack([step, offset], dim=-1).transpose(0, 1)
        w = (w - offset[..., None]).mul_(_inverse(step)[..., None]).round_().add_(8).clamp_(0, 15)
        values[rows] = _join(w.to(torch.uint8).view(-1, k))
    return values, scale


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """[.., N, K], or several stacked, in the dtype of `scale`. Each weight is rounded once."""
    if values.dtype == torch.int8:
        return values.to(scale.dtype) * scale[..., None]
    nibbles = _split(values).to(torch.int8).sub_(8).to(scale.dtype).unflatten(-1, (scale.shape[-3], -1))
    step, offset = scale.transpose(-3, -2).unbind(-1)  # (.., N, K/g)
    return torch.addcmul(offset[..., None], nibbles, step[..., None]).flatten(-2)


def _chunks(weight: Tensor, size: int = CHUNK) -> Iterator[slice]:
    """The rows of a weight, by about `size` values."""
    step = max(1, size // weight.shape[1])
    return (slice(i, min(i + step, len(weight))) for i in range(0, len(weight), step))


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale in float32, and 0 for a row or group of equal weights."""
    scale = scale.float()
    return torch.where(scale > 0, 1 / scale, 0)


def _join(nibbles: Tensor) -> Tensor:
    """uint8 0..15 [.., K] -> uint8 [.., K/2]."""
    high, low = nibbles.chunk(2, dim=-1)
    return high << 4 | low


def _split(values: Tensor) -> Tensor:
    """uint8 [.., K/2] -> uint8 0..15 [.., K]."""
    return torch.cat([values >> 4, values & 15], dim=-1)


# --- Kernels --------------------------------------------------------------------------------------------------------


def product(x: Tensor, values: Tensor, scale: Tensor, packed: bool) -> Tensor:
    """x [.., K] times the transposed weights [N, K] -> [.., N]. packed: in the order of this device's int4 kernel."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.data_ptr() % 32:  # kernels read several values at a time, and check nothing
        flat = flat.clone()
    if packed:
        out = _packed_product(flat, values, scale)
    elif _fits_int8_kernel(flat, values) and kernel_serves("int8", x, scale):
        out = torch._weight_int8pack_mm(flat, values, scale)
    else:
        return torch.cat([_plain_product(x, values, scale, rows) for rows in _chunks(values, PIECE)], dim=-1)
    return out.view(*x.shape[:-1], -1)


def _plain_product(x: Tensor, values: Tensor, scale: Tensor, rows: slice) -> Tensor:
    """Of some rows of the weights, which are dequantised."""
    if values.dtype == torch.int8 and x.dtype != torch.float16 and not needs_gradient(x):
        # Half of the traffic: scaled weights would be written and read once more. Unscaled, fp16 could overflow.
        return F.linear(x, values[rows].to(x.dtype)) * scale[rows].to(x.dtype)
    scale = scale[rows] if values.dtype == torch.int8 else scale[:, rows]
    return F.linear(x, dequantize(values[rows], scale).to(x.dtype))


def _fits_int8_kernel(x: Tensor, values: Tensor) -> bool:
    """The kernel reads 16 weights at a time, at whole multiples of 16, and checks nothing: others crash the process."""
    if values.dtype != torch.int8 or x.device.type != "cpu" or len(x) > INT8_ROWS:
        return False
    return values.shape[-1] % 16 == 0 and values.data_ptr() % 16 == 0


def kernel_serves(kind: str, x: Tensor, scale: Tensor) -> bool:
    return not needs_gradient(x) and x.dtype == scale.dtype and kernel_works(kind, x.device, x.dtype)


@functools.cache
def kernel_works(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a fast kernel here that agrees with plain mathematics; tried once on a small product.

    kind: "int8", "int4", or "int8 halves", int8 through the int4 kernel.
    """
    if dtype != torch.bfloat16 or device.type not in ("cpu", "cuda"):
        return False  # in float32 and fp16 they do not exist, or are slower than dequantising
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 384, generator=generator).to(device, dtype) for n in (3, 2 * BLOCK))
    x = x + 1
    values, scale = quantize_int4(weight, GROUPS[0]) if kind == "int4" else quantize_int8(weight)
    expected = x.float() @ dequantize(values, scale.float()).T
    with torch.no_grad():
        try:
            if kind == "int8":
                found = torch._weight_int8pack_mm(x, values, scale)
            else:
                found = _packed_product(x, packed_for_kernel(values), scale)
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            log.info("no kernel for %s on %s (%s): weights are dequantised for every product", kind, device, error)
            return False
        wrong = float((found.float() - expected).norm() / expected.norm())
    if found.dtype != dtype:  # some versions of the CUDA kernel
        return False
    if not wrong < 0.01:
        log.warning("the kernel for %s on %s is wrong by %.2g and is not used", kind, device, wrong)
    return wrong < 0.01


def _packed_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """x [n, K] by the int4 kernel of its device -> [n, N]."""
    out = kernel_product(x, values, scale)
    return joined(out, scale) if values.dtype == torch.int8 else out


def kernel_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """-> [n, N], or of int8 [n, 2 N]: its halves, without their scale."""
    n, k = values.shape[0], x.shape[1]
    if values.dtype == torch.int8:
        n, scale = 2 * n, _scales_of_halves(n, k, x.device)
    values, group = values.view(torch.uint8).view(n, k // 2), k // scale.shape[0]
    if values.is_cuda:
        tiles = values.view(torch.int32).view(n // 8, k // (16 * K_TILES), 32, K_TILES // 2)
        return torch._weight_int4pack_mm(x, tiles, group, scale)
    return torch._weight_int4pack_mm_for_cpu(x, values, group, scale)


def joined(halves: Tensor, scale: Tensor) -> Tensor:
    """[n, 2 N] -> [n, N], scaled; scale broadcasts against it."""
    whole = halves.unflatten(-1, (-1, 2, BLOCK)).sum(-2, dtype=torch.float32).flatten(-2)
    return (whole * scale).to(halves.dtype)


@functools.lru_cache(maxsize=32)  # as many shapes as a model has; some MB
def _scales_of_halves(rows: int, width: int, device: torch.device) -> Tensor:
    """bf16 [K/g, 2 N, 2]: what makes (v - 8) * step + offset the halves of int8 values, 16 * high - 120 and low - 8.

    Both are around 0, so that their products are not large where the sum is small.
    """
    groups = width // next(g for g in HALVES_GROUPS if width % g == 0)
    steps = torch.tensor([[16, 8], [1, 0]], dtype=torch.bfloat16).repeat_interleave(BLOCK, dim=0)
    return steps.repeat(groups, rows // BLOCK, 1).to(device)


def _nibbles(values: Tensor) -> Tensor:
    """What an int4 kernel multiplies with: uint8 0..15 [N, K], or of int8 [2 N, K], the high halves of 64 rows and then
    their low ones."""
    if values.dtype == torch.uint8:
        return _split(values)
    shifted = (values.view(torch.uint8) ^ 128).view(-1, BLOCK, values.shape[1])  # by 128
    return torch.stack([shifted >> 4, shifted & 15], dim=1).view(-1, values.shape[1])


def _from_nibbles(nibbles: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_nibbles`."""
    if dtype == torch.uint8:
        return _join(nibbles)
    high, low = nibbles.view(-1, 2, BLOCK, nibbles.shape[1]).unbind(1)
    return (high << 4 | low).view(-1, nibbles.shape[1]).bitwise_xor_(128).view(torch.int8)


def packed_for_kernel(values: Tensor) -> Tensor:
    """uint8 [N, K/2] or int8 [N, K] in the order of this device's int4 kernel."""
    nibbles = _nibbles(values)
    if values.is_cuda:
        pairs = nibbles[:, 0::2] << 4 | nibbles[:, 1::2]
        packed = torch._convert_weight_to_int4pack(pairs, K_TILES)
    else:
        block = _cpu_block()
        packed = _in_blocks(nibbles, block) if block else torch._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
    return packed.view(values.dtype).view(values.shape)


@functools.cache
def _cpu_block() -> int:
    """Rows that this processor's kernel takes at once, 0: it has another order than `_in_blocks`."""
    nibbles = torch.randint(16, (2 * BLOCK, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    order = torch._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1).flatten()
    return next((b for b in (64, 32) if torch.equal(order, _in_blocks(nibbles, b).flatten())), 0)


def _in_blocks(nibbles: Tensor, block: int) -> Tensor:
    """Column after column of `block` rows, of which the upper half is in the high bits: AVX-512 takes 64, AVX2 32.

    What torch's own converter makes, several times faster.
    """
    low, high = nibbles.view(-1, 2, block // 2, nibbles.shape[1]).unbind(1)
    return (low | high << 4).mT.contiguous()


def unpacked(values: Tensor, device_type: str) -> Tensor:
    """The inverse of `packed_for_kernel` on a device of this type."""
    width = width_of(values)
    origin = _origins(device_type, width).to(values.device)
    blocks = _split(values.view(torch.uint8).view(-1, width // 2)).view(-1, len(origin))
    plain = torch.empty_like(blocks)
    plain[:, origin] = blocks
    return _from_nibbles(plain.view(-1, width), values.dtype)


@functools.lru_cache(maxsize=16)
def _origins(device_type: str, width: int) -> Tensor:
    """For each place in a packed block of rows, the place that its value had before: int64 [BLOCK * width].

    Found by packing the places' own numbers, four bits at a time, since every processor has its own order.
    """
    places = torch.arange(BLOCK * width)
    origin = torch.zeros_like(places)
    for shift in range(0, len(places).bit_length(), 4):
        digits = (places >> shift & 15).to(torch.uint8).view(BLOCK, width)
        origin += _split(packed_for_kernel(_join(digits).to(device_type))).cpu().flatten().long() << shift
    return origin


def width_of(values: Tensor) -> int:
    """Columns of the weights that these values stand for."""
    return values.shape[-1] * (2 if values.dtype == torch.uint8 else 1)


def can_pack(values: Tensor, device: torch.device) -> bool:
    """Whether the int4 kernel of this device is the one for these values; on a CPU int8 has its own."""
    if values.device != device:
        return False
    if device.type != "cuda":
        return values.dtype == torch.uint8
    whole = values.shape[-2] % BLOCK == 0 and width_of(values) % (16 * K_TILES) == 0
    return whole and values.data_ptr() % 16 == 0
