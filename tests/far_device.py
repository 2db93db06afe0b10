"""A device that is far away: tensors on it compute in host memory, with real values, but refuse to meet host memory.

They say that they are on a device that this machine may not have, and an operation that is given one of them and a
tensor in host memory fails, as on a GPU; only copies cross, and are counted. So mistakes about where a tensor is show
without a GPU. What this cannot show: a GPU's kernels, its speed, its streams and pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default)
SIZED = (aten.nonzero.default, aten.masked_select.default, aten.bincount.default)  # by what is in their input


class FarTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, near: Tensor, far: FarDevice) -> FarTensor:
        make = {"strides": near.stride(), "dtype": near.dtype, "device": far.device}
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, requires_grad=False, **make)

    def __init__(self, near: Tensor, far: FarDevice) -> None:
        self.near, self.far = near, far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        far = next(x.far for x in tree_leaves((args, kwargs)) if isinstance(x, FarTensor))
        return far.run(func, args, kwargs or {})

    def __getitem__(self, index: Any) -> Tensor:
        indices = index if isinstance(index, tuple) else (index,)
        # torch would make tensors of lists without asking the mode
        far = tuple(FarTensor(torch.tensor(i), self.far) if isinstance(i, list) else i for i in indices)
        return super().__getitem__(far if isinstance(index, tuple) else far[0])

    is_cuda = True  # so that the ways for a GPU are taken, whatever the device is called

    def tolist(self) -> list:
        self.far.waits += 1
        return self.near.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"FarTensor({self.near})"


class FarDevice(TorchDispatchMode):
    """While it is active the device exists: the one that torch calls "meta", which every build of torch knows.

    brought  shapes of the tensors that were copied to it
    waits    how often the host had to know what was computed there: a GPU would have had to finish first
    """

    device = torch.device("meta")

    def __init__(self) -> None:
        super().__init__()
        self.brought: list[tuple[int, ...]] = []
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        far = [isinstance(t, FarTensor) for t in tensors]
        place = kwargs.get("device")
        to_far = any(far) if place is None else torch.device(place).type == self.device.type
        if func is aten.copy_.default:
            to_far = far[0]
        copies = func in (aten.copy_.default, aten._to_copy.default)
        if copies and to_far and not far[-1]:
            self.brought.append(tuple(tensors[-1].shape))
        if func in (*READS, *SIZED) or (copies and any(far) and not to_far):
            self.waits += 1
        if not copies and any(far) and not all(f or t.ndim == 0 for f, t in zip(far, tensors, strict=True)):
            raise RuntimeError(f"{func}: tensors far and near: {[tuple(t.shape) for t in tensors]} {far}")

        near_args, near_kwargs = tree_map(lambda x: x.near if isinstance(x, FarTensor) else x, (args, kwargs))
        if place is not None:
            near_kwargs["device"] = torch.device("cpu")
        result = func(*near_args, **near_kwargs)
        if func in READS or not to_far:
            return result
        if func._schema.is_mutable and result is near_args[0]:
            return args[0]
        return tree_map(lambda x: FarTensor(x, self) if isinstance(x, Tensor) else x, result)


def near_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor, which makes a tensor where it is to be without asking the mode."""
    return lambda data, device=None, **more: make(data, **more).to(device or "cpu")


def outside(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A maker of tensors of a class of its own, such as a causal mask by its sizes, which no mode may see made."""

    def made(*args: Any) -> Tensor:
        with _disable_current_modes():
            return make(*args)

    return made


def bring(module: nn.Module, far: FarDevice) -> None:
    """All weights of a module to the device; torch's own `to` goes through `data`, which knows of no far tensors."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(parameter.to(far.device), requires_grad=False))
