"""Attention: what queries gather from keys and values, for each of the ways in which a transformer runs here.

    causal_attention         a whole sequence at once: training, and the semantic decoder
    cached_attention         new tokens of every row over that row's own cache: the semantic decoder, token by token
    prefill_attention        new tokens of one sequence over its cache, grouped key/value heads; on GPUs
                             fused_prefill_attention
    shared_prefix_attention  new tokens of several rows over a prefix that they share and their own caches, in one
                             softmax: guidance rows and the images of a batch

A language model layer is handed one of `CausalAttention`, `PrefillAttention` and `DecodeAttention`: it stores the new
keys and values, if there is a cache, and attends. Scores are float32 in every precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from .kv_cache import DecodeCache, LayerCache, PrefillCache

# enable_gqa; torch 2.4 has none
TORCH_GROUPS_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 5)
# (layer, queries [B, heads, T, d], keys and values [2, B, kv_heads, T, d]) -> [B, heads, T, d]
Attend = Callable[[int, Tensor, Tensor], Tensor]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend over the sequence itself, [B, heads, T, d] each.

    mask: bool [B, 1, T, T], True where a query may attend; None: causal.
    """
    # torch refuses a mask together with is_causal; told only the latter, its fused kernels skip the hidden half
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def cached_attention(q: Tensor, cache: LayerCache, kv: Tensor) -> Tensor:
    """Store the new keys and values [2, B, heads, T, d] and attend to all that the cache holds, causally."""
    tokens, empty = q.shape[2], not cache.length  # before `append` changes the length
    k, v = cache.append(kv)
    if tokens == 1 and q.is_cuda:
        return single_query_attention(q, k, v, cache.attn_mask(1))
    # a static cache hands out its unfilled slots too, so it needs its mask even for the first tokens
    if empty and cache.cache_position is None:
        return causal_attention(q, k, v)
    # is_causal would be wrong over a past: torch aligns its triangle with the first key, not with the last
    return F.scaled_dot_product_attention(q, k, v, attn_mask=cache.attn_mask(tokens))


def single_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with one query [B, heads, 1, d]; mask: bool [1, N].

    Used on CUDA, where torch's fused attention goes to cuDNN on newer GPUs: reports say that it plans anew for every N
    and is wrong for one query on some cards. Not measured: there was no GPU to do so.
    """
    rows, heads, _, d = q.shape
    scores = scaled_scores(by_head(q).float(), by_head(k), d)  # (heads * B, 1, N)
    if mask is not None:
        scores = scores.where(mask, float("-inf"))
    # float32 as far as the softmax, whose exponentials magnify rounding; its results can bear the cast
    return torch.bmm(scores.softmax(-1).to(q.dtype), by_head(v)).view(heads, rows, 1, d).transpose(0, 1)


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with the last T positions of one sequence: q [1, heads, T, d], k and v [kv_heads, N, d].

    mask: bool [T, N]; None: T = N, causal, or T = 1. Each key/value head serves a group of query heads.
    """
    kv_heads, n, d = k.shape
    # key/value head j serves the G query heads from j * G on, so that reshaping is enough: (kv, G, T, d)
    q = q.reshape(kv_heads, -1, q.shape[2], d)
    # (kv, G, N, d), views: no head is copied here for the queries that it serves
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    # torch's own triangle starts at the first key, so it fits only where nothing came before
    causal = mask is None and q.shape[2] == n
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).flatten(0, 1)[None]


