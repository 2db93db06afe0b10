"""Products with quantized weights, by torch's weight-only kernels where they serve.

A kernel is used on a device once it has given the right numbers there (`kernel_works`). Otherwise weights are
dequantized chunk by chunk and multiplied as usual, which also serves gradients.

The int4 kernels read the values in an order of their own, which depends on the processor: `pack` brings
values into it, `unpack` brings them back. "Plain" is the order of formats.py, in which weights are stored.

On CUDA int8 goes through the int4 kernel too: a value is 16 * high + low - 128, two halves of four bits, so a product
with twice the rows takes the very same weights, and reads each byte once. Torch's own int8 kernel for CUDA gives every
output to one thread (up to 2.13; pytorch/pytorch#190529), and was measured at a twentieth of an H20's bandwidth
(flagos-ai/FlagGems#5371).
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from ..offload import is_out_of_memory, needs_gradient
from .formats import (
    GROUPS,
    ROW_BLOCK,
    dequantize,
    join_nibbles,
    quantize_int4,
    quantize_int8,
    row_chunks,
    split_nibbles,
    width_of,
)

log = logging.getLogger(__name__)

PRODUCT_CHUNK = 1 << 23  # values dequantized at once for a product: at most 200 MB beside them
INT8_ROWS = 32  # of x; from more on, dequantizing once costs less than the CPU's kernel, which reads all for every row
KERNEL_ROWS = 16  # of x, that the CUDA kernel takes at once: fewer cost as much
K_TILES = 8  # of the CUDA kernel: widths must be multiples of 16 * 8
HALVES_GROUPS = (256, 128, 64, 32)  # that the int4 kernels know; for int8 any will do, so the largest


def quantized_product(x: Tensor, values: Tensor, scale: Tensor, packed: bool) -> Tensor:
    """The product of x [.., K] with the transposed weights [N, K] -> [.., N].

    packed: the values are in the order of this device's int4 kernel.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.data_ptr() % 32:  # kernels read several values at a time, and check nothing
        flat = flat.clone()
    if packed:
        out = _packed_product(flat, values, scale)
    elif _fits_int8_kernel(flat, values) and kernel_serves("int8", x, scale):
        out = torch._weight_int8pack_mm(flat, values, scale)
    else:
        chunks = row_chunks(values, PRODUCT_CHUNK)
        return torch.cat([_dequantized_product(x, values, scale, rows) for rows in chunks], dim=-1)
    return out.view(*x.shape[:-1], -1)


def _dequantized_product(x: Tensor, values: Tensor, scale: Tensor, rows: slice) -> Tensor:
    """The product with some rows of the weights, which are dequantized for it."""
    if values.dtype == torch.int8 and x.dtype != torch.float16 and not needs_gradient(x):
        # Half of the traffic: scaled weights would be written and read once more. Unscaled, fp16 could overflow.
        return F.linear(x, values[rows].to(x.dtype)) * scale[rows].to(x.dtype)
    scale = scale[rows] if values.dtype == torch.int8 else scale[:, rows]
    return F.linear(x, dequantize(values[rows], scale).to(x.dtype))


def _fits_int8_kernel(x: Tensor, values: Tensor) -> bool:
    """Whether the CPU's int8 kernel can take these values and is the fastest way.

    It reads 16 weights at a time, from multiples of 16, and checks nothing: anything else crashes the process.
    """
    if values.dtype != torch.int8 or x.device.type != "cpu" or len(x) > INT8_ROWS:
        return False
    return values.shape[-1] % 16 == 0 and values.data_ptr() % 16 == 0


def kernel_serves(kind: str, x: Tensor, scale: Tensor) -> bool:
    """Whether the kernel (see `kernel_works`) can multiply x: kernels have no gradient and no mixed dtypes."""
    return not needs_gradient(x) and x.dtype == scale.dtype and kernel_works(kind, x.device, x.dtype)


