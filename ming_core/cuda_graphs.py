"""The steps that a drawing repeats for every token, as CUDA graphs: recorded once a drawing, then replayed.

A token is thousands of small kernels, and launching them from Python takes longer than many of them run. A graph
launches them all at once: the same operations on the same memory. So a step that is captured takes and returns tensors
of fixed shapes, and everything else that it touches stays where it is: weights (a graph lives no longer than its
drawing, during which nothing moves them), static key/value caches, and positions that are tensors on the device.

A replay is compared with the step itself, on inputs that it was not recorded on, before it takes the step's place.
Where recording fails or the results differ, the step goes on running as it is; so it does where weights are offloaded,
or where experts synchronize with the device.

A host that does without graphs says so to the language model (`LanguageModel.cuda_graphs`). No GPU was available when
this was written: the tests replay operations on the CPU, one by one, as a graph would, but not what CUDA does when a
recording fails.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .kv_cache import LayerCaches
from .offload import all_on

log = logging.getLogger(__name__)

TOLERANCE = 0.01  # relative distance of a replay from the step: a GPU may choose another kernel for the same product

Tensors = tuple[Tensor, ...]
Run = Callable[[], Tensors]
Record = Callable[[Run], tuple[Callable[[], None], Tensors]]  # returns a replay function, and the tensors it writes


class CapturedStep:
    """A step that is replayed from its fourth call on: the first warms up, then one is recorded and one compared.

    The tensors it then returns are overwritten by its next call. `record` None: the step is always just called.
    """

    def __init__(self, step: Callable[..., Tensors], record: Record | None) -> None:
        self.step, self.record = step, record
        self.replay: Callable[[], None] | None = None
        self.replaying = False
        self._warm = False
        self._inputs: Tensors = ()
        self._outputs: Tensors = ()

    def __call__(self, *inputs: Tensor) -> Tensors:
        if self.replaying:
            return self._replayed(inputs)
        if self.record is None or not self._warm:
            self._warm = True
            return self.step(*inputs)
        return self._recorded(inputs) if self.replay is None else self._compared(inputs)

    def _recorded(self, inputs: Tensors) -> Tensors:
        assert self.record is not None
        self._inputs = tuple(x.clone() for x in inputs)
        try:
            self.replay, self._outputs = self.record(lambda: self.step(*self._inputs))
        except RuntimeError as error:
            self._give_up(str(error))
        return self.step(*inputs)

    def _compared(self, inputs: Tensors) -> Tensors:
        """Replay, then run the step itself: what the step stores (a token's keys) is then its own in any case."""
        try:
            replayed = tuple(x.clone() for x in self._replayed(inputs))
        except RuntimeError as error:
            self._give_up(str(error))
            return self.step(*inputs)
        outputs = self.step(*inputs)
        errors = [float((a - b).float().norm() / b.float().norm()) for a, b in zip(replayed, outputs, strict=True)]
        self.replaying = all(error <= TOLERANCE for error in errors)  # False if one is NaN
        if not self.replaying:
            self._give_up(f"a replay differs by {errors}")
        return outputs

    def _replayed(self, inputs: Tensors) -> Tensors:
        assert self.replay is not None
        for mine, x in zip(self._inputs, inputs, strict=True):
            mine.copy_(x)
        self.replay()
        return self._outputs

    def _give_up(self, why: str) -> None:
        log.warning("%s is not replayed as a CUDA graph: %s", self.step.__name__, why)
        self.record = self.replay = None


def graphs_possible(device: torch.device) -> bool:
    """Whether steps on this device may be recorded: on CUDA, until a recording has failed."""
    return device.type == "cuda" and not torch.version.hip and not Recorder.failed


def recorder(device: torch.device, *modules: nn.Module) -> Record | None:
    """A recorder for steps that use these modules on `device`; None where not possible, or some are elsewhere."""
    if not graphs_possible(device):
        return None
    device = torch.empty(0, device=device).device  # with its index
    return Recorder(device) if all_on(device, *modules) else None


class TokenLoop:
    """The steps that a drawing takes for every token: called as they are, or replayed where graphs are possible.

    modules  those whose weights the steps read
    graphs   False: the steps are just called, whatever is possible
    Entered around the loop; `advance` completes a token.
    """

    def __init__(self, device: torch.device, *modules: nn.Module, graphs: bool = True) -> None:
        self.device, self.record = device, recorder(device, *modules) if graphs else None
        self.static: list[LayerCaches] = []

    def step(
        self, caches: LayerCaches | None = None, *, synchronizes: bool = False
    ) -> Callable[[Callable[..., Tensors]], CapturedStep]:
        """Decorate a step that adds a token to `caches`; one that `synchronizes` with the device is just called."""
        record = None if synchronizes else self.record
        if caches is not None and record:
            caches.make_static()
            self.static.append(caches)
        return lambda step: CapturedStep(step, record)

    def advance(self) -> None:
        """Complete a token: count it in the static caches, and wait for the device where graphs are replayed."""
        for caches in self.static:
            caches.advance()
        if self.record and self.device.type == "cuda":  # else tokens are queued far ahead of an interrupt
            torch.cuda.current_stream(self.device).synchronize()

    def __enter__(self) -> TokenLoop:
        return self

    def __exit__(self, *_: object) -> None:
        for caches in self.static:
            caches.make_dynamic()


class Recorder:
    """Records the steps of one drawing, which share their memory and so are replayed in the order of recording.

    Steps are recorded on a stream of their own: where two graphs share one, the end of the first frees memory that the
    second still uses. For the same reason all graphs live as long as the recorder, a failed one too.
    """

    failed = False  # in this process: torch's allocator may be in disorder since

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> tuple[Callable[[], None], Tensors]:
        stream, graph = _stream(self.device), torch.cuda.CUDAGraph()
        self.graphs.append(graph)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(stream):
                # other threads of the host may use the GPU meanwhile
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
