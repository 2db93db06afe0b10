"""Compute device and dtype of models whose weights may be offloaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OffloadableModule(nn.Module):
    """A model that may compute on another device than the one that holds its weights.

    It computes where its weights are, unless a host that copies them when they are needed names a device: `compute_on`.
    """

    compute_device: torch.device | None = None

    def compute_on(self, device: torch.device) -> None:
        """Move inputs of this model and its parts to `device`, wherever their weights are."""
        for module in self.modules():
            if isinstance(module, OffloadableModule):
                module.compute_device = device

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.reference_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.reference_weight.dtype

    @property
    def reference_weight(self) -> Tensor:
        """A weight that is always on hand, in the dtype that the model computes in."""
        raise NotImplementedError


def all_on(device: torch.device, *modules: nn.Module) -> bool:
    """Whether all weights of the modules are on this device."""
    return all(parameter.device == device for module in modules for parameter in module.parameters())


class NonfiniteError(RuntimeError):
    """The model computed NaN or infinite values.

    dtype    what it computed in
    remedy   what to do about it
    """

    def __init__(self, dtype: torch.dtype, remedy: str) -> None:
        super().__init__(f"the model computed NaN or infinite values in {str(dtype).removeprefix('torch.')}: {remedy}")
        self.dtype, self.remedy = dtype, remedy


def nonfinite_error(dtype: torch.dtype, perhaps: str = "") -> NonfiniteError:
    """The error for NaN or infinite results, with the remedy: fp16 may be too narrow for the model.

    perhaps: a cause other than damaged weights, with its remedy.
    """
    if dtype == torch.float16:
        return NonfiniteError(dtype, "choose fp32 (or bf16)")
    return NonfiniteError(dtype, f"{perhaps}the weights are damaged, download them again")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is for want of memory, and so says nothing about what the device can do."""
    # on a CPU torch has no class of its own for it
    return isinstance(error, torch.cuda.OutOfMemoryError) or "memory" in str(error)


def needs_gradient(x: Tensor) -> bool:
    """Whether a gradient will flow back to x through what is computed from it."""
    return torch.is_grad_enabled() and x.requires_grad
