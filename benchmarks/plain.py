"""The plain implementation: the same mathematics without optimizations, to compare ours with in time and result.

It draws one image as one would write it at first: the cache of the prompt is repeated for every guidance row and grows
by concatenation, experts are computed in a loop, every step of the solver runs the whole velocity network (time,
condition and every modulation), and the semantic decoder and the projection run for every guidance row. It reads the
weights of a network and uses nothing else of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import project  # noqa: F401 - puts ming_core on the import path
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ming_core.conversation import Image, Segment

LAYER_NORM_EPS = 1e-6
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [rows, heads, n, head_dim]


def embed(network: nn.Module, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    """Embeddings [P, H] of a transcript, and bool [P] of the tokens for the image router."""
    words = network.language_model.model.word_embeddings.weight
    embeddings, image_gate = [], []
    for segment in segments:
        is_image = isinstance(segment, Image)
        embeddings.append(
            network.linear_proj(segment.features.tokens[0]) if is_image else words[torch.tensor(segment.ids)]
        )
        image_gate += [is_image and not segment.drawn] * len(embeddings[-1])
    return torch.cat(embeddings), torch.tensor(image_gate)


def draw(
    network: nn.Module,
    prompt: Tensor,
    image_gate: Tensor,
    masks: Tensor,
    noise: Tensor,
    guidance_weights: tuple[float, ...],
    steps: int,
) -> Tensor:
    """Draw one image with Euler's rule; returns its latents [N, C].

    prompt            [P, H], embeddings of the transcript so far
    image_gate        bool [P], the tokens for the image router
    masks             bool [rows, P], what each guidance row sees of the prompt, the conditional row first
    noise             [N, C]
    guidance_weights  of the guidance rows' velocities
    """
    config, rows = network.config.llm_config, len(masks)
    _, cache = forward(network, prompt[None], torch.arange(len(prompt))[None], None, [], image_gate)
    cache = [(k.repeat(rows, 1, 1, 1), v.repeat(rows, 1, 1, 1)) for k, v in cache]
    semantic: Cache = []
    latents = []
    x = network.language_model.model.word_embeddings.weight[config.image_start_token].repeat(rows, 1)
    for start in noise:
        masks = torch.cat([masks, torch.ones(rows, 1, dtype=torch.bool)], dim=1)
        hidden, cache = forward(network, x[:, None], masks.sum(1, keepdim=True) - 1, masks, cache)
        latent = sample(network.flow_head, hidden[:, 0], start[None], guidance_weights, steps)
        latents.append(latent[0])
        features, semantic = expand(network.mingtok, latent.repeat(rows, 1)[:, None], semantic)
        x = network.linear_proj(features[:, 0])
    return torch.stack(latents)


def forward(
    network: nn.Module,
    x: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    cache: Cache,
    image_gate: Tensor | None = None,
) -> tuple[Tensor, Cache]:
    """The language model over x [B, T, H]: final-normed hidden states, and the grown cache.

    positions  [B, T]
    mask       bool [B, length], the keys that each row sees; None: causal
    """
    decoder, config = network.language_model.model, network.config.llm_config
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
    """The mixture of experts over x [T, H]: every expert in turn, on the tokens that are routed to it."""
    logits = moe.gate(x)
    if image_gate is not None:
        logits = torch.where(image_gate[:, None], moe.image_gate(x), logits)
    weights, chosen = logits.float().softmax(-1).topk(moe.top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in range(moe.experts.count):
        tokens, rank = torch.where(chosen == expert)
        if len(tokens):
            gate, up = F.linear(x[tokens], moe.experts.gate_up.values[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, moe.experts.down.values[expert])
            out.index_add_(0, tokens, y.float() * weights[tokens, rank, None])
    shared = moe.shared_experts
    return out.to(x.dtype) + shared.down_proj(F.silu(shared.gate_proj(x)) * shared.up_proj(x))


def sample(head: nn.Module, hidden: Tensor, noise: Tensor, guidance_weights: tuple[float, ...], steps: int) -> Tensor:
    """One latent [1, C] from the hidden states [rows, H] of the guidance rows."""
    z, x = head.vis_head(hidden), noise
    for i in range(steps):
        v = velocity(head.net, x.repeat(len(z), 1), torch.full((len(z),), 1 - i / steps), z)
        x = x + sum(weight * row for weight, row in zip(guidance_weights, v, strict=True)) / steps
    return x


def velocity(net: nn.Module, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """The velocity network, with time, condition and every modulation computed anew."""
    angles = 1000 * t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    y = net.time_embed.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1)) + net.cond_embed(z)
    h = net.input_proj(x)
    for block in net.res_blocks:
        shift, scale, gate = block.adaLN_modulation(y).chunk(3, dim=-1)
        h = h + gate * block.mlp(block.in_ln(h) * (1 + scale) + shift)
    shift, scale = net.final_layer.adaLN_modulation(y).chunk(2, dim=-1)
    h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
    return net.final_layer.linear(h * (1 + scale) + shift)


def expand(mingtok: nn.Module, latent: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """The semantic decoder over one more latent [rows, 1, C]: features [rows, 1, D], and the grown cache."""
    decoder, grown = mingtok.semantic_decoder, []
    raw = latent * mingtok.config.scaling_factor + mingtok.config.mean
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
    """RMS normalization, computed in float32."""
    y = x.float()
    return (weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps))).to(x.dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, T, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-b, a], dim=-1) * angles.sin()
