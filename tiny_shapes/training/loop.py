"""The loop that every stage of training runs in: batches, steps, progress, log, checkpoints, resuming.

A stage is anything with the members of `Objective`; the loop owns the optimizers. All randomness of a step, data and
noise, comes from (seed of the stage, step), so a run that was stopped goes on as if it had not been (exactly so where
the stage is one of steps: the learning rate of a stage of hours follows the clock), and batches can be made ahead by
other processes. Checkpoints and model folders are written whole, then renamed.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import logging
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ming_core.files import FileError, move, write_whole_folder

from .optimizers import MovingAverage, learning_rate, make_optimizers
from .recipe import Stage

log = logging.getLogger(__name__)

CLIP = 1.0  # largest norm of the gradient of a step
SMOOTH = 0.98  # of the averages that progress and log show
SHOW_SECONDS = 30.0  # between two lines of progress where there is no terminal


class Objective(Protocol):
    """What a stage trains."""

    module: nn.Module  # those of its parameters that need a gradient are trained
    data: Callable[[np.random.Generator], Any]  # makes a batch; picklable

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """The scalar "loss" to descend, and whatever else is worth logging."""

    def evaluate(self) -> dict[str, float]:
        """A few figures on unseen scenes; always the same scenes."""

    def publish(self, folder: Path) -> None:
        """Write the weights as they are into a published-layout folder."""


class Run:
    """One stage being trained in `folder`: state.pt, log.csv and, at every checkpoint, the model in `model/`.

    workers: processes that make batches ahead; 0 makes them here.
    """

    def __init__(self, stage: Stage, objective: Objective, folder: Path, workers: int = 0) -> None:
        self.stage, self.objective, self.folder, self.workers = stage, objective, folder, workers
        self.optimizers = make_optimizers(objective.module, stage.lr)
        self.average = MovingAverage(objective.module, stage.average)
        self.step, self.seconds = 0, 0.0
        self.averages: dict[str, float] = {}
        self._shown = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def progress(self) -> float:
        """Share of the stage that is done: of its steps or of its hours, whichever is further."""
        steps = self.step / self.stage.steps if self.stage.steps else 0.0
        hours = self.seconds / 3600 / self.stage.hours if self.stage.hours else 0.0
        return min(1.0, max(steps, hours))

    def train(self) -> None:
        """Train to the end of the stage, or until interrupted (Ctrl-C, SIGTERM); a checkpoint is written either way.

        Raises KeyboardInterrupt after that checkpoint when it was interrupted.
        """
        stopped: list[int] = []
        saved = self.seconds
        with _signals(lambda number, _: stopped.append(number)), _batches(self) as batches:
            while self.progress < 1.0 and not stopped:
                started = time.perf_counter()
                self.update(next(batches))
                self.seconds += time.perf_counter() - started
                self.show()
                if self.seconds - saved >= 60 * self.stage.checkpoint_minutes:
                    self.checkpoint()
                    saved = self.seconds
            self.checkpoint(look=not stopped)  # who interrupts does not want to wait
        if stopped:
            raise KeyboardInterrupt

    def update(self, batch: Any) -> None:
        """One step of the optimizers on one batch."""
        factor = learning_rate(self.progress, self.step, self.stage.warmup, self.stage.settle)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.stage.lr * factor
        generator = torch.Generator().manual_seed(_seed(self.stage.seed, self.step))
        parts = self.objective.loss(batch, generator)
        parts["loss"].backward()
        trained = [p for p in self.objective.module.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, CLIP)
        if not torch.isfinite(norm):
            raise RuntimeError(
                f"the gradient of step {self.step} is not finite: lower this stage's learning rate in recipe.py, "
                "and go on by the same command"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)
        keep = min(SMOOTH, 1 - 1 / self.step)
        for name, value in parts.items():
            self.averages[name] = keep * self.averages.get(name, 0.0) + (1 - keep) * float(value.detach())

    def show(self) -> None:
        """Progress: one line of a terminal, rewritten; elsewhere a line now and then."""
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if terminal or now - self._shown >= SHOW_SECONDS:
            self._shown = now
            parts = "  ".join(f"{name} {value:.4f}" for name, value in self.averages.items())
            speed = self.stage.batch * self.step / max(self.seconds, 1e-9)
            line = f"{self.stage.name} {100 * self.progress:5.1f} %  step {self.step}  {speed:.1f}/s  {parts}"
            sys.stderr.write(f"\r{line}\x1b[K" if terminal else f"{line}\n")
            sys.stderr.flush()

    def checkpoint(self, look: bool = True) -> None:
        """Write the state to resume from, and the model with averaged weights; evaluate that (unless not), and log."""
        state = {
            "module": self.objective.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average.weights,
            "step": self.step,
            "seconds": self.seconds,
            "averages": self.averages,
        }
        with self.average.in_place():
            write_whole_folder(self.objective.publish, self.folder / "model")
        fresh = self.folder / "state.pt.new"  # last: a stage whose state says that it is done has its model
        torch.save(state, fresh)
        move(fresh, self.folder / "state.pt")
        with self.average.in_place():
            self.record(self.objective.evaluate() if look else {})

    def record(self, figures: dict[str, float]) -> None:
        """One more row of log.csv; what earlier rows lack, or this one, stays empty there."""
        row: dict[str, Any] = {"stage": self.stage.name, "step": self.step, "hours": round(self.seconds / 3600, 4)}
        row |= {name: round(value, 5) for name, value in (self.averages | figures).items()}
        path, rows = self.folder / "log.csv", []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        rows.append(row)
        fresh = path.with_suffix(".new")
        with fresh.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for each in rows for name in each)), restval="")
            writer.writeheader()
            writer.writerows(rows)
        move(fresh, path)
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")  # the line of `show`
        log.info("%s", "  ".join(f"{name} {value}" for name, value in row.items()))

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, exactly; False if there is none."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.objective.module.load_state_dict(state["module"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError) as error:
            raise FileError(
                f"{path} is of another recipe ({error}): name another folder, or remove this one"
            ) from error
        self.average.restore(state["average"])
        self.step, self.seconds, self.averages = state["step"], state["seconds"], state["averages"]
        return True


def make_batch(data: Callable[[np.random.Generator], Any], seed: int, step: int) -> Any:
    """The batch of a step: a pure function of the data, the stage's seed and the step."""
    return data(np.random.default_rng([seed, step]))


def _seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step, 1]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def _batches(run: Run) -> Iterator[Iterator[Any]]:
    """The batches from the run's step on, made here or a few ahead by worker processes."""
    data, seed = run.objective.data, run.stage.seed
    if not run.workers:
        yield (make_batch(data, seed, step) for step in itertools.count(run.step))
        return
    spawn = get_context("spawn")
    # Ctrl-C in a terminal reaches every process; the batch that is waited for must come nevertheless
    deaf = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(run.workers, mp_context=spawn, **deaf) as pool:
        steps = itertools.count(run.step)

        def ahead() -> Iterator[Any]:
            waiting = deque(pool.submit(make_batch, data, seed, next(steps)) for _ in range(2 * run.workers))
            while True:
                waiting.append(pool.submit(make_batch, data, seed, next(steps)))
                yield waiting.popleft().result()

        yield ahead()
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handler` instead of ending the process; the old handlers come back afterwards."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
