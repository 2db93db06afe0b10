"""What is done: a folder for each row, made whole in one step, and results.jsonl with a line for each row of the table.

A row's files are written to a folder of their own and come to their place together, with result.json among them: in a
folder of this machine or a shared one by a rename, at an fsspec URL (such as s3://bucket/folder) by uploading
result.json last. Where result.json is, the row is done.

A record is {"row", "status", "seconds", "answers", "files", "error", "key"}: the row's id, "done" or "failed", the
texts that nodes show by node id, the files that were saved, relative to the folder, and what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ...ming_core.json_files import FileError, read_json
from ...nodes.filenames import absolute

Record = dict[str, Any]
RECORD, RESULTS, ROWS, WORK = "result.json", "results.jsonl", "rows", ".work"


class ResultsError(ValueError):
    """The folder for results cannot be used; the message says why and what to do."""


def open_results(place: str | Path) -> Results:
    """The results in a folder, or at an fsspec URL such as s3://bucket/folder."""
    return RemoteResults(str(place)) if "://" in str(place) else FolderResults(absolute(place))


class Results:
    """What RowRunner and the command need of a place for results."""

    place: str

    def done(self) -> dict[str, Record]:
        """The records of all rows that are done, by key."""
        raise NotImplementedError

    def find(self, name: str) -> Record | None:
        """The record of the row whose folder has this name, if it is done."""
        raise NotImplementedError

    def staged(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """An empty folder for the files of a row; removed at the end of the `with` block unless committed."""
        raise NotImplementedError

    def deaths(self, name: str) -> int:
        """How many workers have begun this row since the run started and did not come to its end."""
        raise NotImplementedError

    def commit(self, name: str, folder: Path, record: Record) -> Record:
        """Brings a staged folder to its place, whole, and returns the record that counts from now on.

        If somebody else has done the same row meanwhile, their results stay and these are dropped.
        """
        raise NotImplementedError

    def write_table(self, records: Iterable[Record]) -> None:
        """Writes results.jsonl, whole."""
        raise NotImplementedError

    def append(self, record: Record) -> None:
        """Adds a line to results.jsonl while the rows run, for those who watch it."""

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Raises ResultsError if another run writes to the same place."""
        yield


class FolderResults(Results):
    """Results in a folder of this machine, or one that several machines share."""

    def __init__(self, folder: Path):
        self.folder, self.place = folder, str(folder)

    def done(self) -> dict[str, Record]:
        rows = self.folder / ROWS
        names = os.listdir(rows) if rows.is_dir() else []
        records = filter(None, map(self.find, names))
        return {record["key"]: record for record in records}

    def find(self, name: str) -> Record | None:
        try:
            return _as_record(read_json(self.folder / ROWS / name / RECORD))
        except FileError:
            return None

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        folder = self.folder / WORK / f"{name}.{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        (folder / RECORD).touch()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def deaths(self, name: str) -> int:
        return sum(1 for _ in (self.folder / WORK).glob(f"{name}.*"))

    def commit(self, name: str, folder: Path, record: Record) -> Record:
        target = self.folder / ROWS / name
        # It is missing if a later run has cleared this folder away, though nodes may have saved to it since.
        with (folder / RECORD).open("r+", encoding="utf-8") as file:
            json.dump(record, file)
        target.parent.mkdir(exist_ok=True)
        try:
            folder.rename(target)
        except OSError:  # there is one already
            if (found := self.find(name)) is not None:
                return found
            shutil.rmtree(target, ignore_errors=True)  # damaged: it is not done
            folder.rename(target)
        return record

    def write_table(self, records: Iterable[Record]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_whole(self.folder / RESULTS, _lines(records))

    def append(self, record: Record) -> None:
        with (self.folder / RESULTS).open("a", encoding="utf-8") as file:
            file.write(_lines([record]))

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        work = self.folder / WORK
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(
                f"cannot make the folder {self.folder} ({error.strerror}): choose another --out"
            ) from None
        lock = work / "lock.json"
        holder = _holder(lock)
        if holder is not None:
            raise ResultsError(
                f"another run writes to {self.folder} (process {holder}): wait for it, or choose another --out"
            )
        _write_whole(lock, json.dumps({"host": socket.gethostname(), "process": os.getpid(), "started": _started()}))
        for leftover in work.iterdir():  # of a run that was killed
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(work, ignore_errors=True)


class RemoteResults(Results):
    """Results at an fsspec URL. An object comes to be whole or not at all, and result.json comes last."""

    def __init__(self, url: str):
        import fsspec  # comes with PyTorch

        self.place = url
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ResultsError(f"{url} cannot be used: {error}") from None

    def done(self) -> dict[str, Record]:
        rows = f"{self.root}/{ROWS}"
        paths = self.files.glob(f"{rows}/*/{RECORD}") if self.files.isdir(rows) else []
        records = filter(None, (self.find(path.rsplit("/", 2)[-2]) for path in paths))
        return {record["key"]: record for record in records}

    def find(self, name: str) -> Record | None:
        try:
            return _as_record(read_json(self.files.cat_file(f"{self.root}/{ROWS}/{name}/{RECORD}")))
        except (FileNotFoundError, FileError):
            return None

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        mark = f"{self._work}/{name}.{uuid.uuid4().hex[:8]}"
        self.files.pipe_file(mark, b"")  # stays if this process dies
        try:
            with tempfile.TemporaryDirectory(prefix="ming-row-") as folder:
                yield Path(folder)
        finally:
            with contextlib.suppress(FileNotFoundError):  # a later run has cleared it away
                self.files.rm_file(mark)

    def deaths(self, name: str) -> int:
        return len(self.files.glob(f"{self._work}/{name}.*"))

    def commit(self, name: str, folder: Path, record: Record) -> Record:
        if (found := self.find(name)) is not None:
            return found
        target = f"{self.root}/{ROWS}/{name}"
        for path in files_in(folder):
            remote = f"{target}/{path}"
            self.files.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
            self.files.put_file(str(folder / path), remote)
        self.files.makedirs(target, exist_ok=True)
        self.files.pipe_file(f"{target}/{RECORD}", json.dumps(record).encode())
        return record

    def write_table(self, records: Iterable[Record]) -> None:
        self.files.pipe_file(f"{self.root}/{RESULTS}", _lines(records).encode())

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        try:
            self._remove_work()  # of a run that was killed
            self.files.makedirs(self._work, exist_ok=True)
        except Exception as error:  # each file system has its own
            raise ResultsError(f"{self.place} cannot be written to: {error}") from error
        try:
            yield
        finally:
            self._remove_work()

    @property
    def _work(self) -> str:
        return f"{self.root}/{WORK}"

    def _remove_work(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.files.rm(self._work, recursive=True)


def files_in(folder: Path) -> list[str]:
    """The files of a row in its folder and the folders in it, as relative paths with slashes, in order."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [path for path in paths if path != RECORD]


def _as_record(value: Any) -> Record | None:
    return value if isinstance(value, dict) and isinstance(value.get("key"), str) else None


def _lines(records: Iterable[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that nobody ever sees a part of it."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _started(process: int | None = None) -> float | None:
    """When a process started; None without one. A number is used again, a number with its start is not."""
    try:
        return psutil.Process(process).create_time()
    except psutil.Error:
        return None


def _holder(lock: Path) -> int | None:
    """The process that has written a lock and is still running on this machine."""
    try:
        found = read_json(lock)
        same_host = found["host"] == socket.gethostname()
        alive = same_host and _started(found["process"]) == found["started"]
    except (FileError, KeyError, TypeError, ValueError):
        return None
    return found["process"] if alive else None
