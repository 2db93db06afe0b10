"""The processes that train together, started by torchrun on one machine or several; without it, one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """This process among `count` of them; number 0 is the one that writes and talks."""

    def __init__(self, device: torch.device, rank: int = 0, count: int = 1) -> None:
        self.device, self.rank, self.count = device, rank, count

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def sums(self, *values: float) -> list[float]:
        """The sum of each value over all processes."""
        if self.count == 1:
            return list(values)
        # MPS and some others have no float64
        kind = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        total = torch.tensor(values, dtype=kind, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether it is true in any process."""
        return self.sums(float(value))[0] > 0

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over all processes; it begins with the values of process 0."""
        if self.count == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids)


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun has started.

    device: "cpu", "cuda" or "cuda:1"; None: a GPU of its own for each process, if there are any.
    """
    count, rank, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = torch.device(f"cuda:{local}" if name == "cuda" and count > 1 else name)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if count == 1:
        yield Processes(here)
        return
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    try:
        yield Processes(here, rank, count)
    finally:
        dist.destroy_process_group()


_ENVIRONMENT = (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))  # as torchrun sets it
