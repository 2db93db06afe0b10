"""Tables: CSV (by commas or semicolons), tab-separated, JSON lines, Parquet, or the pictures of a folder.

A column is `NODE.INPUT` (a node's id and an input of it), `image` (the picture to start from), `id` (a name for the
row), or begins with # (a remark). An empty cell, or null, leaves what the workflow has.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...ming_core.json_files import FileError, printable, read_json
from ..core_nodes import is_image_file

ID, IMAGE, REMARK = "id", "image", "#"
VALUES = (str, int, float, bool, list, dict)  # that a workflow can have; Parquet has others
MAX_PROBLEMS = 20  # in one message


class TableError(ValueError):
    """A table was refused before anything ran. `problems` has one sentence for each problem, with row and column."""

    def __init__(self, problems: Iterable[str] | str):
        self.problems = [printable(problem) for problem in ([problems] if isinstance(problems, str) else problems)]
        more = len(self.problems) - MAX_PROBLEMS
        shown = [*self.problems[:MAX_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        head = f"{len(self.problems)} problems in the table:\n  - " if len(self.problems) > 1 else ""
        super().__init__(head + "\n  - ".join(shown))


@dataclass(frozen=True)
class Row:
    """A row: its number in the table, from 1, its id, and the values of its cells by column."""

    number: int
    id: str
    cells: dict[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"row {self.number}" + (f" ({self.id})" if self.id != str(self.number) else "")


@dataclass(frozen=True)
class Table:
    """Rows, and the folder that their relative paths begin in."""

    rows: list[Row]
    folder: Path


def read_table(path: str | Path) -> Table:
    """Reads a table by the ending of its file. Raises TableError for what is no table."""
    path = Path(path).absolute()
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise TableError(f"{path} is not a table that can be read: use a file that ends in {', '.join(READERS)}")
    try:
        cells = list(read(path))
    except FileError as error:
        raise TableError(str(error)) from None
    except OSError as error:
        raise TableError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise TableError(f"{path} is not UTF-8 text: save it as CSV in UTF-8") from None
    if not cells:
        raise TableError(f"{path} has no rows")
    return Table(_rows(cells), path.parent)


def table_of_images(folder: str | Path) -> Table:
    """A row for each picture file in a folder and the folders in it, by name. Raises TableError without one."""
    folder = Path(folder).absolute()
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if is_image_file(path))
    if not files:
        raise TableError(f"there is no picture in {folder}")
    return Table(_rows([{ID: file.as_posix(), IMAGE: file.as_posix()} for file in files]), folder)


def _rows(cells: list[dict[str, Any]]) -> list[Row]:
    problems: list[str] = []
    rows: list[Row] = []
    seen: dict[str, int] = {}
    columns = dict.fromkeys(column for row in cells for column in row)
    problems += [problem for column in columns if (problem := _bad_column(column))]
    for number, values in enumerate(cells, start=1):
        given = values.get(ID)
        row = Row(number, str(number) if given in (None, "") else str(given), _settings(values))
        rows.append(row)
        missing = [column for column in columns if column not in values and not column.startswith(REMARK)]
        problems += [f"{row.where}, column {column}: it is missing" for column in missing]
        problems += [
            f"{row.where}, column {column}: {value!r} is a {type(value).__name__}; save it as text or as a number"
            for column, value in row.cells.items()
            if not isinstance(value, VALUES)
        ]
        if row.id in seen:
            problems.append(f"{row.where}, column {ID}: {row.id!r} is also the id of row {seen[row.id]}")
        seen.setdefault(row.id, number)
    if problems:
        raise TableError(problems)
    return rows


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """The cells that set something."""
    return {
        column: value
        for column, value in values.items()
        if column != ID and not column.startswith(REMARK) and value is not None
    }


def _bad_column(column: str) -> str | None:
    node, dot, name = column.rpartition(".")
    if column in (ID, IMAGE) or column.startswith(REMARK) or (dot and node and name):
        return None
    return (
        f"column {column!r}: expected NODE.INPUT, for example 5.seed, or {IMAGE}, or {ID}; a column that begins with "
        f"{REMARK} is a remark"
    )


def _read_csv(path: Path, delimiter: str = "") -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        if not delimiter:  # spreadsheets separate by semicolons where a comma is in numbers
            first = file.readline()
            delimiter = ";" if first.count(";") > first.count(",") else ","
            file.seek(0)
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(lines, [])
            if repeated := [name for name in header if header.count(name) > 1]:
                raise TableError(f"column {repeated[0]!r} is there more than once")
            for number, cells in enumerate(filter(None, lines), start=1):
                if len(cells) > len(header):
                    raise TableError(
                        f"row {number} has {len(cells)} cells, and the table {len(header)} columns: put a text with a "
                        f"{_SEPARATORS[delimiter]} into double quotes"
                    )
                if len(cells) < len(header):
                    raise TableError(f"row {number}, column {header[len(cells)]}: it is missing")
                yield {name: cell or None for name, cell in zip(header, cells, strict=False)}
        except csv.Error as error:
            raise TableError(f"{path}, line {lines.line_num}: {error}") from None


_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}


def _read_tsv(path: Path) -> Iterator[dict[str, Any]]:
    return _read_csv(path, "\t")


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = read_json(line, what=f"{path}, line {number}", remedy="write one JSON object on each line")
            if not isinstance(row, dict):
                raise TableError(f"{path}, line {number}: expected an object of columns and values")
            yield row


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise TableError(
            f"{path} is a Parquet file, and pyarrow is not installed: install it with pip install pyarrow, or save the "
            "table as CSV or JSON lines"
        )
    import pyarrow
    import pyarrow.parquet

    try:
        yield from pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise TableError(f"{path} cannot be read: {error}") from None


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}
