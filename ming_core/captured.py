"""What is done again for every token, as CUDA graphs: recorded once a drawing, then replayed in one call.

A token is thousands of small operations, and to start them from Python takes longer than many of them. A graph plays
them back: the same operations on the same memory, whatever Python would do now. So a function that is captured takes
and gives tensors of fixed shapes, and all else that it touches stays where it is: weights (a graph lives no longer than
its drawing, during which nothing moves them), buffers of fixed size, and counters that are numbers on the device.

A replay is compared with the function itself, on inputs that it was not recorded on, before it takes the function's
place; where recording fails or the numbers differ, the function goes on as it is. So it does where weights rest
elsewhere, or where experts wait for the device.

MING_UNIVISION_CUDA_GRAPHS=1 in the environment asks for graphs. They are not used unasked, since no GPU was at hand
when this was written: the tests play operations back on the CPU, one by one, as a graph would, but not what CUDA does
when a recording fails. Nor are they used with the allocator cudaMallocAsync, which ComfyUI chooses unless it is started
with --disable-cuda-malloc: there, memory that is freed while a recording fails would end the process.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .buffers import Buffers
from .placement import rest_on

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
        if self.record is None or not self._warm:
            self._warm = True
            return self.function(*inputs)
        return self._recorded(inputs) if self.replay is None else self._compared(inputs)

    def _recorded(self, inputs: Tensors) -> Tensors:
        self._inputs = tuple(x.clone() for x in inputs)
        try:
            self.replay, self._outputs = self.record(lambda: self.function(*self._inputs))
        except RuntimeError as error:
            self._give_up(str(error))
        return self.function(*inputs)

    def _compared(self, inputs: Tensors) -> Tensors:
        """The function runs last: what it writes elsewhere (a token, at its place) is then its own, whatever comes."""
        try:
            replayed = tuple(x.clone() for x in self._replayed(inputs))
        except RuntimeError as error:
            self._give_up(str(error))
            return self.function(*inputs)
        outputs = self.function(*inputs)
        wrong = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(replayed, outputs, strict=True)]
        self.replaying = all(distance <= CLOSE for distance in wrong)  # not so if one is NaN
        if not self.replaying:
            self._give_up(f"a replay differs by {wrong}")
        return outputs

    def _replayed(self, inputs: Tensors) -> Tensors:
        for mine, x in zip(self._inputs, inputs, strict=True):
            mine.copy_(x)
        self.replay()
        return self._outputs

    def _give_up(self, why: str) -> None:
        log.warning("%s is not replayed as a CUDA graph: %s", self.function.__name__, why)
        self.record = self.replay = None


def wanted() -> bool:
    return os.environ.get(SWITCH) == "1"


def recorder(device: torch.device, *modules: nn.Module) -> Record | None:
    """What records functions that use these modules on `device`; None where that is not wanted or cannot be."""
    if device.type != "cuda" or torch.version.hip or not wanted() or Recorder.failed:
        return None
    if torch.cuda.get_allocator_backend() != "native":
        log.warning("no CUDA graphs with the allocator %s: --disable-cuda-malloc", torch.cuda.get_allocator_backend())
        return None
    device = torch.empty(0, device=device).device  # with its number
    return Recorder(device) if rest_on(device, *modules) else None


class Loop:
    """The steps that a drawing takes for every token: called as they are, or replayed where graphs are wanted.

    modules: whose weights the steps read. Entered around the loop; `advance` belongs to the end of a token.
    """

    def __init__(self, device: torch.device, *modules: nn.Module) -> None:
        self.device, self.record = device, recorder(device, *modules)
        self.fixed: list[Buffers] = []

    def step(
        self, buffers: Buffers | None = None, *, waits: bool = False
    ) -> Callable[[Callable[..., Tensors]], Captured]:
        """Decorates a function that adds a token to `buffers`; `waits`: it waits for the device, and is just called."""
        record = None if waits else self.record
        if buffers is not None and record:
            buffers.fix()
            self.fixed.append(buffers)
        return lambda function: Captured(function, record)

    def advance(self) -> None:
        for buffers in self.fixed:
            buffers.advance()
        if self.record and self.device.type == "cuda":  # else it would be given tokens far ahead of the one to stop at
            torch.cuda.current_stream(self.device).synchronize()

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        for buffers in self.fixed:
            buffers.unfix()


class Recorder:
    """Records the functions of one drawing, which share their memory and so are replayed in the order of recording.

    They are recorded in a stream of our own: where two graphs share one, the end of the first takes memory that the
    second still uses. For the same reason all graphs live as long as the recorder, a failed one too.
    """

    failed = False  # in this process: torch's memory may be in disorder since

    def __init__(self, device: torch.device) -> None:
        self.device, self.graphs = device, []
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> tuple[Callable[[], None], Tensors]:
        stream, graph = _stream(self.device), torch.cuda.CUDAGraph()
        self.graphs.append(graph)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                # a host's other threads may use the GPU meanwhile
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                try:
                    outputs = run()
                finally:
                    graph.capture_end()
        except RuntimeError:
            Recorder.failed = True
            raise

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay, outputs


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
