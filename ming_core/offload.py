"""Where a model computes, and in which numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OffloadableModule(nn.Module):
    """A model that may compute elsewhere than where its weights rest.

    It computes where its weights are, unless a host that brings them over as they are needed says where: `compute_on`.
    """

    compute_device: torch.device | None = None

    def compute_on(self, device: torch.device) -> None:
        """Whatever is given to this model and its parts goes to `device`, wherever their weights rest."""
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
        """A weight that is always in the dtype that is computed in."""
        raise NotImplementedError


def all_on(device: torch.device, *modules: nn.Module) -> bool:
    """Whether all weights of the modules are on this device."""
    return all(parameter.device == device for module in modules for parameter in module.parameters())


def nonfinite_error(dtype: torch.dtype, perhaps: str = "") -> RuntimeError:
    """What to raise where what was computed is no number: in fp16 it may have outgrown the format.

    perhaps: what else than damaged weights may be the cause, and its remedy.
    """
    remedy = f"{perhaps}the weights are damaged, download them again"
    if dtype == torch.float16:
        remedy = "choose fp32 (or bf16)"
    return RuntimeError(f"the model computed NaN or infinite values in {str(dtype).removeprefix('torch.')}: {remedy}")


def needs_gradient(x: Tensor) -> bool:
    """Whether what is computed from x must let its gradient through."""
    return torch.is_grad_enabled() and x.requires_grad
