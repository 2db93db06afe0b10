"""Weight-only quantisation: int8 a row, int4 a group, for the language model and the flow head.

Drawing is bound by how many bytes of weights are read, so fewer bits are less time as well as less memory.

The linear layers of the language model (its output layer too) and of the flow head are quantised, and the experts in
their stacked weights. MingTok, embeddings, routers, norms and what is a thousandth of the head but touches the latent
or the time itself (`KEPT`) stay as they are. few_bits.py has the numbers and the products.

The int4 kernels want the values in an order of their own: a layer brings its weights into it, in place, when it first
runs, and back when they are saved or used elsewhere.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..experts import GATHER_LIMIT, Experts
from ..offload import all_on
from .kernels import (
    BLOCK,
    CHUNK,
    can_pack,
    group_of,
    joined,
    kernel_product,
    kernel_serves,
    packed_for_kernel,
    product,
    quantize_int4,
    quantize_int8,
    unpacked,
)

FORMATS = ("int8", "int4")
SCALE = "_scale"  # ends the names of the scales of quantised weights
QUANTIZED = ("language_model.", "flow_head.")
KEPT = re.compile(r"\.(gate|image_gate)$|\.time_embed\.|\.input_proj$|\.final_layer\.linear$")
LOST = "lost"  # an order that nothing can be computed in


class Quantized(nn.Module):
    """A module with quantised weights: the parameter `name` and its `name` + SCALE, for each name of `NAMES`."""

    NAMES: tuple[str, ...] = ()
    order = "plain"  # or the type of the device for whose int4 kernel the weights lie ready

    def _register(self, name: str, weight: Tensor, kind: str) -> None:
        """Room for a weight [.., N, K], on its device; filled from it unless it is on the meta device."""
        *stack, n, k = weight.shape
        group = group_of(n, k) if kind == "int4" else None
        shape, dtype = ((*stack, n, k // 2), torch.uint8) if group else ((*stack, n, k), torch.int8)
        scales = (*stack, k // group, n, 2) if group else (*stack, n)
        self.register_parameter(name, _frozen(torch.empty(shape, dtype=dtype, device=weight.device)))
        self.register_parameter(name + SCALE, _frozen(weight.new_empty(scales)))
        if not weight.is_meta:
            for index in itertools.product(*map(range, stack)):
                self.store(name, index, weight.detach()[index])

    @torch.no_grad()
    def store(self, name: str, index: tuple, weight: Tensor) -> None:
        """Quantise rows [n, K] into the place that `index` (experts, rows) says."""
        values, scale = getattr(self, name), getattr(self, name + SCALE)
        if values.dtype == torch.int8:
            values[index], scale[index] = quantize_int8(weight)
            return
        group = weight.shape[1] // scale.shape[-3]
        experts, rows = index[: values.ndim - 2], index[values.ndim - 2 :]
        values[index], scale[(*experts, slice(None), *rows)] = quantize_int4(weight, group)

    @torch.no_grad()
    def arrange(self, order: str) -> None:
        """Bring the weights into another order, in place."""
        if order == self.order:
            return
        if self.order == LOST:
            raise RuntimeError("an error stopped the weights half-way between two orders: load the model again")
        before, self.order = self.order, LOST
        for name in self.NAMES:
            values = getattr(self, name)
            for piece in values.data.view(-1, *values.shape[-2:]):
                for rows in piece.split(max(BLOCK, CHUNK // piece.shape[1] // BLOCK * BLOCK)):
                    plain = rows if before == "plain" else unpacked(rows, before)
                    rows.copy_(plain if order == "plain" else packed_for_kernel(plain))
        self.order = order

    def ready(self, x: Tensor) -> bool:
        """Arrange the weights for a product with x; True: they are in the order of its device's int4 kernel."""
        packed = self.served(x)
        self.arrange(x.device.type if packed else "plain")
        return packed

    def served(self, x: Tensor) -> bool:
        """Whether the int4 kernel of its device can multiply x with all the weights.

        Once they are in its order they may rest elsewhere, and are copied.
        """
        every = [getattr(self, name) for name in self.NAMES]
        scale = getattr(self, self.NAMES[0] + SCALE)
        kinds = {"int4" if values.dtype == torch.uint8 else "int8 halves" for values in every}
        if not all(kernel_serves(kind, x, scale) for kind in kinds):
            return False
        return self.order == x.device.type or all(can_pack(values, x.device) for values in every)


