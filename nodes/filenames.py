"""Names of new files as in ComfyUI's save nodes: prefix_00001_.png, one above the largest number in the folder."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

FORBIDDEN = set('<>:"|?*') if os.name == "nt" else set()  # characters that a file name must not contain


def numbered_path(prefix: str, folder: Path, width: int = 0, height: int = 0) -> tuple[Path, str, int]:
    """Return the folder, base name and first free number for a `filename_prefix`, counted as ComfyUI does.

    The prefix may contain subfolders and %width%, %height%, %year%, %month%, %day%, %hour%, %minute% and %second%.
    The folder is not created. Raises ValueError for a prefix outside `folder`, OSError for an unreadable folder.
    """
    now = time.localtime()
    fields = {"width": str(width), "height": str(height), "year": str(now.tm_year)}
    pairs = {"month": now.tm_mon, "day": now.tm_mday, "hour": now.tm_hour, "minute": now.tm_min, "second": now.tm_sec}
    fields |= {name: f"{number:02}" for name, number in pairs.items()}
    for name, text in fields.items():
        prefix = prefix.replace(f"%{name}%", text)
    full = Path(os.path.normpath(check_prefix(prefix, folder)))
    # %batch_num% is replaced by the node that saves a batch, so existing files have a number in its place
    name = r"\d+".join(map(re.escape, os.path.normcase(full.name).split("%batch_num%")))
    counted = re.compile(name + r"_(\d+)")
    names = os.listdir(full.parent) if full.parent.is_dir() else []
    numbers = [int(match[1]) for name in names if (match := counted.match(os.path.normcase(name)))]
    return full.parent, full.name, max(numbers, default=0) + 1


def nearest_existing(folder: Path) -> Path | None:
    """The folder itself or its nearest parent that exists; None on a missing drive."""
    return next((path for path in (folder, *folder.parents) if path.exists()), None)


def check_prefix(prefix: str, folder: Path) -> Path:
    """Return `folder` / `prefix`. Raises ValueError if it is outside `folder` or not a valid file name."""
    path = Path(folder, prefix.replace("\\", "/"))
    inside = "\0" not in prefix and path.resolve().is_relative_to(Path(folder).resolve())
    if not inside or path.resolve() == Path(folder).resolve():
        raise ValueError(
            f"filename_prefix {prefix!r} leads out of {folder} or is not a file name: use a name such as "
            '"cats" or "cats/first"'
        )
    if forbidden := sorted(FORBIDDEN.intersection(prefix)):
        raise ValueError(
            f"filename_prefix {prefix!r} contains {' '.join(forbidden)}, which Windows does not allow in file names: "
            "remove it"
        )
    return path


def validate_prefix(prefix: str | None, folder: Path) -> bool | str:
    """For VALIDATE_INPUTS. None means that the prefix is linked; it is checked when the node runs."""
    try:
        if prefix is not None:
            check_prefix(prefix, folder)
    except ValueError as error:
        return str(error)
    return True
