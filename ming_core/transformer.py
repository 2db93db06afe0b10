"""The transformer block that the three stages of MingTok share.

Plain pre-norm blocks: multi-head attention with one fused projection and no position encoding, then a feed-forward
layer, SwiGLU in the encoder and the semantic decoder, GELU in the pixel decoder. Every layer comes from
`operations` (torch.nn, or another namespace with the same classes), with `device` and `dtype` handed through.
Module names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import cached_attention, causal_attention
from .config import HEAD_DIM
from .kv_cache import LayerCache

LAYER_NORM_EPS = 1e-6  # of every LayerNorm in MingTok and the flow head


class Attention(nn.Module):
    """Multi-head self-attention; rows of `qkv` are ordered [q of all heads | k of all heads | v of all heads]."""

    def __init__(self, dim: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.heads = dim // HEAD_DIM  # the width of a head is fixed, their number follows
        # with biases, as every linear layer of MingTok; no norm of queries or keys
        self.qkv = operations.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = operations.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, causal: bool = False, cache: LayerCache | None = None) -> Tensor:
        """x [B, N, D]: the whole sequence, or with a cache its next N tokens."""
        b, n, dim = x.shape
        # one product for queries, keys and values of all heads, then taken apart
        qkv = self.qkv(x).view(b, n, 3, self.heads, HEAD_DIM).permute(2, 0, 3, 1, 4)  # (3, B, heads, N, 64)
        q, k, v = qkv
        if cache is not None:  # token by token, causal by nature
            x = cached_attention(q, cache, qkv[1:])  # (B, heads, N, 64)
        elif causal:
            x = causal_attention(q, k, v)
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # every token sees all others
        return self.proj(x.transpose(1, 2).reshape(b, n, dim))  # heads side by side again


def swiglu_width(dim: int) -> int:
    """Hidden width of a SwiGLU layer: two thirds of 4 * dim, rounded up to a multiple of 8 (768 -> 2048)."""
    # truncated before it is rounded up, as published: 1024 -> 2730 -> 2736
    return (int(4 * dim * 2 / 3) + 7) // 8 * 8


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
        hidden = hidden or swiglu_width(dim)  # as many weights as an MLP of four times the width
        # gate and value in one product: one kernel and one read of x
        self.w12 = operations.Linear(dim, 2 * hidden, device=device, dtype=dtype)
        self.w3 = operations.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)  # the gate and what it lets through, (..., hidden) each
        return self.w3(F.silu(a) * b)  # (..., dim)


class GeluMlp(nn.Module):
    """fc2(gelu(fc1(x))), four times as wide inside, exact (erf) GELU."""

    def __init__(self, dim: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.fc1 = operations.Linear(dim, 4 * dim, device=device, dtype=dtype)
        self.fc2 = operations.Linear(4 * dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        # the tanh approximation is so near (3.6e-4 in `linear_proj`) that a wrong choice passes for rounding
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
        # no LayerScale: the published blocks have no weights for it
        self.norm1 = operations.LayerNorm(dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        self.attn = Attention(dim, **make)
        self.norm2 = operations.LayerNorm(dim, eps=LAYER_NORM_EPS, device=device, dtype=dtype)
        self.mlp = feed_forward(dim, **make)

    def forward(self, x: Tensor, *, causal: bool = False, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), causal=causal, cache=cache)  # (B, N, D)
        return x + self.mlp(self.norm2(x))


class BlockStack(nn.ModuleList):
    """`depth` blocks, nested one level deeper as in the published key names: blocks.0.{i}."""

    def __init__(self, depth: int, dim: int, feed_forward: Callable[..., nn.Module], **make: Any) -> None:
        # one chunk holds all blocks: the level is there for the key names alone
        super().__init__([nn.ModuleList([Block(dim, feed_forward, **make) for _ in range(depth)])])

    @property
    def layers(self) -> list[Block]:
        # a ModuleList is typed as one of plain modules
        return cast("list[Block]", list(cast(nn.ModuleList, self[0])))
