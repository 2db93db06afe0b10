"""The decoder-only language model: text tokens and image tokens in one sequence.

A pre-norm transformer with grouped-query attention, rotary positions and a mixture of experts in every layer. How
attention looks at the past is the business of a cache object with one method, `attend`:

- `Prefix`  one growing sequence that is being prefilled, in chunks, so that no square mask is ever built;
- `Rows`    several continuations of one prefix, a token each at a time. Guidance rows and the pictures of a batch
            are such rows: the prefix is stored and read once for all of them, and each row sees its own part of it;
- `Causal`  no cache at all, for training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .buffers import Buffers, KeyValueBuffer
from .captured import wanted
from .config import LanguageModelConfig
from .experts import GatedMlp, MixtureOfExperts
from .placement import Placed

PREFILL_CHUNK = 512  # tokens forwarded at once; bounds the mask of a chunk to [512, length so far]


class KeyValues(NamedTuple):
    """Keys (after rope) and values of n consecutive positions: [layers, kv_heads, n, head_dim] each."""

    keys: Tensor
    values: Tensor

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def length(self) -> int:
        return self.keys.shape[2]


class Cache(Protocol):
    """What a layer's attention asks for: add this token's keys and values, give what its queries find."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, heads, T, d]; k, v [B, kv_heads, T, d] -> [B, heads, T, d]."""
        ...


class Causal:
    """Full attention over the sequence itself, for training: causal, or by a mask (bool [B, T, T], True: seen)."""

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = None if mask is None else mask[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.mask is None)


