"""Load MingTok and Ming-UniVision.

Checkpoint folders are found below ComfyUI's models/ming (and what extra_model_paths.yaml adds); the built-in model
comes first. A folder that is loaded and unchanged is found again rather than loaded twice.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..ming_core import load_mingtok, load_univision
from ..ming_core.checkpoint import INDEX, checkpoint_bytes, checkpoint_kind, stored_quantization
from . import host
from .widgets import CATEGORY, combo

log = logging.getLogger(__name__)

BUILT_IN = "tiny-shapes (built in)"
BUILT_IN_FOLDER = host.PACK / "models" / "tiny-shapes"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = ("int8", "int4")
GB = 1e9

PUBLISHED = {
    "mingtok": ("inclusionAI/MingTok-Vision", "2.8 GB"),
    "univision": ("inclusionAI/Ming-UniVision-16B-A3B", "37.6 GB"),
}

# Models that are alive somewhere (ComfyUI's cache, a running graph), by what they were loaded from.
_live: weakref.WeakValueDictionary[tuple, host.Loaded] = weakref.WeakValueDictionary()


def found(kind: str) -> dict[str, Path]:
    """Name -> folder of the checkpoints of a kind, or with one inside; the built-in model first."""
    folders = {BUILT_IN: BUILT_IN_FOLDER}
    roots = dict.fromkeys((*host.model_folders(), BUILT_IN_FOLDER.parent))
    there = [(folder, root, checkpoint_kind(folder)) for root in roots for folder in _folders_below(root)]
    for wanted in dict.fromkeys((kind, "univision")):  # which has a MingTok inside
        for folder, root, its_kind in there:
            if its_kind == wanted and folder.resolve() != BUILT_IN_FOLDER:
                _add(folders, folder, parts=max(1, len(folder.relative_to(root).parts)))
    return folders


def _folders_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The folder and all below it, through links too, but never back into one of those `above`."""
    real = folder.resolve()
    if real not in above:
        yield folder
        _, names, _ = next(os.walk(folder), ("", [], []))
        for name in sorted(names):
            yield from _folders_below(folder / name, (*above, real))


def _add(folders: dict[str, Path], folder: Path, parts: int) -> None:
    """Name a folder by the last `parts` of its path, or by as many more as tell it from another one."""
    for count in range(parts, len(folder.parts) + 1):
        name = "/".join(folder.parts[-count:])
        if folders.setdefault(name, folder).resolve() == folder.resolve():
            break


def absent(name: str, kind: str) -> str:
    """What to do about a model that is not there."""
    repository, size = PUBLISHED[kind]
    published = repository.split("/")[1]
    places = host.model_folders()
    # PowerShell takes what begins with a quote for a text; portable's Python cannot make the environment that it takes
    windows = " (PowerShell: & before it; ComfyUI portable: a full Python, such as py, in its place)"
    hint = windows if os.name == "nt" else ""
    return (
        f'the model "{name}" is not there. Put its folder (config.json, *.safetensors, tokenizer files) into '
        f"{' or '.join(map(str, places))}. The published one is {repository} ({size}), at "
        f"https://huggingface.co/{repository} and https://modelscope.cn/models/{repository}; it belongs into "
        f'{places[0] / published}, and "{sys.executable}" "{host.PACK / "quickstart.py"}" download {published} '
        f'--to "{places[0]}" puts it there{hint}. Nothing is downloaded while a graph runs; '
        f'"{BUILT_IN}" works without any download.'
    )


def state_of(folder: Path) -> tuple:
    """(name, size, time) of config, index and shards: changes when a file does."""
    files = [folder / "config.json", folder / INDEX, *sorted(folder.glob("*.safetensors"))]
    return tuple((f.name, s.st_size, s.st_mtime_ns) for f in files if f.is_file() for s in [f.stat()])


def choose_precision(precision: str, kind: str, folder: Path) -> tuple[torch.dtype, str | None]:
    """(dtype, quantization) for a precision widget. Raises ValueError, with the figures, for what cannot fit."""
    on, rests_on = host.device(), host.resting_device()
    memory = host.total_memory(rests_on)  # a GPU may hold less: ComfyUI then brings over a part
    if precision not in ("auto", *DTYPES, *QUANTIZED):
        raise ValueError(f"precision is {precision!r}: give one of {('auto', *DTYPES, *QUANTIZED)}")
    quantization = precision if precision in QUANTIZED else None
    dtype = DTYPES.get(precision) or host.half(on)
    if precision == "auto" and on.type == "cpu" and not _quantised(kind, folder):  # which are fast in 16 bit only
        if checkpoint_bytes(folder, kind, torch.float32) < memory / 4:
            dtype = torch.float32
    elif precision == "auto" and dtype == torch.float32 and checkpoint_bytes(folder, kind, dtype) > memory:
        dtype = torch.float16  # not what ComfyUI likes on this GPU, but it fits
    needed = checkpoint_bytes(folder, kind, dtype, quantization)
    if needed > memory:
        where = "this machine" if rests_on.type == "cpu" else f"the GPU ({rests_on})"
        fits_gpu = rests_on.type == "cpu" and on.type == "cuda" and host.total_memory(on) > needed
        straight = ", or start ComfyUI with --highvram, which loads it straight onto the GPU" if fits_gpu else ""
        raise ValueError(
            f"this model takes {needed / GB:.1f} GB at {quantization or str(dtype).removeprefix('torch.')}, "
            f"and {where} has {memory / GB:.1f} GB: choose a smaller precision, or a smaller model{straight}"
        )
    return dtype, quantization