def fused_prefill_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`prefill_attention` of q [1, heads, T, d], k and v [kv_heads, N, d], by the fused kernels of a GPU.

    They take the causal triangle of the last T positions without a mask, and key/value heads without copies.
    """
    causal, k, v = causal_lower_right(q.shape[2], k.shape[1]), k[None], v[None]
    if TORCH_GROUPS_HEADS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal)


def shared_prefix_attention(
    q: Tensor,
    prefix: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    prefix_bias: Tensor | None = None,
    own_mask: Tensor | None = None,
) -> Tensor:
    """Attend over a shared prefix and each row's own tokens in one softmax; the prefix is read once for all rows.

    q            [rows, heads, T, d]
    prefix       keys, float32, and values [kv_heads, P, d]
    own          keys and values [rows, kv_heads, n, d], the T new tokens among them
    prefix_bias  float32 [1, rows * heads / kv_heads * T, P], added to the scores of the prefix (-inf: not seen); see
                 `prefix_bias`
    own_mask     bool [T, n], True where a new token may attend
    Returns [rows, heads, T, d].
    """
    (prefix_k, prefix_v), (own_k, own_v) = prefix, own
    rows, heads, tokens, d = q.shape
    kv_heads, length, _ = prefix_k.shape
    # everything key/value head by key/value head, as the caches lie in memory, so that only the queries are copied;
    # cast in the same kernel where that is needed: (kv, rows, group, T, d)
    grouped = q.unflatten(1, (kv_heads, -1)).transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    grouped = grouped.reshape(kv_heads, -1, d)
    # the queries of all rows in one product: the prefix, 57 KB a position in bf16, is read once, not once a row
    past = scaled_scores(grouped, prefix_k, d, prefix_bias)  # (kv, rows * group * T, P)
    recent = scaled_scores(grouped.view(kv_heads * rows, -1, d), by_head(own_k), d)  # (kv * rows, group * T, n)
    if own_mask is not None:
        # (.., group, T, n) for the mask, which knows tokens but no groups
        recent = recent.unflatten(1, (-1, tokens)).where(own_mask, float("-inf")).flatten(1, 2)
    # only the scores are put together and taken apart: keys and values stay where they are
    scores = torch.cat([past, recent.view(kv_heads, past.shape[1], -1)], dim=-1)
    past, recent = scores.softmax(-1).to(q.dtype).split([length, own_k.shape[2]], dim=-1)
    gathered = (past @ prefix_v).view(kv_heads * rows, -1, d)
    # the two parts only need adding: one softmax has normalised them together
    gathered = torch.baddbmm(gathered, recent.view(len(gathered), -1, own_v.shape[2]), by_head(own_v))
    return gathered.view(kv_heads, rows, -1, tokens, d).transpose(0, 1).reshape(rows, heads, tokens, d)


def scaled_scores(q: Tensor, k: Tensor, d: int, bias: Tensor | None = None) -> Tensor:
    """Scores of float32 queries [H, m, d] for keys [H, n, d], by sqrt(d): float32 [H, m, n].

    bias: float32 [1, m, n], added.
    """
    # product, scale and bias in one kernel; without a bias any tensor of a fitting shape stands there, and is not read
    added, beta = (q[..., :1], 0) if bias is None else (bias, 1)
    return torch.baddbmm(added, q, k.float().mT, beta=beta, alpha=d**-0.5)


def by_head(x: Tensor) -> Tensor:
    """[rows, heads, n, d] -> [heads * rows, n, d]; a view of what a `LayerCache` holds."""
    return x.transpose(0, 1).flatten(0, 1)


def prefix_bias(rows: Tensor, queries: int) -> Tensor:
    """What is added to the scores of a prefix: from [rows, P] to [1, rows * queries, P].

    queries: the queries of a row for one key/value head, heads / kv_heads * T.
    """
    # -inf is safe: every token sees at least itself, so no softmax is left without a finite score
    return rows.repeat_interleave(queries, dim=0)[None]


class CausalAttention:
    """No cache: full attention over the sequence itself, for training.

    mask: bool [B, T, T], True where a query may attend; None: causal.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = None if mask is None else mask[:, None]  # (B, 1, T, T), for all heads alike

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        # (B, heads, T, d): this copies each key/value head for its group, but only training comes here
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in kv)
        return causal_attention(q, k, v, self.mask)


class PrefillAttention:
    """Attention of the next `tokens` positions of a sequence that is being prefilled."""

    def __init__(self, cache: PrefillCache, tokens: int) -> None:
        self.cache, self.mask, self.fused = cache, None, cache.keys.is_cuda
        if cache.length and tokens > 1 and not self.fused:
            # (T, N), built once for all layers; query t stands at position cache.length + t, which shifts the diagonal
            mask = torch.ones(tokens, cache.length + tokens, dtype=torch.bool, device=cache.keys.device)
            self.mask = mask.tril(cache.length)

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        keys, values = self.cache.append(layer, kv[:, 0])
        return fused_prefill_attention(q, keys, values) if self.fused else prefill_attention(q, keys, values, self.mask)


class DecodeAttention:
    """Attention of the next tokens of every row of a `DecodeCache`."""

    def __init__(self, cache: DecodeCache) -> None:
        self.cache = cache
        self.bias: Tensor | None = None  # of the prefix, made once for all layers

    def __call__(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        if self.bias is None and self.cache.prefix_bias is not None:
            self.bias = prefix_bias(self.cache.prefix_bias, q.shape[1] // kv.shape[2] * q.shape[2])
        prefix, own = self.cache.prefix, self.cache.layers[layer]
        recent = own.append(kv)  # stored before attending: a token attends to itself
        return shared_prefix_attention(
            q,
            (self.cache.prefix_keys[layer], prefix.values[layer, :, : prefix.length]),
            recent,
            self.bias,
            own.attn_mask(q.shape[2]),
        )
