"""Two checkouts of this project compared: what the same rounds take in each, as ratios made in one run.

    git worktree add ../before f735b59
    python benchmarks/compare.py ../before . [--repeats 9] [--threads 1] [--reduced 64] [--precision int8]

Each checkout runs in a process of its own, and one waits while the other works: A B A B ... Only the public Python API
is used, so checkouts whose insides differ can be compared. The model is the built-in one of this checkout or, with
--reduced, that of each checkout's own benchmarks/reduced.py, which has the published proportions. The outputs are
compared as well: the largest difference of the latents, and whether the texts are equal.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from project import BUILT_IN
from timing import machine, seconds_of

DRAW = "Please generate the corresponding image based on the description. a large red circle on a white background"
EDIT = "Make the red circle blue."
ASK = "Please describe the picture in detail."
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quantization": "int8"},
    "int4": {"dtype": torch.bfloat16, "quantization": "int4"},
}


class Settings(NamedTuple):
    """What both processes are started with. reduced: tokens per image of the reduced model; None: the built-in one."""

    model: Path
    precision: str
    reduced: int | None
    threads: int


class Measured(NamedTuple):
    """What one call took, and what it gave: latents or text."""

    seconds: float
    output: torch.Tensor | str


def cases(settings: Settings) -> dict[str, Callable[[], torch.Tensor | str]]:
    """The rounds that are measured, by name. Runs in a process whose import path begins with the checkout."""
    import ming_core

    if settings.reduced:
        from reduced import reduced_model

        model = reduced_model(settings.reduced)
    else:
        model = ming_core.load_univision(settings.model, **PRECISIONS[settings.precision])
    first = model.generate_image(ming_core.Conversation(), DRAW, max_new_tokens=1)

    def draw(images: int = 1) -> torch.Tensor:
        model.prefix_cache.clear()
        drawn = model.generate_images(ming_core.Conversation(), DRAW, seeds=list(range(images)), max_new_tokens=1)
        return torch.cat([result.features.latents for result in drawn])

    def edit() -> torch.Tensor:
        return model.generate_image(first.conversation, EDIT, seed=1, max_new_tokens=1).features.latents

    def understand() -> str:
        model.prefix_cache.clear()
        return model.understand(ming_core.Conversation(), ASK, features=first.features, max_new_tokens=32).text

    return {
        "draw, two guidance rows": draw,
        "edit, three guidance rows": edit,
        "understand": understand,
        "draw four images in one pass": lambda: draw(4),
    }


def serve(checkout: Path, settings: Settings, connection: Connection) -> None:
    """Run the rounds of one checkout when asked for them by name; None ends the process."""
    sys.path[:0] = [str(checkout / "benchmarks"), str(checkout)]
    torch.set_num_threads(settings.threads)
    outputs: list[torch.Tensor | str] = []
    with torch.no_grad():
        rounds = cases(settings)
        connection.send(list(rounds))
        while (name := connection.recv()) is not None:
            run = rounds[name]
            seconds = seconds_of(lambda run=run: outputs.append(run()))
            connection.send(Measured(seconds, outputs.pop()))


class Worker:
    """A process that runs the rounds of one checkout."""

    def __init__(self, checkout: Path, settings: Settings) -> None:
        if not (checkout / "ming_core" / "__init__.py").is_file():
            raise SystemExit(f"{checkout} is not a checkout of this project: it has no ming_core")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(checkout.resolve(), settings, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.rounds: list[str] = self._connection.recv()

    def measure(self, name: str) -> Measured:
        """Run one round."""
        self._connection.send(name)
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.join()


def difference(a: torch.Tensor | str, b: torch.Tensor | str) -> str:
    """How two outputs differ, in words."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return f"latents differ by up to {(a - b).abs().max():.1g}"
    return "same text" if a == b else "other text"


def compare(a: Worker, b: Worker, name: str, repeats: int) -> str:
    """Measure one round alternately in both; a row of the table."""
    a.measure(name), b.measure(name)  # to warm up
    pairs = [(a.measure(name), b.measure(name)) for _ in range(repeats)]
    of_a, of_b = ([pair[i].seconds for pair in pairs] for i in (0, 1))
    medians = statistics.median(of_a), statistics.median(of_b)
    low, _, high = statistics.quantiles([y / x for x, y in zip(of_a, of_b, strict=True)], n=4)
    cells = [
        name,
        *(f"{seconds:.3f}" for seconds in medians),
        f"{medians[1] / medians[0]:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{min(of_b) / min(of_a):.3f}",  # other processes can only make a round slower
        difference(pairs[0][0].output, pairs[0][1].output),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("a", metavar="CHECKOUT_A", type=Path, help="the state to compare with")
    parser.add_argument("b", metavar="CHECKOUT_B", type=Path, help="the state to judge")
    parser.add_argument("--repeats", type=int, default=9, help="measurements of each round, at least 2 (%(default)s)")
    parser.add_argument("--only", metavar="TEXT", default="", help="only rounds whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    parser.add_argument("--model", type=Path, default=BUILT_IN, help="checkpoint folder (default: the built-in model)")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32", help="precision (%(default)s)")
    parser.add_argument("--reduced", metavar="TOKENS", type=int, help="use the reduced model with so many image tokens")
    options = parser.parse_args()
    if options.repeats < 2:
        raise SystemExit(f"--repeats is {options.repeats}: it must be at least 2")
    torch.set_num_threads(options.threads)
    settings = Settings(options.model.resolve(), options.precision, options.reduced, options.threads)
    workers = [Worker(checkout, settings) for checkout in (options.a, options.b)]
    print(f"{machine()}; A: {options.a}, B: {options.b}\n")
    columns = ("round", "A, s", "B, s", "B / A", "quartiles of the pairs", "B / A, fastest", "outputs")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in (name for name in workers[0].rounds if options.only in name):
        print(compare(*workers, name, options.repeats), flush=True)
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    main()
