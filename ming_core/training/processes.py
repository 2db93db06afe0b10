"""The processes that train together, started by torchrun on one machine or several; without it, one."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """This process among `count` of them; number 0 is the one that writes and talks."""

    def __init__(self, device: torch.device, rank: int = 0, count: int = 1) -> None:
        self.device, self.rank, self.count = device, rank, count
        self._local_rank = _environment("LOCAL_RANK", 0)
        self._local_count = _environment("LOCAL_WORLD_SIZE", 1)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """What is within it is done by one process of each machine at a time."""
        for _ in range(self._local_rank):
            self.wait()
        yield
        for _ in range(self._local_count - self._local_rank):
            self.wait()

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

    def parallel(self, module: nn.Module, *, all_used: bool = True) -> nn.Module:
        """The module with its gradients averaged over all processes; it begins with the values of process 0.

        all_used: every loss depends on every parameter
        """
        if self.count == 1:
            return module
        ids = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=not all_used)

    def shard(self, modules: Iterable[nn.Module]) -> None:
        """Leave each process its share of the parameters of these modules (FSDP2), on its device.

        The parameters of one module at a time come together while it computes, on the way back again. All processes
        must call each module equally often.
        """
        mesh = init_device_mesh(self.device.type, (self.count,))
        for module in modules:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)


def alone(module: nn.Module) -> contextlib.AbstractContextManager:
    """Within it, gradients of what `Processes.parallel` gave stay in their process, to be averaged with later ones."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that torchrun has started.

    device: "cpu", "cuda" or "cuda:1"; None: a GPU of its own for each process, if there are any.
    """
    count, rank, local = _environment("WORLD_SIZE", 1), _environment("RANK", 0), _environment("LOCAL_RANK", 0)
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
        gc.collect()  # a model that still knows the group keeps its threads, and they may abort the process at its end
        dist.destroy_process_group()


def _environment(name: str, default: int) -> int:
    """A number that torchrun has set."""
    return int(os.environ.get(name, default))
