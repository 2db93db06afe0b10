"""Layers with quantized weights: int8 with a scale per row, int4 with a scale per group (formats.py).

Drawing is bound by how many bytes of weights are read, so fewer bits take less time as well as less memory.

The linear layers of the language model (its output layer too) and of the flow head are quantized, and so are the
stacked weights of the experts. MingTok, embeddings, routers and norms stay as they are, and so do layers that are a
thousandth of the head but act on the latent or the time itself (`KEPT`).

An int4 kernel wants its values in an order of its own. A layer packs them when it first runs, into new memory that
takes the place of the old, so an error on the way changes nothing. `state_dict` always gives the plain order and
`load_state_dict` always takes it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..experts import GATHER_LIMIT, ExpertPerRow, OneExpert, Route, StackedLinear, StackedWeight
from ..offload import all_on
from ..univision import UniVision
from .formats import CHUNK, FORMATS, ROW_BLOCK, group_of, quantize_int4, quantize_int8
from .kernels import KERNEL_ROWS, can_pack, join_halves, kernel_product, kernel_serves, pack, quantized_product, unpack

QUANTIZED = ("language_model.", "flow_head.")
KEPT = re.compile(r"\.(gate|image_gate)$|\.time_embed\.|\.input_proj$|\.final_layer\.linear$")
PLAIN = "plain"  # the order of formats.py


class QuantizedWeight(nn.Module):
    """A weight [N, K], or several stacked as [E, N, K], in a format of formats.py.

    values  int8 [.., N, K] or uint8 [.., N, K/2]
    scale   [.., N] or [.., K/g, N, 2], in the dtype that is computed in
    order   of the values: PLAIN, or the type of the device for whose int4 kernel they are packed
    """

    def __init__(self, weight: Tensor, kind: str) -> None:
        """Quantize `weight`; on the meta device, only make room. kind: one of FORMATS."""
        super().__init__()
        *stack, n, k = weight.shape
        group = group_of(n, k) if kind == "int4" else None
        shape, dtype = ((*stack, n, k // 2), torch.uint8) if group else ((*stack, n, k), torch.int8)
        scales = (*stack, k // group, n, 2) if group else (*stack, n)
        self.values = _frozen(torch.empty(shape, dtype=dtype, device=weight.device))
        self.scale = _frozen(weight.new_empty(scales))
        self.order = PLAIN
        if not weight.is_meta:
            for index in itertools.product(*map(range, stack)):
                self.fill(index, weight.detach()[index])

    @torch.no_grad()
    def fill(self, index: tuple, weight: Tensor) -> None:
        """Quantize rows [n, K] into the slice of the weights that `index` (expert, rows) selects."""
        if self.values.dtype == torch.int8:
            self.values[index], self.scale[index] = quantize_int8(weight)
            return
        group = weight.shape[1] // self.scale.shape[-3]
        # in a scale, the groups of columns come before the rows
        stack = self.values.ndim - 2
        in_scale = (*index[:stack], slice(None), *index[stack:])
        self.values[index], self.scale[in_scale] = quantize_int4(weight, group)

    # --- Order of the values --------------------------------------------------------------------------------------

    def kernel_serves(self, x: Tensor) -> bool:
        """Whether the int4 kernel of x's device can multiply x with these weights.

        Once packed for it they may be offloaded, and are copied.
        """
        kind = "int4" if self.values.dtype == torch.uint8 else "int8 halves"
        if not kernel_serves(kind, x, self.scale):
            return False
        return self.order == x.device.type or can_pack(self.values, x.device)

    def prepare(self, x: Tensor) -> bool:
        """Bring the values into the order for a product with x. True: they are packed for its device's int4 kernel."""
        packed = self.kernel_serves(x)
        self.arrange(x.device.type if packed else PLAIN)
        return packed

    def arrange(self, order: str) -> None:
        """Bring the values into another order."""
        if order != self.order:
            parameters = {**self._parameters, "values": self._arranged(order)}
            # Nothing has changed until here: when memory runs out on the way, the weights stay as they were. Both
            # change in one step, between whose halves Ctrl+C could not come: values of another order are noise.
            self.__dict__.update(_parameters=parameters, order=order)

    @torch.inference_mode(False)  # what is made under inference mode could not be used outside
    @torch.no_grad()
    def _arranged(self, order: str) -> nn.Parameter:
        """A copy of the values in another order."""
        out = torch.empty_like(self.values)
        rows = max(ROW_BLOCK, CHUNK // out.shape[-1] // ROW_BLOCK * ROW_BLOCK)
        for matrix, target in zip(self.values.view(-1, *out.shape[-2:]), out.view(-1, *out.shape[-2:]), strict=True):
            for part, place in zip(matrix.split(rows), target.split(rows), strict=True):
                plain = part if self.order == PLAIN else unpack(part, self.order)
                place.copy_(plain if order == PLAIN else pack(plain))
        return _frozen(out)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.order != PLAIN and not _keep_packed.get():
            destination[prefix + "values"] = self._arranged(PLAIN).detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if prefix + "values" in state_dict:
            self.arrange(PLAIN)
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedLinear(QuantizedWeight):
    """A linear layer with a quantized weight, x [.., K] -> [.., N]."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.weight, kind)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        packed = self.prepare(x)
        out = quantized_product(x, self.values.to(x.device), self.scale.to(x.device), packed)
        return out if self.bias is None else out + self.bias.to(x.device)


class QuantizedStackedLinear(QuantizedWeight, StackedWeight):
    """A StackedLinear with quantized weights; only those of the chosen experts are read."""

    gather_limit = 2 * GATHER_LIMIT  # copies take half as much as in 16 bit, or less

    def __init__(self, stacked: StackedLinear, kind: str) -> None:
        super().__init__(stacked.values, kind)

    def serves(self, kind: type[Route], x: Tensor, pairs: int) -> bool:
        if kind is OneExpert:
            return True
        few = x.is_cuda and pairs <= self.gather_limit
        return kind is ExpertPerRow and few and all_on(x.device, self) and self.kernel_serves(x)

    def forward(self, x: Tensor, route: Route) -> Tensor:
        packed = self.prepare(x)
        if isinstance(route, OneExpert):
            values, scale = (p[route.expert].to(x.device) for p in (self.values, self.scale))
            return quantized_product(x, values, scale, packed)
        if isinstance(route, ExpertPerRow) and packed:
            return self._gathered(x, route.experts)
        raise TypeError(f"quantized experts cannot be multiplied by {type(route).__name__} here: check `serves` first")

    def _gathered(self, x: Tensor, experts: Tensor) -> Tensor:
        """Copy the weights of all rows' experts, and multiply by the kernel all rows with all of them."""
        each = len(experts) // len(x)
        parts = zip(x.split(KERNEL_ROWS), experts.split(KERNEL_ROWS * each), strict=True)
        return torch.cat([self._gathered_rows(rows, chosen) for rows, chosen in parts])

    def _gathered_rows(self, x: Tensor, experts: Tensor) -> Tensor:
        rows, pairs = len(x), len(experts)
        values = self.values.view(torch.int64)[experts].view(self.values.dtype)  # copied eight bytes at a time
        # of int4 (K/g, P, N, 2): the groups of columns come first in what the kernel takes
        scale = self.scale[experts] if values.dtype == torch.int8 else self.scale.transpose(0, 1)[:, experts]
        stacked = scale if values.dtype == torch.int8 else scale.flatten(1, 2)
        # the kernel takes as long for one row as for all of them: (R, P * N), or both halves of each
        found = kernel_product(x, values.flatten(0, 1), stacked).view(rows, rows, pairs // rows, -1)
        # each row with its own experts: (P, N)
        own = found.diagonal(dim1=0, dim2=1).permute(2, 0, 1).flatten(0, 1)
        return join_halves(own, scale) if values.dtype == torch.int8 else own


def quantize(model: UniVision, kind: str) -> None:
    """Replace the layers of a UniVision that are quantized by quantized ones; on the meta device, by room for them.

    Raises ValueError for a kind that is not one of FORMATS.
    """
    check_format(kind)
    for name, module in list(model.named_modules()):
        if name.startswith(QUANTIZED) and not KEPT.search(name):
            parent, _, attribute = name.rpartition(".")
            if isinstance(module, StackedLinear):
                setattr(model.get_submodule(parent), attribute, QuantizedStackedLinear(module, kind))
            elif isinstance(module, nn.Linear):
                setattr(model.get_submodule(parent), attribute, QuantizedLinear(module, kind))
    model.quantization = kind


def check_format(kind: str) -> None:
    """Raises ValueError for a kind that is not one of FORMATS."""
    if kind not in FORMATS:
        raise ValueError(f"quantization {kind!r} is unknown: give None or one of {', '.join(FORMATS)}")


def unpack_weights(model: nn.Module) -> None:
    """Bring all quantized weights of a model into the order in which they are stored."""
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.arrange(PLAIN)


@contextlib.contextmanager
def packed_state_dict() -> Iterator[None]:
    """Within it, `state_dict` copies nothing and gives packed values as they are, for callers that count bytes."""
    token = _keep_packed.set(True)
    try:
        yield
    finally:
        _keep_packed.reset(token)


_keep_packed: ContextVar[bool] = ContextVar("keep_packed", default=False)


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
