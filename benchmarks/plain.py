"""The same mathematics written down plainly: what our step is measured against, and tested equal to.

One picture, as one would write it at first: the cache of the prompt repeated for every guidance row and grown by
concatenation, a loop over all experts, the whole velocity network (time, condition and every modulation) in each step
of the solver, the semantic decoder and the projection run for every guidance row. It reads the weights of a model and
uses nothing else of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-6
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [rows, heads, n, head_dim]


def draw(
    model: nn.Module,
    prompt: Tensor,
    image_gate: Tensor | None,
    views: Tensor,
    noise: Tensor,
    factors: tuple[float, ...],
    steps: int,
) -> Tensor:
    """One picture's latents [N, C] by Euler's rule.

    prompt      [P, H], embeddings of the transcript so far; image_gate bool [P], those for the image router
    views       bool [rows, P], what each guidance row sees of it, the conditional row first
    noise       [N, C]
    factors     of the guidance rows' velocities
    """
    config, rows = model.config.llm_config, len(views)
    _, cache = forward(model, prompt[None], torch.arange(len(prompt))[None], None, [], image_gate)
    cache = [(k.repeat(rows, 1, 1, 1), v.repeat(rows, 1, 1, 1)) for k, v in cache]
    mask, semantic, latents = views, [], []
    x = model.language_model.model.word_embeddings.weight[config.image_start_token].repeat(rows, 1)
    for start in noise:
        mask = torch.cat([mask, torch.ones(rows, 1, dtype=torch.bool)], dim=1)
        hidden, cache = forward(model, x[:, None], mask.sum(1, keepdim=True) - 1, mask, cache)
        latent = sample(model.flow_head, hidden[:, 0], start[None], factors, steps)
        latents.append(latent[0])
        features, semantic = expand(model.mingtok, latent.repeat(rows, 1)[:, None], semantic)
        x = model.linear_proj(features[:, 0])
    return torch.stack(latents)


def forward(
    model: nn.Module, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache, image_gate: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """The language model over x [B, T, H]: final-normed hidden states, and the grown cache.

    positions [B, T]; mask bool [B, length], the keys that each row sees, None: causal.
    """
    decoder, config = model.language_model.model, model.config.llm_config
    heads, kv, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    angles = positions[:, None, :, None] * config.rope_theta ** -(torch.arange(0, d, 2) / d)
    angles = torch.cat([angles, angles], dim=-1)
    b, t, _ = x.shape
    grown = []
    for i, layer in enumerate(decoder.layers):
        h = rms_norm(x, layer.input_layernorm.weight, config.rms_norm_eps)
        qkv = layer.attention.query_key_value(h).view(b, t, heads + 2 * kv, d).transpose(1, 2)
        q, k, v = qkv[:, :heads], qkv[:, heads:-kv], qkv[:, -kv:]
        q, k = rotate(q, angles), rotate(k, angles)
        if cache:
            k, v = torch.cat([cache[i][0], k], dim=2), torch.cat([cache[i][1], v], dim=2)
        grown.append((k, v))
        k, v = k.repeat_interleave(heads // kv, dim=1), v.repeat_interleave(heads // kv, dim=1)
        scores = q @ k.mT / math.sqrt(d)
        seen = torch.ones(t, t, dtype=torch.bool).tril() if mask is None else mask[:, None, None]
        weights = scores.float().masked_fill(~seen, float("-inf")).softmax(-1).to(x.dtype)
        x = x + layer.attention.dense((weights @ v).transpose(1, 2).reshape(b, t, -1))
        h = rms_norm(x, layer.post_attention_layernorm.weight, config.rms_norm_eps)
        x = x + experts(layer.mlp, h.flatten(0, 1), image_gate).view_as(x)
    return rms_norm(x, decoder.norm.weight, config.rms_norm_eps), grown


def experts(moe: nn.Module, x: Tensor, image_gate: Tensor | None) -> Tensor:
    """x [T, H]: every expert in turn, on the tokens that chose it."""
    logits = moe.gate(x)
    if image_gate is not None:
        logits = torch.where(image_gate[:, None], moe.image_gate(x), logits)
    weights, chosen = logits.float().softmax(-1).topk(moe.top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(moe.experts.count):
        tokens, place = torch.where(chosen == expert)
        if len(tokens):
            gate, up = F.linear(x[tokens], moe.experts.gate_up[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, moe.experts.down[expert])
            out.index_add_(0, tokens, y.float() * weights[tokens, place, None])
    shared = moe.shared_experts
    return out.to(x.dtype) + shared.down_proj(F.silu(shared.gate_proj(x)) * shared.up_proj(x))


def sample(head: nn.Module, hidden: Tensor, noise: Tensor, factors: tuple[float, ...], steps: int) -> Tensor:
    """One latent [1, C] from the hidden states [rows, H] of the guidance rows."""
    z, x = head.vis_head(hidden), noise
    for i in range(steps):
        v = velocity(head.net, x.repeat(len(z), 1), torch.full((len(z),), 1 - i / steps), z)
        x = x + sum(f * row for f, row in zip(factors, v, strict=True)) / steps
    return x


def velocity(net: nn.Module, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    y = net.time_embed.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1)) + net.cond_embed(z)
    h = net.input_proj(x)
    for block in net.res_blocks:
        shift, scale, gate = block.adaLN_modulation(y).chunk(3, dim=-1)
        h = h + gate * block.mlp(block.in_ln(h) * (1 + scale) + shift)
    shift, scale = net.final_layer.adaLN_modulation(y).chunk(2, dim=-1)
    h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
    return net.final_layer.linear(h * (1 + scale) + shift)


def expand(tok: nn.Module, latent: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """The semantic decoder over one more latent [rows, 1, C] -> features [rows, 1, D], and the grown cache."""
    decoder, grown = tok.semantic_decoder, []
    raw = latent * tok.config.scaling_factor + tok.config.mean
    x = decoder.in_proj(raw) + raw.repeat_interleave(decoder.repeat, dim=-1)
    for i, block in enumerate(decoder.blocks[0]):
        b, _, dim = x.shape
        qkv = block.attn.qkv(block.norm1(x)).view(b, 3, block.attn.heads, 1, -1)
        q, k, v = qkv.unbind(1)
        if cache:
            k, v = torch.cat([cache[i][0], k], dim=2), torch.cat([cache[i][1], v], dim=2)
        grown.append((k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + block.attn.proj((weights @ v).transpose(1, 2).reshape(b, 1, dim))
        x = x + block.mlp(block.norm2(x))
    return decoder.norm(x), grown


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps))).to(x.dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin()
