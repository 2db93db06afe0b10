"""Keys and values of past tokens: storage only. What attention computes from them is in attention.py.

    KeyValues     keys and values of consecutive positions, as they travel to the prefix cache and back
    PrefillCache  one sequence that is being prefilled
    DecodeCache   several continuations of one prefilled sequence: guidance rows, and the images of a batch
    LayerCache    one layer of a stack; LayerCaches, all of them

Buffers are allocated once and filled from the front, so a step copies nothing but its own keys and values.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import LanguageModelConfig


class KeyValues(NamedTuple):
    """Keys (after rotary embedding) and values of n consecutive positions: [layers, kv_heads, n, head_dim] each."""

    keys: Tensor  # right only at the positions that they were rotated for
    values: Tensor

    @property
    def bytes(self) -> int:
        # in bf16 57 KB a position at the published size: 28 layers * 2 * 4 heads * 128 channels * 2 bytes
        return self.keys.nbytes + self.values.nbytes

    @property
    def length(self) -> int:
        return self.keys.shape[2]


class CachePosition:
    """Index of the next token as a tensor on the device, for caches whose shapes must not change (a static cache)."""

    def __init__(self, index: int, capacity: int, device: torch.device) -> None:
        # on the device, since a CUDA graph would keep a Python number as it was when recorded
        self.index = torch.tensor([index], device=device)
        self._slots = torch.arange(capacity, device=device)  # (capacity,)

    def indices(self, tokens: int) -> Tensor:
        """Indices of the next `tokens` tokens, int64 [tokens]."""
        # a single token, the usual step, needs no kernel: this is the tensor itself, not a copy
        return self.index if tokens == 1 else self.index + self._slots[:tokens]

    def attn_mask(self, tokens: int) -> Tensor:
        """Slots that each of the next `tokens` tokens may attend to: bool [tokens, capacity]."""
        # causal among the new tokens as well; slots not filled yet come after all of them
        return self._slots <= self.indices(tokens)[:, None]


class LayerCache:
    """Preallocated keys and values of one attention layer, for `rows` sequences that grow together.

    keys, values: [rows, heads, capacity, head_dim]; the first `length` positions are filled. `both` holds the two,
    [2, rows, heads, capacity, head_dim], so that a step stores what it adds with one copy.
    """

    def __init__(self, rows: int, heads: int, capacity: int, head_dim: int, *, device: Any, dtype: torch.dtype) -> None:
        # not zeroed: what is not filled is never read, except in a static cache, which zeroes it. In memory heads come
        # before rows, as attention over a shared prefix takes them
        self.both = torch.empty(2, heads, rows, capacity, head_dim, device=device, dtype=dtype).transpose(1, 2)
        self.keys, self.values = self.both[0], self.both[1]
        self.length = 0  # a host number: asking for it never waits for the device
        self.cache_position: CachePosition | None = None  # set while the cache is static

    def append(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [2, rows, heads, n, head_dim] and return views of all that is filled now.

        A static cache returns its whole capacity, of which `attn_mask` tells what counts. Raises ValueError when the
        capacity is exceeded.
        """
        if self.cache_position is not None:
            # written by an index on the device, as a slice needs its bounds on the host; `advance` counts the tokens,
            # since a replayed step does not run this code
            self.both.index_copy_(3, self.cache_position.indices(both.shape[3]), both)
            return self.keys, self.values
        end = self.length + both.shape[3]
        # a trap without this: a slice beyond the end is empty, and a single token vanishes in it without an error
        if end > self.keys.shape[2]:
            raise ValueError(f"{end} tokens exceed the cache's capacity of {self.keys.shape[2]}")
        self.both[:, :, :, self.length : end] = both
        self.length = end
        # views, (rows, heads, end, head_dim)
        return self.keys[:, :, :end], self.values[:, :, :end]

    @property
    def filled(self) -> Tensor:
        """Keys and values so far, [2, rows, heads, length, head_dim]."""
        return self.both[:, :, :, : self.length]

    def attn_mask(self, tokens: int) -> Tensor | None:
        """Which keys returned by `append` each of the newest `tokens` may attend to: bool [tokens, keys].

        None where each attends to all of them.
        """
        if self.cache_position is not None:
            return self.cache_position.attn_mask(tokens)
        if tokens == 1:  # there is nothing after the newest token
            return None
        # `append` has counted the new tokens already, so that the first of them is number length - tokens
        seen = torch.ones(tokens, self.length, dtype=torch.bool, device=self.keys.device)
        return seen.tril(self.length - tokens)


class LayerCaches(list[LayerCache]):
    """The caches of all layers of a stack.

    A static one does the same operations on the same memory in every step, as a CUDA graph requires: the position of
    the next token is a tensor on the device, and unfilled slots are masked.
    """

    @property
    def length(self) -> int:
        """Tokens that every row holds; the last layer is the last to be filled."""
        return self[-1].length

    @property
    def cache_position(self) -> CachePosition | None:
        return self[-1].cache_position  # the layers share one

    def make_static(self) -> None:
        """Keep all shapes from now on; `advance` completes a step."""
        last = self[-1]
        # one position for all layers, so that a step moves it with one kernel
        position = CachePosition(last.length, last.keys.shape[2], last.keys.device)
        for layer in self:
            layer.cache_position = position
            layer.both[:, :, :, layer.length :] = 0  # masked slots have weight 0, but 0 * NaN is NaN

    def make_dynamic(self) -> None:
        """Grow with every `append` again."""
        for layer in self:
            # the host has counted along, so there is no length to read back
            layer.cache_position = None

    def advance(self, tokens: int = 1) -> None:
        """Complete a step of a static cache; a dynamic one counts by itself."""
        if self.cache_position is not None:
            # in place: recorded steps read this very tensor
            self.cache_position.index += tokens
            for layer in self:
                layer.length += tokens


