"""The values that are trained: low-rank branches beside chosen layers of a network whose weights stay as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters import LowRank
from ..lora import save_lora, targets
from ..univision import UniVision

GROUPS = {  # of layers, by patterns of their names in the network
    "attention": r"^language_model\..*\.attention\.",
    "shared_expert": r"^language_model\..*\.(shared_experts|mlp)\.(gate_proj|up_proj|down_proj)$",
    "projection": r"^linear_proj\.",
    "flow_head": r"^flow_head\.",
    "experts": r"^language_model\..*\.experts\.(gate_up|down)$",
    "output": r"^language_model\.lm_head$",
}
DEFAULT_GROUPS = ("attention", "shared_expert", "projection", "flow_head")


def choose_layers(network: UniVision, groups: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """The layers of these `GROUPS`, by their names in the network: (experts or 0, N, K) of each."""
    patterns = [re.compile(GROUPS[group]) for group in groups]
    found: dict[str, tuple[int, int, int]] = {}
    for target in targets(network).values():
        if not any(pattern.search(target.module) for pattern in patterns):
            continue
        experts, rows, width = found.get(target.module, (0, 0, target.shape[1]))
        if target.expert is None:
            found[target.module] = (0, *target.shape)
        else:  # the parts of an expert, gate and up, are rows of one weight
            found[target.module] = (max(experts, target.expert + 1), max(rows, target.rows.stop), width)
    return found


class TrainedLayers(nn.Module):
    """float32 branches of one rank beside layers; at the start they change nothing.

    layers  by the names of the network's modules, as `choose_layers` gives them
    """

    def __init__(
        self,
        layers: dict[str, tuple[int, int, int]],
        rank: int,
        alpha: float,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.names, self.scale = list(layers), alpha / rank
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        generator = torch.Generator().manual_seed(seed)
        for experts, rows, width in layers.values():
            # more directions than the layer has would be of no use
            own, stack = min(rank, rows, width), (experts,) if experts else ()
            down = torch.empty(*stack, own, width).uniform_(-1, 1, generator=generator) / width**0.5
            self.down.append(nn.Parameter(down.to(device)))
            self.up.append(nn.Parameter(torch.zeros(*stack, rows, own, device=device)))

    def layers(self) -> dict[str, LowRank]:
        """The branches, whose tensors require gradients."""
        return {
            name: LowRank(down, up, self.scale) for name, down, up in zip(self.names, self.down, self.up, strict=True)
        }

    def nothing(self) -> Tensor:
        """0 with a gradient of 0 for every value: a batch need not pass through every layer."""
        return sum((p.flatten()[0] for p in self.parameters()), start=torch.zeros(())) * 0.0

    def save(self, path: str | Path, network: UniVision, dtype: torch.dtype | None = None) -> None:
        """Write them as a LoRA file, rounded to a dtype if one is given. Raises FileError."""
        save_lora(path, self.layers(), network, dtype=dtype)


def count_values(layers: dict[str, tuple[int, int, int]], rank: int) -> int:
    """How many values `TrainedLayers` would have."""
    return sum(max(experts, 1) * min(rank, n, k) * (n + k) for experts, n, k in layers.values())
