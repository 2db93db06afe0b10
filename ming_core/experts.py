"""The mixture of experts: two routers, one set of experts, one shared expert that every token passes.

Text and everything that is drawn is routed by `gate`; the patches of an image that was looked at, by `image_gate`.

Weights of every kind have one way in, their call: `layer(x)`, and `layer(x, route)` where the layers of all experts
are stacked in one weight and the route says which rows go to which expert. A quantized layer (quantization/) takes the
place of a plain one without anybody else noticing. `dispatch` chooses the route, and with it whether the host waits for
the device.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LanguageModelConfig
from .offload import all_on, is_out_of_memory, needs_gradient

log = logging.getLogger(__name__)

GATHER_LIMIT = 64  # (token, expert) pairs up to which a GPU copies the experts' weights rather than sorting tokens


class GatedMlp(nn.Module):
    """The gated feed-forward layer down(silu(gate(x)) * up(x)): the shared expert, and layers without experts."""

    def __init__(
        self, dim: int, hidden: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        make = {"bias": False, "device": device, "dtype": dtype}  # no linear layer of this model has biases
        self.gate_proj = operations.Linear(dim, hidden, **make)
        self.up_proj = operations.Linear(dim, hidden, **make)
        self.down_proj = operations.Linear(hidden, dim, **make)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class OneExpert(NamedTuple):
    """A route on which all rows go through one expert."""

    expert: int  # on the host, which is why this route synchronizes


class ExpertPerRow(NamedTuple):
    """A route on which each of R rows goes through P / R experts of its own, [R, K] -> [P, N]."""

    experts: Tensor  # int64 [P], those of the first row first


class SortedRows(NamedTuple):
    """A route for rows that are sorted by expert: those of expert e end before row ends[e]."""

    ends: Tensor  # int32 [E]


Route = OneExpert | ExpertPerRow | SortedRows


class StackedWeight(nn.Module):
    """One linear layer of all E experts in a single weight; called with rows and their route.

    A host may leave it offloaded from the device that computes: then the weights of the routed experts are copied, one
    expert after the other.
    """

    gather_limit = GATHER_LIMIT

    def serves(self, kind: type[Route], x: Tensor, pairs: int) -> bool:
        """Whether `pairs` rows like x can be multiplied by this kind of route; by OneExpert they always can."""
        raise NotImplementedError

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """Multiply every row of x by the weights of its expert, [P, K] -> [P, N]; of its experts, if it has several."""
        raise NotImplementedError


class StackedLinear(StackedWeight):
    """Weights of all experts as they are, [E, N, K]."""

    def __init__(
        self,
        count: int,
        in_features: int,
        out_features: int,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # over all layers these are 15.5 B of the model's 18.8 B values: 31.0 GB in bf16
        self.values = nn.Parameter(torch.empty(count, out_features, in_features, device=device, dtype=dtype))

    def serves(self, kind: type[Route], x: Tensor, pairs: int) -> bool:
        if kind is OneExpert:
            return True
        fast = grouped_product_serves(x) if kind is SortedRows else x.is_cuda and pairs <= self.gather_limit
        # both other kinds read the weights where they are; offloaded ones have to be fetched, expert by expert
        return fast and all_on(x.device, self)

    def forward(self, x: Tensor, route: Route) -> Tensor:
        if isinstance(route, OneExpert):
            # indexed before the copy: 12 MB of bf16 (gate and up) or 6 MB (down) cross the bus, not those of 64 experts
            return F.linear(x, self.values[route.expert].to(x.device, x.dtype, non_blocking=True))
        if isinstance(route, ExpertPerRow):
            # the index copies an [N, K] matrix for each pair, on the device: cheap for few of them only
            weights = self.values[route.experts].to(x.dtype).view(len(x), -1, x.shape[-1])  # (R, P / R * N, K)
            return torch.bmm(weights, x[..., None]).view(len(route.experts), -1)
        return grouped_product(x, self.values.mT.to(x.dtype), route.ends)  # mT is a view, (E, K, N)


def dispatch(weights: Iterable[StackedWeight], x: Tensor, pairs: int) -> type[Route]:
    """The kind of route that is the fastest for `pairs` pairs of a row of x and an expert.

    SortedRows    one product of all experts, on GPUs that have a kernel for it
    ExpertPerRow  for few pairs on any GPU: the experts' weights are copied for each
    OneExpert     one product per expert that has any rows. The only one that synchronizes with the device, since the
                  host has to know which experts those are
    """
    for kind in (SortedRows, ExpertPerRow):
        if all(weight.serves(kind, x, pairs) for weight in weights):  # they share one route
            return kind
    return OneExpert


class Experts(nn.Module):
    """E gated feed-forward layers, down(silu(gate(x)) * up(x)), in two stacked weights.

    gate_up  [E, 2 * I, H]: rows of gate_proj, then rows of up_proj
    down     [E, H, I]
    """

    def __init__(self, count: int, dim: int, hidden: int, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.count = count
        # stacked, where the checkpoint has 3 * 64 tensors a layer: so one kernel can serve all experts, and gate and up
        # read their input once
        self.gate_up: StackedWeight = StackedLinear(count, dim, 2 * hidden, device=device, dtype=dtype)
        self.down: StackedWeight = StackedLinear(count, hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum over the chosen experts.

        x [T, H]; chosen int64 [T, k]; weights float32 [T, k]. Returns [T, H]; summed in float32.
        """
        outputs = self.outputs(x, chosen, self.dispatch(x, chosen.numel()))  # (T, k, H)
        # as published: the outputs become float32 one by one, by the weights' dtype, and only their sum is cast back
        return (outputs * weights[..., None]).sum(1).to(x.dtype)

    def dispatch(self, x: Tensor, pairs: int) -> type[Route]:
        """The kind of route for so many pairs of a token and an expert."""
        return dispatch((self.gate_up, self.down), x, pairs)

    def synchronizes(self, x: Tensor, pairs: int) -> bool:
        """Whether a forward pass of so many pairs of a token and an expert synchronizes with the device."""
        return self.dispatch(x, pairs) is OneExpert

    def outputs(self, x: Tensor, chosen: Tensor, kind: type[Route]) -> Tensor:
        """Every token of x [T, H] through each of its chosen experts [T, k], by a kind of route -> [T, k, H]."""
        experts = chosen.flatten()
        if kind is ExpertPerRow:
            # in order: nothing to restore
            return self._multiply(x, ExpertPerRow(experts)).unflatten(0, chosen.shape)
        order = experts.argsort(stable=True)  # pairs of one expert stand together
        restored = torch.empty_like(order)  # the inverse permutation
        restored[order] = torch.arange(len(order), device=order.device)
        rows = x[order // chosen.shape[1]]  # (T * k, H): pair p belongs to token p // k
        if kind is SortedRows:
            ids = torch.arange(self.count, device=x.device)
            # (E,), by binary search: bincount would make the host wait for the device
            ends = torch.searchsorted(experts[order], ids, right=True, out_int32=True)
            out = self._multiply(rows, SortedRows(ends))
        else:
            # here the host waits; minlength, since the last experts may have no rows
            groups = rows.split(torch.bincount(experts, minlength=self.count).tolist())
            # an expert without rows is skipped, and its weights never read: one token reads 6 of 64
            out = torch.cat([self._multiply(group, OneExpert(e)) for e, group in enumerate(groups) if len(group)])
        return out[restored].unflatten(0, chosen.shape)  # (T, k, H), in the order of x

    def _multiply(self, x: Tensor, route: Route) -> Tensor:
        """Rows x through their experts, one a row or several -> [P, H]."""
        gate, up = self.gate_up(x, route).chunk(2, dim=-1)  # (P, I) each
        return self.down(F.silu(gate) * up, route)

    def gathered_bytes(self, pairs: int) -> int:
        """The most that a GPU copies of the experts' weights for up to so many pairs."""
        # three matrices of 2048 * 1408 values, 17 MB in bf16
        per_expert = sum(p.nbytes for p in self.parameters()) // self.count
        # bounded, at 1.1 GB in bf16: for more pairs `dispatch` takes another route
        return min(self.gate_up.gather_limit, pairs) * per_expert


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Rows x [P, K] by weights [E, K, N] -> [P, N]: those up to ends[e], and after ends[e - 1], by weights[e]."""
    # older releases of torch have it only under the private name
    run = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return run(x, weights, offs=ends)


def grouped_product_serves(x: Tensor) -> bool:
    """Whether torch has a grouped product for x that does not synchronize with the device."""
    # for other dtypes torch has no such kernel, or a loop that synchronizes
    return x.is_cuda and x.dtype == torch.bfloat16 and not needs_gradient(x) and _grouped_product_works(x.device)


@functools.cache
def _grouped_product_works(device: torch.device) -> bool:
    """Whether torch's grouped product is a kernel here that gives the right numbers; tried once on a small product.

    It is on Hopper and data centre Blackwell (compute capability 9 and 10). Elsewhere, and with ROCm, it is a loop that
    synchronizes.
    """
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False
    # a generator of its own leaves the global random state as it was
    generator = torch.Generator().manual_seed(0)
    x, weights = (
        torch.randn(s, generator=generator, device="cpu").to(device, torch.bfloat16) for s in ((5, 64), (3, 32, 64))
    )
    ends = torch.tensor([2, 2, 5], dtype=torch.int32, device=device)  # an expert without rows is common
    try:
        found = grouped_product(x, weights.mT, ends)
    except (AttributeError, RuntimeError) as error:  # no such function, or no kernel in this build
        if is_out_of_memory(error):
            raise
        log.info("no grouped product on %s (%s)", device, error)
        return False
    expected = torch.cat([x[:2] @ weights[0].T, x[2:] @ weights[2].T])
    # sums of 64 products are about 8 in size, where bf16 rounds by up to 0.03
    return torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.1)


class MixtureOfExperts(nn.Module):
    """The experts with their two routers, plus the shared expert, which every token passes with weight 1."""

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, hidden = config.hidden_size, config.moe_intermediate_size
        make = {"device": device, "dtype": dtype}
        self.top_k = config.num_experts_per_tok  # published: 6 of 64
        # one router for text and drawn images, one for images that were looked at; the experts are the same
        # a third one in the checkpoint, audio_gate, is never used and so not loaded
        self.gate = operations.Linear(dim, config.num_experts, bias=False, **make)
        self.image_gate = operations.Linear(dim, config.num_experts, bias=False, **make)
        self.experts = Experts(config.num_experts, dim, hidden, **make)
        # two shared experts are published as one that is twice as wide, 2 * 1408
        self.shared_experts = GatedMlp(dim, config.num_shared_experts * hidden, operations=operations, **make)

    def forward(self, x: Tensor, image_gate: Tensor | None = None) -> Tensor:
        """The layer's output for x [..., H]. image_gate bool [...]: tokens for the image router; None: no token."""
        flat = x.reshape(-1, x.shape[-1])  # (T, H): routing is by token, whatever the rows
        chosen, weights = self.route(flat, None if image_gate is None else image_gate.reshape(-1))
        return self.experts(flat, chosen, weights).view_as(x) + self.shared_experts(x)

    def route(self, x: Tensor, image_gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The experts of x [T, H], int64 [T, k], best first, and their weights float32 [T, k], which sum to 1."""
        best, chosen = self.logits(x, image_gate).topk(self.top_k, dim=-1)
        # published as the best of all probabilities, divided by their sum: what their common divisor is, cancels out
        return chosen, best.softmax(-1, dtype=torch.float32)

    def scores(self, x: Tensor, image_gate: Tensor | None = None) -> Tensor:
        """Probability of every expert, float32 [T, E]."""
        return self.logits(x, image_gate).float().softmax(-1)

    def logits(self, x: Tensor, image_gate: Tensor | None = None) -> Tensor:
        """What the router says of every expert, [T, E]."""
        logits = self.gate(x)
        if image_gate is not None:
            # both routers for every token: 64 columns cost little, picking tokens out would synchronize. Drawn tokens
            # are not among these: by the image router, latents of the reference cases are off by 0.7 to 1.0
            logits = torch.where(image_gate[:, None], self.image_gate(x), logits)
        return logits
