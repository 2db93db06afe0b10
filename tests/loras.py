"""LoRA files with random values for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from ming_univision.ming_core.lora import targets
from ming_univision.ming_core.univision import UniVision
from safetensors.torch import save_file


def write_lora(path: Path, network: UniVision, *, seed: int = 0, size: float = 0.2) -> Path:
    """A LoRA of rank 2 on every layer that may have one."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, target in targets(network).items():
        rows, width = target.shape
        tensors[f"{name}.lora_A"] = torch.randn(2, width, generator=generator) / width**0.5
        tensors[f"{name}.lora_B"] = torch.randn(rows, 2, generator=generator) * size
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path
