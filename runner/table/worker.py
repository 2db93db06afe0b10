"""Runs rows in a session that keeps the model and what the rows share."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..execution import ExecutionError, NodeResult
from ..workflow import NodeClasses, WorkflowError
from .batches import BatchSession, Outcome
from .jobs import Job
from .results import ROWS, Record, Results, files_in

MAX_DEATHS = 3  # of workers in one row, until it counts as failed
TOO_MANY_DEATHS = (
    "{} workers died while they ran this row: it may need more memory than a worker has. Change the row, or run the "
    "same command again to try it once more"
)


class WorkersError(RuntimeError):
    """The rows cannot go on, whichever row it is; the message says why and what to do."""


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
        self.results = results
        self.session = BatchSession(batch, node_classes, input_dir=input_dir)

    def close(self) -> None:
        self.session.close()

    def run(self, jobs: Iterable[Job]) -> Iterator[Record]:
        """Runs rows, as many at a time as a batch has, and commits their results; yields the record of each.

        A row that fails is a record too; only an interrupt is raised.
        """
        jobs = list(jobs)
        for start in range(0, len(jobs), self.session.batch):
            yield from self._run_group(jobs[start : start + self.session.batch])

    def _run_group(self, jobs: Sequence[Job]) -> Iterator[Record]:
        untried, suspects = list[Job](), list[Job]()
        for job in jobs:
            # It may have been done by a worker that died before it could say so.
            if (found := self.results.find(job.name)) is not None:
                yield found
                continue
            deaths = self.results.deaths(job.name)
            if deaths >= MAX_DEATHS:
                yield failed(job, WorkersError(TOO_MANY_DEATHS.format(deaths)), 0.0)
            else:
                (suspects if deaths else untried).append(job)
        for group in (untried, *([job] for job in suspects)):  # a row that kills its worker takes no other with it
            yield from self._run_together(group)

    def _run_together(self, jobs: Sequence[Job]) -> list[Record]:
        started = time.perf_counter()
        try:
            with ExitStack() as stack:
                folders = [stack.enter_context(self.results.staged(job.name)) for job in jobs]
                outcomes = self._outcomes(jobs, folders)
                seconds = (time.perf_counter() - started) / max(1, len(jobs))
                return [self._committed(*row, seconds) for row in zip(jobs, folders, outcomes, strict=True)]
        except OSError as error:  # the place for results is full, or gone
            return [failed(job, error, time.perf_counter() - started) for job in jobs]

    def _outcomes(self, jobs: Sequence[Job], folders: Sequence[Path]) -> list[Outcome]:
        if len(jobs) > 1:
            return self.session.run_together([job.workflow for job in jobs], folders)
        outcomes: list[Outcome] = []
        for job, folder in zip(jobs, folders, strict=True):
            try:
                outcomes.append(self.session.run(job.workflow, output_dir=folder))
            except (ExecutionError, WorkflowError) as error:
                outcomes.append(error)
        return outcomes

    def _committed(self, job: Job, folder: Path, outcome: Outcome, seconds: float) -> Record:
        if isinstance(outcome, Exception):
            return failed(job, outcome, seconds)
        try:
            return self.results.commit(job.name, folder, _done(job, outcome, folder, seconds))
        except OSError as error:
            return failed(job, error, seconds)


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
