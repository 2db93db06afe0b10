"""How few velocity evaluations a drawing needs: quality by number and solver, on the built-in model.

    python benchmarks/steps.py [--model FOLDER] [--scenes 100] [--out docs]

Writes steps.md, a table, and steps.png, its plot (where matplotlib is installed), and prints the table. Unseen scenes
are drawn with the nodes' defaults and judged by the scorer, which reads pixels alone; all rows draw the same scenes
with the same noise. The token error is steady with few scenes: how far a latent is from that of the reference solver,
drawn from the same noise under the same condition, as a share of the latents' length.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from here import BUILT_IN
from torch import Tensor

from ming_core import Solver, load_univision
from ming_core.flow_head import METHODS, FlowHead, Sampler
from tiny_shapes.training.evaluation import Score, share
from tiny_shapes.training.examiner import Examiner
from tiny_shapes.world import compare, read_scene

EVALUATIONS = (4, 6, 8, 12, 16)
REFERENCE = Solver(64, "ab2")
REFERENCE_SCENES = 8
ATTRIBUTES = ("shape", "color", "position", "size")
COLUMNS = (
    "evaluations",
    "solver",
    "token error, median",
    "root mean square",
    "drawings right",
    "interval",
    *ATTRIBUTES,
)


class Drawn(NamedTuple):
    """One latent's drawing: all that it was made from."""

    z: Tensor
    noise: Tensor
    factors: tuple[float, ...]


class Result(NamedTuple):
    """Of one solver with one number of evaluations."""

    solver: Solver
    error: tuple[float, float]  # of a token: median, root mean square
    right: Score
    attributes: list[float]

    def row(self) -> str:
        shares = (self.right.value, *self.attributes)
        interval = f"{100 * self.right.low:.0f} to {100 * self.right.high:.0f} %"
        errors = [f"{x:.1%}" for x in self.error]
        cells = [str(self.solver.steps), self.solver.method, *errors, f"{shares[0]:.1%}", interval]
        return "| " + " | ".join([*cells, *(f"{x:.1%}" for x in shares[1:])]) + " |"


@contextmanager
def recording(into: list[Drawn]) -> Iterator[None]:
    """Keeps what every latent is drawn from, while it lasts."""
    draw = Sampler.draw

    def kept(sampler: Sampler, z: Tensor, noise: Tensor) -> Tensor:
        into.append(Drawn(z.clone(), noise.clone(), tuple(sampler.factors[:, 0].tolist())))
        return draw(sampler, z, noise)

    with patch.object(Sampler, "draw", kept):
        yield


@torch.no_grad()
def token_error(head: FlowHead, drawn: list[Drawn], solver: Solver) -> tuple[float, float]:
    """Median and root mean square over the tokens of the latent's distance to the reference's.

    In units of the latents' root mean square length.
    """
    z, noise = (torch.cat([getattr(d, name) for d in drawn]) for name in ("z", "noise"))
    expected, found = (head.sample(z, noise, drawn[0].factors, steps=s.steps, solver=s) for s in (REFERENCE, solver))
    distance = (found - expected).norm(dim=-1) / expected.square().sum(-1).mean().sqrt()
    return float(distance.median()), float(distance.square().mean().sqrt())


def quality(examiner: Examiner) -> tuple[Score, list[float]]:
    """Share of drawings with every asked object right; share of objects of which each attribute is."""
    right: list[bool] = []
    attributes: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    asked = examiner.rounds(["generate"])
    for turn, result in zip(asked, examiner.draw_rounds(asked), strict=True):
        found = compare(read_scene(examiner.pixels(result.features)), turn.target_scene)
        right.append(found.things_right)
        for name, hits in attributes.items():
            hits += getattr(found, name)
    return share("right", right, ""), [statistics.fmean(hits) for hits in attributes.values()]


def table(results: list[Result], scenes: int) -> str:
    lines = [
        f"{scenes} scenes a row; the interval is that of 95 % confidence.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(result.row() for result in results),
    ]
    return "\n".join(lines) + "\n"


def plot(results: list[Result], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no plot")
        return
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method in METHODS:
        of_method = [r for r in results if r.solver.method == method]
        steps = [r.solver.steps for r in of_method]
        left.plot(steps, [100 * r.error[1] for r in of_method], marker="o", label=method)
        low = [100 * (r.right.value - r.right.low) for r in of_method]
        high = [100 * (r.right.high - r.right.value) for r in of_method]
        right.errorbar(
            steps, [100 * r.right.value for r in of_method], (low, high), marker="o", capsize=3, label=method
        )
    left.set(title="error of a token, %, root mean square", ylim=(0, None))
    right.set(title="drawings with every object right, %", ylim=(0, 104))
    for axes in (left, right):
        axes.set(xlabel="velocity evaluations a token", xticks=EVALUATIONS)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUILT_IN)
    parser.add_argument("--scenes", type=int, default=100, help="drawn a row (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder to write steps.md and steps.png to")
    options = parser.parse_args()

    model = load_univision(options.model)
    drawn: list[Drawn] = []
    with recording(drawn):
        quality(Examiner(model, min(REFERENCE_SCENES, options.scenes), solver=REFERENCE))
    results = []
    for evaluations in EVALUATIONS:
        for method in METHODS:
            solver = Solver(evaluations, method)  # both take one evaluation a step
            found = quality(Examiner(model, options.scenes, solver=solver))
            model.prefix_cache.clear()
            results.append(Result(solver, token_error(model.flow_head, drawn, solver), *found))
            print(results[-1].row(), flush=True)
    print("\n" + table(results, options.scenes))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "steps.md").write_text(table(results, options.scenes), encoding="utf-8")
        plot(results, options.out / "steps.png")


if __name__ == "__main__":
    main()
