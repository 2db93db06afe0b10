"""Jobs: the workflow of each row, checked before anything runs, and known by its content."""

from __future__ import annotations

import hashlib
import json
import os.path
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..output_cache import is_changed
from ..workflow import (
    LOAD_IMAGE,
    Node,
    NodeClasses,
    Workflow,
    WorkflowError,
    is_link,
    plan,
    with_image,
    with_inputs,
)
from .rows import IMAGE, Row, Table, TableError


@dataclass(frozen=True)
class Job:
    """A row that can run.

    key     a digest of all that its results depend on: widget values, links, pictures and other files that are read
    name    of the folder of its results: readable, and its own
    steps   digests of the same kind for each of its nodes, in running order
    """

    row_id: str
    key: str
    name: str
    workflow: Workflow
    steps: Sequence[str] = ()


def make_jobs(table: Table, workflow: Workflow, node_classes: NodeClasses) -> list[Job]:
    """The job of each row, in the table's order.

    Raises WorkflowError if the workflow itself is at fault, and TableError with every problem of the table.
    """
    places = {column: _place(column) for row in table.rows for column in row.cells if column != IMAGE}
    try:
        with_inputs(workflow, dict.fromkeys(places.values()), node_classes)
    except WorkflowError as error:
        raise TableError(_about_column(problem) for problem in error.problems) from None
    problems: list[str] = []
    made: list[tuple[Row, Workflow, str, tuple[str, ...]]] = []
    for row in table.rows:
        try:
            graph = _with_cells(workflow, row, table.folder, node_classes)
            made.append((row, graph, *_content(plan(graph, node_classes))))
        except TableError as error:
            problems += error.problems
        except WorkflowError as error:
            if not any(_column(problem, row) for problem in error.problems):
                raise  # no cell can mend it
            problems += [f"{row.where}{_in_column(problem, row)}: {problem}" for problem in error.problems]
    if problems:
        raise TableError(problems)
    return _jobs(made)


def in_sharing_order(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with those next to each other that share a beginning: a picture, or the first rounds.

    Only the outputs of the last workflow are kept, so what is shared is computed once if they follow one another.
    Otherwise the order stays.
    """
    first_seen: dict[str, int] = {}
    places = {job.key: [first_seen.setdefault(step, len(first_seen)) for step in job.steps] for job in jobs}
    return sorted(jobs, key=lambda job: places[job.key])


def _jobs(made: Iterable[tuple[Row, Workflow, str, tuple[str, ...]]]) -> list[Job]:
    jobs: list[Job] = []
    equal: Counter[str] = Counter()
    for row, graph, content, steps in made:
        # Rows of equal content are told apart by their number among these, not by their place in the table.
        key = hashlib.sha256(f"{content} {equal[content]}".encode()).hexdigest()
        equal[content] += 1
        name = re.sub(r"[^\w.-]+", "_", row.id).strip("._")[:40]
        jobs.append(Job(row.id, key, f"{name}-{key[:12]}", graph, steps))
    return jobs


def _place(column: str) -> tuple[str, str]:
    node_id, _, name = column.rpartition(".")
    return node_id, name


def _with_cells(workflow: Workflow, row: Row, folder: Path, node_classes: NodeClasses) -> Workflow:
    cells = dict(row.cells)
    image = cells.pop(IMAGE, None)
    if image is not None:
        try:
            workflow = with_image(workflow, folder / str(image))
        except WorkflowError as error:
            raise TableError(f"{row.where}, column {IMAGE}: {error}") from None
    values = {_place(column): value for column, value in cells.items()}
    for (node_id, name), value in values.items():
        if name == "image" and workflow[node_id]["class_type"] == LOAD_IMAGE:
            file = os.path.join(folder, str(value))
            if os.path.isfile(file):  # otherwise it may be in the input folder
                values[node_id, name] = file
    return with_inputs(workflow, values, node_classes)


def _about_column(problem: Any) -> str:
    node_id, name = problem.place
    return f"column {node_id}.{name}: {problem}"


def _column(problem: Any, row: Row) -> str | None:
    """The column that a problem is about."""
    if problem.place is None:
        return None
    columns = [".".join(problem.place), problem.place[1]]  # a picture comes by its column, or by that of its node
    return next((column for column in columns if column in row.cells), None)


def _in_column(problem: Any, row: Row) -> str:
    column = _column(problem, row)
    return f", column {column}" if column else ""


def _content(nodes: Sequence[Node]) -> tuple[str, tuple[str, ...]]:
    """A digest of all that the output nodes depend on, and those of each node; ids and titles are no part of them."""
    digests = _digests(nodes)
    return _digest(sorted(digests[node.id] for node in nodes if node.is_output)), tuple(digests.values())


def _digests(nodes: Sequence[Node]) -> dict[str, str]:
    """A digest of what each node depends on, by node id, for nodes in running order."""
    digests: dict[str, str] = {}
    for node in nodes:
        inputs = {
            name: {"link": [digests[value[0]], value[1]]} if is_link(value) else {"value": value}
            for name, value in node.declared_inputs()
        }
        digests[node.id] = _digest([node.class_type, is_changed(node), inputs])
    return digests


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
