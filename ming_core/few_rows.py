"""Quick products of few rows on a CPU, while an image is drawn.

For every image token two or three rows go through each layer, many times over, so time goes into reading weights. For
so few rows the library behind `F.linear` reads float32 weights at a third of what the memory gives, and bfloat16 ones
at half of it. oneDNN, which torch brings along, comes near to it if the weights are packed in an order of its own, as
torch.compile packs those of a frozen model. To pack a layer costs about as much as to read it three times. So it is
done once for a drawing and forgotten after it: between drawings nothing is kept that could differ from the weights.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .offload import needs_gradient

log = logging.getLogger(__name__)

FEWEST_ROWS = 3  # oneDNN takes longer for one row or two
MOST_ROWS = 64
SMALLEST = 2**21  # bytes: less stays in the processor's cache, where all products are quick
DTYPES = (torch.float32, torch.bfloat16)


class PackedWeights:
    """Within it (`with`) the large linear layers of some modules multiply few rows by packed weights, where they can.

    A layer's weight is packed when it is first used, and all stay packed as long as this object lives; the weights must
    not change meanwhile. Packed weights take as much memory as the weights themselves. Where twice that is not free, or
    the products of this torch are no good, it does nothing.
    """

    def __init__(self, *modules: nn.Module) -> None:
        layers = [layer for layer in large_layers(*modules) if _usable(layer)]
        if not _fits(sum(layer.weight.nbytes for layer in layers)):
            layers = []
        self._products = {layer: _PackedProduct(layer) for layer in layers}

    def __enter__(self) -> PackedWeights:
        for layer, product in self._products.items():
            layer.__dict__["forward"] = product  # of this instance: hooks still run around it
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._products:
            layer.__dict__.pop("forward", None)

    def around(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """`run`, called within it."""

        def packed_run() -> Tensor:
            with self:
                return run()

        return packed_run


class _PackedProduct:
    """What a layer computes, by a packed weight if there are few rows."""

    def __init__(self, layer: nn.Linear) -> None:
        self.plain: Callable[[Tensor], Tensor] = layer.forward
        self.weight, self.bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()

    @functools.cached_property
    def packed(self) -> Tensor:
        return _packed(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if not 0 < rows <= MOST_ROWS or x.dtype != self.weight.dtype or not x.is_cpu or needs_gradient(x):
            return self.plain(x)
        flat = x.reshape(rows, -1)
        if rows < FEWEST_ROWS:
            flat = F.pad(flat, (0, 0, 0, FEWEST_ROWS - rows))
        return _product(flat, self.packed, self.bias)[:rows].reshape(*x.shape[:-1], -1)


def _fits(size: int) -> bool:
    if 2 * size <= psutil.virtual_memory().available:
        return True
    log.info("%.1f GB for packed weights are not free: drawing takes longer", size / 1e9)
    return False


def large_layers(*modules: nn.Module) -> list[nn.Linear]:
    """The linear layers whose weights a CPU packs."""
    linear = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear)]
    weights = [getattr(layer, "weight", None) for layer in linear]  # a host may not have loaded all of them
    return [
        layer
        for layer, weight in zip(linear, weights, strict=True)
        if weight is not None and weight.dtype in DTYPES and weight.nbytes >= SMALLEST
    ]


def _usable(layer: nn.Linear) -> bool:
    # a host has functions that change a weight before each product
    if not layer.weight.is_cpu or "forward" in layer.__dict__ or getattr(layer, "weight_function", None):
        return False
    return packed_products_work(layer.weight.dtype)


@torch.no_grad()
def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, FEWEST_ROWS)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@functools.cache
def packed_products_work(dtype: torch.dtype) -> bool:
    """Whether this torch has these products on this processor and they are right; the log says where they are not."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator, device="cpu").to(dtype) for rows in (FEWEST_ROWS, 48))
    close = 1e-4 if dtype == torch.float32 else 0.05
    try:
        found, expected = _product(x, _packed(weight), None), F.linear(x, weight)
        if torch.allclose(found.float(), expected.float(), rtol=close, atol=2 * close):
            return True
        why = "they are wrong"
    except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
        why = str(error).splitlines()[0]
    log.info("products with packed weights of %s cannot be used here (%s): drawing takes longer", dtype, why)
    return False
