"""Train the built-in model: all stages of the recipe, or the ones that are named.

    python -m ming_core.training                                   everything, from nothing, into runs/
    python -m ming_core.training --start models/tiny-shapes "everything"    go on from a model with one stage
    python -m ming_core.training --list                            what the stages are

A stage that was interrupted (Ctrl-C) goes on where it stopped when the command is given again; a finished one is
skipped. Each writes its model, log.csv and loss.png into a folder of its name.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ming_core.files import FileError

from .loop import Objective, Run
from .plot import plot
from .recipe import RECIPE, Stage
from .stages import objective

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    options = _options().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.list:
        for stage in RECIPE:
            log.info("%s", stage)
        return 0
    stages = [_stage(name) for name in options.stages] if options.stages else list(RECIPE)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")
    start = options.start
    for stage in stages:
        stage = _changed(stage, options)
        folder = options.folder / stage.name.replace(" ", "-")
        try:
            _train(Run(stage, _objective(stage, start, device), folder, options.workers))
        except FileError as error:
            sys.exit(str(error))
        except KeyboardInterrupt:
            log.info("stopped; the same command goes on from here")
            return 130
        start = folder / "model"
    return 0


def _objective(stage: Stage, start: Path | None, device: str) -> Objective:
    try:
        return objective(stage, start, device)
    except ValueError as error:  # a folder that it cannot start from
        sys.exit(str(error))


def _train(run: Run) -> None:
    if run.resume():
        log.info("%s: going on from step %d", run.stage.name, run.step)
    try:
        if run.progress < 1:
            run.train()
    finally:
        plot(run.folder / "log.csv", run.folder / "loss.png")


def _options() -> argparse.ArgumentParser:
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m ming_core.training",
        description=about,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="stages of the recipe to train; default: all")
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="model folder that the first stage starts from")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where to write (%(default)s)")
    parser.add_argument("--device", help='"cpu" or "cuda"; default: cuda where there is one')
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches ahead; for a GPU, 8 or so")
    parser.add_argument("--hours", type=float, help="instead of the recipe's, for every stage named")
    parser.add_argument("--steps", type=int, help="likewise; 0: no limit")
    parser.add_argument("--batch", type=int, help="likewise")
    parser.add_argument("--list", action="store_true", help="list the stages and stop")
    return parser


def _stage(name: str) -> Stage:
    for stage in RECIPE:
        if stage.name == name:
            return stage
    known = ", ".join(repr(stage.name) for stage in RECIPE)
    sys.exit(f"the recipe has no stage {name!r}; its stages are {known}")


def _changed(stage: Stage, options: argparse.Namespace) -> Stage:
    changes = {name: getattr(options, name) for name in ("hours", "steps", "batch")}
    return replace(stage, **{name: value for name, value in changes.items() if value is not None})


if __name__ == "__main__":
    sys.exit(main())
