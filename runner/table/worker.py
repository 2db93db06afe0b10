"""Runs rows in a session that keeps the model and what the rows share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ..execution import ExecutionError, NodeResult
from ..session import Session
from ..workflow import NodeClasses, WorkflowError
from .jobs import Job
from .results import ROWS, Record, Results, files_in


class RowRunner:
    """One worker. It loads a model once, and computes what consecutive rows share once."""

    def __init__(
        self,
        results: Results,
        *,
        input_dir: str | Path | None = None,
        node_classes: NodeClasses | None = None,
        batch: int = 1,
    ):
        self.results, self.batch = results, batch
        self.session = Session(node_classes, input_dir=input_dir)

    def close(self) -> None:
        self.session.close()

    def run_all(self, jobs: Iterable[Job]) -> Iterator[Record]:
        """Runs jobs one after another, and yields the record of each."""
        yield from map(self.run, jobs)

    def run(self, job: Job) -> Record:
        """Runs a row and commits its results. A row that fails is a record too; only an interrupt is raised."""
        if (found := self.results.find(job.name)) is not None:  # done by a worker that died before it could say so
            return found
        started = time.perf_counter()
        try:
            with self.results.staged(job.name) as folder:
                outcome = self.session.run(job.workflow, output_dir=folder)
                return self.results.commit(job.name, folder, _done(job, outcome, folder, time.perf_counter() - started))
        except (ExecutionError, WorkflowError, OSError) as error:  # OSError: the place for results is full, or gone
            return failed(job, error, time.perf_counter() - started)


def failed(job: Job, error: Exception, seconds: float) -> Record:
    return _record(job, "failed", seconds, {}, [], str(error))


def _done(job: Job, outcome: Mapping[str, NodeResult], folder: Path, seconds: float) -> Record:
    answers = {node_id: text for node_id, result in outcome.items() if (text := _shown_text(result)) is not None}
    files = [f"{ROWS}/{job.name}/{path}" for path in files_in(folder)]
    return _record(job, "done", seconds, answers, files, None)


def _shown_text(result: NodeResult) -> str | list[str] | None:
    texts = [str(text) for text in result.ui.get("text", ())]
    return texts[0] if len(texts) == 1 else texts or None


def _record(
    job: Job, status: str, seconds: float, answers: Mapping[str, object], files: Sequence[str], error: str | None
) -> Record:
    return {
        "row": job.row_id,
        "status": status,
        "seconds": round(seconds, 3),
        "answers": dict(answers),
        "files": list(files),
        "error": error,
        "key": job.key,
    }
