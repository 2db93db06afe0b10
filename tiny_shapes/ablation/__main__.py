"""Train the unified and the separate design with one budget, and compare them.

    python -m tiny_shapes.ablation                    all runs, one after another, then the table and the plot
    python -m tiny_shapes.ablation --run unified-1    one run; several can go on at once
    python -m tiny_shapes.ablation --report           the table and the plot of what there is

An interrupted run (Ctrl-C) is continued by the same command; a finished one is skipped. Each writes log.csv into a
folder of its name, and the report writes ablation.md and, where Matplotlib is installed, ablation.png.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from ming_core import FileError
from ming_core.training.command_line import documented_parser

from ..training.loop import Run
from ..training.recipe import Stage
from .designs import DESIGNS, ablation_stage
from .figures import OBJECTS
from .report import write_report

log = logging.getLogger(__name__)

STEPS = 600
EVALUATIONS = 6  # of a run
SEEDS = (1, 2, 3)  # of what the conclusion rests on
DRAWING = {"generate": 5.0, "edit": 3.0}
EVERYTHING = {**DRAWING, "question": 5.0, "describe": 1.5, "identify region": 0.5}
MODEL = Path(__file__).parents[2] / "models" / "tiny-shapes"


class Planned(NamedTuple):
    """A run: one design, taught everything or drawing alone, from one seed."""

    design: str
    alone: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.design}{'-drawing-alone' if self.alone else ''}-{self.seed}"

    def stage(self, steps: int) -> Stage:
        """Its learning rate does not fall, so that every point of the curve is an end that the run might have had."""
        return Stage(
            self.name,
            "joint",
            batch=24,
            lr=2e-3,
            steps=steps,
            warmup=60,
            decay_fraction=1e-6,
            average=0.98,
            checkpoint_steps=max(1, steps // EVALUATIONS),
            objects=OBJECTS,
            tasks=DRAWING if self.alone else EVERYTHING,
            rounds=2,
            seed=self.seed,
        )


# In this order, so that a comparison can be made as early as possible.
PLAN = (
    *(Planned(design, False, SEEDS[0]) for design in DESIGNS),
    *(Planned(design, True, SEEDS[0]) for design in DESIGNS),
    *(Planned(design, False, seed) for seed in SEEDS[1:] for design in DESIGNS),
)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    plan = [run for run in PLAN if options.run in (None, run.name)]
    try:
        for planned in () if options.report else plan:
            stage = planned.stage(options.steps)
            objective = ablation_stage(stage, planned.design, options.model, device)
            Run(stage, objective, options.folder / planned.name, bf16=options.bf16).complete()
        if options.run is None:
            log.info("%s", write_report(options.folder, options.out or options.folder))
    except (FileError, ValueError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        log.info("interrupted: run the same command again to continue")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = documented_parser("python -m tiny_shapes.ablation", __doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="whose MingTok and tokenizer to use (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"), help="of the runs (%(default)s)")
    parser.add_argument("--out", type=Path, help="of the report; default: the folder of the runs")
    parser.add_argument("--run", choices=[run.name for run in PLAN], help="train this one alone")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--steps", type=int, default=STEPS, help="of every run (%(default)s)")
    parser.add_argument("--device", help='"cpu" or "cuda"; default: cuda if there is one')
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, if the processor is fast at it")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    return parser


if __name__ == "__main__":
    sys.exit(main())