class Prefix:
    """Keys and values of one sequence, preallocated for `capacity` positions and filled from the front."""

    def __init__(self, config: LanguageModelConfig, capacity: int, *, device: Any, dtype: torch.dtype) -> None:
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self.mask: Tensor | None = None  # of the chunk that is forwarded; the first layer makes it for all

    def extend(self, known: KeyValues) -> None:
        """Take over positions that were computed before."""
        end = self.length + known.length
        self.keys[:, :, self.length : end] = known.keys
        self.values[:, :, self.length : end] = known.values
        self.length = end

    def slice(self, start: int, end: int) -> KeyValues:
        """A copy of positions start..end in host memory."""
        return KeyValues(*(x[:, :, start:end].detach().to("cpu", copy=True) for x in (self.keys, self.values)))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The new positions see the whole prefix and, causally, each other. `length` moves on after the last layer."""
        n, end = q.shape[2], self.length + q.shape[2]
        self.keys[layer, :, self.length : end] = k[0]
        self.values[layer, :, self.length : end] = v[0]
        # each key/value head serves a group of query heads: (kv, group, ., d), without a copy
        q = q.reshape(k.shape[1], -1, n, q.shape[3])
        k, v = (x[layer, :, None, :end].expand(-1, q.shape[1], -1, -1) for x in (self.keys, self.values))
        if layer == 0 and self.length and n > 1:
            self.mask = torch.ones(n, end, dtype=torch.bool, device=q.device).tril(self.length)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=not self.length)
        if layer == len(self.keys) - 1:
            self.length, self.mask = end, None
        return out.flatten(0, 1)[None]


class Rows:
    """`rows` sequences that continue one prefix, one token a step each.

    visible  bool [rows, prefix.length], what each row sees of the prefix; None: everything. All that a row itself
             has added is visible to it. A row counts its positions over what it sees, so a row that sees less has
             compacted positions, while the keys of the prefix keep those they were made with.
    """

    def __init__(self, prefix: Prefix, capacity: int, rows: int = 1, visible: Tensor | None = None) -> None:
        layers, heads, _, head_dim = prefix.keys.shape
        self.prefix, self.rows = prefix, rows
        make = {"device": prefix.keys.device, "dtype": prefix.keys.dtype}
        self.buffers = Buffers(KeyValueBuffer(rows, heads, capacity, head_dim, **make) for _ in range(layers))
        self._see(visible)

    def _see(self, visible: Tensor | None) -> None:
        device = self.prefix.keys.device
        self.bias = None
        starts = torch.full((self.rows,), self.prefix.length, dtype=torch.long)
        if visible is not None:
            starts = visible.sum(1)
            if not visible.all():
                bias = torch.zeros(visible.shape).masked_fill(~visible.cpu(), float("-inf"))
                self.bias = bias.to(device)[None, :, None]  # (1, rows, 1, P)
        self.starts = starts.to(device)

    @property
    def length(self) -> int:
        """Tokens that each row has added."""
        return self.buffers[-1].length

    @property
    def positions(self) -> Tensor:
        """Position of each row's next token, [rows, 1]."""
        place = self.buffers.place
        return (self.starts + (self.length if place is None else place.index))[:, None]

    def fork(self, rows: int, capacity: int, visible: Tensor | None) -> Rows:
        """`rows` copies of a single row, which go on separately."""
        return self._copy(torch.zeros(rows, dtype=torch.long), capacity, visible)

    def select(self, indices: list[int], capacity: int) -> Rows:
        """Only these rows, which must be ones that see everything; with room for `capacity` tokens in all."""
        return self._copy(torch.tensor(indices), capacity, None)

    def _copy(self, indices: Tensor, capacity: int, visible: Tensor | None) -> Rows:
        other = Rows(self.prefix, capacity, len(indices), visible)
        indices = indices.to(self.prefix.keys.device)
        for mine, theirs in zip(self.buffers, other.buffers, strict=True):
            theirs.append(mine.keys[indices, :, : mine.length], mine.values[indices, :, : mine.length])
        return other

    def slice(self, row: int, start: int, end: int) -> KeyValues:
        """A copy in host memory of what one row has added, from its start-th token to its end-th."""
        keys = torch.stack([b.keys[row, :, start:end] for b in self.buffers])
        values = torch.stack([b.values[row, :, start:end] for b in self.buffers])
        return KeyValues(keys.detach().cpu(), values.detach().cpu())  # stacking has copied them

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One softmax over the shared prefix and the row's own tokens; the prefix is read once for all rows."""
        rows, heads, _, d = q.shape
        own_k, own_v = self.buffers[layer].append(k, v)  # (rows, kv, n, d)
        end = self.prefix.length
        past_k, past_v = self.prefix.keys[layer, :, :end], self.prefix.values[layer, :, :end]  # (kv, P, d)
        kv = past_k.shape[0]
        q = q.view(rows, kv, heads // kv, d) * d**-0.5
        past = (q.transpose(0, 1).reshape(kv, -1, d) @ past_k.mT).view(kv, rows, -1, end).float()
        if self.bias is not None:
            past = past + self.bias
        own = (q @ own_k.mT).float()  # (rows, kv, group, n)
        seen = self.buffers[layer].seen
        if seen is not None:
            own = own.where(seen, float("-inf"))
        # the scores alone are put together and taken apart, and transposed: keys and values lie where they are
        weights = torch.cat([past, own.transpose(0, 1)], dim=-1).softmax(-1).to(q.dtype)
        past, own = weights.split([end, own_k.shape[2]], dim=-1)
        past = (past.reshape(kv, -1, end) @ past_v).view(kv, rows, -1, d).transpose(0, 1)
        return (past + own.transpose(0, 1) @ own_v).reshape(rows, heads, 1, d)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32."""

    def __init__(self, dim: int, eps: float, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight.to(x.device) * y).to(x.dtype)


class Rope(NamedTuple):
    """Cosines and sines of the rotary positions, [B, 1, T, head_dim] each; the sines of the first half negated."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, positions: Tensor, config: LanguageModelConfig, dtype: torch.dtype) -> Rope:
        """positions int64 [B, T]. Computed in float32, then cast, as published."""
        d = config.head_dim
        exponents = torch.arange(0, d, 2, dtype=torch.float32, device=positions.device) / d
        angles = positions[..., None].float() * (config.rope_theta**-exponents)
        cos, sin = angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)
        return cls(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))

    def rotate(self, x: Tensor) -> Tensor:
        """x [B, heads, T, head_dim]; the first half of the channels is paired with the second."""
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
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        make = {"bias": False, "device": device, "dtype": dtype}
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.query_key_value = operations.Linear(config.hidden_size, width, **make)
        self.dense = operations.Linear(self.heads * self.head_dim, config.hidden_size, **make)

    def forward(self, x: Tensor, rope: Rope, cache: Cache) -> Tensor:
        b, t, _ = x.shape
        qkv = self.query_key_value(x).view(b, t, -1, self.head_dim).transpose(1, 2)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rope.rotate(qk).split([self.heads, self.kv_heads], dim=1)
        out = cache.attend(self.layer, q, k, v)
        return self.dense(out.transpose(1, 2).reshape(b, t, -1))


