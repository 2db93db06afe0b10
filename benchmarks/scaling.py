"""Tables of rows: several rows in one pass against one at a time, and Ray's share, as ratios made in one run.

    python benchmarks/scaling.py [--rows 8] [--batch 4] [--steps 4] [--ray] [--workers 2] [--tiny-rows 400]

Rows draw a picture each with the built-in model, from different prompts and seeds (text_to_image). Without --ray, only
`--batch` is measured. With it, also the rate of several workers against one, and what Ray costs a row that computes
nothing; both without the time that Ray and the workers take to start, since a table has thousands of rows.
Batches are measured in CPU time on one thread; workers in wall time, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from project import ROOT
from timing import machine, medians

SAME_GROUP = 0.05  # seconds
PROMPTS = ("a large red circle", "a small blue star", "a green square on black", "two yellow triangles")


def load_pack() -> types.ModuleType:
    """The commands of quickstart.py, which make the project's folder a package under another name."""
    sys.path.insert(0, str(ROOT))
    import quickstart

    quickstart.load_pack()
    from ming_univision.runner.table import command

    return command


def write_drawing(folder: Path, rows: int, steps: int) -> None:
    """A workflow that draws a picture, and its table."""
    graph = json.loads((ROOT / "workflows" / "api" / "text_to_image.json").read_text(encoding="utf-8"))
    (draw,) = (node_id for node_id, node in graph.items() if node["class_type"] == "MingGenerate")
    graph[draw]["inputs"]["steps"] = steps
    cells = [{f"{draw}.prompt": PROMPTS[i % len(PROMPTS)], f"{draw}.seed": i} for i in range(rows)]
    write(folder, graph, cells)


def write_tiny(folder: Path, rows: int) -> None:
    """A workflow that computes nothing worth mentioning, and its table."""
    graph = {"1": {"class_type": "PreviewAny", "inputs": {"source": ""}}}
    write(folder, graph, [{"1.source": str(i)} for i in range(rows)])


def write(folder: Path, graph: dict, cells: Sequence[dict]) -> None:
    (folder / "workflow.json").write_text(json.dumps(graph))
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in cells))


def run(command: types.ModuleType, folder: Path, **options: object) -> float:
    """Runs the table in a folder of its own; returns the seconds a row, from the first rows that are done on.

    The rows of a group of Ray come together, so those that come with the first one are not counted.
    """
    finished: list[float] = []

    def append(self: object, record: dict) -> None:
        finished.append(time.perf_counter())

    results = type(command.open_results(folder))
    appended, results.append = results.append, append
    try:
        with tempfile.TemporaryDirectory() as out:
            code = command.main(
                folder / "workflow.json", table=folder / "table.jsonl", out=out, stream=io.StringIO(), **options
            )
    finally:
        results.append = appended
    if code:
        raise SystemExit(f"not all rows were done with {options}")
    start = finished[0] + SAME_GROUP
    return (finished[-1] - start) / sum(moment > start for moment in finished)


@contextlib.contextmanager
def drawing_alone(command: types.ModuleType, folder: Path) -> Iterator[Callable[[int], None]]:
    """draw(batch) runs all rows of the table with a model that is loaded already."""
    from ming_univision.runner.session import known_node_classes
    from ming_univision.runner.table.batches import BatchSession
    from ming_univision.runner.table.jobs import make_jobs
    from ming_univision.runner.table.rows import read_table
    from ming_univision.runner.workflow import read_workflow

    jobs = make_jobs(read_table(folder / "table.jsonl"), read_workflow(folder / "workflow.json"), known_node_classes())
    with tempfile.TemporaryDirectory() as out:
        sessions: dict[int, BatchSession] = {}
        calls = itertools.count()

        def draw(batch: int) -> None:
            session = sessions.setdefault(batch, BatchSession(batch))
            first_seed = 1000 * next(calls)  # a session draws nothing twice
            for start in range(0, len(jobs), batch):
                group = jobs[start : start + batch]
                graphs = [with_new_seed(job.workflow, first_seed + start + k) for k, job in enumerate(group)]
                outcomes = session.run_together(graphs, [Path(out, str(batch))] * len(group))
                failed = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
                if failed:
                    raise SystemExit(str(failed[0]))

        yield draw


def with_new_seed(graph: dict, seed: int) -> dict:
    graph = copy.deepcopy(graph)
    for node in graph.values():
        if node["class_type"] == "MingGenerate":
            node["inputs"]["seed"] = seed
    return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tiny-rows", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = load_pack()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_drawing(folder, options.rows, options.steps)
        with drawing_alone(command, folder) as draw:
            ways = {"one at a time": lambda: draw(1), f"{options.batch} in one pass": lambda: draw(options.batch)}
            times = medians(ways, options.repeats)
        alone, together = times.values()
        print(f"{options.batch} rows in one pass cost {together / alone * options.batch:.2f} of one row")
        if not options.ray:
            return
        pace = [
            statistics.median(run(command, folder, ray="", workers=workers) for _ in range(options.repeats))
            for workers in (1, options.workers)
        ]
        print(f"{options.workers} workers do {pace[0] / pace[1]:.2f} times as many rows as one")
        write_tiny(folder, options.tiny_rows)
        plain, spread = run(command, folder), run(command, folder, ray="", workers=1)
        print(f"a row that computes nothing takes {plain * 1000:.1f} ms, and {spread * 1000:.1f} ms with Ray")


if __name__ == "__main__":
    main()