class PrefillCache:
    """Keys and values of one sequence, preallocated: [layers, kv_heads, capacity, head_dim] each."""

    def __init__(self, config: LanguageModelConfig, capacity: int, *, device: Any, dtype: torch.dtype) -> None:
        # all layers in one tensor, from which a segment is cut in one piece; one sequence, so there is no batch axis
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.both = torch.empty(2, *shape, device=device, dtype=dtype)
        self.keys, self.values = self.both[0], self.both[1]
        self.length = 0

    def append(self, layer: int, both: Tensor) -> tuple[Tensor, Tensor]:
        """Add one layer's new keys and values [2, kv_heads, n, head_dim] and return views of all of its filled ones.

        The positions count as filled for the other layers once `advance` is called, after the last layer.
        """
        end = self.length + both.shape[2]
        self.both[:, layer, :, self.length : end] = both
        # views, (kv_heads, end, head_dim)
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def extend(self, known: KeyValues) -> None:
        """Append positions that were computed before."""
        end = self.length + known.length
        # they may come from host memory; keys keep the rotation of their old position, wherever they stand in here
        self.keys[:, :, self.length : end] = known.keys
        self.values[:, :, self.length : end] = known.values
        self.length = end

    def slice(self, start: int, end: int) -> KeyValues:
        """Copy positions start..end to host memory."""
        # copy=True, or on a CPU these would be views, which keep the whole buffer alive
        return KeyValues(*(x[:, :, start:end].detach().to("cpu", copy=True) for x in (self.keys, self.values)))


class DecodeCache:
    """`rows` sequences that continue one prefix. The prefix is stored once for all of them.

    visible  bool [rows, prefix.length], the positions of the prefix that each row attends to; None: all. A row attends
             to all that it has added itself. Its positions count what it attends to, so a row that sees less has
             compacted positions, while the prefix keeps the keys it was computed with (MODEL_SPEC, generation loop).
    """

    def __init__(self, prefix: PrefillCache, capacity: int, rows: int = 1, visible: Tensor | None = None) -> None:
        layers, heads, _, head_dim = prefix.keys.shape
        options: dict[str, Any] = {"device": prefix.keys.device, "dtype": prefix.keys.dtype}
        self.prefix, self.rows, self.visible = prefix, rows, visible
        # rows differ only in what they add: the prompt takes no more memory for three guidance rows than for one
        self.layers = LayerCaches(LayerCache(rows, heads, capacity, head_dim, **options) for _ in range(layers))
        self.prefix_bias: Tensor | None = None  # float32 [rows, P], added to the scores of the prefix
        starts = torch.full((rows,), prefix.length, dtype=torch.long, device="cpu")
        if visible is not None:
            # hidden positions do not count, as published: counting them moves the reference latents by 0.3 to 0.6
            starts = visible.sum(1)
            if not visible.all():  # else there is nothing to add to the scores of any layer
                bias = torch.zeros(visible.shape, device="cpu").masked_fill(~visible.cpu(), float("-inf"))
                self.prefix_bias = bias.to(prefix.keys.device)
        self._starts = starts.to(prefix.keys.device)  # (rows,)

    @functools.cached_property
    def prefix_keys(self) -> Tensor:
        """Keys of the prefix [layers, kv_heads, P, head_dim] in float32, in which scores are computed."""
        return self.prefix.keys[:, :, : self.prefix.length].float()  # once: a step would convert all of them again

    @property
    def length(self) -> int:
        """Tokens that each row has added."""
        return self.layers.length

    def positions(self, tokens: int) -> Tensor:
        """Positions of the next `tokens` of each row, int64 [rows, tokens]."""
        static = self.layers.cache_position
        # (rows,); for a static cache all on the device, so that a graph records the sum and not its first result
        first = self._starts + (self.length if static is None else static.index)
        if tokens == 1:
            return first[:, None]  # (rows, 1), the usual step
        return first[:, None] + torch.arange(tokens, device=first.device)

    def fork(self, rows: int, capacity: int, visible: Tensor | None) -> DecodeCache:
        """Copy a single row `rows` times; the copies go on separately and see `visible` of the prefix."""
        return self._copy([0] * rows, capacity, visible)

    def select(self, rows: list[int], capacity: int) -> DecodeCache:
        """Copy only these rows, with room for `capacity` tokens in all."""
        return self._copy(rows, capacity, None if self.visible is None else self.visible[rows])

    def _copy(self, rows: list[int], capacity: int, visible: Tensor | None) -> DecodeCache:
        other = DecodeCache(self.prefix, capacity, len(rows), visible)
        other.prefix_keys = self.prefix_keys
        index = torch.tensor(rows, device=self.prefix.keys.device)  # may name a row several times
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.append(mine.filled[:, index])  # `append` also checks that they fit the new capacity
        return other

    def slice(self, row: int, start: int, end: int) -> KeyValues:
        """Copy what one row has added, from its start-th token to its end-th, to host memory."""
        # (layers, kv_heads, end - start, head_dim): stacked first, so that two transfers do for all layers
        keys = torch.stack([layer.keys[row, :, start:end] for layer in self.layers])
        values = torch.stack([layer.values[row, :, start:end] for layer in self.layers])
        return KeyValues(keys.detach().cpu(), values.detach().cpu())  # stacking has copied them