@functools.cache
def kernel_works(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a fast kernel here that computes the right numbers; tried once on a small product.

    kind: "int8", "int4", or "int8 halves" for int8 through the int4 kernel.
    """
    if dtype != torch.bfloat16 or device.type not in ("cpu", "cuda"):
        return False  # in float32 and fp16 they do not exist, or are slower than dequantizing
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 384, generator=generator, device="cpu").to(device, dtype) for n in (3, 2 * ROW_BLOCK))
    x = x + 1  # a mean that is not 0 shows wrong offsets
    values, scale = quantize_int4(weight, GROUPS[0]) if kind == "int4" else quantize_int8(weight)
    expected = x.float() @ dequantize(values, scale.float()).T
    with torch.no_grad():
        try:
            if kind == "int8":
                found = torch._weight_int8pack_mm(x, values, scale)
            else:
                found = _packed_product(x, pack(values), scale)
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                raise  # there may be a kernel: the answer is remembered, so it is not given now
            log.info("no kernel for %s on %s (%s): weights are dequantized for every product", kind, device, error)
            return False
        wrong = float((found.float() - expected).norm() / expected.norm())
    if found.dtype != dtype:  # some versions of the CUDA kernel
        return False
    if not wrong < 0.01:
        log.warning("the kernel for %s on %s is wrong by %.2g and is not used", kind, device, wrong)
    return wrong < 0.01


def _packed_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """The product of x [n, K] by the int4 kernel of its device -> [n, N]."""
    out = kernel_product(x, values, scale)
    return join_halves(out, scale) if values.dtype == torch.int8 else out


def kernel_product(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """What the int4 kernel gives: [n, N], or for int8 the products with its halves, [n, 2 N], not yet scaled."""
    n, k = values.shape[0], x.shape[1]
    if values.dtype == torch.int8:
        n, scale = 2 * n, _scales_of_halves(n, k, x.device)
    values, group = values.view(torch.uint8).view(n, k // 2), k // scale.shape[0]
    if values.is_cuda:
        tiles = values.view(torch.int32).view(n // 8, k // (16 * K_TILES), 32, K_TILES // 2)
        return torch._weight_int4pack_mm(x, tiles, group, scale)
    return torch._weight_int4pack_mm_for_cpu(x, values, group, scale)


def join_halves(halves: Tensor, scale: Tensor) -> Tensor:
    """The product with int8 weights from those with their halves: [n, 2 N] -> [n, N]; scale broadcasts against it."""
    whole = halves.unflatten(-1, (-1, 2, ROW_BLOCK)).sum(-2, dtype=torch.float32).flatten(-2)
    return (whole * scale).to(halves.dtype)


@functools.lru_cache(maxsize=32)  # as many shapes as a model has; some MB
def _scales_of_halves(rows: int, width: int, device: torch.device) -> Tensor:
    """Scales bf16 [K/g, 2 N, 2] that make the halves of int8 values 16 * high - 120 and low - 8.

    Both are around 0, so that their products are not large where the sum is small.
    """
    groups = width // next(g for g in HALVES_GROUPS if width % g == 0)
    steps = torch.tensor([[16, 8], [1, 0]], dtype=torch.bfloat16, device="cpu").repeat_interleave(ROW_BLOCK, dim=0)
    return steps.repeat(groups, rows // ROW_BLOCK, 1).to(device)


def _nibbles(values: Tensor) -> Tensor:
    """The four-bit values that an int4 kernel multiplies with: uint8 0..15 [N, K].

    Of int8 they are [2 N, K]: the high halves of 64 rows, then the low halves of the same rows.
    """
    if values.dtype == torch.uint8:
        return split_nibbles(values)
    shifted = (values.view(torch.uint8) ^ 128).view(-1, ROW_BLOCK, values.shape[1])  # value + 128
    return torch.stack([shifted >> 4, shifted & 15], dim=1).view(-1, values.shape[1])


def _from_nibbles(nibbles: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_nibbles`."""
    if dtype == torch.uint8:
        return join_nibbles(nibbles)
    high, low = nibbles.view(-1, 2, ROW_BLOCK, nibbles.shape[1]).unbind(1)
    return (high << 4 | low).view(-1, nibbles.shape[1]).bitwise_xor_(128).view(torch.int8)


def pack(values: Tensor) -> Tensor:
    """Values uint8 [N, K/2] or int8 [N, K] in the order of this device's int4 kernel; N a multiple of 64."""
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
    """Rows that this processor's kernel takes at once; 0: its order is not that of `_in_blocks`."""
    generator = torch.Generator().manual_seed(0)
    nibbles = torch.randint(16, (2 * ROW_BLOCK, 32), dtype=torch.uint8, generator=generator, device="cpu")
    order = torch._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1).flatten()
    return next((b for b in (64, 32) if torch.equal(order, _in_blocks(nibbles, b).flatten())), 0)


def _in_blocks(nibbles: Tensor, block: int) -> Tensor:
    """Column after column of `block` rows, of which the upper half is in the high bits: AVX-512 takes 64, AVX2 32.

    The result is that of torch's own converter, several times faster.
    """
    low, high = nibbles.view(-1, 2, block // 2, nibbles.shape[1]).unbind(1)
    return (low | high << 4).mT.contiguous()


def unpack(values: Tensor, device_type: str) -> Tensor:
    """The inverse of `pack` on a device of this type; the values may be on any device."""
    width = width_of(values)
    origin = _origins(device_type, width).to(values.device)
    blocks = split_nibbles(values.view(torch.uint8).view(-1, width // 2)).view(-1, len(origin))
    plain = torch.empty_like(blocks)
    plain[:, origin] = blocks
    return _from_nibbles(plain.view(-1, width), values.dtype)


@functools.lru_cache(maxsize=16)
def _origins(device_type: str, width: int) -> Tensor:
    """The plain place of the value at each place of a packed block of rows: int64 [ROW_BLOCK * width].

    Found by packing the numbers of the places, four bits at a time, since every processor has its own order.
    """
    places = torch.arange(ROW_BLOCK * width, device="cpu")
    origin = torch.zeros_like(places)
    for shift in range(0, len(places).bit_length(), 4):
        digits = (places >> shift & 15).to(torch.uint8).view(ROW_BLOCK, width)
        packed = pack(join_nibbles(digits).to(device_type))
        origin += split_nibbles(packed).cpu().flatten().long() << shift
    return origin


def can_pack(values: Tensor, device: torch.device) -> bool:
    """Whether these values can be packed for the int4 kernel of this device; on a CPU int8 has its own kernel."""
    if values.device != device:
        return False
    if device.type != "cuda":
        return values.dtype == torch.uint8
    whole = values.shape[-2] % ROW_BLOCK == 0 and width_of(values) % (16 * K_TILES) == 0
    return whole and values.data_ptr() % 16 == 0
