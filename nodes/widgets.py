"""Input declarations that nodes share. Names, order and strings are saved in users' workflows and never change."""

from __future__ import annotations

from typing import Any

MAX_SEED = 2**64 - 1

CATEGORY = "Ming-UniVision"
FEATURES, TOOLS = f"{CATEGORY}/features", f"{CATEGORY}/tools"


def integer(default: int, low: int, high: int, tooltip: str, **more: Any) -> tuple:
    return "INT", {"default": default, "min": low, "max": high, "tooltip": tooltip, **more}


def number(default: float, low: float, high: float, step: float, tooltip: str, **more: Any) -> tuple:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, "tooltip": tooltip, **more}


def combo(options: list[str], tooltip: str, **more: Any) -> tuple:
    return options, {"default": options[0], "tooltip": tooltip, **more}


def boolean(default: bool, tooltip: str) -> tuple:
    return "BOOLEAN", {"default": default, "tooltip": tooltip}


def prompt(tooltip: str, default: str = "") -> tuple:
    """A multiline text that is taken literally: no {a|b} dynamic prompts."""
    return "STRING", {"default": default, "multiline": True, "dynamicPrompts": False, "tooltip": tooltip}


def file_name(default: str) -> tuple:
    return "STRING", {"default": default, "tooltip": "File name in output/ming; a counter is added."}


def socket(kind: str, tooltip: str) -> tuple:
    return kind, {"tooltip": tooltip}


def seed(tooltip: str, *, changes: bool, **more: Any) -> tuple:
    """changes: whether the page offers to change the seed after each run."""
    return integer(0, 0, MAX_SEED, tooltip, control_after_generate=changes, **more)
