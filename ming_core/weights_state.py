"""What the weights of a network are at the moment, so that nothing computed from other weights is taken for theirs.

A fingerprint is taken of stored files. Weights that were changed since, by training, by `load_state_dict`, by a patch,
need another answer, quick enough to be asked once a round.
"""

from __future__ import annotations

import hashlib
import weakref

import torch
from torch import Tensor, nn

SAMPLES = 8  # values of each weight that are looked at, spread over it


class WeightsState:
    """Tells whether the weights of some modules are those of the last time.

    Two signs are read: torch counts the in-place changes of a tensor, but not those made through `.data`, and a weight
    that moved to another device is another tensor; a few values of every weight show the rest. Integer weights are left
    out: those of quantized layers are reordered for kernels and still mean the same, and their scales are looked at.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = nn.ModuleList(modules)
        self._versions: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._changes = 0

    @torch.no_grad()
    def key(self) -> bytes:
        """Equal for equal weights, on whatever device they are."""
        samples: dict[str, Tensor] = {}
        together: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, weight in self._modules.named_parameters():
            if not weight.is_floating_point() or weight.is_meta or not weight.numel():
                continue
            self._count(name, weight)
            samples[name] = weight.flatten()[:: max(1, weight.numel() // SAMPLES)]
            together.setdefault((weight.device, weight.dtype), []).append(name)
        for names in together.values():  # one copy from each device: a GPU is waited for once
            sizes = [samples[name].numel() for name in names]
            copied = torch.cat([samples[name] for name in names]).float().cpu().split(sizes)
            samples.update(zip(names, copied, strict=True))
        digest = hashlib.blake2b(self._changes.to_bytes(8, "big"), digest_size=16)
        for values in samples.values():  # in the order of the network, which a weight keeps wherever it is
            digest.update(values.numpy().tobytes())
        return digest.digest()

    def _count(self, name: str, weight: Tensor) -> None:
        """Count a change when the same tensor has a newer version than the last time."""
        if weight.is_inference():  # such a tensor cannot be changed, and has no version
            return
        seen = self._versions.get(name)
        if seen is not None and seen[0]() is weight and seen[1] != weight._version:
            self._changes += 1
        if seen is None or seen[0]() is not weight or seen[1] != weight._version:
            self._versions[name] = weakref.ref(weight), weight._version
