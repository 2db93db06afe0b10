"""What is done again for every token, as CUDA graphs: recorded once a drawing, then replayed in one call.

A token is thousands of small operations, and to start them from Python takes longer than many of them. A graph plays
them back: the same operations on the same memory, whatever Python would do now. So a function that is captured takes
and gives tensors of fixed shapes, and all else that it touches stays where it is: weights (a graph lives no longer than
its drawing, during which nothing moves them), buffers of fixed size, and counters that are numbers on the device.

Nobody needs to trust this. A replay is compared with the function itself, on inputs that it was not recorded on, before
it takes the function's place; where recording fails or the numbers differ, the function goes on as it is. So it is with
layers that rest elsewhere or wait for the device. MING_UNIVISION_CUDA_GRAPHS=0 in the environment turns graphs off.

No GPU was at hand when this was written: the tests play operations back on the CPU, one by one, as a graph would.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

SWITCH = "MING_UNIVISION_CUDA_GRAPHS"
CLOSE = 0.01  # relative distance of a replay from the function: a GPU may choose another kernel for the same product

Tensors = tuple[Tensor, ...]
Run = Callable[[], Tensors]
Record = Callable[[Run], tuple[Callable[[], None], Tensors]]  # returns what replays a run, and what a replay writes to


class Captured:
    """A function of tensors that is replayed once it has been called three times: to warm up, to record, to compare.

    What it returns then is written over by the next call. `record` None: it is always just called.
    """

    def __init__(self, function: Callable[..., Tensors], record: Record | None) -> None:
        self.function, self.record = function, record
        self.replay: Callable[[], None] | None = None
        self.replaying = False
        self._warm = False

    def __call__(self, *inputs: Tensor) -> Tensors:
        if self.replaying:
            return self._replayed(inputs)
        outputs = self.function(*inputs)
        if self.record is not None:
            if self.replay is not None:
                self._compare(inputs, outputs)
            elif self._warm:
                self._capture(inputs)
            self._warm = True
        return outputs

    def _capture(self, inputs: Tensors) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        try:
            self.replay, self._outputs = self.record(lambda: self.function(*self._inputs))
        except RuntimeError as error:
            self._give_up(str(error))

    def _compare(self, inputs: Tensors, outputs: Tensors) -> None:
        """All that the function writes elsewhere it writes again, at the same places: the counters did not move on."""
        outputs = tuple(x.clone() for x in outputs)
        pairs = zip(self._replayed(inputs), outputs, strict=True)
        wrong = max(float((found - x).float().norm() / x.float().norm()) for found, x in pairs)
        if wrong <= CLOSE:  # not so if it is NaN
            self.replaying = True
        else:
            self._give_up(f"a replay differs by {wrong:.2g}")

    def _replayed(self, inputs: Tensors) -> Tensors:
        for mine, x in zip(self._inputs, inputs, strict=True):
            mine.copy_(x)
        self.replay()
        return self._outputs

    def _give_up(self, why: str) -> None:
        log.warning("%s is not replayed as a CUDA graph: %s", self.function.__name__, why)
        self.record = self.replay = None


def recorder(device: torch.device, *modules: nn.Module) -> Record | None:
    """What records functions that use these modules on `device`; None where it has no graphs or some weights are not
    there."""
    if device.type != "cuda" or torch.version.hip or os.environ.get(SWITCH) == "0":
        return None
    device = torch.empty(0, device=device).device  # with its number
    return (lambda run: _cuda_graph(run, device)) if rest_on(device, *modules) else None


def rest_on(device: torch.device, *modules: nn.Module) -> bool:
    """Whether all weights of the modules are on this device."""
    return all(parameter.device == device for module in modules for parameter in module.parameters())


def _cuda_graph(run: Run, device: torch.device) -> tuple[Callable[[], None], Tensors]:
    graph = torch.cuda.CUDAGraph()
    # a host's other threads may use the GPU meanwhile
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, outputs
