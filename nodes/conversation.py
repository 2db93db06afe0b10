"""Conversation nodes: save and load a conversation, take a picture out of it, write it as text."""

from __future__ import annotations

from pathlib import Path

from ..ming_core import Conversation, Engine, Features, FileError, load_conversation, save_conversation
from ..ming_core.files import check_format
from ..ming_core.saved import CONVERSATION_FORMAT
from . import host
from .saved_files import (
    LoadingNode,
    SavingNode,
    content_digest,
    file_without_number,
    replace_file,
    save_new_file,
    saved_path,
)
from .widgets import FEATURES, TOOLS, boolean, file_name, integer, socket


class MingSaveConversation(SavingNode):
    DESCRIPTION = "Saves a conversation to output/ming as a small file that you can resume later."
    CATEGORY = TOOLS
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"
    SEARCH_ALIASES = ("store conversation",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "conversation": socket("MING_CONVERSATION", "The conversation to save."),
                "filename_prefix": file_name("conversation"),
            },
            "optional": {
                "overwrite": boolean(
                    False,
                    "Off: a new file, with a counter. On: one file of exactly this name, which is replaced; "
                    "Ming Continue Conversation reads it.",
                )
            },
        }

    def save(self, conversation: Conversation, filename_prefix: str, overwrite: bool = False) -> dict:
        save = replace_file if overwrite else save_new_file
        return save(filename_prefix, lambda path: save_conversation(conversation, path))


class MingLoadConversation(LoadingNode):
    DESCRIPTION = "Loads a saved conversation so that you can continue it. Needs the model it was made with."
    FILE_FORMAT = CONVERSATION_FORMAT
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("MING_CONVERSATION",), ("conversation",)
    OUTPUT_TOOLTIPS = ("The conversation as saved.",)
    FUNCTION = "load"
    SEARCH_ALIASES = ("continue conversation",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": socket("MING_UNIVISION", "The model the conversation was made with."),
                "file": cls.files("A file saved by Ming Save Conversation."),
            }
        }

    def load(self, model: host.Loaded[Engine], file: str) -> tuple[Conversation]:
        return (_loaded(model, saved_path(file)),)


class MingContinueConversation:
    DESCRIPTION = (
        "Goes on with the conversation that was saved under a name, or begins it: a chat without adding nodes."
    )
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("MING_CONVERSATION",), ("conversation",)
    OUTPUT_TOOLTIPS = ("The conversation as it was last saved; an empty one if there is none yet.",)
    FUNCTION = "resume"
    SEARCH_ALIASES = ("chat", "resume conversation", "chat memory")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "model": socket("MING_UNIVISION", "The model the conversation is held with."),
                "name": (
                    "STRING",
                    {
                        "default": "chat",
                        "tooltip": "The file name of Ming Save Conversation with overwrite on. A new name begins anew.",
                    },
                ),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None = None) -> bool | str:
        try:
            if name is not None and (path := file_without_number(name, "name")).exists():
                check_format(path, CONVERSATION_FORMAT)
        except FileError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, name: str | None, **_: object) -> str | float:
        if name is None:  # it is linked, and may become any name
            return float("nan")
        path = file_without_number(name, "name")
        return content_digest(path) if path.exists() else ""

    def resume(self, model: host.Loaded[Engine], name: str) -> tuple[Conversation]:
        path = file_without_number(name, "name")
        return (_loaded(model, path) if path.exists() else Conversation(),)


def _loaded(model: host.Loaded[Engine], path: Path) -> Conversation:
    """The conversation of a file, whose pictures are expanded again; the bar moves."""
    report = host.progress(1)

    def on_ready(image_tokens: int) -> None:
        host.load_to_gpu(model, model.model.mingtok.working_memory(1, image_tokens))

    def on_image(done: int, total: int) -> None:
        report(done, total=total)

    return load_conversation(path, model.model, on_ready, on_image)


class MingConversationPicture:
    DESCRIPTION = "Takes one picture from a conversation, as features."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("MING_FEATURES",), ("features",)
    OUTPUT_TOOLTIPS = ("The features of that picture.",)
    FUNCTION = "pick"
    SEARCH_ALIASES = ("picture from conversation", "last picture")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "conversation": socket("MING_CONVERSATION", "A conversation that contains pictures."),
                "index": integer(-1, -1024, 1023, "0 is the first picture, attached or drawn; -1 is the last."),
            }
        }

    def pick(self, conversation: Conversation, index: int) -> tuple[Features]:
        images = conversation.images
        if not -len(images) <= index < len(images):
            n = len(images)
            has = f"{n} picture{'s' * (n > 1)} (0 to {n - 1}, or -1 to {-n} from the end)" if n else "no picture"
            raise ValueError(f"there is no picture {index}: this conversation has {has}")
        return (images[index].features,)


class MingConversationTranscript:
    DESCRIPTION = "Writes a conversation as readable text."
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("transcript",)
    OUTPUT_TOOLTIPS = ("The rounds in order.",)
    FUNCTION = "write"
    SEARCH_ALIASES = ("conversation to text", "chat log")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"conversation": socket("MING_CONVERSATION", "The conversation to write as text.")}}

    def write(self, conversation: Conversation) -> tuple[str]:
        return (conversation.transcript(),)
