"""Checkpoints: finding them, choosing a precision, and loading each only once.

Checkpoint folders are found in ComfyUI's models/ming (and what extra_model_paths.yaml adds); the built-in model comes
first. A folder that is loaded already and has not changed is not loaded a second time.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..ming_core.checkpoint import INDEX, Checkpoint, CheckpointError, checkpoint_bytes, stored_quantization
from ..ming_core.config import MingTokConfig, UniVisionConfig
from ..ming_core.json_files import log_left_out, printable
from ..ming_core.text_tokenizer import TOKENIZER, TOKENIZER_CONFIG
from . import host

log = logging.getLogger(__name__)

BUILT_IN = "tiny-shapes (built in)"
BUILT_IN_FOLDER = host.PACK / "models" / "tiny-shapes"
GB = 1e9
MAX_FOLDERS, MAX_NESTED = 10_000, 32  # that are looked through; links among folders can make any number of ways

# By kind of checkpoint: repository and download size.
PUBLISHED = {
    "mingtok": ("inclusionAI/MingTok-Vision", "2.8 GB"),
    "univision": ("inclusionAI/Ming-UniVision-16B-A3B", "37.6 GB"),
}


# --- Finding ------------------------------------------------------------------------------------------------------


def find_checkpoints(kind: str) -> dict[str, Path]:
    """Name -> folder of the checkpoints that are, or contain, a "mingtok" or "univision"; the built-in model first."""
    named = {BUILT_IN: BUILT_IN_FOLDER}
    roots = dict.fromkeys((*host.model_folders(), BUILT_IN_FOLDER.parent))
    candidates = [
        (folder, root, _listed_kind(folder))
        for root in roots
        for folder in itertools.islice(_folders_below(root), MAX_FOLDERS)
    ]
    for accepted in dict.fromkeys((kind, "univision")):  # a univision contains a mingtok
        for folder, root, found_kind in candidates:
            if found_kind == accepted and _real(folder) != BUILT_IN_FOLDER:
                _add(named, folder, parts=max(1, len(folder.relative_to(root).parts)))
    return named


def _listed_kind(folder: Path) -> str | None:
    """The kind of model in a folder; None, with a line in the log, where that cannot even be read."""
    try:
        if not os.path.lexists(folder / "config.json"):
            return None  # a folder of folders
        if printable(str(folder)) != str(folder):
            raise CheckpointError("its name is not Unicode text: rename it")
        return Checkpoint(folder).config.kind
    except (CheckpointError, OSError) as error:
        log_left_out(folder, error)
        return None


def _folders_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The folder and all folders in it, also through links, but never back into one of those `above`."""

    def left_out(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # there need not be a models/ming
            log_left_out(error.filename or folder, error)

    real = _real(folder)
    if real not in above and len(above) < MAX_NESTED:
        yield folder
        _, names, _ = next(os.walk(folder, onerror=left_out), ("", [], []))
        for name in sorted(names):
            yield from _folders_below(folder / name, (*above, real))


def _real(path: Path) -> Path:
    """The path without links. Unlike Path.resolve, it has an answer for links that lead in a circle."""
    return Path(os.path.realpath(path))


def _add(named: dict[str, Path], folder: Path, parts: int) -> None:
    """Name a folder by the last `parts` parts of its path, or by more where another folder has that name."""
    for count in range(parts, len(folder.parts) + 1):
        name = "/".join(folder.parts[-count:])
        if _real(named.setdefault(name, folder)) == _real(folder):
            break


# PowerShell takes a quoted first word for a string; ComfyUI portable's Python cannot create virtual environments.
POWERSHELL = " (in PowerShell, put & before it; with ComfyUI portable, use a full Python such as py instead)"


def missing_message(name: Any, kind: str) -> str:
    """What to do about a model that was not found."""
    if not isinstance(name, str):
        return f"model_name is {str(name)[:100]}: choose a model from the list"
    shown = printable(name[:200])
    found = list(find_checkpoints(kind))
    there = _by_any_case(name, found)
    if there:
        return f'there is no model "{shown}": did you mean "{there}"? Choose it from the list (case matters)'
    if reason := _why_left_out(name, kind):
        return reason
    repository, size = PUBLISHED[kind]
    published = repository.split("/")[1]
    places = host.model_folders()
    hint = POWERSHELL if os.name == "nt" else ""
    close = difflib.get_close_matches(name, found, n=1)
    meant = f'did you mean "{close[0]}"? ' if close else ""
    return (
        f'{meant}the model "{shown}" was not found. Put its folder (config.json, *.safetensors, tokenizer files) '
        f"in {' or '.join(map(str, places))}. The published model is {repository} ({size}), from "
        f"https://huggingface.co/{repository} or https://modelscope.cn/models/{repository}; put it in "
        f'{places[0] / published}, or download it there with "{sys.executable}" "{host.PACK / "quickstart.py"}" '
        f'download {published} --to "{places[0]}"{hint}. Nothing is downloaded while a workflow runs; '
        f'"{BUILT_IN}" needs no download.'
    )


def _by_any_case(name: str, found: list[str]) -> str | None:
    """The name that differs in upper and lower case, or in the slashes of another system, only."""

    def plain(text: str) -> str:
        return text.replace("\\", "/").casefold()

    return next((other for other in found if plain(other) == plain(name)), None)


def _why_left_out(name: str, kind: str) -> str | None:
    """Why a folder of this name is not in the list though it is there; None where there is none."""
    for root in host.model_folders():
        folder = root / name
        inside = bool(name) and "\0" not in name and root in folder.parents and ".." not in folder.parts
        if not inside or printable(name) != name or not os.path.isdir(folder):
            continue
        try:
            Checkpoint(folder).config.read(UniVisionConfig if kind == "univision" else MingTokConfig)
        except (CheckpointError, OSError) as error:
            return f'the model "{name[:200]}" cannot be listed: {error}'
    return None


def file_state(folder: Path) -> tuple:
    """(name, size, modification time) of config, index, shards and tokenizer: changes when a file does."""
    state = []
    for path in (*(folder / name for name in ("config.json", INDEX, TOKENIZER, TOKENIZER_CONFIG)), *_shards(folder)):
        with contextlib.suppress(OSError, ValueError):  # it is not there, or not any more
            found = os.stat(path)
            state.append((path.name, found.st_size, found.st_mtime_ns))
    return tuple(state)


def _shards(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("*.safetensors"))
    except OSError:
        return []


# --- Precision ----------------------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = ("int8", "int4")
PRECISIONS = ("auto", *DTYPES, *QUANTIZED)


def choose_precision(precision: str, kind: str, folder: Path | Checkpoint) -> tuple[torch.dtype, str | None]:
    """(dtype, quantization) for a precision widget. Raises ValueError with the figures when the model cannot fit."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}: choose one of {PRECISIONS}")
    quantization = precision if precision in QUANTIZED else None
    if precision == "auto":
        dtype = _auto_dtype(kind, folder)
    else:
        dtype = DTYPES.get(precision) or host.half_dtype(host.device())
    _check_memory(kind, folder, dtype, quantization)
    return dtype, quantization


def _auto_dtype(kind: str, folder: Path | Checkpoint) -> torch.dtype:
    """float32 on a CPU with plenty of RAM, else the device's 16-bit dtype."""
    compute = host.device()
    memory = host.total_memory(host.offload_device())
    half = host.half_dtype(compute)
    full_size = checkpoint_bytes(folder, kind, torch.float32)
    if compute.type == "cpu":
        # quantized weights are fast in 16 bit only
        return torch.float32 if full_size < memory / 4 and not _stored_quantization(kind, folder) else half
    if half == torch.float32 and full_size > memory:
        return torch.float16  # ComfyUI recommends no 16-bit dtype on this GPU, but this one fits
    return half


def _check_memory(kind: str, folder: Path | Checkpoint, dtype: torch.dtype, quantization: str | None) -> None:
    """Raises ValueError when the offload device cannot hold the model. A GPU may: ComfyUI then loads only a part."""
    compute, offload = host.device(), host.offload_device()
    memory, needed = host.total_memory(offload), checkpoint_bytes(folder, kind, dtype, quantization)
    if needed <= memory:
        return
    where = "this machine" if offload.type == "cpu" else f"the GPU ({offload})"
    on_gpu = offload.type == "cpu" and compute.type not in host.SHARES_RAM
    fits_gpu = on_gpu and host.total_memory(compute) > needed
    hint = ", or start ComfyUI with --highvram to load it straight to the GPU" if fits_gpu else ""
    raise ValueError(
        f"this model takes {needed / GB:.1f} GB at {quantization or str(dtype).removeprefix('torch.')}, "
        f"and {where} has {memory / GB:.1f} GB: choose a smaller precision, or a smaller model{hint}"
    )


def _stored_quantization(kind: str, folder: Path | Checkpoint) -> str | None:
    """The format of a folder's quantized weights, if any. The MingTok inside a folder is never quantized."""
    return stored_quantization(folder) if kind == "univision" else None


# --- Loading ------------------------------------------------------------------------------------------------------

# The models that something still holds (ComfyUI's cache, a running workflow), by what they were loaded from.
_live: weakref.WeakValueDictionary[tuple, host.Loaded[Any]] = weakref.WeakValueDictionary()


def load(kind: str, name: str, precision: str, loader: Callable[..., host.Model]) -> host.Loaded[host.Model]:
    """Load a model, or return the live one if its files have not changed.

    loader  ming_core's load_mingtok or load_univision
    """
    folder = find_checkpoints(kind).get(name) if isinstance(name, str) else None
    if folder is None:
        raise ValueError(missing_message(name, kind))
    checkpoint = Checkpoint.open(folder)  # config and headers are read once for all that follows
    dtype, quantization = choose_precision(precision, kind, checkpoint)
    key = (kind, str(folder), file_state(folder), dtype, quantization or _stored_quantization(kind, checkpoint))
    loaded = _live.get(key)
    if loaded is None:
        host.make_room(checkpoint_bytes(checkpoint, kind, dtype, quantization))
        log.info("loading %s as %s", folder, quantization or dtype)
        loaded = host.managed(_read(checkpoint, dtype, quantization, loader), name)
        _live[key] = loaded
    return loaded


def _read(
    checkpoint: Checkpoint, dtype: torch.dtype, quantization: str | None, loader: Callable[..., host.Model]
) -> host.Model:
    """Read a model from disk, with a progress bar in percent."""
    report = host.progress(100)
    options = {"quantization": quantization} if quantization else {}
    return loader(
        checkpoint,
        device=host.offload_device(),
        dtype=dtype,
        operations=host.operations(),
        on_progress=lambda done, total: report(100 * done // total),
        **options,
    )
