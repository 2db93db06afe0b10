"""Node classes for workers of Ray, which get them by the name of this module."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from ming_univision.tests.runner.example_nodes import CLASSES as EXAMPLES


class Trouble:
    """Passes a text on, and keeps a list of what went through. The text "kill" ends its process, but only once."""

    RETURN_TYPES, FUNCTION = ("STRING",), "give"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {}), "folder": ("STRING", {})}}

    def give(self, text, folder):
        with (Path(folder) / "runs.txt").open("a") as file:
            file.write(f"{text} ")
        if text == "fail":
            raise ValueError("it rained")
        if text == "kill" and not (Path(folder) / "killed").exists():
            (Path(folder) / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if text == "stop" and not (Path(folder) / "killed").exists():
            (Path(folder) / "killed").touch()
            os.kill(int((Path(folder) / "driver").read_text()), signal.SIGKILL)
        return (text,)


def classes() -> dict[str, type]:
    return {**EXAMPLES, "Trouble": Trouble}