def _quantised(kind: str, folder: Path) -> str | None:
    """The format that the weights of a model of this kind are stored in; a MingTok never is quantised."""
    return stored_quantization(folder) if kind == "univision" else None


def load(kind: str, name: str, precision: str, loader: Callable[..., Any]) -> host.Loaded:
    """The loaded model, from memory when it is alive and its files are unchanged."""
    folder = found(kind).get(name)
    if folder is None:
        raise ValueError(absent(name, kind))
    dtype, quantization = choose_precision(precision, kind, folder)
    key = (kind, str(folder), state_of(folder), dtype, quantization or _quantised(kind, folder))
    loaded = _live.get(key)
    if loaded is None:
        host.make_room(checkpoint_bytes(folder, kind, dtype, quantization))
        log.info("loading %s as %s", folder, quantization or dtype)
        options = {"quantization": quantization} if quantization else {}
        place = {"device": host.resting_device(), "dtype": dtype, "operations": host.operations()}
        report = host.progress(100)
        model = loader(folder, **place, **options, on_progress=lambda done, total: report(100 * done // total))
        loaded = host.managed(model, name)
        _live[key] = loaded
    return loaded


class _Loader:
    CATEGORY = CATEGORY
    KIND = ""

    @classmethod
    def IS_CHANGED(cls, model_name: str | None, precision: str | None) -> tuple:
        folders = found(cls.KIND)
        if model_name is None:  # it is linked: it may be any of them
            return tuple(map(state_of, folders.values()))
        return state_of(folders[model_name]) if model_name in folders else ()

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str | None = None) -> bool | str:
        """None: the name is linked, and looked for when it is known."""
        return model_name is None or model_name in found(cls.KIND) or absent(model_name, cls.KIND)


class MingTokLoader(_Loader):
    KIND = "mingtok"
    DESCRIPTION = "Loads a MingTok: the tokenizer that turns pictures into continuous latents and features, and back."
    RETURN_TYPES, RETURN_NAMES = ("MINGTOK",), ("mingtok",)
    OUTPUT_TOOLTIPS = ("The tokenizer, for the MingTok nodes.",)
    FUNCTION = "load"
    SEARCH_ALIASES = ("tokenizer loader", "load tokenizer", "mingtok checkpoint")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model_name": combo(
                    list(found(cls.KIND)), "A checkpoint folder in models/ming, or the built-in model."
                ),
                "precision": combo(
                    ["auto", "fp32", "bf16", "fp16"],
                    "auto: fp32 on a CPU when it fits well, else bf16 (fp16 or fp32 on GPUs without it).",
                ),
            }
        }

    def load(self, model_name: str, precision: str) -> tuple:
        return (load(self.KIND, model_name, precision, load_mingtok),)


class MingUniVisionLoader(_Loader):
    KIND = "univision"
    DESCRIPTION = "Loads Ming-UniVision, the model that looks at, draws and edits pictures, with the MingTok inside it."
    RETURN_TYPES, RETURN_NAMES = ("MING_UNIVISION", "MINGTOK"), ("model", "mingtok")
    OUTPUT_TOOLTIPS = ("The model, for Ming Understand, Generate and Edit.", "Its tokenizer, for the MingTok nodes.")
    FUNCTION = "load"
    SEARCH_ALIASES = ("checkpoint loader", "load model", "unified multimodal model", "vlm loader")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model_name": combo(
                    list(found(cls.KIND)), "A checkpoint folder in models/ming, or the built-in model."
                ),
                "precision": combo(
                    ["auto", "bf16", "fp16", "fp32", "int8", "int4"],
                    "auto: fp32 on a CPU when it fits well, else bf16 (fp16 or fp32 on GPUs without it). "
                    "int8 and int4 keep the language model's and the head's weights in fewer bits.",
                ),
            }
        }

    def load(self, model_name: str, precision: str) -> tuple:
        loaded = load(self.KIND, model_name, precision, load_univision)
        return loaded, host.Loaded(loaded.model.mingtok, loaded.patcher, f"{model_name}: MingTok", owner=loaded)
