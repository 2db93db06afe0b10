"""The decoder-only language model: text tokens and image tokens in one sequence.

A pre-norm transformer with grouped-query attention, rotary positions and a mixture of experts in every layer. Each
layer is handed the way in which it attends (attention.py): over the sequence itself in training, over a `PrefillCache`
while a prompt is read, over a `DecodeCache` while rows grow token by token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend, DecodeAttention, PrefillAttention
from .config import LanguageModelConfig
from .cuda_graphs import graphs_possible
from .experts import Experts, GatedMlp, MixtureOfExperts
from .kv_cache import DecodeCache, PrefillCache
from .offload import OffloadableModule

# before its fused kernel, torch rounded to 16 bit before it multiplied by the weight
ROUNDS_ONCE = hasattr(torch.ops.aten, "_fused_rms_norm")
PREFILL_CHUNK = 512  # tokens forwarded at once; bounds the mask of a chunk to [512, length so far]


def prefill_bounds(tokens: int) -> list[int]:
    """Where the chunks of a prompt begin, and the end of the last; never is a single token left for one of its own."""
    bounds = [*range(0, tokens, PREFILL_CHUNK), tokens]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1 < PREFILL_CHUNK:
        bounds[-2] -= 1  # fused kernels for many queries do not always take one
    return bounds


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.device)  # it may rest on another device
        # the weight is multiplied in float32 too: only the product is rounded, as published
        if ROUNDS_ONCE and weight.dtype == x.dtype:
            return F.rms_norm(x, (x.shape[-1],), weight, self.eps)  # one kernel on a GPU
        return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), self.eps).to(x.dtype)


@functools.lru_cache(maxsize=64)  # a step would otherwise spend eight small kernels on it
def rope_frequencies(theta: float, d: int, rotated: int, still: int, device: torch.device) -> Tensor:
    """By how much a position turns the channels of each head, float32 [rotated + still, 1, d].

    Negative in the first half of a head's channels; zero for the heads that carry no position, which are the last.
    """
    with torch.inference_mode(False):  # it is kept, and what is made in that mode cannot be trained with
        # inv_freq_i = theta^(-2i/d): the first channels turn fast and tell neighbours apart, the last ones slowly
        frequencies = theta ** -(torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
        signed = torch.cat([-frequencies, frequencies])
        return torch.cat([signed.expand(rotated, d), signed.new_zeros(still, d)])[:, None]


class Rope(NamedTuple):
    """Cosines and sines for queries, keys and values, [B, heads + 2 * kv_heads, T, head_dim] each.

    Sines of the first half of the channels are negated, and those of values are 0.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, config: LanguageModelConfig, dtype: torch.dtype) -> Rope:
        """positions int64 [B, T]. Computed in float32, then cast, as published."""
        rotated, still = config.num_attention_heads + config.num_key_value_heads, config.num_key_value_heads
        # theta 600000: over all 32768 positions the slowest channel turns by 0.07, so no two positions look alike
        frequencies = rope_frequencies(config.rope_theta, config.head_dim, rotated, still, positions.device)
        # (B, heads, T, d); never in bf16, whose 8 significant bits do not tell position 1000 from 1001
        angles = positions[:, None, :, None].float() * frequencies
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))

    def rotate(self, x: Tensor) -> Tensor:
        """x [B, heads + 2 * kv_heads, T, head_dim]; the first half of the channels is paired with the second."""
        # one roll swaps the halves, (a, b) -> (b, a), and the negated sines make it (-b, a)
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, dims=-1), self.sin)


