"""The reduced model: a model of the published proportions that fits a small machine, for the other benchmarks.

It has a quarter of every width and half of every depth, so each part keeps its share of the work. The counts (tokens
per image, experts, heads) are the published ones. The weights are random: what it draws or says means nothing.
"""

from __future__ import annotations

import torch
from project import BUILT_IN
from torch import nn

from ming_core import Engine, UniVision
from ming_core.config import (
    FlowHeadConfig,
    LanguageModelConfig,
    LowLevelEncoderConfig,
    MingTokConfig,
    PixelDecoderConfig,
    SemanticDecoderConfig,
    UniVisionConfig,
)
from ming_core.prompts import ChatFormat

FLOW_HIDDEN = 2048  # inside the flow head's layers: a quarter of the published 8192
WEIGHT_SPREAD = 0.02


def reduced_config(tokens: int = 256, depth_divisor: int = 2) -> UniVisionConfig:
    """The reduced config.

    tokens         image tokens per image, a square number
    depth_divisor  what every depth is divided by, up to 24
    """
    side = int(tokens**0.5)
    mingtok = MingTokConfig(
        low_level_encoder=LowLevelEncoderConfig(img_size=32 * side, depth=max(1, 12 // depth_divisor), embed_dim=192),
        semantic_decoder=SemanticDecoderConfig(embed_dim=256, decoder_depth=24 // depth_divisor),
        pixel_decoder=PixelDecoderConfig(embed_dim=256, decoder_depth=24 // depth_divisor),
    )
    language_model = LanguageModelConfig(
        vocab_size=31616,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=28 // depth_divisor,
        head_dim=32,
        moe_intermediate_size=352,
        num_image_tokens_for_gen=tokens,
        # the ids of the built-in model's text tokenizer, which is used here
        eos_token_id=0,
        image_patch_token=3,
        image_start_token=4,
    )
    flow_head = FlowHeadConfig(diffloss_w=768, diffloss_d=max(1, 12 // depth_divisor))
    return UniVisionConfig(language_model, flow_head, mingtok)


def reduced_model(tokens: int = 256, depth_divisor: int = 2) -> Engine:
    """The reduced model with random weights, which are the same at every call. Parameters as in `reduced_config`."""
    network = UniVision(reduced_config(tokens, depth_divisor), flow_hidden=FLOW_HIDDEN, device="meta")
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower():
                parameter.data.fill_(float(name == "weight"))
            else:
                parameter.data.normal_(0, WEIGHT_SPREAD, generator=generator)
    network.mingtok.fingerprint = "reduced"
    return Engine(network.eval().requires_grad_(False), ChatFormat.from_folder(BUILT_IN), "reduced")
