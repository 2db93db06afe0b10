"""Checks of values that callers pass: numbers, tensors, features. Each returns the value in its plain form.

All raise ValueError with one sentence: the name of the value, what it is, and what it must be.
"""

from __future__ import annotations

import math
import reprlib
import sys

import numpy as np
import torch
from torch import Tensor

from .features import Features

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # fp8 can be stored, but not computed with
MAX_DEPTH = 1_000_000  # drawings that may lie behind an image


def whole_number(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int: an int, a float that is whole, or a NumPy or torch scalar of either; a bool is none."""
    number = _plain(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"{name} is {described(number)}: it must be a whole number{_range(low, high, ' of')}")
    _check_range(name, number, low, high)
    return number


def real_number(name: str, value: object, low: float | None = None, high: float | None = None) -> float:
    """`value` as a finite float: an int, a float, or a NumPy or torch scalar of either; a bool is none."""
    number = _plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != number:
        raise ValueError(f"{name} is {described(number)}: it must be a number{_range(low, high, ' of')}")
    _check_range(name, number, low, high)
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"{name} is {described(number)}: it must be a finite number{_range(low, high, ' of')}")
    return float(number)


def check_tensor(name: str, value: object, content: str = "") -> Tensor:
    """`value` if it is a dense tensor of floats or bools, whose values can be read.

    content: what the floats must be, for the message, such as "from 0 to 1".
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {described(value)}: it must be a tensor")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device, where tensors have no values: compute it on a real device")
    if value.is_nested or value.layout != torch.strided:
        raise ValueError(f"{name} is a sparse or nested tensor: make it dense first")
    if value.dtype not in (*FLOATS, torch.bool):
        dtype = str(value.dtype).removeprefix("torch.")
        raise ValueError(f"{name} holds {dtype}: convert it to float32{content and f' with values {content}'}")
    return value


def check_features(name: str, value: object) -> Features:
    """`value` if it is `Features` of at least one picture, whose fields belong together."""
    if not isinstance(value, Features):
        raise ValueError(f"{name} is {described(value)}: it must be Features")
    tokens = check_tensor(f"{name}.tokens", value.tokens)
    latents = check_tensor(f"{name}.latents", value.latents)
    fits = (
        tokens.dtype == latents.dtype == torch.float32
        and (tokens.ndim, latents.ndim) == (3, 4)
        and value.grid == tuple(latents.shape[2:])
        and tuple(tokens.shape[:2]) == (len(latents), math.prod(latents.shape[2:]))
    )
    if not fits:
        raise ValueError(
            f"{name} has tokens {list(tokens.shape)} ({tokens.dtype}), latents {list(latents.shape)} ({latents.dtype}) "
            f"and the grid {value.grid}: they must be float32 [B, h*w, D], float32 [B, C, h, w] and (h, w)"
        )
    if 0 in latents.shape:
        raise ValueError(f"{name} contains no picture: encode at least one")
    if not (tokens.isfinite().all() and latents.isfinite().all()):
        raise ValueError(f"{name} contains NaN or infinite values: make the features again")
    if not isinstance(value.tokenizer, str):
        raise ValueError(f"{name}.tokenizer is {described(value.tokenizer)}: it must be the fingerprint of a MingTok")
    whole_number(f"{name}.depth", value.depth, 0, MAX_DEPTH)
    return value


def described(value: object) -> str:
    """A short description of any value, for an error message."""
    if value is None:
        return "nothing (None)"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"a NumPy array {list(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write very long ones
    if isinstance(value, (bool, int, float, complex, str, bytes)):
        return reprlib.repr(value)
    return f"a {type(value).__name__}"


def _plain(value: object) -> object:
    """The Python number in a NumPy scalar or a tensor without dimensions; other values as they are."""
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return value.item()
    if isinstance(value, Tensor) and value.ndim == 0 and value.layout == torch.strided and not value.is_meta:
        return value.item()
    return value


def _check_range(name: str, number: float, low: float | None, high: float | None) -> None:
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} is {described(number)}: it must be{_range(low, high)}")


def _range(low: float | None, high: float | None, of: str = "") -> str:
    """What is allowed, to stand behind "it must be"; `of` stands before "at least"."""
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f"{of} at least {low}"
    return f"{of} at most {high}" if high is not None else ""