class GroupedQueryAttention(nn.Module):
    """Rows of `query_key_value` are ordered [q heads | k heads | v heads]; k and v serve groups of query heads."""

    def __init__(
        self,
        config: LanguageModelConfig,
        layer: int,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        # published: 16 query heads on 4 key/value heads, so the cache is a quarter, 57 KB a position in bf16
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        make: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        # one fused projection without biases, as all linear layers of this language model
        self.query_key_value = operations.Linear(config.hidden_size, width, **make)
        self.dense = operations.Linear(self.heads * self.head_dim, config.hidden_size, **make)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        b, t, _ = x.shape
        qkv = self.query_key_value(x).view(b, t, -1, self.head_dim).transpose(1, 2)  # (B, heads + 2 kv, T, d)
        # values are turned by nothing, which leaves them what they are and beside the keys: a cache takes both at once
        q, kv = rope.rotate(qkv).split([self.heads, 2 * self.kv_heads], dim=1)
        kv = kv.unflatten(1, (2, -1)).transpose(0, 1)  # (2, B, kv, T, d)
        out = attend(self.layer, q, kv)  # (B, heads, T, d); a cache stores the rotated keys
        return self.dense(out.transpose(1, 2).reshape(b, t, -1))  # (B, T, H)


class DecoderLayer(nn.Module):
    """A pre-norm layer: attention, then experts (in the first `first_k_dense_replace` layers one dense MLP)."""

    def __init__(
        self,
        config: LanguageModelConfig,
        layer: int,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = {"operations": operations, "device": device, "dtype": dtype}
        norm = {"eps": config.rms_norm_eps, "device": device, "dtype": dtype}
        # pre-norm: the residual stream itself is never normalized before the last layer
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.attention = GroupedQueryAttention(config, layer, **make)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        # in published checkpoints no layer is dense
        self.dense = layer < config.first_k_dense_replace
        self.mlp = (
            GatedMlp(config.hidden_size, config.intermediate_size, **make)
            if self.dense
            else MixtureOfExperts(config, **make)
        )

    def forward(self, x: Tensor, rope: Rope, attend: Attend, image_gate: Tensor | None) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), rope, attend)  # (B, T, H)
        normed = self.post_attention_layernorm(x)
        # a dense MLP has no router, hence no use for the gate
        return x + (self.mlp(normed) if self.dense else self.mlp(normed, image_gate))


class Decoder(nn.Module):
    """Embeddings to final-normed hidden states."""

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = {"operations": operations, "device": device, "dtype": dtype}
        self.config = config
        # looked up row by row, wherever it is: a host may leave the table offloaded (see `embed`)
        self.word_embeddings = operations.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList([DecoderLayer(config, i, **make) for i in range(config.num_hidden_layers)])
        # the vision head reads what it gives, as the output layer does: never the raw stream
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, image_gate: Tensor | None = None) -> Tensor:
        """x [B, T, H]; positions int64 [B, T]; image_gate bool [B, T], tokens for the image router -> [B, T, H]."""
        rope = Rope.at(positions, self.config, x.dtype)  # the same for every layer
        for layer in self.layers:
            x = layer(x, rope, attend, image_gate)  # (B, T, H)
        return self.norm(x)


