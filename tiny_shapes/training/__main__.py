"""Train the built-in model: all stages of the recipe, or those that are named.

    python -m tiny_shapes.training                                          everything, from nothing, into runs/
    python -m tiny_shapes.training --start models/tiny-shapes "everything"  one stage more, from a model
    python -m tiny_shapes.training --list                                   the stages

If a stage was interrupted (Ctrl-C), the same command continues it; a finished stage is skipped. Each stage writes its
model, log.csv and loss.png into a folder of its name. Stages that stand side by side may be trained at the same time,
by a command for each; the command that names all of them then writes their mean. With several GPUs:
torchrun --nproc-per-node 2 -m tiny_shapes.training --start-from models/tiny-shapes ...
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ming_core import FileError
from ming_core.training.command_line import documented_parser
from ming_core.training.plot import plot_log
from ming_core.training.processes import Processes, joined

from .loop import Objective, Run
from .mean import write_mean
from .recipe import RECIPE, STAGES, SideBySide, Stage
from .stages import make_objective

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.list:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        for line in _listed(RECIPE):
            log.info("%s", line)
        return 0
    entries = [_entry(name) for name in options.stages] if options.stages else list(RECIPE)
    with joined(options.device) as processes:
        logging.basicConfig(level=logging.INFO if processes.first else logging.ERROR, format="%(message)s")
        return _train_entries(entries, options, processes)


def _train_entries(entries: list[Stage | SideBySide], options: argparse.Namespace, processes: Processes) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    if processes.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    start = options.start
    try:
        for entry in entries:
            start = _train_entry(entry, start, options, processes)
    except FileError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        log.info("interrupted: run the same command again to continue")
        return 130
    return 0


def _train_entry(
    entry: Stage | SideBySide, start: Path | None, options: argparse.Namespace, processes: Processes
) -> Path:
    """Train what an entry of the recipe says, and return the folder of its model."""
    model: Path = options.folder / entry.name.replace(" ", "-") / "model"
    if isinstance(entry, Stage):
        stage = _with_options(entry, options)
        objective = _objective(stage, start, processes.device)
        _train(Run(stage, objective, model.parent, options.workers, processes, options.passes, options.bf16))
        return model
    models = [_train_entry(stage, start, options, processes) for stage in entry.stages]
    if processes.first:
        write_mean(models, model)
    processes.wait()
    return model


def _objective(stage: Stage, start: Path | None, device: torch.device) -> Objective:
    try:
        return make_objective(stage, start, device)
    except ValueError as error:  # no folder to start from, or not the right one
        sys.exit(str(error))


def _train(run: Run) -> None:
    try:
        run.complete()
    finally:
        if run.processes.first:
            plot_log(run.folder / "log.csv", run.folder / "loss.png", over="hours", left_out=("stage", "step"))


def _parser() -> argparse.ArgumentParser:
    parser = documented_parser("python -m tiny_shapes.training", __doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="stages of the recipe to train; default: all")
    parser.add_argument(
        "--start-from",
        "--start",  # which torchrun takes for its own --start-method
        dest="start",
        type=Path,
        metavar="FOLDER",
        help="model folder that the first stage starts from",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where to write (%(default)s)")
    parser.add_argument("--device", help='"cpu" or "cuda"; default: cuda if there is one')
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches ahead; for a GPU about 8")
    parser.add_argument("--hours", type=float, help="of every stage, in place of the recipe's; 0: no limit")
    parser.add_argument("--steps", type=int, help="of every stage, in place of the recipe's; 0: no limit")
    parser.add_argument("--batch", type=int, help="images or dialogues of a batch, in place of the recipe's")
    parser.add_argument("--passes", type=int, default=1, help="batches of a step, in each process (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, if the processor is fast at it")
    parser.add_argument("--list", action="store_true", help="list the stages and exit")
    return parser


def _listed(entries: Iterable[Stage | SideBySide]) -> Iterator[str]:
    """The stages, a line each: name, what is trained, hours."""
    for entry in entries:
        if isinstance(entry, Stage):
            yield f"{entry.name:32} {entry.trains:14} {entry.hours:g} hours"
        else:
            yield f"{entry.name}: the mean of"
            yield from (f"    {line}" for line in _listed(entry.stages))


def _entry(name: str) -> Stage | SideBySide:
    entries = {entry.name: entry for entry in (*STAGES, *RECIPE)}
    if name not in entries:
        sys.exit(f"the recipe has no stage {name!r}: its stages are {', '.join(map(repr, entries))}")
    return entries[name]


def _with_options(stage: Stage, options: argparse.Namespace) -> Stage:
    changes = {name: getattr(options, name) for name in ("hours", "steps", "batch")}
    return replace(stage, **{name: value for name, value in changes.items() if value is not None})


if __name__ == "__main__":
    sys.exit(main())
