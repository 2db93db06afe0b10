"""Names of new files, as ComfyUI's save nodes give them: prefix_00001_.png, the number one above the largest there."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

FORBIDDEN = set('<>:"|?*') if os.name == "nt" else set()  # in names of files


def numbered_path(prefix: str, folder: Path, width: int = 0, height: int = 0) -> tuple[Path, str, int]:
    """Where files of a `filename_prefix` go: (folder, base name, first free number), as core counts.

    The prefix may name subfolders and use %width%, %height%, %year%, %month%, %day%, %hour%, %minute% and %second%.
    The folder is not made. Raises ValueError for a prefix that climbs out of `folder`, OSError for an unreadable one.
    """
    now = time.localtime()
    fields = {"width": str(width), "height": str(height), "year": str(now.tm_year)}
    pairs = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min, "second": now.tm_sec}
    fields |= {name: f"{number:02}" for name, number in pairs.items()}
    for name, text in fields.items():
        prefix = prefix.replace(f"%{name}%", text)
    full = Path(os.path.normpath(check_prefix(prefix, folder)))
    # %batch_num% is left to whoever saves a batch, and is a number in what is there
    name = r"\d+".join(map(re.escape, os.path.normcase(full.name).split("%batch_num%")))
    counted = re.compile(name + r"_(\d+)")
    names = os.listdir(full.parent) if full.parent.is_dir() else []
    numbers = [int(match[1]) for name in names if (match := counted.match(os.path.normcase(name)))]
    return full.parent, full.name, max(numbers, default=0) + 1


def nearest_existing(folder: Path) -> Path | None:
    """The folder, or the first above it that is there; None on a drive that is not there."""
    return next((path for path in (folder, *folder.parents) if path.exists()), None)


def check_prefix(prefix: str, folder: Path) -> Path:
    """`folder` / `prefix`, or a ValueError when that is not inside `folder`, names no file, or cannot be a name."""
    path = Path(folder, prefix.replace("\\", "/"))
    inside = "\0" not in prefix and path.resolve().is_relative_to(Path(folder).resolve())
    if not inside or path.resolve() == Path(folder).resolve():
        raise ValueError(
            f"filename_prefix {prefix!r} leads out of {folder}, or names no file: give a name, with folders below that "
            "one if you like"
        )
    if wrong := sorted(FORBIDDEN.intersection(prefix)):
        raise ValueError(f"filename_prefix {prefix!r} holds {' '.join(wrong)}, which no file name may on Windows")
    return path


def prefix_verdict(prefix: str | None, folder: Path) -> bool | str:
    """What VALIDATE_INPUTS says of a prefix. None: it is linked, and checked when it is known."""
    try:
        if prefix is not None:
            check_prefix(prefix, folder)
    except ValueError as error:
        return str(error)
    return True
