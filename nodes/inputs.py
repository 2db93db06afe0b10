"""What every node's inputs go through: each is what its INPUT_TYPES declare, or an error names the input; and what its
errors go through: they are in the language of the page.

ComfyUI checks the widgets of a prompt, but nothing that comes through a link: a number can be beyond its widget's
range, and a node of another pack can return anything under the name of a type.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..ming_core import Conversation, Engine, Features
from ..ming_core.checks import check_features, check_tensor, described, real_number, whole_number
from ..ming_core.images import check_image
from .host import Loaded
from .translation import in_page_language, translate_error
from .widgets import MAX_SEED

SOURCES = {  # what to connect to a socket of each type that this pack takes
    "MING_UNIVISION": "Load Ming-UniVision",
    "MINGTOK": "Load MingTok or Load Ming-UniVision",
    "MING_FEATURES": "MingTok Semantic Features, Ming Generate or Ming Edit",
    "MING_CONVERSATION": "Ming Understand, Ming Generate or Ming Edit",
    "IMAGE": "Load Image or MingTok Decode",
    "MASK": "Load Image or MingTok Encode",
    "LATENT": "MingTok Encode",
    "STRING": "a node that returns text",
}


def checked(node: Any) -> Any:
    """Make a node class check its inputs whenever it is run, and say in the page's language what is wrong.

    Returns the class.
    """
    function: str = node.FUNCTION
    run = getattr(node, function)
    names = list(inspect.signature(run).parameters)[1:]

    @functools.wraps(run)
    def checked_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False)) | kwargs  # ComfyUI passes all of them by name
        try:
            return run(self, **check_inputs(node, inputs))
        except Exception as error:
            translate_error(error)
            raise

    setattr(node, function, checked_run)
    if hasattr(node, "VALIDATE_INPUTS"):
        node.VALIDATE_INPUTS = classmethod(_in_page_language(node.VALIDATE_INPUTS))
    return node


def _in_page_language(validate: Callable[..., bool | str]) -> Callable[..., bool | str]:
    """VALIDATE_INPUTS of a node class, with the language of the page for what it says."""

    def validated(_: type, *args: Any, **inputs: Any) -> bool | str:
        found = validate(*args, **inputs)
        return in_page_language(found) if isinstance(found, str) else found

    # ComfyUI passes the inputs that its signature names
    validated.__signature__ = inspect.signature(validate.__func__)  # type: ignore[attr-defined]
    return validated


def check_inputs(node: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a node as plain values of the declared types. Raises ValueError."""
    declared = node.INPUT_TYPES()
    optional = declared.get("optional", {})
    all_inputs = declared.get("required", {}) | optional
    by_node = inspect.signature(node.VALIDATE_INPUTS).parameters if hasattr(node, "VALIDATE_INPUTS") else ()
    values = dict(inputs)
    for name, (kind, options) in all_inputs.items():
        if name in optional and inputs.get(name) is None:
            values.pop(name, None)  # not connected: its default
            continue
        if name not in inputs:
            continue
        if isinstance(kind, list) and name in by_node:
            continue  # names of files and models, which a node checks in words of its own, as before a run
        values[name] = check_input(name, inputs[name], kind, options)
    return values


def check_input(name: str, value: Any, kind: str | list[str], options: dict[str, Any]) -> Any:
    """One input as a plain value of its declared type. Raises ValueError, which names the input."""
    if isinstance(kind, list):
        if not isinstance(value, str) or value not in kind:
            raise ValueError(f"{name} is {described(value)}: choose one of {tuple(kind)}")
        return value
    if kind == "INT":
        if options["max"] == MAX_SEED:  # any whole number is a seed: beyond 64 bits they begin again
            return whole_number(name, value) % (MAX_SEED + 1)
        return whole_number(name, value, options["min"], options["max"])
    if kind == "FLOAT":
        return real_number(name, value, options["min"], options["max"])
    if kind == "BOOLEAN":
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{name} is {described(value)}: it must be true or false")
        return bool(value)
    return check_socket(name, value, kind) if kind in SOURCES else value


def check_socket(name: str, value: Any, kind: str) -> Any:
    """The value of a socket of this type, if it is one. Raises ValueError with what came and what belongs there."""
    if kind not in types_of(value):
        came = " or ".join(types_of(value)) or described(value)
        raise ValueError(f"{name} takes {kind}, and {came} came: connect {SOURCES[kind]}")
    if kind in CONTENT_CHECKS:
        CONTENT_CHECKS[kind](name, value)
    return value


CONTENT_CHECKS: dict[str, Callable[[str, Any], object]] = {
    "IMAGE": lambda name, value: check_image(value, name),
    "MASK": lambda name, value: check_tensor(name, value, "from 0 to 1"),
    "MING_FEATURES": check_features,
}


def types_of(value: Any) -> tuple[str, ...]:
    """The types of sockets that a value is of; none if it is of no type that this pack takes."""
    if isinstance(value, Loaded):
        return ("MING_UNIVISION",) if isinstance(value.model, Engine) else ("MINGTOK",)
    if isinstance(value, torch.Tensor):
        return ("IMAGE", "MASK")  # both are tensors; their shapes are checked where they are used
    classes = {"MING_FEATURES": Features, "MING_CONVERSATION": Conversation, "LATENT": dict, "STRING": str}
    return tuple(kind for kind, known in classes.items() if isinstance(value, known))
