"""Saved features and conversations: their names in lists, their paths, and what their save and load nodes share.

Files are written to ming/ in ComfyUI's output folder, and read from there and from the input folder.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..ming_core import FileError
from ..ming_core.files import check_format, draft_in, file_format
from ..ming_core.json_files import check_regular, log_left_out, printable
from . import host
from .filenames import check_prefix, filled, give_number, numbered_path, validate_prefix


def save_new_file(prefix: str, write: Callable[[Path], None]) -> dict:
    """Write a new file in output/ming, and show the name under which load nodes list it. Raises FileError.

    It has ComfyUI's counter: prefix_00001_.safetensors.
    """
    root = host.output_directory() / "ming"
    try:
        folder, name, number = numbered_path(prefix, root)
        with draft_in(folder) as draft:
            write(draft)
            path, _ = give_number(draft, folder, name, number, ".safetensors")
    except FileError:
        raise
    except ValueError as error:
        raise FileError(str(error)) from None
    except OSError as error:
        raise FileError(f"cannot write to {root}: {error.strerror}; choose another output folder") from error
    return _shown(path)


def replace_file(prefix: str, write: Callable[[Path], None]) -> dict:
    """Write prefix.safetensors in output/ming and show its name. If it exists, `write` replaces it whole."""
    path = file_without_number(prefix)
    write(path)
    return _shown(path)


def file_without_number(prefix: object, called: str = "filename_prefix") -> Path:
    """output/ming/prefix.safetensors. Raises FileError for a prefix that leads elsewhere or is no file name.

    called: what messages call the prefix.
    """
    try:
        path = check_prefix(
            filled(prefix) if isinstance(prefix, str) else prefix, host.output_directory() / "ming", called
        )
    except ValueError as error:
        raise FileError(str(error)) from None
    return Path(os.path.normpath(path.with_name(f"{path.name}.safetensors")))


def _shown(path: Path) -> dict:
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
            return tuple((name, _modified(name)) for name in saved_files())
        return content_digest(saved_path(file))


def content_digest(path: Path) -> str:
    """What changes when the content of a file does."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _modified(name: str) -> int:
    try:
        return saved_path(name).stat().st_mtime_ns
    except (FileError, OSError):  # removed since it was listed
        return 0


def saved_files(file_format: str | None = None) -> list[str]:
    """List saved files, of one format or of any: `ming/x_00001_.safetensors [output]`, `y.safetensors [input]`."""
    names: list[str] = []
    for place in ("output", "input"):
        root, listed = _saved_below(place)
        paths = (path for path in _safetensors_below(listed) if _is_listed(path, root, listed, file_format))
        names += sorted(saved_name(path, place) for path in paths)
    return names


def _safetensors_below(folder: Path) -> Iterator[Path]:
    """Everything of this name in a folder and the folders in it, links to folders aside."""

    def left_out(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # nothing has been saved yet
            log_left_out(error.filename or folder, error)

    for parent, _, names in os.walk(folder, onerror=left_out):
        yield from (Path(parent, name) for name in names if fnmatch.fnmatch(name, "*.safetensors"))


def _is_listed(path: Path, root: Path, listed: Path, file_format: str | None) -> bool:
    """Whether a file can be chosen: one that cannot even be opened must not take the others from the list."""
    try:
        if printable(str(path)) != str(path):
            raise FileError("its name is not Unicode text: rename it")
        stat = check_regular(path)
        if not _is_inside(path, root, listed):
            return False
        # cached, because ComfyUI asks for the lists again on every page load
        return file_format is None or _format_of(path, stat.st_mtime_ns, stat.st_size) == file_format
    except (FileError, OSError) as error:  # damaged, or in use by another program
        log_left_out(path, error)
        return False


def saved_name(path: Path, place: str = "output") -> str:
    """The name of a file in the "output" or "input" folder, as `saved_files` lists it."""
    root, _ = _saved_below(place)
    return f"{path.relative_to(root).as_posix()} [{place}]"


def saved_path(name: str | None) -> Path:
    """The path of a listed name. Raises FileError for a missing file or a name outside the folders.

    The name is None or empty if the list was empty when the workflow was saved.
    """
    if name is None or (isinstance(name, str) and not name):
        raise FileError("no file is chosen: save one first, press R to refresh the list, and choose it there")
    if not isinstance(name, str) or "\0" in name or printable(name) != name:
        raise FileError(f"{str(name)[:200]!r} is not a file name: choose a file from the list")
    match = re.fullmatch(r"(.+?) ?\[(output|input)\]", name)
    relative, place = match.groups() if match else (name, "input")
    root, listed = _saved_below(place)
    shown = relative if len(relative) <= 200 else f"{relative[:200]}..."
    path = _real(root / relative)
    if not _is_inside(path, root, listed):
        raise FileError(f"the file name {shown!r} leads out of {root}: choose a file from the list")
    try:
        check_regular(path)
    except FileError:
        raise FileError(
            f"there is no file {shown!r} in {root}: save it first, or choose another one from the list"
        ) from None
    return path


@functools.lru_cache(maxsize=1 << 15)
def _format_of(path: Path, *state: int) -> str:
    """The format of a file in this state."""
    return file_format(path)


def _saved_below(place: str) -> tuple[Path, Path]:
    """Return the folder that names are relative to, and the folder whose files are listed."""
    if place == "input":
        return host.input_directory(), host.input_directory()
    return host.output_directory(), host.output_directory() / "ming"


def _is_inside(path: Path, *roots: Path) -> bool:
    """Whether a file, with links resolved, is inside one of the folders, any of which may itself be a link."""
    return any(_real(root) in _real(path).parents for root in roots)


def _real(path: Path) -> Path:
    """The path without links. Unlike Path.resolve, it has an answer for links that lead in a circle."""
    return Path(os.path.realpath(path))
