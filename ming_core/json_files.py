"""The one reader for JSON: config.json, headers and indexes of safetensors, tokenizers, saved files and workflows.

What is read comes from strangers, so everything is bounded before it costs memory or time: only regular files are
opened (a pipe would block, a device might never end), bytes and nesting have limits, and numbers are finite. Whatever
is wrong is one FileError that names the file.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import stat
from typing import Any

log = logging.getLogger(__name__)

MAX_BYTES = 16 << 20  # twenty times the header or the index of the published model; a tokenizer.json may be longer
MAX_DEPTH = 64  # nested lists and objects; the files that are read here have fewer than ten
MAX_DIGITS = 300  # of a whole number: one with more is beyond the largest float, and takes long to read


class FileError(ValueError):
    """A file that cannot be read or written: the message names it and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class MissingFileError(FileError):
    """There is no file of this name."""


def read_json(
    source: str | os.PathLike[str] | bytes,
    *,
    what: str = "",
    remedy: str = "replace the file",
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
) -> Any:
    """The value of a JSON file, or of the bytes of JSON text (UTF-8, with or without a byte order mark).

    what       what messages call it; by default, its path
    remedy     what messages advise where the content is at fault
    max_bytes  a longer file is refused before it is read
    max_depth  how deep lists and objects may be nested

    Raises MissingFileError for a path that leads nowhere, and FileError for what is not a regular file, cannot be
    opened, is too long, is not UTF-8 or not JSON, is nested too deep, or has a number that is not finite or absurdly
    long. Nothing else is raised.
    """
    what = what or ("this JSON text" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else read_file(source, max_bytes=max_bytes, what=what, remedy=remedy)
    if len(data) > max_bytes:
        raise FileError(f"{what} is too long ({len(data)} bytes, where at most {max_bytes} are read): {remedy}")
    numbers: list[_NotFinite] = []  # that no program can count with

    def number(text: str) -> Any:
        value = float(text)
        return value if math.isfinite(value) else _noted(_NotFinite(repr(value)), numbers)

    def whole(text: str) -> Any:
        if len(text) <= MAX_DIGITS:
            return int(text)
        return _noted(_NotFinite(f"{text[:20]}... ({len(text)} digits)"), numbers)

    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=number, parse_float=number, parse_int=whole)
    except UnicodeDecodeError as error:
        raise FileError(f"{what} is not UTF-8 text (byte {error.start}): {remedy}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise FileError(f"{what} is not valid JSON: {error.msg} at {where}; {remedy}") from None
    except RecursionError:
        raise FileError(f"{what} is nested more than {max_depth} levels deep: {remedy}") from None
    if _is_deeper(value, max_depth):
        raise FileError(f"{what} is nested more than {max_depth} levels deep: {remedy}")
    if numbers:
        raise FileError(f"{what}: {_place_of(numbers[0], value)} is {numbers[0]}, not a finite number; {remedy}")
    return value


def read_file(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, what: str = "", remedy: str = "replace the file"
) -> bytes:
    """The bytes of a regular file of at most `max_bytes`. Raises MissingFileError and FileError; never blocks."""
    what = what or str(path)
    size = check_regular(path, what=what).st_size
    try:
        if size <= max_bytes:
            with open(path, "rb") as file:
                data = file.read(max_bytes + 1)  # not `size`: the file may grow meanwhile
            if len(data) <= max_bytes:
                return data
            size = len(data)
    except OSError as error:
        raise unreadable(what, error) from None
    raise FileError(f"{what} is too long ({size} bytes, where at most {max_bytes} are read): {remedy}")


def check_regular(path: str | os.PathLike[str], *, what: str = "") -> os.stat_result:
    """The stat of a regular file, links followed. Raises MissingFileError and FileError for everything else.

    To be called before anything opens a file that somebody else put there: opening a pipe blocks until someone writes.
    """
    what = what or str(path)
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise MissingFileError(f"{what} is a link to {os.readlink(path)}, which is not there") from None
        raise MissingFileError(f"{what}: no such file") from None
    except OSError as error:
        raise unreadable(what, error) from None
    except ValueError:  # a null character, or half a character
        raise FileError(f"{what!r} is not a file name: rename the file") from None
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{what} is {_kind(found.st_mode)}, not a file: put the file in its place")
    return found


def unreadable(what: str | os.PathLike[str], error: OSError) -> FileError:
    """What to raise where a file is there and the system does not let it be read."""
    reason = error.strerror or str(error)
    return FileError(f"{what} cannot be read ({reason}): make sure that it is a file and that you may read it")


def printable(text: str) -> str:
    """The text with halves of characters (lone surrogates, as in file names of other systems) written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any) -> str:
    """A value as a JSON file has it or, for texts and numbers, as Python does; cut where it is long."""
    text = json.dumps(value) if value is None or isinstance(value, (list, dict)) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def log_left_out(path: str | os.PathLike[str], error: Exception) -> None:
    """Say in the log that a list goes without this file or folder: once, until it changes or has another fault.

    Lists are asked for again on every page load.
    """
    try:
        found = os.lstat(path)
        state = (found.st_mtime_ns, found.st_ctime_ns, found.st_size)
    except (OSError, ValueError):
        state = (0, 0, 0)
    _log_once(printable(str(path)), state, printable(str(error)))


@functools.lru_cache(maxsize=1 << 12)
def _log_once(path: str, state: tuple[int, ...], error: str) -> None:
    log.warning("%s is left out of the list: %s", path, error)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"


class _NotFinite(str):
    """What a number that cannot be used is called in a message; it stands for the number until it is refused."""


def _noted(number: _NotFinite, numbers: list[_NotFinite]) -> _NotFinite:
    numbers.append(number)
    return number


def _place_of(wanted: Any, value: Any) -> str:
    """Where an object is in nested lists and objects: llm_config.rope_scaling[0]."""
    places = [("", value)]
    while places:
        place, value = places.pop()
        if value is wanted:
            break
        if isinstance(value, dict):
            places += [(f"{place}.{key[:60]}".lstrip("."), child) for key, child in value.items()]
        elif isinstance(value, list):
            places += [(f"{place}[{i}]", child) for i, child in enumerate(value)]
    return place or "it"


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` levels deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        children = (v for item in level for v in (item.values() if isinstance(item, dict) else item))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return False
    return bool(level)
