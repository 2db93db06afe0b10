"""Low-rank branches beside the linear layers of a network: what a LoRA is while the model runs.

The weights stay as they are. A branch adds up(down(x)) to the output of its layer, so it goes with weights of every
precision, quantized or offloaded, and one set of weights serves any number of LoRAs. Branches are put in place for the
time of a call, by the thread that holds the model's lock, and taken away however the call ends.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .experts import ExpertPerRow, OneExpert, Route, StackedWeight
from .offload import NonfiniteError, OffloadableModule


class LowRank(NamedTuple):
    """A change of one linear layer's weights [N, K] by scale * up @ down; of stacked experts, of each expert's.

    down   [r, K], or [E, r, K] for E stacked experts
    up     [N, r], or [E, N, r]
    scale  alpha / r
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA for one kind of model.

    layers  by the names of the network's modules
    digest  identifies its content, whatever file it came from
    """

    name: str
    layers: Mapping[str, LowRank] = field(repr=False)
    digest: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", self.digest or _digest(self.layers))


@torch.no_grad()
def _digest(layers: Mapping[str, LowRank]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(layers):
        down, up, scale = layers[name]
        digest.update(f"{name} {tuple(down.shape)} {tuple(up.shape)} {down.dtype} {up.dtype} {scale!r}".encode())
        for tensor in (down, up):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


class Adapters:
    """The LoRAs of an engine with their strengths; without any, the model itself.

    Sums are made in an order that does not depend on the order in which LoRAs were added, so that order has no effect.
    """

    def __init__(self, strengths: Mapping[Lora, float] | None = None) -> None:
        given = strengths or {}
        self.strengths = {lora: given[lora] for lora in sorted(given, key=lambda lora: lora.digest)}
        self._joined: dict[torch.dtype, dict[str, LowRank]] = {}

    def added(self, lora: Lora, strength: float) -> Adapters:
        """These and one more. The same LoRA twice counts with the sum; one of strength 0 is left out."""
        if not math.isfinite(strength):
            raise ValueError(f"the strength of a LoRA is {strength}: it must be a number, 1.0 as it was trained")
        strengths = dict(self.strengths)
        same = next((known for known in strengths if known.digest == lora.digest), lora)
        strengths[same] = strengths.get(same, 0.0) + strength
        return Adapters({each: total for each, total in strengths.items() if total != 0})

    @property
    def key(self) -> bytes:
        """Identifies what these do to the weights; keys of the prefix cache contain it."""
        return b"".join(lora.digest + repr(strength).encode() for lora, strength in self.strengths.items())

    def bytes(self, dtype: torch.dtype) -> int:
        """Memory that the branches take where they compute."""
        layers = [layer for lora in self.strengths for layer in lora.layers.values()]
        return sum(layer.down.numel() + layer.up.numel() for layer in layers) * dtype.itemsize

    def joined(self, dtype: torch.dtype) -> dict[str, LowRank]:
        """The branches of all LoRAs, one a layer: ranks side by side, scales and strengths multiplied into `up`."""
        if dtype not in self._joined:
            self._joined[dtype] = _join(self.strengths, dtype)
        return self._joined[dtype]

    @contextlib.contextmanager
    def applied_to(self, network: OffloadableModule) -> Iterator[None]:
        """Compute with these and no other LoRAs. The branches are brought to the device, and freed at the end."""
        layers = self.joined(network.dtype)
        here = {name: LowRank(down.to(network.device), up.to(network.device)) for name, (down, up, _) in layers.items()}
        with branches(network, here):
            yield

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Name these as the first suspects where the model computes NaN or infinite values: nobody need download it."""
        try:
            yield
        except NonfiniteError as error:
            if not self.strengths:
                raise
            names = " and ".join(lora.name for lora in self.strengths)
            remedy = f"lower the strength of the LoRA {names}, or leave it out; if that does not help, {error.remedy}"
            raise NonfiniteError(error.dtype, remedy) from None


