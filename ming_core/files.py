"""Atomic writing of files and folders, and small safetensors files with a JSON header of our own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .json_files import FileError

HEADER = "ming"  # the metadata entry that holds the JSON


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON-able `about`; on any failure the folder is left as it was. Raises FileError."""
    data = save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        {HEADER: json.dumps(dict(about), ensure_ascii=False)},
    )
    write_whole(path, data)


def write_whole(path: str | Path, data: bytes) -> None:
    """Put `data` at `path` in one step, and create its folder. Raises FileError; no partial file is left behind."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
        move(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it is gone if all went well
            os.unlink(temporary)


@contextlib.contextmanager
def written_together(folder: Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write files into, which are moved to `folder` once all are written; `stale` ones there are removed.

    Raises FileError. If one cannot be written, none is moved; if one cannot be moved, those before it have been.
    """
    fresh = folder / f".new.{secrets.token_hex(8)}"
    try:
        yield fresh
        # largest first: the file that may be in use is the weights, and then nothing has been moved yet
        for path in sorted(fresh.iterdir(), key=lambda path: -path.stat().st_size):
            move(path, folder / path.name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_whole_folder(write: Callable[[Path], None], folder: Path) -> None:
    """Have `write` fill a temporary folder, then rename it: a reader never finds a partial one. Raises FileError."""
    # names that nobody uses for folders of their own: a folder that has one is removed
    fresh, old = (folder.with_name(f".{folder.name}.ming-{suffix}") for suffix in ("new", "old"))
    try:
        if old.exists() and not folder.exists():  # an earlier run was killed between the two renames
            move(old, folder)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(folder, error) from error
        raise
    try:
        if folder.exists():
            move(folder, old)
        move(fresh, folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            with contextlib.suppress(OSError):  # then the next run brings it back
                move(old, folder)
        raise FileError(
            f"{folder} cannot be replaced ({error.strerror or error}): the complete new folder is {fresh}; "
            "close the programs that use the old one, then rename it"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def move(path: Path, to: Path) -> None:
    """Rename, with retries: Windows refuses while any program, such as a virus scanner, has a file of it open."""
    for seconds in (0.5, 1.0, 2.0):
        try:
            path.replace(to)
            return
        except PermissionError:
            time.sleep(seconds)
    path.replace(to)


def file_format(path: str | Path) -> str:
    """The about["format"] of a file that `write_tensors` made, "" for any other safetensors file. Raises FileError."""
    with _opened(path) as (_, about):
        return _format(about)


def check_format(path: str | Path, wanted: str) -> None:
    """Raises FileError for a file that is not of this format; only its header is read."""
    with _opened(path) as (_, about):
        _require_format(path, about, wanted)


def read_tensors(path: str | Path, wanted: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about) of a file that `write_tensors` made with about["format"] == wanted. Raises FileError."""
    with _opened(path) as (file, about):
        _require_format(path, about, wanted)
        # cloned: a mapped tensor would keep the file open, and change when the file does
        return {name: file.get_tensor(name).clone() for name in file.keys()}, about  # noqa: SIM118 - not a dict


def _format(about: Any) -> str:
    found = about.get("format") if isinstance(about, dict) else None
    return found if isinstance(found, str) else ""


def _require_format(path: str | Path, about: Any, wanted: str) -> None:
    found = _format(about)
    if found != wanted:
        kind = f'"{found}"' if found else "unknown"
        raise FileError(f'{path}: the format of this file is {kind}, expected "{wanted}": choose another file')


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file and its `about`; any problem while it is read is a FileError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file, json.loads((file.metadata() or {}).get(HEADER, "{}"))
    except FileError:
        raise
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path}: damaged or not a safetensors file ({error}); save it again") from None


def _unwritable(path: Path, error: OSError) -> FileError:
    return FileError(f"cannot write {path}: {error.strerror or error}; choose a folder that you may write to")
