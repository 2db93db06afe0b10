"""Optimization: Muon and AdamW, their learning rate, and the moving average of the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

_Tensors = tuple[Tensor, ...] | list[Tensor]

# Quintic Newton-Schulz iteration with the steepest slope at zero (Keller Jordan, "Muon", 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(matrices: Tensor, bf16: bool = False) -> Tensor:
    """[K, m, n] -> the same with all singular values brought near 1 (between 0.5 and 1.5)."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if bf16 or matrices.is_cuda else matrices.float()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)  # spectral norm at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, so that every direction of a weight matrix learns equally fast.

    Parameters are matrices [m, n] or stacks of them [K, m, n]. A step is scaled to the size that AdamW's would have
    (0.2 * sqrt(max(m, n)), arXiv:2502.16982), so that both can share a learning rate.

    torch.optim.Muon is no substitute: it takes no stacks of matrices, which the weights of the experts are, and always
    computes in bfloat16, one matrix at a time. Here all matrices of one shape are orthogonalized together, and on a
    CPU in float32 unless bf16 is set: not every CPU is fast in bfloat16.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, bf16: bool = False) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.bf16 = bf16

    @torch.no_grad()
    def step(self, closure=None):  # without types, as those of torch are
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape[-2:]].append(param)
            for shape, params in by_shape.items():
                updates = [self._nesterov(param, group["momentum"]).reshape(-1, *shape) for param in params]
                update = orthogonalize(torch.cat(updates), self.bf16)
                scale = group["lr"] * 0.2 * math.sqrt(max(shape))
                for param, part in zip(params, update.split([len(u) for u in updates]), strict=True):
                    param.add_(part.view_as(param), alpha=-scale)

    def _nesterov(self, param: nn.Parameter, momentum: float) -> Tensor:
        assert param.grad is not None
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        average = state["momentum"].lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(average, momentum)


def make_optimizers(model: nn.Module, lr: float, bf16: bool = False) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of all blocks and layers, AdamW for the rest; frozen parameters are left out.

    Routers stay with AdamW: their few rows are classes, not directions.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        if param.requires_grad:
            inner = any(part in name for part in ("blocks.", "layers.")) and "gate.weight" not in name
            (matrices if inner and param.ndim >= 2 else others).append(param)
    return [Muon(matrices, lr=lr, bf16=bf16), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def make_schedulers(
    optimizers: Iterable[torch.optim.Optimizer], lr: float, factor: Callable[[int], float], step: int = 0
) -> list[LambdaLR]:
    """Schedulers that set the learning rate to `lr` times the factor of the step, from this step on."""
    schedulers = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = lr  # a checkpoint of before may have another one
        schedulers.append(LambdaLR(optimizer, factor, last_epoch=step - 1))
    return schedulers


def make_average(module: nn.Module, decay: float) -> AveragedModel:
    """The exponential moving average of a module's weights; with decay 0 just the weights.

    It forgets faster while it is young, because an average with the first random weights is of no use.
    """

    def update(averaged: _Tensors, current: _Tensors, updates: Tensor | int) -> None:
        step = int(updates) + 1
        torch._foreach_lerp_(averaged, current, 1 - min(decay, step / (step + 10)))

    return AveragedModel(module, multi_avg_fn=update)
