"""Velocity evaluations: how good drawings are by their number and by solver, on the built-in model.

    python benchmarks/steps.py [--model FOLDER] [--scenes 100] [--out docs]

Prints a table, and writes it as steps.md with its plot steps.png (where matplotlib is installed). Unseen scenes are
drawn with the nodes' defaults and judged by the scorer, which reads pixels alone; all rows draw the same scenes with
the same noise. The token error needs few scenes to be steady: it is the distance of a latent to the one that the
reference solver gives from the same noise under the same condition, as a share of the latents' length.
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
from project import BUILT_IN
from torch import Tensor

from ming_core import Solver, load_univision
from ming_core.flow_head import FlowHead, Sampler
from ming_core.solver import METHODS
from tiny_shapes.evaluation.evaluator import Evaluator
from tiny_shapes.evaluation.scores import Score, share
from tiny_shapes.world import compare, read_scene
from tiny_shapes.world.tasks import require

EVALUATIONS = (4, 6, 8, 12, 16)
REFERENCE = Solver(64, "data_ab2")  # off by 0.05 % (root mean square), which 64 steps of ab2 are by 0.5 %
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


class DrawnLatent(NamedTuple):
    """What one latent was drawn from."""

    z: Tensor
    noise: Tensor
    guidance_weights: tuple[float, ...]


class Result(NamedTuple):
    """The quality of one solver with one number of evaluations.

    error       of a token: median, root mean square
    right       share of drawings with every requested object right
    attributes  share of objects that have each attribute right
    """

    solver: Solver
    error: tuple[float, float]
    right: Score
    attributes: list[float]

    def row(self) -> str:
        """A row of the Markdown table."""
        shares = (self.right.value, *self.attributes)
        interval = f"{100 * self.right.low:.0f} to {100 * self.right.high:.0f} %"
        errors = [f"{x:.1%}" for x in self.error]
        cells = [str(self.solver.steps), self.solver.method, *errors, f"{shares[0]:.1%}", interval]
        return "| " + " | ".join([*cells, *(f"{x:.1%}" for x in shares[1:])]) + " |"


@contextmanager
def recording(into: list[DrawnLatent]) -> Iterator[None]:
    """Within it, what every latent is drawn from is added to the list."""
    draw = Sampler.draw

    def recorded(sampler: Sampler, z: Tensor, noise: Tensor) -> Tensor:
        into.append(DrawnLatent(z.clone(), noise.clone(), tuple(sampler.guidance_weights[:, 0].tolist())))
        return draw(sampler, z, noise)

    with patch.object(Sampler, "draw", recorded):
        yield


@torch.no_grad()
def token_error(head: FlowHead, drawn: list[DrawnLatent], solver: Solver) -> tuple[float, float]:
    """Median and root mean square, over the tokens, of the latent's distance to the reference's.

    The unit is the root mean square length of the latents.
    """
    z, noise = torch.cat([d.z for d in drawn]), torch.cat([d.noise for d in drawn])
    weights = drawn[0].guidance_weights
    expected, found = (head.sample(z, noise, weights, steps=s.steps, solver=s) for s in (REFERENCE, solver))
    distance = (found - expected).norm(dim=-1) / expected.square().sum(-1).mean().sqrt()
    return float(distance.median()), float(distance.square().mean().sqrt())


def quality(evaluator: Evaluator) -> tuple[Score, list[float]]:
    """The share of drawings with every requested object right, and of objects that have each attribute right."""
    right: list[bool] = []
    attributes: dict[str, list[bool]] = {name: [] for name in ATTRIBUTES}
    tasks = evaluator.tasks(["generate"])
    for task, result in zip(tasks, evaluator.draw(tasks), strict=True):
        comparison = compare(read_scene(evaluator.pixels(result.features)), require(task.target_scene))
        right.append(comparison.objects_right)
        for name, hits in attributes.items():
            hits += getattr(comparison, name)
    return share("right", right, ""), [statistics.fmean(hits) for hits in attributes.values()]


def table(results: list[Result], scenes: int) -> str:
    """All results as Markdown."""
    lines = [
        f"{scenes} scenes per row; the interval is that of 95 % confidence.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(result.row() for result in results),
    ]
    return "\n".join(lines) + "\n"


def plot(results: list[Result], path: Path) -> None:
    """Draw token error and drawings by number of evaluations."""
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
    left.set(title="error of an image token, %, root mean square", ylim=(0, None))
    right.set(title="drawings with every object right, %", ylim=(0, 104))
    for axes in (left, right):
        axes.set(xlabel="velocity evaluations per image token", xticks=EVALUATIONS)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUILT_IN, help="checkpoint folder (default: the built-in model)")
    parser.add_argument("--scenes", type=int, default=100, help="scenes to draw for each row (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for steps.md and steps.png")
    options = parser.parse_args()

    engine = load_univision(options.model)
    drawn: list[DrawnLatent] = []
    with recording(drawn):
        quality(Evaluator(engine, min(REFERENCE_SCENES, options.scenes), solver=REFERENCE))
    results = []
    for evaluations in EVALUATIONS:
        for method in METHODS:
            solver = Solver(evaluations, method)  # all methods take one evaluation per step
            found = quality(Evaluator(engine, options.scenes, solver=solver))
            engine.prefix_cache.clear()
            results.append(Result(solver, token_error(engine.network.flow_head, drawn, solver), *found))
            print(results[-1].row(), flush=True)
    print("\n" + table(results, options.scenes))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "steps.md").write_text(table(results, options.scenes), encoding="utf-8")
        plot(results, options.out / "steps.png")


if __name__ == "__main__":
    main()
