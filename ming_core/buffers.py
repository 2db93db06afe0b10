"""Preallocated keys and values, which grow token by token without a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Place:
    """Where the next token goes, as a number on the device, for buffers that are fixed; see Buffers.fix."""

    def __init__(self, index: int, capacity: int, device: Any) -> None:
        self.index = torch.tensor([index], device=device)
        self._all = torch.arange(capacity, device=device)

    @property
    def seen(self) -> Tensor:
        """bool [1, capacity], what the token at this place sees."""
        return (self._all <= self.index)[None]


class KeyValueBuffer:
    """Preallocated keys and values of one attention layer, for `rows` sequences that grow together.

    keys, values: [rows, heads, capacity, head_dim]; the first `length` positions are filled.
    """

    def __init__(self, rows: int, heads: int, capacity: int, head_dim: int, *, device: Any, dtype: torch.dtype) -> None:
        self.keys = torch.empty(rows, heads, capacity, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self.place: Place | None = None  # of the next token, while the buffer is fixed

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [rows, heads, n, head_dim] of each; returns views of all that is filled now.

        A fixed buffer takes one token and returns all of its capacity, of which `seen` says what counts.
        """
        if self.place is not None:
            self.keys.index_copy_(2, self.place.index, keys)
            self.values.index_copy_(2, self.place.index, values)
            return self.keys, self.values
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"{end} tokens are given to a buffer for {self.keys.shape[2]}")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @property
    def seen(self) -> Tensor | None:
        """bool [1, capacity], what the newest token of a fixed buffer may see; None: all that `append` returns."""
        return None if self.place is None else self.place.seen


class Buffers(list[KeyValueBuffer]):
    """Those of all layers of a stack.

    Once they are fixed, a step does the same operations on the same memory however many tokens there are, as a CUDA
    graph wants it: the place of its token is a number on the device, and what is not filled is hidden by a mask.
    """

    @property
    def place(self) -> Place | None:
        return self[-1].place

    def fix(self) -> None:
        """From now on take one token a step, and keep it when `advance` is called."""
        last = self[-1]
        place = Place(last.length, last.keys.shape[2], last.keys.device)
        for buffer in self:
            buffer.place = place
            for tensor in (buffer.keys, buffer.values):
                tensor[:, :, buffer.length :] = 0  # hidden numbers count 0 times, but 0 * NaN is NaN

    def unfix(self) -> None:
        """Grow again."""
        for buffer in self:
            buffer.place = None

    def advance(self) -> None:
        """After a step of fixed buffers; growing ones do so by themselves."""
        self.place.index += 1
        for buffer in self:
            buffer.length += 1
