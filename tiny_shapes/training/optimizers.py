"""Muon for the matrices inside the blocks, AdamW for everything else, one learning rate for both.

Muon replaces the momentum of a weight matrix by the nearest orthogonal matrix, so that every direction of the matrix
learns equally fast. torch.optim.Muon does so one matrix at a time and always in bfloat16; here all matrices of one
shape, stacked experts included, go through the iteration together, in float32 on a CPU (where bfloat16 is slow).
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz iteration with the steepest slope at zero (Keller Jordan, "Muon", 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """[K, m, n] -> the same with all singular values brought near 1 (between 0.5 and 1.5)."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)  # spectral norm at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Parameters are matrices [m, n] or stacks of them [K, m, n].

    The step is scaled to the size that AdamW's would have (0.2 * sqrt(max(m, n)), arXiv:2502.16982), so that both
    can share a learning rate.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            alike = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    alike[param.shape[-2:]].append(param)
            for shape, params in alike.items():
                updates = [self._nesterov(param, group["momentum"]).reshape(-1, *shape) for param in params]
                update = orthogonalise(torch.cat(updates))
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for param, part in zip(params, update.split([len(u) for u in updates]), strict=True):
                    param.add_(part.view_as(param), alpha=-scale)

    def _nesterov(self, param: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        average = state["momentum"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(average, momentum)


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon over the matrices of all blocks and layers, AdamW over the rest; parameters without gradient are left out.

    Routers stay with AdamW: their few rows are classes, not directions.
    """
    matrices, others = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            inner = any(part in name for part in ("blocks.", "layers.")) and "gate.weight" not in name
            (matrices if inner and param.ndim >= 2 else others).append(param)
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(progress: float, step: int, warmup: int, settle: float) -> float:
    """Factor on the learning rate: linear warm-up over `warmup` steps, level, then a cosine down to 2 %.

    `progress` is the share of the stage that is done, 0 to 1 (0 for a run without an end); the fall takes the last
    share `settle` of it.
    """
    rise = min(1.0, (step + 1) / warmup)
    fallen = max(0.0, (progress - 1 + settle) / settle)
    return min(rise, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fallen)))


class MovingAverage:
    """The exponential moving average of a module's trained weights; with decay 0 just the weights.

    It forgets faster while it is young: an average over the first random weights is of no use.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.trained = {name: param for name, param in module.named_parameters() if param.requires_grad}
        self.weights = {name: param.detach().clone() for name, param in self.trained.items()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        decay = min(self.decay, step / (step + 10))
        for name, average in self.weights.items():
            average.lerp_(self.trained[name], 1 - decay)

    def restore(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            self.weights[name].copy_(value)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the module has the averaged weights."""
        own = {name: self.trained[name].detach().clone() for name in self.weights}
        try:
            self._put(self.weights)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            self.trained[name].copy_(value)