class QuantizedLinear(Quantized):
    """x W^T + b."""

    NAMES = ("weight",)

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self._register("weight", linear.weight, kind)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        packed = self.ready(x)
        out = product(x, self.weight.to(x.device), self.weight_scale.to(x.device), packed)
        return out if self.bias is None else out + self.bias.to(x.device)


class QuantizedExperts(Quantized, Experts):
    """Experts whose stacked weights are quantised; only those of the chosen ones are read."""

    NAMES = ("gate_up", "down")
    gather_limit = 2 * GATHER_LIMIT  # copies take half as much as in 16 bit, or less

    def __init__(self, experts: Experts, kind: str) -> None:
        nn.Module.__init__(self)
        self.count = experts.count
        for name in self.NAMES:
            self._register(name, getattr(experts, name), kind)

    def _way(self, x: Tensor, pairs: int) -> Callable[[Tensor, Tensor], Tensor]:
        if x.is_cuda and pairs <= self.gather_limit and all_on(x.device, self) and self.served(x):
            return self._gathered
        return self._sorted

    def _gathered(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Copies the chosen experts in their few bits, and reads each in a product of its own; never waits."""
        self.arrange(x.device.type)
        experts = chosen.flatten()
        gate, up = self._products("gate_up", experts, x.repeat_interleave(chosen.shape[1], 0)).chunk(2, dim=-1)
        return self._products("down", experts, F.silu(gate) * up).unflatten(0, chosen.shape)

    def _products(self, name: str, experts: Tensor, x: Tensor) -> Tensor:
        """Row by row, x [P, K] through experts [P] -> [P, N]."""
        whole, scale = getattr(self, name), getattr(self, name + SCALE)[experts]
        values = whole.view(torch.int64)[experts].view(whole.dtype)  # copied eight bytes at a time
        rows = torch.cat([kernel_product(*of_one) for of_one in zip(x[:, None], values, scale, strict=True)])
        return joined(rows, scale) if values.dtype == torch.int8 else rows

    def apply_expert(self, expert: int, x: Tensor) -> Tensor:
        packed = self.ready(x)
        gate, up = self._product("gate_up", expert, x, packed).chunk(2, dim=-1)
        return self._product("down", expert, F.silu(gate) * up, packed)

    def _product(self, name: str, expert: int, x: Tensor, packed: bool) -> Tensor:
        values, scale = (getattr(self, n)[expert].to(x.device) for n in (name, name + SCALE))
        return product(x, values, scale, packed)


def quantize(model: nn.Module, kind: str) -> None:
    """Replace the layers of a UniVision that are quantised by their quantised selves; on the meta device, by room
    for them. Raises ValueError for a kind that is not one of FORMATS."""
    if kind not in FORMATS:
        raise ValueError(f"quantization {kind!r} is unknown: give None or one of {', '.join(FORMATS)}")
    for name, module in list(model.named_modules()):
        if name.startswith(QUANTIZED) and not KEPT.search(name):
            parent, _, attribute = name.rpartition(".")
            if isinstance(module, Experts):
                setattr(model.get_submodule(parent), attribute, QuantizedExperts(module, kind))
            elif isinstance(module, nn.Linear):
                setattr(model.get_submodule(parent), attribute, QuantizedLinear(module, kind))
    model.quantization = kind


def arrange_plainly(model: nn.Module) -> None:
    """Bring all quantised weights into the order in which they are stored."""
    for module in model.modules():
        if isinstance(module, Quantized):
            module.arrange("plain")


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