class LanguageModel(OffloadableModule):
    """The decoder with its output layer, and the two ways to run it over a cache: `prefill` and `decode`.

    `cuda_graphs`: whether the steps of a drawing may be recorded as CUDA graphs. A host that has none sets it to False.
    """

    cuda_graphs = True

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = {"operations": operations, "device": device, "dtype": dtype}
        self.config = config
        self.model = Decoder(config, **make)
        # untied from the embeddings; drawing needs it only for the token after an image
        self.lm_head = operations.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)

    @property
    def reference_weight(self) -> Tensor:
        # a norm is never quantized, so its dtype is the one to compute in
        return self.model.norm.weight

    def working_memory(self, prefix: int, rows: int, new: int, *, in_runs: bool = False) -> int:
        """Bytes beside the weights for `rows` rows that add up to `new` tokens each to a prefix.

        in_runs: the new tokens come in runs of any length, not one by one. Keys and values are exact; what is computed
        at once is that of the largest prefill chunk.
        """
        config, size = self.config, self.dtype.itemsize
        # keys and values of one position, in all layers
        position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
        # tokens that are computed at once, and the keys that each of them may see
        chunk = min(max(prefix, rows * new if in_runs else 0), PREFILL_CHUNK)
        keys = prefix + (new if in_runs else 0)
        # float32: the scores of every head and their softmax
        scores = 2 * config.num_attention_heads * chunk * keys * 4
        # each token is copied for each of its experts, and their outputs are float32 until they are summed
        experts = 4 * chunk * config.num_experts_per_tok * config.hidden_size * 4
        # a GPU may copy the experts of a step, for which a CUDA graph has its own memory, or of a short chunk
        recorded = self.cuda_graphs and graphs_possible(self.device)
        copies = max(self._gathered_bytes(rows) * (2 if recorded else 1), self._gathered_bytes(chunk))
        # float32, once as they come and once as probabilities
        logits = 2 * rows * config.vocab_size * 4
        # the prefix is stored once for all rows; its keys, half of a position, once more in float32
        float_keys = position // 2 * 4 // size * prefix if size < 4 else 0
        return position * (prefix + rows * new) + float_keys + scores + max(experts, copies) + logits

    def _gathered_bytes(self, tokens: int) -> int:
        pairs = tokens * self.config.num_experts_per_tok
        # layers run one after the other and free their copies: the largest counts
        return max((experts.gathered_bytes(pairs) for experts in self._experts), default=0)

    def synchronizes(self, x: Tensor) -> bool:
        """Whether a step with these embeddings, [rows, H], synchronizes with the device."""
        pairs = len(x) * self.config.num_experts_per_tok
        return any(experts.synchronizes(x, pairs) for experts in self._experts)

    @property
    def _experts(self) -> list[Experts]:
        return [module for module in self.model.layers.modules() if isinstance(module, Experts)]

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [...], on any device -> [..., H], on the device that computes."""
        table = self.model.word_embeddings
        # looked up where the table rests, which may be the host: a few rows travel instead of 0.5 GB
        return table(ids.to(table.weight.device)).to(self.device, self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final-normed hidden states [..., H] -> float32 [..., vocabulary]."""
        # 0.5 GB of weights in bf16; float32 afterwards, for softmax and sampling
        return self.lm_head(hidden).float()

    def new_cache(self, capacity: int) -> PrefillCache:
        """An empty cache for one sequence of up to `capacity` positions."""
        return PrefillCache(self.config, capacity, device=self.device, dtype=self.dtype)

    def prefill(
        self,
        x: Tensor,
        cache: PrefillCache,
        image_gate: Tensor | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Forward the next T embeddings [T, H] of one sequence; returns the last hidden state [H].

        image_gate: bool [T], tokens for the image router. Runs in chunks, so memory grows with the length, not with
        its square. `on_chunk` is called between them with the number of finished embeddings and may raise to stop.
        """
        hidden = x[-1]
        for start, end in pairwise(prefill_bounds(len(x))):
            if start and on_chunk:
                on_chunk(start)
            chunk = x[None, start:end]  # (1, t, H)
            tokens = end - start
            # a prompt is never compacted: positions run on from what the cache holds
            positions = torch.arange(cache.length, cache.length + tokens, device=x.device)[None]
            # images of the prompt take the image router, everything else the text router
            gate = None if image_gate is None else image_gate[None, start:end]
            hidden = self.model(chunk, positions, PrefillAttention(cache, tokens), gate)[0, -1]
            # only now, since every layer of a chunk writes to the same positions
            cache.advance(tokens)
        return hidden

    def decode(self, x: Tensor, cache: DecodeCache) -> Tensor:
        """Forward the next T embeddings of every row [rows, T, H], all through the text gate -> hidden states alike."""
        # image tokens too, as published: the image gate would move latents by 0.7 to 1.0
        return self.model(x, cache.positions(x.shape[1]), DecodeAttention(cache))
