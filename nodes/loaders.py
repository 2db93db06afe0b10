"""The loader nodes: Load MingTok and Load Ming-UniVision."""

from __future__ import annotations

from ..ming_core import Engine, MingTok, load_mingtok, load_univision
from . import host
from .models import file_state, find_checkpoints, load, missing_message
from .widgets import CATEGORY, combo

AUTO_PRECISION = "auto: fp32 on a CPU with plenty of RAM, otherwise bf16 (fp16 or fp32 on GPUs without bf16)."


class _Loader:
    """What both loaders share: `model_name` is one of the checkpoints of their `KIND`."""

    CATEGORY = CATEGORY
    KIND: str

    @classmethod
    def model_name(cls) -> tuple:
        """The `model_name` widget."""
        return combo(list(find_checkpoints(cls.KIND)), "Checkpoint folder in models/ming, or the built-in model.")

    @classmethod
    def IS_CHANGED(cls, model_name: str | None, precision: str | None) -> tuple:
        folders = find_checkpoints(cls.KIND)
        if model_name is None:  # it is linked, and may become any of them
            return tuple(map(file_state, folders.values()))
        known = isinstance(model_name, str) and model_name in folders
        return file_state(folders[model_name]) if known else ()

    @classmethod
    def VALIDATE_INPUTS(cls, model_name: str | None = None) -> bool | str:
        """None means that the name is linked; it is checked when the node runs."""
        found = model_name is None or (isinstance(model_name, str) and model_name in find_checkpoints(cls.KIND))
        return found or missing_message(model_name, cls.KIND)


class MingTokLoader(_Loader):
    KIND = "mingtok"
    DESCRIPTION = "Loads MingTok, the tokenizer that converts images to continuous latents and features, and back."
    RETURN_TYPES, RETURN_NAMES = ("MINGTOK",), ("mingtok",)
    OUTPUT_TOOLTIPS = ("The tokenizer, for the MingTok nodes.",)
    FUNCTION = "load"
    SEARCH_ALIASES = ("tokenizer loader", "load tokenizer", "mingtok checkpoint")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model_name": cls.model_name(),
                "precision": combo(["auto", "fp32", "bf16", "fp16"], AUTO_PRECISION),
            }
        }

    def load(self, model_name: str, precision: str) -> tuple[host.Loaded[MingTok]]:
        return (load(self.KIND, model_name, precision, load_mingtok),)


class MingUniVisionLoader(_Loader):
    KIND = "univision"
    DESCRIPTION = "Loads Ming-UniVision, the model that understands, draws and edits pictures, and its MingTok."
    RETURN_TYPES, RETURN_NAMES = ("MING_UNIVISION", "MINGTOK"), ("model", "mingtok")
    OUTPUT_TOOLTIPS = (
        "The model, for Ming Understand, Ming Generate and Ming Edit.",
        "Its tokenizer, for the MingTok nodes.",
    )
    FUNCTION = "load"
    SEARCH_ALIASES = ("checkpoint loader", "load model", "unified multimodal model", "vlm loader")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model_name": cls.model_name(),
                "precision": combo(
                    ["auto", "bf16", "fp16", "fp32", "int8", "int4"],
                    f"{AUTO_PRECISION} int8 and int4 quantize the language model and the flow head to save memory.",
                ),
            }
        }

    def load(self, model_name: str, precision: str) -> tuple[host.Loaded[Engine], host.Loaded[MingTok]]:
        loaded = load(self.KIND, model_name, precision, load_univision)
        mingtok = host.Loaded(loaded.model.mingtok, loaded.patcher, f"{model_name}: MingTok", owner=loaded)
        return loaded, mingtok
