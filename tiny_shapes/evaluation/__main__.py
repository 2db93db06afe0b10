"""Evaluate a model of the shapes world: how well it sees, draws and edits, on scenes that it was never trained on.

    python -m tiny_shapes.evaluation                                  everything, of models/tiny-shapes
    python -m tiny_shapes.evaluation --scenes 20 --only edits         one part, on few scenes
    python -m tiny_shapes.evaluation --chains 24 --out docs/evaluation

Every question, description and image is judged by the scorer, which reads pixels alone. All settings are the nodes'
defaults; seeds are the numbers of the scenes. Prints a table with 95 % confidence intervals and, with --out, writes
evaluation.md (the table), evaluation.json (the figures) and, where Matplotlib is installed, chains.png.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from ming_core import CheckpointError, FileError, load_univision
from ming_core.training.command_line import documented_parser

from .chains import ChainScores, evaluate_chains
from .evaluator import Evaluator
from .report import table, write_report
from .suite import SUITE, images_in, photographs

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if min(options.scenes, options.chains) < 1:
        parser.error("--scenes and --chains must be at least 1")
    if options.photographs and not (options.photographs.is_dir() and images_in(options.photographs)):
        parser.error(f"--photographs: there are no images in {options.photographs}; name a folder that has some")
    try:
        _evaluate(options)
    except (CheckpointError, FileError) as error:
        sys.exit(str(error))
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    engine = load_univision(options.model)
    evaluator = Evaluator(engine, options.scenes, tuple(options.objects))
    scores = [photographs(evaluator, options.photographs)] if options.photographs else []
    chains: list[ChainScores] = []
    for name in options.only or [*SUITE, "chains"]:
        log.info("%s", name)
        if name == "chains":
            chains = evaluate_chains(Evaluator(engine, options.chains, evaluator.objects))
        else:
            for score in SUITE[name](evaluator):
                log.info("%s", score.row())
                scores.append(score)
        engine.prefix_cache.clear()
        if options.out:
            write_report(options.out, scores, chains)
    log.info("\n%s", table(scores, chains))


def _parser() -> argparse.ArgumentParser:
    parser = documented_parser("python -m tiny_shapes.evaluation", __doc__)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-shapes"), metavar="FOLDER")
    parser.add_argument("--scenes", type=int, default=300, help="scenes of each measurement (%(default)s)")
    parser.add_argument("--chains", type=int, default=60, help="five-round chains in each way (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*SUITE, "chains"], help="parts to evaluate; default: all")
    parser.add_argument("--objects", type=int, nargs=2, default=(1, 3), metavar=("FEWEST", "MOST"), help="in a scene")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="folder of images to reconstruct as well")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