@torch.inference_mode(False)  # kept for later calls, which need not run under inference mode
@torch.no_grad()
def _join(strengths: Mapping[Lora, float], dtype: torch.dtype) -> dict[str, LowRank]:
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for lora, strength in strengths.items():
        for name, (down, up, scale) in lora.layers.items():
            # multiplied in float32: rounded once
            part = down.to(dtype), (up.float() * (scale * strength)).to(dtype)
            parts.setdefault(name, []).append(part)
    return {
        name: LowRank(torch.cat([down for down, _ in of_layer], dim=-2), torch.cat([up for _, up in of_layer], dim=-1))
        for name, of_layer in parts.items()
    }


class Adapted(Protocol):
    @property
    def adapters(self) -> Adapters: ...
    @property
    def network(self) -> OffloadableModule: ...


Owner = TypeVar("Owner", bound=Adapted)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def adapted(method: Callable[Concatenate[Owner, Arguments], Result]) -> Callable[Concatenate[Owner, Arguments], Result]:
    """A method that computes with its owner's adapters. It must hold the model's lock: the network is shared."""

    @functools.wraps(method)
    def with_adapters(owner: Owner, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with owner.adapters.applied_to(owner.network), owner.adapters.named_in_errors():
            return method(owner, *args, **kwargs)

    return with_adapters


@contextlib.contextmanager
def branches(network: nn.Module, layers: Mapping[str, LowRank]) -> Iterator[None]:
    """Add these branches, and no others, to the layers of a network with these names.

    Their tensors may require gradients, and get them. Within it other branches may take their place for a while.
    """
    outer, inner = _in_place.get(network), _Branches(network, layers)
    if outer:
        outer.take_away()
    try:
        _in_place[network] = inner
        inner.put()
        yield
    finally:
        inner.take_away()
        if outer:
            _in_place[network] = outer
            outer.put()
        else:
            _in_place.pop(network, None)


class _Branches:
    """Forward hooks that add branches to the outputs of layers."""

    def __init__(self, network: nn.Module, layers: Mapping[str, LowRank]) -> None:
        self.modules = {name: network.get_submodule(name) for name in layers}
        self.layers, self.handles = layers, list[RemovableHandle]()

    def put(self) -> None:
        for name, module in self.modules.items():
            branch = _stacked_branch if isinstance(module, StackedWeight) else _linear_branch
            self.handles.append(module.register_forward_hook(functools.partial(branch, self.layers[name])))

    def take_away(self) -> None:
        while self.handles:
            self.handles[-1].remove()
            self.handles.pop()


_in_place: weakref.WeakKeyDictionary[nn.Module, _Branches] = weakref.WeakKeyDictionary()


def _linear_branch(layer: LowRank, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    (x,) = args
    return torch.add(out, F.linear(F.linear(x, layer.down.to(x.dtype)), layer.up.to(x.dtype)), alpha=layer.scale)


def _stacked_branch(layer: LowRank, module: nn.Module, args: tuple[Tensor, Route], out: Tensor) -> Tensor:
    x, route = args
    product = _stacked_product(x, route, layer.down.to(x.dtype), layer.up.to(x.dtype))
    return torch.add(out, product, alpha=layer.scale)


def _stacked_product(x: Tensor, route: Route, down: Tensor, up: Tensor) -> Tensor:
    """Rows of x through the branches of their experts -> [P, N], as `StackedWeight.forward` multiplies them.

    It waits for the device on no route that does not wait already.
    """
    if isinstance(route, OneExpert):
        return F.linear(F.linear(x, down[route.expert]), up[route.expert])
    if isinstance(route, ExpertPerRow):  # few pairs: each copies its branch
        downs = down[route.experts].view(len(x), -1, x.shape[-1])  # (R, P / R * r, K): those of a row read it together
        hidden = torch.bmm(downs, x[..., None]).view(len(route.experts), -1, 1)  # (P, r, 1)
        return torch.bmm(up[route.experts], hidden)[..., 0]
    # many rows through the branches of all experts at once, which are as narrow together as one layer is wide
    hidden = F.linear(x, down.flatten(0, 1)).unflatten(1, down.shape[:2])  # (P, E, r)
    row, expert = torch.arange(len(x), device=x.device), torch.arange(len(down), device=x.device)
    own = torch.searchsorted(route.ends, row, right=True)[:, None] == expert  # (P, E)
    return (hidden * own[..., None]).flatten(1) @ up.transpose(1, 2).flatten(0, 1)  # (P, E * r) by (E * r, N)
