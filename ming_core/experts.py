"""The mixture of experts: two routers, one set of experts, one always-on shared expert.

Text and everything that is drawn is routed by `gate`; the patches of a picture that was looked at by `image_gate`.
All experts of a layer are one module with stacked weights, so that they can be read, moved and multiplied as one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LanguageModelConfig
from .offload import all_on, needs_gradient

log = logging.getLogger(__name__)

GATHER_LIMIT = 64  # (token, expert) pairs up to which a GPU copies the experts' weights rather than sorting tokens


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)): the shared expert, and the layers without experts."""

    def __init__(
        self, dim: int, hidden: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        make = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = operations.Linear(dim, hidden, **make)
        self.up_proj = operations.Linear(dim, hidden, **make)
        self.down_proj = operations.Linear(hidden, dim, **make)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """E gated feed-forward layers in two stacked weights.

    gate_up  [E, 2 * I, H]: rows of gate_proj, then rows of up_proj
    down     [E, H, I]

    They may rest on another device than the one that is computed on: then those of the routed experts are copied, one
    after the other.
    """

    fetches_weights = True  # a host may leave them where they rest
    gather_limit = GATHER_LIMIT

    def __init__(self, count: int, dim: int, hidden: int, *, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.count = count
        self.gate_up = nn.Parameter(torch.empty(count, 2 * hidden, dim, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(count, dim, hidden, device=device, dtype=dtype))

    def weights(self, name: str, experts: Any, like: Tensor) -> Tensor:
        """Weights `name` of one expert, [N, K], or of an index of several, [.., N, K], on the device of `like`."""
        return getattr(self, name)[experts].to(like.device, like.dtype, non_blocking=True)

    def apply_expert(self, expert: int, x: Tensor) -> Tensor:
        """x [n, H] through one expert -> [n, H]."""
        gate, up = F.linear(x, self.weights("gate_up", expert, x)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.weights("down", expert, x))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum over the chosen experts.

        x [T, H]; chosen int64 [T, k]; weights float32 [T, k]. Returns [T, H]; summed in float32.
        """
        return (self.outputs(x, chosen).float() * weights[..., None]).sum(1).to(x.dtype)

    def outputs(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [T, H] through each of its chosen experts [T, k] -> [T, k, H]."""
        return self._way(x, chosen.numel())(x, chosen)

    def synchronizes(self, x: Tensor, pairs: int) -> bool:
        """Whether products of so many pairs of a token and an expert synchronize with the device."""
        return self._way(x, pairs) == self._sorted

    def gathered_bytes(self, pairs: int) -> int:
        """The most that a GPU copies for up to so many pairs."""
        return min(self.gather_limit, pairs) * sum(p.nbytes for p in self.parameters()) // self.count

    def _way(self, x: Tensor, pairs: int) -> Callable[[Tensor, Tensor], Tensor]:
        if all_on(x.device, self):
            if grouped_product_serves(x):
                return self._grouped
            if x.is_cuda and pairs <= self.gather_limit:
                return self._gathered
        return self._sorted

    def _gathered(self, x: Tensor, chosen: Tensor) -> Tensor:
        """For few tokens on a GPU: copies the chosen weights, and never waits for the device. -> [T, k, H]."""
        gate_up, down = (self.weights(name, chosen, x) for name in ("gate_up", "down"))  # (T, k, 2I, H), (T, k, H, I)
        gate, up = torch.einsum("tkih,th->tki", gate_up, x).chunk(2, dim=-1)
        return torch.einsum("tkhi,tki->tkh", down, F.silu(gate) * up)

    def _grouped(self, x: Tensor, chosen: Tensor) -> Tensor:
        """For GPUs: tokens sorted by expert, all experts in one product that never waits for the device."""
        order, restored = _by_expert(chosen)
        ends = torch.searchsorted(
            chosen.flatten()[order], torch.arange(self.count, device=x.device), right=True, out_int32=True
        )
        gate_up, down = (self.weights(name, slice(None), x).mT for name in ("gate_up", "down"))
        gate, up = grouped_product(x[order // chosen.shape[1]], gate_up, ends).chunk(2, dim=-1)
        return grouped_product(F.silu(gate) * up, down, ends)[restored].unflatten(0, chosen.shape)

    def _sorted(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Tokens sorted by expert, one product an expert that has any; a GPU is waited for. -> [T, k, H]."""
        order, restored = _by_expert(chosen)
        counts = torch.bincount(chosen.flatten(), minlength=self.count).tolist()
        groups = x[order // chosen.shape[1]].split(counts)
        out = [self.apply_expert(expert, group) for expert, group in enumerate(groups) if len(group)]
        return torch.cat(out)[restored].unflatten(0, chosen.shape)


def _by_expert(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [T, k] -> the order that sorts the T * k pairs by expert, and the one that brings them back."""
    order = chosen.flatten().argsort(stable=True)
    restored = torch.empty_like(order)
    restored[order] = torch.arange(len(order), device=order.device)
    return order, restored


def grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x [P, K], whose rows up to ends[e] belong to weights [E, K, N][e] and to no earlier ones -> [P, N]."""
    run = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return run(x, weights, offs=ends)


def grouped_product_serves(x: Tensor) -> bool:
    """Whether torch has a grouped product for x that does not synchronize with the device."""
    return x.is_cuda and x.dtype == torch.bfloat16 and not needs_gradient(x) and _grouped_product_works(x.device)


@functools.cache
def _grouped_product_works(device: torch.device) -> bool:
    """torch has a kernel for Hopper and for data centre Blackwell (compute capability 9 and 10), elsewhere, with ROCm
    too, a loop that waits. Tried once on a small product."""
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(s, generator=generator).to(device, torch.bfloat16) for s in ((5, 64), (3, 32, 64)))
    ends = torch.tensor([2, 2, 5], dtype=torch.int32, device=device)
    try:
        found = grouped_product(x, weights.mT, ends)
    except (AttributeError, RuntimeError) as error:
        log.info("no grouped product on %s (%s)", device, error)
        return False
    expected = torch.cat([x[:2] @ weights[0].T, x[2:] @ weights[2].T])
    return torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.1)


class MixtureOfExperts(nn.Module):
    """Experts with their two routers, plus the shared expert, which every token passes with weight 1."""

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
        self.top_k = config.num_experts_per_tok
        self.gate = operations.Linear(dim, config.num_experts, bias=False, **make)
        self.image_gate = operations.Linear(dim, config.num_experts, bias=False, **make)
        self.experts = Experts(config.num_experts, dim, hidden, **make)
        self.shared_experts = GatedMlp(dim, config.num_shared_experts * hidden, operations=operations, **make)

    def forward(self, x: Tensor, image_gate: Tensor | None = None) -> Tensor:
        """x [..., H]; image_gate bool [...]: tokens that the image router routes (None: no token)."""
        flat = x.reshape(-1, x.shape[-1])
        chosen, weights = self.route(flat, None if image_gate is None else image_gate.reshape(-1))
        return self.experts(flat, chosen, weights).view_as(x) + self.shared_experts(x)

    def route(self, x: Tensor, image_gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, H] -> experts int64 [T, k], best first, and their weights float32 [T, k], summing to 1."""
        scores = self.scores(x, image_gate)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        return chosen, weights / weights.sum(-1, keepdim=True)

    def scores(self, x: Tensor, image_gate: Tensor | None = None) -> Tensor:
        """Probability of every expert, float32 [T, E]."""
        logits = self.gate(x)
        if image_gate is not None:
            logits = torch.where(image_gate[:, None], self.image_gate(x), logits)
        return logits.float().softmax(-1)
