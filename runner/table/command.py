"""`quickstart.py map`: runs the rows of a table that are not done, and keeps results.jsonl."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from ..session import known_node_classes
from ..terminal import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED
from ..workflow import NodeClasses, WorkflowError, read_workflow, with_settings
from .jobs import Job, in_sharing_order, make_jobs
from .results import Record, Results, ResultsError, open_results
from .rows import TableError, read_table, table_of_images
from .worker import RowRunner, WorkersError

SECONDS_BETWEEN_LINES = 10.0  # of progress, where a line cannot be redrawn


def main(
    workflow: str | Path,
    *,
    table: str | Path | None = None,
    images: str | Path | None = None,
    out: str | Path,
    settings: Sequence[str] = (),
    ray: str | None = None,
    workers: int | None = None,
    batch: int = 1,
    node_classes: NodeClasses | None = None,
    stream: TextIO | None = None,
) -> int:
    """Runs a workflow for each row and returns the exit code of the process: 0 only if all rows are done.

    Args:
        table, images: a table, or a folder of pictures in place of one.
        out: the folder for results, or an fsspec URL.
        settings: NODE.INPUT=VALUE, inputs to change in all rows.
        ray: the address of a Ray cluster; empty means Ray on this machine, and None no Ray.
        workers: with Ray, the number of processes; None means one for each GPU.
        batch: rows that are drawn in one pass.
        node_classes: the class of each node type; None means `known_node_classes()`.
        stream: where progress is printed; None means the standard output.
    """
    progress = Progress(stream or sys.stdout)
    node_classes = known_node_classes() if node_classes is None else node_classes
    if workers is not None and ray is None:
        progress.say("Refused: --workers is the number of Ray's processes: add --ray, or leave it out")
        return EXIT_REFUSED
    try:
        graph = read_workflow(workflow)
        if settings:
            graph = with_settings(graph, settings, node_classes)
        rows = read_table(table) if table is not None else table_of_images(images or ".")
        results = open_results(out)
        with results.in_use():
            jobs = make_jobs(rows, graph, node_classes)

            def run(waiting: Sequence[Job]) -> Iterator[Record]:
                if ray is None:
                    return run_here(waiting, results, node_classes, batch)
                from . import ray_pool

                return ray_pool.run_on_ray(
                    waiting, results, address=ray, workers=workers, batch=batch, nodes=ray_pool.NODES
                )

            return _run(jobs, results, run, progress)
    except (WorkflowError, TableError, ResultsError) as error:
        progress.say(f"Refused: {error}")
        return EXIT_REFUSED
    except OSError as error:
        progress.say(f"Stopped: {error}; run the same command again when that is mended")
        return EXIT_FAILED
    except KeyboardInterrupt:
        progress.say("Interrupted before anything ran.")
        return EXIT_INTERRUPTED


def _run(
    jobs: Sequence[Job],
    results: Results,
    run: Callable[[Sequence[Job]], Iterator[Record]],
    progress: Progress,
) -> int:
    before = results.done()
    waiting = in_sharing_order([job for job in jobs if job.key not in before])
    records = {job.key: {**before[job.key], "row": job.row_id} for job in jobs if job.key in before}
    progress.start(len(jobs), len(records), results.place)
    results.write_table(_in_order(jobs, records))
    interrupted = False
    try:
        for record in run(waiting) if waiting else ():
            records[record["key"]] = record
            results.append(record)
            progress.finished(record)
    except KeyboardInterrupt:
        interrupted = True
    except WorkersError as error:
        progress.say(f"Stopped: {error}")
    results.write_table(_in_order(jobs, records))
    return progress.end(records.values(), len(jobs), interrupted)


def run_here(jobs: Iterable[Job], results: Results, node_classes: NodeClasses, batch: int = 1) -> Iterator[Record]:
    """Runs jobs one after another in this process; yields the record of each."""
    runner = RowRunner(results, node_classes=node_classes, batch=batch)
    try:
        yield from runner.run(jobs)
    finally:
        runner.close()


def _in_order(jobs: Sequence[Job], records: dict[str, Record]) -> list[Record]:
    return [records[job.key] for job in jobs if job.key in records]


class Progress:
    """Prints how many rows are done, at what rate, and how long the others will take. Failures are lines of their own.

    In a terminal one line is redrawn; elsewhere a line is printed every ten seconds at most.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._redraws = stream.isatty()
        self._bar: tqdm | None = None
        self._printed_at = time.monotonic()

    def start(self, rows: int, done: int, place: str) -> None:
        already = f", of which {done} are done already" if done else ""
        self.say(f"{_counted(rows)}{already}. Results go to {place}")
        self._bar = tqdm(
            total=rows,
            initial=done,
            unit="row",
            file=self._stream if self._redraws else _Nowhere(),
            leave=False,
            dynamic_ncols=self._redraws,
            ascii="░█",
        )

    def finished(self, record: Record) -> None:
        assert self._bar is not None
        self._bar.update()
        if record["status"] == "failed":
            self.say(f"Row {record['row']} failed: {record['error']}")
        if not self._redraws and time.monotonic() - self._printed_at >= SECONDS_BETWEEN_LINES:
            self._printed_at = time.monotonic()
            self.say(rate_and_time_left(self._bar))

    def end(self, records: Iterable[Record], rows: int, interrupted: bool) -> int:
        """Prints what is done and what is not, and returns the exit code."""
        if self._bar is not None:
            self._bar.close()
        done = sum(record["status"] == "done" for record in records)
        failed = sum(record["status"] == "failed" for record in records)
        words = f"{done} of {_counted(rows)} {'is' if rows == 1 else 'are'} done" + (
            f", {failed} failed" if failed else ""
        )
        if failed and not interrupted:
            words += "; mend what the messages name, and run the same command again for these"
        elif done < rows:
            words += "; run the same command again for the others"
        self.say(("Interrupted: " if interrupted else "") + f"{words}.")
        if interrupted:
            return EXIT_INTERRUPTED
        return EXIT_DONE if done == rows else EXIT_FAILED

    def say(self, text: str) -> None:
        if self._bar is not None and self._redraws:
            self._bar.clear()
        print(text, file=self._stream, flush=True)


def _counted(rows: int) -> str:
    return f"{rows} row" + "s" * (rows != 1)


def rate_and_time_left(bar: tqdm) -> str:
    """Such as "12 of 40 rows, 1.5 s a row, 0:00:42 left"."""
    numbers = bar.format_dict
    made = numbers["n"] - numbers["initial"]
    if not made:
        return f"{numbers['n']} of {numbers['total']} rows"
    pace = numbers["elapsed"] / made
    rate = f"{pace:.1f} s a row" if pace >= 1 else f"{1 / pace:.1f} rows a second"
    left = tqdm.format_interval((numbers["total"] - numbers["n"]) * pace)
    return f"{numbers['n']} of {numbers['total']} rows, {rate}, {left} left"


class _Nowhere:
    """A stream that keeps nothing: the bar counts, and prints nothing."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass
