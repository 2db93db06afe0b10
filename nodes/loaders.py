"""Load MingTok and Ming-UniVision.

Checkpoint folders are found below ComfyUI's models/ming (and what extra_model_paths.yaml adds); the built-in model
comes first. A folder that is loaded and unchanged is found again rather than loaded twice.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..ming_core import load_mingtok, load_univision
from ..ming_core.checkpoint import INDEX, checkpoint_kind, checkpoint_values
from . import host
from .widgets import CATEGORY, combo

log = logging.getLogger(__name__)

BUILT_IN = "tiny-shapes (built in)"
BUILT_IN_FOLDER = host.PACK / "models" / "tiny-shapes"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = {"int8": 1.0, "int4": 0.5}  # bytes a value
GB = 1e9

PUBLISHED = {
    "mingtok": ("inclusionAI/MingTok-Vision", "2.8 GB"),
    "univision": ("inclusionAI/Ming-UniVision-16B-A3B", "37.6 GB"),
}

# Models that are alive somewhere (ComfyUI's cache, a running graph), by what they were loaded from.
_live: weakref.WeakValueDictionary[tuple, host.Loaded] = weakref.WeakValueDictionary()


def found(kind: str) -> dict[str, Path]:
    """Name -> folder of the checkpoints of a kind, the built-in model first."""
    folders = {BUILT_IN: BUILT_IN_FOLDER}
    for root in host.model_folders():
        for config in sorted(root.rglob("config.json")):
            folder = config.parent
            if checkpoint_kind(folder) == kind and folder.resolve() != BUILT_IN_FOLDER:
                folders.setdefault(folder.relative_to(root).as_posix(), folder)
    return folders


def absent(name: str, kind: str) -> str:
    """What to do about a model that is not there."""
    repository, size = PUBLISHED[kind]
    published = repository.split("/")[1]
    places = host.model_folders()
    return (
        f'the model "{name}" is not there. Put its folder (config.json, *.safetensors, tokenizer files) into '
        f"{' or '.join(map(str, places))}. The published one is {repository} ({size}), at "
        f"https://huggingface.co/{repository} and https://modelscope.cn/models/{repository}; it belongs into "
        f'{places[0] / published}, and python "{host.PACK / "quickstart.py"}" download {published} --to "{places[0]}" '
        f'puts it there. Nothing is downloaded while a graph runs; "{BUILT_IN}" works without any download.'
    )


def state_of(folder: Path) -> tuple:
    """(name, size, time) of config, index and shards: changes when a file does."""
    files = [folder / "config.json", folder / INDEX, *sorted(folder.glob("*.safetensors"))]
    return tuple((f.name, s.st_size, s.st_mtime_ns) for f in files if f.is_file() for s in [f.stat()])


def choose_precision(precision: str, values: int) -> tuple[torch.dtype, str | None]:
    """(dtype, quantization) for a precision widget. Raises ValueError, with the figures, for what cannot fit."""
    on, rests_on = host.device(), host.resting_device()
    memory = host.total_memory(rests_on)  # a GPU may hold less: ComfyUI then brings over a part
    half = torch.bfloat16 if host.bfloat16_works(on) else torch.float16
    quantization = precision if precision in QUANTIZED else None
    if precision == "auto" and on.type == "cpu" and values * 4 < memory / 4:
        dtype = torch.float32
    else:
        dtype = DTYPES.get(precision, half)
    needed = values * QUANTIZED.get(precision, dtype.itemsize)
    if needed > memory:
        where = "this machine" if rests_on.type == "cpu" else f"the GPU ({rests_on})"
        raise ValueError(
            f"this model takes {needed / GB:.1f} GB at {quantization or str(dtype).removeprefix('torch.')}, "
            f"and {where} has {memory / GB:.1f} GB: choose a smaller precision"
        )
    return dtype, quantization


def load(kind: str, name: str, precision: str, loader: Callable[..., Any]) -> host.Loaded:
    """The loaded model, from memory when it is alive and its files are unchanged."""
    folder = found(kind).get(name)
    if folder is None:
        raise ValueError(absent(name, kind))
    key = (kind, str(folder), state_of(folder), precision)
    loaded = _live.get(key)
    if loaded is None:
        values = checkpoint_values(folder)
        dtype, quantization = choose_precision(precision, values)
        host.keep(None, coming=values * dtype.itemsize)
        log.info("loading %s as %s", folder, quantization or dtype)
        options = {"quantization": quantization} if quantization else {}
        place = {"device": host.resting_device(), "dtype": dtype, "operations": host.operations()}
        loaded = host.managed(loader(folder, **place, **options), name)
        _live[key] = loaded
    return loaded


class _Loader:
    CATEGORY = CATEGORY
    KIND = ""

    @classmethod
    def IS_CHANGED(cls, model_name: str, precision: str) -> tuple | float:
        folder = found(cls.KIND).get(model_name)
        return state_of(folder) if folder else float("nan")

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str) -> bool | str:
        return True if model_name in found(cls.KIND) else absent(model_name, cls.KIND)


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
                    "auto: fp32 on a CPU when it fits well, else bf16 (fp16 on GPUs without it).",
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
                    "auto: fp32 on a CPU when it fits well, else bf16 (fp16 on GPUs without it). "
                    "int8 and int4 keep the language model's and the head's weights in fewer bits.",
                ),
            }
        }

    def load(self, model_name: str, precision: str) -> tuple:
        loaded = load(self.KIND, model_name, precision, load_univision)
        return loaded, host.Loaded(loaded.model.mingtok, loaded.patcher, f"{model_name}: MingTok", owner=loaded)
