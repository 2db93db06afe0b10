"""Phrasings that the model knows, ready to connect to a prompt."""

from __future__ import annotations

from ..tiny_shapes.world import TASK_INSTRUCTIONS, instruction
from .widgets import TOOLS, combo, prompt

OUR_WORDS = ("super-resolution", "denoise", "colorize")  # the other tasks' words are the published ones


class MingInstruction:
    DESCRIPTION = (
        "Writes the instruction for a task. generate, describe, identify region and refine are the published "
        f"phrasings, word for word; {', '.join(OUR_WORDS)} are ours."
    )
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("instruction",)
    OUTPUT_TOOLTIPS = ("Connect it to a prompt or an instruction.",)
    FUNCTION = "write"
    SEARCH_ALIASES = ("ming prompt", "task prompt")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "task": combo(list(TASK_INSTRUCTIONS), "What the model is to do."),
                "text": prompt("The description or the edit, where the task has one."),
            }
        }

    def write(self, task: str, text: str) -> tuple[str]:
        return (instruction(task, text),)
