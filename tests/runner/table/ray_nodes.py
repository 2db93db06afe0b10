"""Node classes for workers of Ray, which get them by the name of this module."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from ming_univision.tests.runner.example_nodes import CLASSES as EXAMPLES


class Trouble:
    """Passes a text on, and keeps a list of what went through.

    The text "kill" ends its process once, "die" each time; "stop" ends the driver once, and "slow" takes its time.
    """

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
        if text == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if text.startswith("slow"):
            time.sleep(3)
        if text == "stop" and not (Path(folder) / "killed").exists():
            (Path(folder) / "killed").touch()
            os.kill(int((Path(folder) / "driver").read_text()), signal.SIGKILL)
        return (text,)


def classes() -> dict[str, type]:
    return {**EXAMPLES, "Trouble": Trouble}
