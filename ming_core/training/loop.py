"""The loop that trains a LoRA: steps, progress, log, checkpoints, resuming.

A folder has what a training needs to go on: state.safetensors, and log.csv. All randomness of a step comes from the
seed and the numbers of its samples, so a training that was interrupted goes on as if it had not been, also with another
number of processes. Only the first process writes, and every file is written whole, then renamed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..files import FileError, read_tensors, write_tensors, write_whole
from .batches import Noising, SampleStream, collate
from .loss import LoraLoss, Weights
from .processes import Processes, alone
from .sequences import Sequence
from .signals import signal_handler

log = logging.getLogger(__name__)

FORMAT = "ming lora training"
STATE, LOG = "state.safetensors", "log.csv"
TERMS = ("loss", "text", "flow")
LOG_STEPS = 10  # a row of the log is the mean of so many steps
MAX_GRADIENT_NORM = 1.0
LAST_RATE = 0.02  # of the learning rate, at the end


@dataclass(frozen=True)
class Plan:
    """How a LoRA is trained.

    batch             samples of a step, in each process
    pass_batch        of them, samples that are computed at once
    warmup            steps until the learning rate is reached; it decays to almost nothing over the last `decay` of all
    checkpoint_steps  between two checkpoints; 0: only at the end
    """

    steps: int
    batch: int = 4
    pass_batch: int = 4
    lr: float = 1e-4
    warmup: int = 20
    decay: float = 0.7
    checkpoint_steps: int = 200
    noising: Noising = field(default_factory=Noising)


def learning_rate_factor(progress: float, step: int, warmup: int, decay: float) -> float:
    """Factor on the learning rate: a linear rise over `warmup` steps, constant, then a cosine down to `LAST_RATE`.

    progress  share of the training that is done, 0 to 1
    decay     share of the training, its last part, that the cosine takes
    """
    rise = min(1.0, (step + 1) / max(warmup, 1))
    decayed = max(0.0, (progress - 1 + decay) / decay) if decay else 0.0
    return min(rise, LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * decayed)))


class Training:
    """A LoRA being trained.

    about  what must be the same when it is resumed, and what was chosen
    save   writes the LoRA as it is now
    """

    def __init__(
        self,
        plan: Plan,
        loss: LoraLoss,
        stream: SampleStream,
        processes: Processes,
        folder: Path,
        *,
        about: dict[str, Any] | None = None,
        save: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan, self.loss, self.stream, self.processes, self.folder = plan, loss, stream, processes, folder
        self.about, self.save = about or {}, save
        self.optimizer = torch.optim.AdamW(loss.parameters(), lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.parallel = processes.parallel(loss)
        self.step, self.samples = 0, 0  # done so far, by all processes together
        self.rows: list[dict[str, float]] = []  # of the log
        self.recent: list[list[float]] = []  # the terms of steps that are in no row yet

    # --- Steps ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, or until interrupted (Ctrl-C, SIGTERM); a checkpoint is written either way.

        Raises KeyboardInterrupt after that checkpoint if it was interrupted.
        """
        interrupts: list[int] = []
        stopped = False
        with (
            signal_handler(lambda number, _: interrupts.append(number)),
            self.loss.in_place(),
            self._progress() as progress,
        ):
            while self.step < self.plan.steps and not stopped:
                terms = self.update()
                progress.set_postfix_str("  ".join(f"{k} {v:.4f}" for k, v in terms.items()), refresh=False)
                progress.update()
                if self.plan.checkpoint_steps and self.step % self.plan.checkpoint_steps == 0:
                    self.checkpoint()
                # all processes stop after the same step, whichever of them was told
                stopped = self.processes.any(bool(interrupts))
            self.checkpoint()
        if stopped and self.step < self.plan.steps:
            raise KeyboardInterrupt

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.plan.steps, initial=self.step, unit="step", disable=not self.processes.first, file=sys.stderr
        )

    def update(self) -> dict[str, float]:
        """One step of the optimizer, on a batch of every process. Returns the terms of the loss."""
        sequences = self._own_sequences()
        weights = Weights(
            *self.processes.sums(sum(s.text_weight for s in sequences), sum(s.flow_weight for s in sequences))
        )
        for group in self.optimizer.param_groups:
            factor = learning_rate_factor(self.step / self.plan.steps, self.step, self.plan.warmup, self.plan.decay)
            group["lr"] = self.plan.lr * factor
        terms = self._gradients(sequences, weights)
        norm = nn.utils.clip_grad_norm_(self.loss.parameters(), MAX_GRADIENT_NORM)
        if not torch.isfinite(norm):
            raise RuntimeError(
                f"the gradient of step {self.step} is not finite: lower --lr, and begin again from the last checkpoint "
                "with --resume"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.samples += self.plan.batch * self.processes.count
        return self._record(terms)

    def _own_sequences(self) -> list[Sequence]:
        """This process's part of the samples of a step."""
        begin = self.samples + self.processes.rank * self.plan.batch
        return [self.stream[index] for index in range(begin, begin + self.plan.batch)]

    def _gradients(self, sequences: list[Sequence], weights: Weights) -> list[float]:
        """Add up the gradients of all passes; returns the terms of the loss, of all processes."""
        network = self.loss.network
        channels = network.mingtok.config.semantic_decoder.in_dim
        parts = [sequences[i : i + self.plan.pass_batch] for i in range(0, len(sequences), self.plan.pass_batch)]
        totals = [0.0, 0.0, 0.0]
        for part in parts:
            batch = collate(part, self.plan.noising, channels).to(network.device)
            # gradients travel once a step, with the last pass
            with contextlib.nullcontext() if part is parts[-1] else alone(self.parallel):
                found = self.parallel(batch, weights)
                # the processes' gradients are averaged, while their losses are parts of one sum
                (found[0] * self.processes.count).backward()
            totals = [total + float(value.detach()) for total, value in zip(totals, found, strict=True)]
        return self.processes.sums(*totals)

    # --- Log ------------------------------------------------------------------------------------------------------

    def _record(self, terms: list[float]) -> dict[str, float]:
        self.recent.append(terms)
        if self.step % LOG_STEPS == 0 or self.step == self.plan.steps:
            means = [sum(values) / len(values) for values in zip(*self.recent, strict=True)]
            self.rows.append({"step": self.step, **dict(zip(TERMS, means, strict=True))})
            self.recent = []
        return dict(zip(TERMS, terms, strict=True))

    def _write_log(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["step", *TERMS], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if k == "step" else round(v, 6) for k, v in row.items()} for row in self.rows)
        write_whole(self.folder / LOG, text.getvalue().encode())

    # --- Checkpoints ----------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write the LoRA, the log, and the state to resume from. Raises FileError."""
        if self.processes.first:
            self.save()
            self._write_log()
            # written last: a state that says that it is done has its LoRA
            about = {
                "format": FORMAT,
                "about": self.about,
                "plan": asdict(self.plan),
                "step": self.step,
                "samples": self.samples,
                "rows": self.rows,
                "recent": self.recent,
            }
            write_tensors(self.folder / STATE, self._tensors(), about)
        self.processes.wait()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"adapters.{name}": p for name, p in self.loss.adapters.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        return tensors

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, exactly. False if there is none. Raises FileError."""
        path = self.folder / STATE
        if not path.exists():
            return False
        tensors, found = read_tensors(path, FORMAT)
        for name, value in self.about.items():
            if found["about"].get(name) != value:
                raise FileError(
                    f"{path}: {name} was {found['about'].get(name)} when this training began, and is {value} now: give "
                    "the same again, or begin anew with another --out"
                )
        adapters = {name.removeprefix("adapters."): t for name, t in tensors.items() if name.startswith("adapters.")}
        self.loss.adapters.load_state_dict(adapters)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step, self.samples = found["step"], found["samples"]
        self.rows, self.recent = found["rows"], found["recent"]
        return True
