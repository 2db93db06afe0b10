"""Files of features and conversations: what lists call them, where they lie, and the nodes that write and read them.

They are written below ComfyUI's output folder, in ming/, and read from there and from the input folder.
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
from .filenames import numbered_path, prefix_verdict


def saved_as(prefix: str, write: Callable[[Path], None]) -> dict:
    """Write a new file of that name below output/ming, and show what the nodes that load call it."""
    with new_file(prefix, ".safetensors") as path:
        write(path)
    name = saved_name(path)
    host.show_text(name)
    return {"ui": {"text": [name]}}


class SavingNode:
    """A node with a `filename_prefix` widget, whose file goes below output/ming."""

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix: str | None = None) -> bool | str:
        return prefix_verdict(filename_prefix, host.output_directory() / "ming")


class LoadingNode:
    """A node with a `file` widget that lists saved files, of which it loads those of its `FILE_FORMAT`."""

    FILE_FORMAT: str

    @classmethod
    def files(cls, tooltip: str) -> tuple:
        """The `file` widget: what is listed can be loaded by this node."""
        return saved_files(cls.FILE_FORMAT), {"tooltip": tooltip}

    @classmethod
    def VALIDATE_INPUTS(cls, file: str | None = None) -> bool | str:
        try:
            if file is not None:  # None: it is linked, and looked for when it is known
                check_format(saved_path(file), cls.FILE_FORMAT)
        except FileError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, file: str | None, **_: object) -> str | tuple:
        if file is None:  # it is linked: it may be any of them
            return tuple((name, saved_path(name).stat().st_mtime_ns) for name in saved_files())
        return hashlib.sha256(saved_path(file).read_bytes()).hexdigest()


@contextlib.contextmanager
def new_file(prefix: str, suffix: str) -> Iterator[Path]:
    """A new file below output/ming/ with ComfyUI's counter: prefix_00001_.safetensors. Raises FileError.

    It is made empty at once, so that nobody else takes that number, and is gone again if filling it fails.
    """
    root = host.output_directory() / "ming"
    try:
        folder, name, number = numbered_path(prefix, root)
        folder.mkdir(parents=True, exist_ok=True)
        while not _made(path := folder / f"{name}_{number:05}_{suffix}"):
            number += 1
    except ValueError as error:
        raise FileError(str(error)) from None
    except OSError as error:
        raise FileError(f"cannot write below {root}: {error.strerror}; choose another output folder") from error
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _made(path: Path) -> bool:
    """Makes an empty file. False where there is one, which on some disks is also one in other capitals."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def saved_files(wanted: str | None = None) -> list[str]:
    """Names of saved files, of one format or of any: `ming/x_00001_.safetensors [output]`, `y.safetensors [input]`."""
    names = []
    for place in ("output", "input"):
        root, listed = _saved_below(place)
        found = (path for path in listed.rglob("*.safetensors") if path.is_file() and _is_inside(path, root, listed))
        names += sorted(saved_name(path, place) for path in found if wanted is None or _is_of(wanted, path))
    return names


def saved_name(path: Path, place: str = "output") -> str:
    """What `saved_files` calls a file below the "output" or "input" folder."""
    root, _ = _saved_below(place)
    return f"{path.relative_to(root).as_posix()} [{place}]"


def saved_path(name: str | None) -> Path:
    """The file that one of `saved_files` names. Raises FileError for a missing file or a name that climbs out.

    None, and nothing, is what a list holds that was empty when the workflow was stored.
    """
    if not name:
        raise FileError("no file is chosen: save one first, press R to see it in the list, and choose it there")
    if not isinstance(name, str) or "\0" in name:
        raise FileError(f"{name!r} is no file name: choose a file from the list")
    match = re.fullmatch(r"(.+?) ?\[(output|input)\]", name)
    relative, place = match.groups() if match else (name, "input")
    root, listed = _saved_below(place)
    path = (root / relative).resolve()
    if not _is_inside(path, root, listed):
        raise FileError(f"the file name {name!r} leads out of {root}: choose a file from the list")
    if not path.is_file():
        raise FileError(f"there is no file {relative} in {root}: save one first, or put it there")
    return path


def _is_of(wanted: str, path: Path) -> bool:
    try:
        stat = path.stat()
        return _format_of(path, stat.st_mtime_ns, stat.st_size) == wanted
    except (FileError, OSError):  # damaged, or not to be read just now
        return False


@functools.lru_cache(maxsize=1 << 15)
def _format_of(path: Path, *state: int) -> str:
    """The format of a file in this state. Remembered: lists of files are made anew for every page that is opened."""
    return file_format(path)


def _saved_below(place: str) -> tuple[Path, Path]:
    """(folder that names of saved files start from, the one that they are listed from)."""
    if place == "input":
        return host.input_directory(), host.input_directory()
    return host.output_directory(), host.output_directory() / "ming"


def _is_inside(path: Path, *roots: Path) -> bool:
    """Whether a file really lies below one of the folders, any of which may be a link to elsewhere."""
    return any(root.resolve() in path.resolve().parents for root in roots)
