"""Small node classes that the tests of the runner make workflows of."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from ming_univision.nodes import host


class Number:
    RETURN_TYPES, FUNCTION = ("INT",), "give"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"min": 0, "max": 9})}}

    def give(self, value):
        return (value,)


class Numbers:
    RETURN_TYPES, FUNCTION, OUTPUT_IS_LIST = ("INT", "INT"), "give", (True, False)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {})}}

    def give(self, count):
        return (list(range(count)), count)


class Add:
    RETURN_TYPES, FUNCTION = ("INT",), "add"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {}), "b": ("INT", {})}, "optional": {"more": ("INT,FLOAT", {})}}

    def add(self, a, b, more=0):
        return (a + b + more,)


class Gather:
    RETURN_TYPES, FUNCTION, INPUT_IS_LIST = ("STRING",), "gather", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"items": ("*",), "joint": ("STRING", {})}}

    def gather(self, items, joint):
        return (joint[0].join(map(str, items)),)


class Show:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "show", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("*",)}, "hidden": {"node_id": "UNIQUE_ID", "graph": "PROMPT"}}

    def show(self, source, node_id, graph):
        return {"ui": {"text": [str(source)], "id": [node_id], "nodes": [len(graph)]}}


class Write:
    """Saves a text in the output folder."""

    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "write", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("*",), "name": ("STRING", {})}}

    def write(self, source, name):
        folder = host.output_directory()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(str(source))
        return {"ui": {"text": [str(source)]}}


class Settings:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = ("STRING",), "give", True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "mode": (["fast", "slow"],),
                "strength": ("FLOAT", {"min": 0.0, "max": 2.0}),
                "on": ("BOOLEAN", {}),
                "text": ("STRING", {}),
            },
            "optional": {"steps": ("INT", {"min": 1})},
        }

    def give(self, **values):
        return (values,)


class Picky:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = ("STRING",), "give", True
    asked_with: dict | None = None

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (["listed"],), "size": ("INT", {"max": 5}), "extra": ("INT", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, name, size):
        cls.asked_with = {"name": name, "size": size}
        return True if name == "good" else f"no such thing: {name}"

    def give(self, name, size, extra):
        return (name,)


class Ticks:
    RETURN_TYPES, FUNCTION = ("STRING",), "tick"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {})}}

    def tick(self, count):
        report = host.progress(count)
        for i in range(count):
            report(i + 1, "字" * (i + 1))
            report(i + 1, "字" * (i + 1))
        return (f"{torch.is_inference_mode_enabled()}",)


class Broken:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "run", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("*",)}}

    def run(self, source):
        raise KeyError("the cause")


class Interrupted(Broken):
    def run(self, source):
        raise KeyboardInterrupt


class ReadFile:
    """Reads a file, and says by IS_CHANGED when it has changed."""

    RETURN_TYPES, FUNCTION = ("STRING",), "read"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, file):
        return None if file is None else Path(file).read_text()

    def read(self, file):
        return (Path(file).read_text(),)


class AlwaysChanged(Number):
    @classmethod
    def IS_CHANGED(cls, value):
        return math.nan


class Counting:
    """Counts its own calls, so that it shows whether an instance is kept."""

    RETURN_TYPES, FUNCTION = ("INT",), "count"

    def __init__(self):
        self.calls = 0

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {})}}

    def count(self, seed):
        self.calls += 1
        return (self.calls,)


CLASSES = {
    cls.__name__: cls
    for cls in (
        Number,
        Numbers,
        Add,
        Gather,
        Show,
        Write,
        Settings,
        Picky,
        Ticks,
        Broken,
        Interrupted,
        ReadFile,
        AlwaysChanged,
        Counting,
    )
}


def node(class_type: str, _title: str = "", **inputs) -> dict:
    entry = {"class_type": class_type, "inputs": inputs}
    return {**entry, "_meta": {"title": _title}} if _title else entry
