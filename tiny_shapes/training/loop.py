"""The training loop of a stage: steps, progress, log, checkpoints, resuming.

A stage is anything with the members of `Objective`; the loop owns the optimizers. All randomness of a batch, data and
noise, comes from (seed of the stage, number of the batch), so a run that was interrupted continues as if it had not
been: exactly for a stage of steps, while the learning rate of a stage of hours follows the clock. A step learns from
one batch, or from several: one after another, or in processes that torchrun has started, which makes no difference.
The first process writes. Checkpoints and model folders are written whole, then renamed.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import logging
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ming_core.files import FileError, move, write_whole_folder
from ming_core.training.loop import learning_rate_factor
from ming_core.training.processes import Processes, alone
from ming_core.training.signals import signal_handler

from .data import MakeBatch, batches
from .optimizers import make_average, make_optimizers, make_schedulers
from .recipe import Stage

log = logging.getLogger(__name__)

MAX_GRADIENT_NORM = 1.0
SMOOTHING = 0.98  # of the moving averages of the losses in progress and log
PROGRESS_SECONDS = 30.0  # between two lines of progress where there is no terminal


class Objective(Protocol):
    """What a stage trains."""

    @property
    def module(self) -> nn.Module:
        """The network with its loss; its parameters that need a gradient are trained."""

    parallel: nn.Module  # what `loss` calls: the module, or what averages its gradients over several processes

    @property
    def data(self) -> MakeBatch:
        """Makes the batches."""

    def loss(self, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """The scalar "loss" to minimize, and whatever else is worth logging."""

    def evaluate(self, module: Any) -> dict[str, float]:
        """A few figures on unseen scenes, always the same ones, with the weights of this module."""

    def export(self, module: Any, folder: Path) -> None:
        """Write the weights of this module into a folder of the published layout."""


class Run:
    """One stage being trained in `folder`: state.pt, log.csv and, at every checkpoint, the model in `model/`.

    workers    processes that make batches ahead; 0 makes them in this process
    processes  that train together
    passes     batches of a step in each of them
    bf16       compute in bfloat16, with weights and gradients in float32; it needs a processor that is fast at it
    """

    def __init__(
        self,
        stage: Stage,
        objective: Objective,
        folder: Path,
        workers: int = 0,
        processes: Processes | None = None,
        passes: int = 1,
        bf16: bool = False,
    ) -> None:
        self.stage, self.objective, self.folder, self.workers = stage, objective, folder, workers
        self.processes, self.passes, self.bf16 = processes or Processes(torch.device("cpu")), passes, bf16
        self.step, self.seconds = 0, 0.0
        self.batches = 0  # that all processes together have learned from
        self.optimizers = make_optimizers(objective.module, stage.lr, bf16)
        self.schedulers = make_schedulers(self.optimizers, stage.lr, self.learning_rate_factor)
        self.average = make_average(objective.module, stage.average)
        self.start = copy.deepcopy(objective.module) if stage.kept else None  # before a checkpoint is read
        self.losses: dict[str, float] = {}  # moving averages
        self._last_shown = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def progress(self) -> float:
        """The share of the stage that is done: of its steps or of its hours, whichever is further."""
        steps = self.step / self.stage.steps if self.stage.steps else 0.0
        hours = self.seconds / 3600 / self.stage.hours if self.stage.hours else 0.0
        return min(1.0, max(steps, hours))

    def learning_rate_factor(self, step: int) -> float:
        """The factor on the learning rate of this step."""
        return learning_rate_factor(self.progress, step, self.stage.warmup, self.stage.decay_fraction)

    def complete(self) -> None:
        """Train to the end, from where it was if it has begun. Raises as `train` and `resume`."""
        if self.resume():
            log.info("%s: continuing from step %d", self.stage.name, self.step)
        if self.progress < 1:
            self.train()

    def train(self) -> None:
        """Train to the end of the stage, or until interrupted (Ctrl-C, SIGTERM); a checkpoint is written either way.

        Raises KeyboardInterrupt after that checkpoint if it was interrupted.
        """
        interrupts: list[int] = []
        interrupted = False
        last_checkpoint = self.seconds
        self.objective.parallel = self.processes.parallel(self.objective.module, all_used=False)
        with signal_handler(lambda number, _: interrupts.append(number)):
            first, every = self.batches + self.processes.rank, self.processes.count
            data = batches(self.objective.data, self.stage.seed, first, self.workers, every)
            while self.progress < 1.0 and not interrupted:
                started = time.perf_counter()
                self.update(*(next(data) for _ in range(self.passes)))
                # all processes keep the first one's time, and stop when any of them was told to
                seconds, told = self.processes.sums(
                    (time.perf_counter() - started) * self.processes.first, float(bool(interrupts))
                )
                self.seconds, interrupted = self.seconds + seconds, told > 0
                self.show_progress()
                due = self.seconds - last_checkpoint >= 60 * self.stage.checkpoint_minutes
                if self.stage.checkpoint_steps:
                    due = self.step % self.stage.checkpoint_steps == 0 and self.progress < 1.0
                if due:
                    self.checkpoint()
                    last_checkpoint = self.seconds
            del data  # ends the workers
            self.checkpoint(evaluate=not interrupted)  # a user who interrupts does not want to wait
        if interrupted:
            raise KeyboardInterrupt

    def update(self, *batches: Any) -> None:
        """One step of the optimizers on these batches, and on those of the other processes."""
        losses = self._gradients(batches)
        trained = [p for p in self.objective.module.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        if not torch.isfinite(norm):
            raise RuntimeError(
                f"the gradient of step {self.step} is not finite: lower this stage's learning rate in recipe.py, and "
                "continue with the same command"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.batches += len(batches) * self.processes.count
        for scheduler in self.schedulers:
            scheduler.step()
        self.average.update_parameters(self.objective.module)
        keep = min(SMOOTHING, 1 - 1 / self.step)
        for name, value in losses.items():
            self.losses[name] = keep * self.losses.get(name, 0.0) + (1 - keep) * value

    def _gradients(self, batches: tuple[Any, ...]) -> dict[str, float]:
        """Add up the gradients of the mean loss of all batches of all processes; returns the means of the losses."""
        totals: dict[str, float] = {}
        for i, batch in enumerate(batches):
            number = self.batches + i * self.processes.count + self.processes.rank
            generator = torch.Generator().manual_seed(_noise_seed(self.stage.seed, number))
            # gradients travel once a step, with the last batch
            with contextlib.nullcontext() if i == len(batches) - 1 else alone(self.objective.parallel):
                with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.bf16):
                    losses = self.objective.loss(batch, generator)
                (losses["loss"] / len(batches)).backward()
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + float(value.detach())
        sums = self.processes.sums(*totals.values())
        return {name: total / (len(batches) * self.processes.count) for name, total in zip(totals, sums, strict=True)}

    def show_progress(self) -> None:
        """Show progress: in a terminal one line, rewritten; elsewhere a line now and then."""
        if not self.processes.first:
            return
        terminal, now = sys.stderr.isatty(), time.monotonic()
        if terminal or now - self._last_shown >= PROGRESS_SECONDS:
            self._last_shown = now
            losses = "  ".join(f"{name} {value:.4f}" for name, value in self.losses.items())
            speed = self.stage.batch * self.batches / max(self.seconds, 1e-9)
            line = f"{self.stage.name} {100 * self.progress:5.1f} %  step {self.step}  {speed:.1f}/s  {losses}"
            sys.stderr.write(f"\r{line}\x1b[K" if terminal else f"{line}\n")
            sys.stderr.flush()

    def checkpoint(self, evaluate: bool = True) -> None:
        """Write the state to resume from and the model with its `weights`; evaluate that, and log.

        The first process does so, and the others wait for it.
        """
        if self.processes.first:
            self._write(evaluate)
        self.processes.wait()

    def weights(self) -> nn.Module:
        """The module with the averaged weights, and the stage's share of those that it started from."""
        if self.start is None:
            return self.average.module
        module = copy.deepcopy(self.average.module)
        with torch.no_grad():
            for weight, started in zip(module.parameters(), self.start.parameters(), strict=True):
                weight.lerp_(started, self.stage.kept)
        return module

    def _write(self, evaluate: bool) -> None:
        state = {
            "module": self.objective.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average.state_dict(),
            "step": self.step,
            "batches": self.batches,
            "seconds": self.seconds,
            "losses": self.losses,
        }
        weights = self.weights()
        write_whole_folder(lambda folder: self.objective.export(weights, folder), self.folder / "model")
        fresh = self.folder / "state.pt.new"  # written last: a stage whose state says that it is done has its model
        torch.save(state, fresh)
        move(fresh, self.folder / "state.pt")
        self.record(self.objective.evaluate(weights) if evaluate else {})

    def record(self, figures: dict[str, float]) -> None:
        """Add a row to log.csv. Columns that earlier rows lack, or this one, are empty there."""
        row: dict[str, Any] = {"stage": self.stage.name, "step": self.step, "hours": round(self.seconds / 3600, 4)}
        row |= {name: round(value, 5) for name, value in (self.losses | figures).items()}
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
            sys.stderr.write("\r\x1b[K")  # clears the line of progress
        log.info("%s", "  ".join(f"{name} {value}" for name, value in row.items()))

    def resume(self) -> bool:
        """Continue from the folder's checkpoint, exactly. Returns False if there is none."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.objective.module.load_state_dict(state["module"])
            self.average.load_state_dict(state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
            self.batches = state.get("batches", self.step)  # states from before had one in every step
        except (KeyError, RuntimeError, ValueError) as error:
            raise FileError(
                f"{path} belongs to another recipe ({error}): name another folder, or remove this one"
            ) from error
        self.schedulers = make_schedulers(self.optimizers, self.stage.lr, self.learning_rate_factor, self.step)
        return True


def _noise_seed(seed: int, number: int) -> int:
    """The seed of the noise of a batch."""
    return int(np.random.SeedSequence([seed, number, 1]).generate_state(1, np.uint64)[0] >> 1)
