"""Ming Instruction: the wording of each task, ready to connect to a prompt."""

from __future__ import annotations

from ..tiny_shapes.world import TASK_INSTRUCTIONS, instruction
from .widgets import TOOLS, combo, prompt

OUR_WORDING = ("super-resolution", "denoise", "colorize")  # every other task uses the published wording


class MingInstruction:
    DESCRIPTION = (
        "Writes the instruction for a task. generate, describe, identify region and refine use the model's published "
        f"wording; {', '.join(OUR_WORDING)} use our own."
    )
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("instruction",)
    OUTPUT_TOOLTIPS = ("Connect to a prompt or instruction input.",)
    FUNCTION = "write"
    SEARCH_ALIASES = ("ming prompt", "task prompt")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "task": combo(list(TASK_INSTRUCTIONS), "What the model should do."),
                "text": prompt("The description or the edit, if the task needs one."),
            }
        }

    def write(self, task: str, text: str) -> tuple[str]:
        return (instruction(task, text),)
