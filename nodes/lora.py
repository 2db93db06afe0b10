"""The node that adds a LoRA to a model."""

from __future__ import annotations

import contextlib
import os
import weakref
from dataclasses import replace
from pathlib import Path

from ..ming_core import Engine
from ..ming_core.adapters import Lora
from ..ming_core.checks import described
from ..ming_core.json_files import printable
from ..ming_core.lora import files_of, read_lora
from . import host
from .widgets import CATEGORY, number, socket


class MingLoraLoader:
    DESCRIPTION = "Adds a LoRA to the model. Several in a row add up, in any order."
    CATEGORY = CATEGORY
    RETURN_TYPES, RETURN_NAMES = ("MING_UNIVISION",), ("model",)
    OUTPUT_TOOLTIPS = ("The model with the LoRA. It shares its weights with the model that came in.",)
    FUNCTION = "load"
    SEARCH_ALIASES = ("lora loader", "load lora", "style", "fine-tune", "adapter")

    def __init__(self) -> None:
        self._last: tuple[tuple, weakref.ref, Lora] | None = None  # what it was read from, for which network

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": socket("MING_UNIVISION", "The model from Load Ming-UniVision or another Ming LoRA."),
                "lora_name": (list(host.lora_files()), {"tooltip": "A LoRA for Ming-UniVision in models/loras."}),
                "strength": number(
                    1.0, -10.0, 10.0, 0.01, "How much of the LoRA: 1 as it was trained, 0 none, below 0 the opposite."
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, lora_name: str | None = None) -> bool | str:
        """None means that the name is linked; it is checked when the node runs."""
        found = lora_name is None or (isinstance(lora_name, str) and lora_name in host.lora_files())
        return found or missing_message(lora_name)

    @classmethod
    def IS_CHANGED(cls, lora_name: str | None, **_: object) -> tuple:
        files = host.lora_files()
        if lora_name is None:  # it is linked, and may become any of them
            return tuple((name, *_state(path)) for name, path in files.items())
        return _state(files[lora_name]) if isinstance(lora_name, str) and lora_name in files else ()

    def load(self, model: host.Loaded[Engine], lora_name: str, strength: float) -> tuple[host.Loaded[Engine]]:
        path = host.lora_files().get(lora_name) if isinstance(lora_name, str) else None
        if path is None:
            raise ValueError(missing_message(lora_name))
        engine = model.model.with_lora(self._read(path, model.model), strength)
        name = f"{model.name} + {lora_name} {strength:g}"
        return (replace(model, model=engine, name=name, owner=model.owner or model),)

    def _read(self, path: Path, engine: Engine) -> Lora:
        """The LoRA in a file; that of the last run where the file is the same, so that trying strengths is quick."""
        origin = (path, *_state(path))
        if self._last is None or self._last[0] != origin or self._last[1]() is not engine.network:
            self._last = origin, weakref.ref(engine.network), read_lora(path, engine.network)
        return self._last[2]


def missing_message(name: object) -> str:
    if not isinstance(name, str):
        return f"lora_name is {described(name)}: choose a LoRA of the folder models/loras from the list"
    return (
        f'the LoRA "{printable(name[:200])}" was not found: put its .safetensors file in models/loras '
        f"({host.lora_folder()}), in ComfyUI press R, and choose it"
    )


def _state(path: Path) -> tuple:
    """Changes when a file of the LoRA does."""
    found: tuple = ()
    for file in files_of(path):
        with contextlib.suppress(OSError):  # it has gone since it was listed, or never was there
            stat = os.stat(file)
            found += (file.name, stat.st_mtime_ns, stat.st_size)
    return found