class DecoderLayer(nn.Module):
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
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.attention = GroupedQueryAttention(config, layer, **make)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        self.dense = layer < config.first_k_dense_replace
        self.mlp = (
            GatedMlp(config.hidden_size, config.intermediate_size, **make)
            if self.dense
            else MixtureOfExperts(config, **make)
        )

    def forward(self, x: Tensor, rope: Rope, cache: Cache, image_gate: Tensor | None) -> Tensor:
        x = x + self.attention(self.input_layernorm(x), rope, cache)
        normed = self.post_attention_layernorm(x)
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
        self.word_embeddings = operations.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList([DecoderLayer(config, i, **make) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, positions: Tensor, cache: Cache, image_gate: Tensor | None = None) -> Tensor:
        """x [B, T, H]; positions int64 [B, T]; image_gate bool [B, T], tokens for the image router -> [B, T, H]."""
        rope = Rope.at(positions, self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, cache, image_gate)
        return self.norm(x)


class LanguageModel(Placed):
    """The decoder with its output layer, and the two ways to run it without gradients: `prefill` and `step`."""

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
        self.lm_head = operations.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)

    @property
    def witness(self) -> Tensor:
        return self.model.norm.weight

    def working_memory(self, prefix: int, rows: int, new: int) -> int:
        """Bytes beside the weights for `rows` rows that add up to `new` tokens each to a prefix.

        Keys and values are exact; what is computed at once is that of the largest prefill chunk.
        """
        config, size = self.config, self.dtype.itemsize
        position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
        chunk = min(prefix, PREFILL_CHUNK)
        scores = 2 * config.num_attention_heads * chunk * prefix * 4  # float32, where no fused attention is at hand
        experts = 4 * chunk * config.num_experts_per_tok * config.hidden_size * 4
        # a GPU may copy the experts of a step, for which a CUDA graph has its own memory, or of a short chunk
        copies = max(self._gathered_bytes(rows) * (2 if wanted() else 1), self._gathered_bytes(chunk))
        logits = 2 * rows * config.vocab_size * 4
        return position * (prefix + rows * new) + scores + max(experts, copies) + logits

    def _gathered_bytes(self, tokens: int) -> int:
        pairs = tokens * self.config.num_experts_per_tok
        return max(
            (layer.mlp.experts.gathered_bytes(pairs) for layer in self.model.layers if not layer.dense), default=0
        )

    def waits(self, x: Tensor) -> bool:
        """Whether a step with these embeddings, [rows, H], waits for the device on its way."""
        pairs = len(x) * self.config.num_experts_per_tok
        return any(layer.mlp.experts.waits(x, pairs) for layer in self.model.layers if not layer.dense)

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [...] -> [..., H]."""
        return self.model.word_embeddings(ids).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final-normed hidden states [..., H] -> float32 [..., vocabulary]."""
        return self.lm_head(hidden).float()

    def prefix(self, capacity: int) -> Prefix:
        return Prefix(self.config, capacity, device=self.device, dtype=self.dtype)

    def prefill(
        self,
        x: Tensor,
        prefix: Prefix,
        image_gate: Tensor | None = None,
        tell: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Forward the next T embeddings [T, H] of one sequence; returns the last hidden state [H].

        image_gate: bool [T]. Runs in chunks: memory grows with the length, not with its square. `tell` is called
        between them with the number of embeddings that are done, and may raise to stop.
        """
        hidden = x[-1]
        for start in range(0, len(x), PREFILL_CHUNK):
            if start and tell:
                tell(start)
            chunk = x[None, start : start + PREFILL_CHUNK]
            positions = torch.arange(prefix.length, prefix.length + chunk.shape[1], device=x.device)[None]
            gate = None if image_gate is None else image_gate[None, start : start + PREFILL_CHUNK]
            hidden = self.model(chunk, positions, prefix, gate)[0, -1]
        return hidden

    def step(self, x: Tensor, rows: Rows) -> Tensor:
        """Forward one embedding a row, [rows, H], routed by the text gate; returns hidden states [rows, H]."""
        return self.model(x[:, None], rows.positions, rows)[:, 0]
