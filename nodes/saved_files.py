"""Saved features and conversations: their names in lists, their paths, and what their save and load nodes share.

Files are written to ming/ in ComfyUI's output folder, and read from there and from the input folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..ming_core import FileError
from ..ming_core.files import check_format, file_format
from . import host
from .filenames import numbered_path, validate_prefix


def save_new_file(prefix: str, write: Callable[[Path], None]) -> dict:
    """Write a new file in output/ming, and show the name under which load nodes list it."""
    with new_file(prefix, ".safetensors") as path:
        write(path)
    name = saved_name(path)
    host.show_text(name)
    return {"ui": {"text": [name]}}


class SavingNode:
    """A node with a `filename_prefix` widget that saves a file in output/ming."""

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        return validate_prefix(filename_prefix, host.output_directory() / "ming")


class LoadingNode:
    """A node with a `file` widget that lists the saved files of its `FILE_FORMAT`."""

    FILE_FORMAT: str

    @classmethod
    def files(cls, tooltip: str) -> tuple:
        """The `file` widget."""
        return saved_files(cls.FILE_FORMAT), {"tooltip": tooltip}

    @classmethod
    def VALIDATE_INPUTS(cls, file: str | None = None) -> bool | str:
        try:
            if file is not None:  # None means that the name is linked; it is checked when the node runs
                check_format(saved_path(file), cls.FILE_FORMAT)
        except FileError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, file: str | None, **_: object) -> str | tuple:
        if file is None:  # it is linked, and may become any of them
            return tuple((name, saved_path(name).stat().st_mtime_ns) for name in saved_files())
        return hashlib.sha256(saved_path(file).read_bytes()).hexdigest()


@contextlib.contextmanager
def new_file(prefix: str, suffix: str) -> Iterator[Path]:
    """Create a new file in output/ming with ComfyUI's counter: prefix_00001_.safetensors. Raises FileError.

    The empty file is created first, so that nothing else takes its number, and removed if writing it fails.
    """
    root = host.output_directory() / "ming"
    try:
        folder, name, number = numbered_path(prefix, root)
        folder.mkdir(parents=True, exist_ok=True)
        while not _create(path := folder / f"{name}_{number:05}_{suffix}"):
            number += 1
    except ValueError as error:
        raise FileError(str(error)) from None
    except OSError as error:
        raise FileError(f"cannot write to {root}: {error.strerror}; choose another output folder") from error
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _create(path: Path) -> bool:
    """Create an empty file. Returns False if it exists; some disks ignore case."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def saved_files(file_format: str | None = None) -> list[str]:
    """List saved files, of one format or of any: `ming/x_00001_.safetensors [output]`, `y.safetensors [input]`."""
    names: list[str] = []
    for place in ("output", "input"):
        root, listed = _saved_below(place)
        paths = (path for path in listed.rglob("*.safetensors") if path.is_file() and _is_inside(path, root, listed))
        names += sorted(
            saved_name(path, place) for path in paths if file_format is None or _has_format(path, file_format)
        )
    return names


def saved_name(path: Path, place: str = "output") -> str:
    """The name of a file in the "output" or "input" folder, as `saved_files` lists it."""
    root, _ = _saved_below(place)
    return f"{path.relative_to(root).as_posix()} [{place}]"


def saved_path(name: str | None) -> Path:
    """The path of a listed name. Raises FileError for a missing file or a name outside the folders.

    The name is None or empty if the list was empty when the workflow was saved.
    """
    if not name:
        raise FileError("no file is chosen: save one first, press R to refresh the list, and choose it there")
    if not isinstance(name, str) or "\0" in name:
        raise FileError(f"{name!r} is not a file name: choose a file from the list")
    match = re.fullmatch(r"(.+?) ?\[(output|input)\]", name)
    relative, place = match.groups() if match else (name, "input")
    root, listed = _saved_below(place)
    path = (root / relative).resolve()
    if not _is_inside(path, root, listed):
        raise FileError(f"the file name {name!r} leads out of {root}: choose a file from the list")
    if not path.is_file():
        raise FileError(f"there is no file {relative} in {root}: save it first, or choose another one from the list")
    return path


def _has_format(path: Path, wanted: str) -> bool:
    try:
        stat = path.stat()
        return _format_of(path, stat.st_mtime_ns, stat.st_size) == wanted
    except (FileError, OSError):  # damaged, or in use by another program
        return False


@functools.lru_cache(maxsize=1 << 15)
def _format_of(path: Path, *state: int) -> str:
    """The format of a file in this state; cached, because ComfyUI asks for the lists again on every page load."""
    return file_format(path)


def _saved_below(place: str) -> tuple[Path, Path]:
    """Return the folder that names are relative to, and the folder whose files are listed."""
    if place == "input":
        return host.input_directory(), host.input_directory()
    return host.output_directory(), host.output_directory() / "ming"


def _is_inside(path: Path, *roots: Path) -> bool:
    """Whether a file, with links resolved, is inside one of the folders, any of which may itself be a link."""
    return any(root.resolve() in path.resolve().parents for root in roots)
