"""Names of new files as in ComfyUI's save nodes: prefix_00001_.png, one above the largest number in the folder."""

from __future__ import annotations

import os
import re
import sys
import time
import unicodedata
from pathlib import Path

from ..ming_core.checks import described
from ..ming_core.files import move

FORBIDDEN = set('<>:"|?*') if os.name == "nt" else set()  # characters that a file name must not contain
LONGEST_NAME = 255  # bytes, on almost every disk
LONGEST_PATH = {"linux": 4095, "darwin": 1023}.get(sys.platform, 32_766)  # in the same units, folders included
LONGEST_ENDING = len("_00001_.safetensors")
CONTROL = {"Cc", "Zl", "Zp"}  # Unicode categories: control characters, line and paragraph separators


def numbered_path(prefix: str, folder: Path, width: int = 0, height: int = 0) -> tuple[Path, str, int]:
    """Return the folder, base name and first free number for a `filename_prefix`, counted as ComfyUI does.

    The prefix may contain subfolders and the fields of `filled`.
    The folder is not created. Raises ValueError for a prefix outside `folder`, OSError for an unreadable folder.
    """
    prefix = filled(prefix, width, height)
    full = Path(os.path.normpath(check_prefix(prefix, folder)))
    # %batch_num% is replaced by the node that saves a batch, so existing files have a number in its place
    name = r"\d+".join(map(re.escape, os.path.normcase(full.name).split("%batch_num%")))
    counted = re.compile(name + r"_(\d+)")
    names = os.listdir(full.parent) if full.parent.is_dir() else []
    numbers = [int(match[1]) for name in names if (match := counted.match(os.path.normcase(name)))]
    return full.parent, full.name, max(numbers, default=0) + 1


def filled(prefix: str, width: int = 0, height: int = 0) -> str:
    """The prefix with %width%, %height%, %year%, %month%, %day%, %hour%, %minute% and %second% filled in."""
    now = time.localtime()
    fields = {"width": str(width), "height": str(height), "year": str(now.tm_year)}
    pairs = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min, "second": now.tm_sec}
    fields |= {name: f"{number:02}" for name, number in pairs.items()}
    for name, text in fields.items():
        prefix = prefix.replace(f"%{name}%", text)
    return prefix


def give_number(draft: Path, folder: Path, name: str, number: int, suffix: str) -> tuple[Path, int]:
    """Name a finished file name_00001_suffix with the first free number from `number` on; return it and its number.

    Nothing is ever there under the number but the whole file, and several processes may save into a folder at once.
    """
    while True:
        path = folder / f"{name}_{number:05}_{suffix}"
        try:
            _name(draft, path)
        except FileExistsError:  # also under another capitalization, on a disk that ignores it
            number += 1
        else:
            return path, number


def _name(draft: Path, path: Path) -> None:
    """Rename a file, but not over another one: FileExistsError."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links: an empty file holds the name for a moment
        path.touch(exist_ok=False)
        try:
            move(draft, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path with ~ and .. resolved. Links stay, and a path that leads nowhere or is none raises nothing yet."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def nearest_existing(folder: Path) -> Path | None:
    """The folder itself or its nearest parent that exists; None on a missing drive."""
    return next((path for path in (folder, *folder.parents) if _exists(path)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long, or that is none
        return False


def folder_problem(folder: Path) -> str | None:
    """Why a folder of this name cannot be made, whatever the disk holds beside it; None if it can."""
    try:
        for name in folder.parts:
            _check_characters(name)
            _check_length(name, LONGEST_NAME)
        _check_length(str(folder), LONGEST_PATH - LONGEST_NAME)
    except ValueError as error:
        return f"the folder's name {error}"
    for part in (folder, *folder.parents):
        if os.path.islink(part) and not os.path.exists(part):
            return f"{part} is a link to {os.readlink(part)}, which is not there: make that folder or remove the link"
        if os.path.exists(part) and not os.path.isdir(part):
            return f"{part} is a file, and a folder is needed there: use another name, or move the file"
    return None


def check_prefix(prefix: object, folder: Path, called: str = "filename_prefix") -> Path:
    """Return `folder` / `prefix`. Raises ValueError if it is outside `folder`, cannot be made, or is no file name.

    called: what messages call the prefix.
    """
    if not isinstance(prefix, str):
        raise ValueError(f"{called} is {described(prefix)}: it must be text, such as cats or cats/first")
    path = Path(folder, prefix.replace("\\", "/"))
    try:
        _check_characters(prefix)
        _check_length(path.name, LONGEST_NAME - LONGEST_ENDING)
        _check_length(str(path), LONGEST_PATH - LONGEST_ENDING)
    except ValueError as error:
        raise ValueError(f"{called} {error}") from None
    if problem := folder_problem(path.parent):
        raise ValueError(problem)
    resolved, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if not resolved.is_relative_to(root) or resolved == root:
        raise ValueError(
            f"{called} {prefix!r} leads out of {folder} or is not a file name: use a name such as "
            '"cats" or "cats/first"'
        )
    if forbidden := sorted(FORBIDDEN.intersection(prefix)):
        raise ValueError(
            f"{called} {prefix!r} contains {' '.join(forbidden)}, which Windows does not allow in file names: remove it"
        )
    return path


def _check_characters(name: str) -> None:
    """Raises ValueError for characters that no disk takes, or that break whatever lists the file."""
    for character in name:
        kind = unicodedata.category(character)
        if kind in CONTROL:
            what = "a line break" if character in "\n\r\x85\u2028\u2029" else "a control character"
            raise ValueError(f"{_short(name)} contains {what}: remove it")
        if kind == "Cs":
            raise ValueError(f"{_short(name)} contains half a character (a lone surrogate): type it again")


def _check_length(name: str, longest: int) -> None:
    # Linux counts bytes; Windows and macOS count as JavaScript does. Half characters come in names that others gave.
    linux = sys.platform.startswith("linux")
    size = len(os.fsencode(name)) if linux else len(name.encode("utf-16-le", "surrogatepass")) // 2
    if size > longest:
        raise ValueError(f"{_short(name)} is too long ({size} bytes or characters): use at most {longest}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def validate_prefix(prefix: str | None, folder: Path) -> bool | str:
    """For VALIDATE_INPUTS. None means that the prefix is linked; it is checked when the node runs."""
    try:
        if prefix is not None:
            check_prefix(prefix, folder)
    except ValueError as error:
        return str(error)
    return True
