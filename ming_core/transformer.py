"""The transformer block that the three stages of MingTok share.

Plain pre-norm blocks: multi-head attention with one fused projection and no position encoding, then a feed-forward
layer, SwiGLU in the encoder and the semantic decoder, GELU in the pixel decoder. Every layer comes from
`operations` (torch.nn, or another namespace with the same classes), with `device` and `dtype` handed through.
Module names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import HEAD_DIM, swiglu_width

LAYER_NORM_EPS = 1e-6


def out_of_range(dtype: torch.dtype) -> RuntimeError:
    """What to raise where what was computed is no number: in fp16 it may have outgrown the format."""
    remedy = "choose fp32 (or bf16)" if dtype == torch.float16 else "the weights are damaged, download them again"
    return RuntimeError(f"the model computed NaN or infinite values in {str(dtype).removeprefix('torch.')}: {remedy}")


class Placed(nn.Module):
    """A model that may compute elsewhere than where its weights rest.

    It computes where its weights are, unless a host that brings them over as they are needed says where: `compute_on`.
    """

    compute_device: torch.device | None = None

    def compute_on(self, device: torch.device) -> None:
        """Whatever is given to this model and its parts goes to `device`, wherever their weights rest."""
        for module in self.modules():
            if isinstance(module, Placed):
                module.compute_device = device

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.witness.device

    @property
    def dtype(self) -> torch.dtype:
        return self.witness.dtype

    @property
    def witness(self) -> Tensor:
        """A weight that is always in the dtype that is computed in."""
        raise NotImplementedError


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
        """After a step of fixed buffers; growing ones have done so already."""
        if self.place is not None:
            self.place.index += 1
            for buffer in self:
                buffer.length += 1


class Attention(nn.Module):
    """Multi-head self-attention; rows of `qkv` are ordered [q of all heads | k of all heads | v of all heads]."""

    def __init__(self, dim: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.heads = dim // HEAD_DIM
        self.qkv = operations.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = operations.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, causal: bool = False, buffer: KeyValueBuffer | None = None) -> Tensor:
        """x [B, N, D]. With a buffer, x holds the one next token, or the first N of an empty buffer."""
        b, n, dim = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, HEAD_DIM).permute(2, 0, 3, 1, 4)  # each (B, heads, N, 64)
        seen = None
        if buffer is not None:
            k, v = buffer.append(k, v)
            seen = buffer.seen
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal and n > 1)
        return self.proj(x.transpose(1, 2).reshape(b, n, dim))


class SwiGLU(nn.Module):
    """w3(silu(a) * b), where a and b are the two halves of w12(x)."""

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or swiglu_width(dim)
        self.w12 = operations.Linear(dim, 2 * hidden, device=device, dtype=dtype)
        self.w3 = operations.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class GeluMlp(nn.Module):
    """fc2(gelu(fc1(x))), four times as wide inside, exact (erf) GELU."""

    def __init__(self, dim: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.fc1 = operations.Linear(dim, 4 * dim, device=device, dtype=dtype)
        self.fc2 = operations.Linear(4 * dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then the feed-forward layer, each added to the stream."""

    def __init__(
        self,
        dim: int,
        feed_forward: Callable[..., nn.Module],
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = {"operations": operations, "device": device, "dtype": dtype}
        self.norm1 = operations.LayerNorm(dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        self.attn = Attention(dim, **make)
        self.norm2 = operations.LayerNorm(dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        self.mlp = feed_forward(dim, **make)

    def forward(self, x: Tensor, *, causal: bool = False, buffer: KeyValueBuffer | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), causal=causal, buffer=buffer)
        return x + self.mlp(self.norm2(x))


def block_stack(depth: int, dim: int, feed_forward: Callable[..., nn.Module], **make: Any) -> nn.ModuleList:
    """`depth` blocks, nested one level deeper as in the published key names: blocks.0.{i}."""
    return nn.ModuleList([nn.ModuleList([Block(dim, feed_forward, **make) for _ in range(depth)])])
