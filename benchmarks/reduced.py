"""A model of the published proportions that fits a small machine: what the benchmarks measure on.

A quarter of every width and half of every depth, so that each part keeps its share of the work; the counts (tokens a
picture, experts, heads) are the published ones. Weights are random: nothing it draws or says means anything.
"""

from __future__ import annotations

import torch
from here import BUILT_IN
from torch import nn

from ming_core import UniVision
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


def reduced_config(tokens: int = 256, shallower: int = 2) -> UniVisionConfig:
    """tokens: of a drawn picture, a square number. shallower: what every depth is divided by, up to 24."""
    side = int(tokens**0.5)
    mingtok = MingTokConfig(
        low_level_encoder=LowLevelEncoderConfig(img_size=32 * side, depth=max(1, 12 // shallower), embed_dim=192),
        semantic_decoder=SemanticDecoderConfig(embed_dim=256, decoder_depth=24 // shallower),
        pixel_decoder=PixelDecoderConfig(embed_dim=256, decoder_depth=24 // shallower),
    )
    language_model = LanguageModelConfig(
        vocab_size=31616,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=28 // shallower,
        head_dim=32,
        moe_intermediate_size=352,
        num_image_tokens_for_gen=tokens,
        # the ids of the built-in model's tokenizer, which is used here
        eos_token_id=0,
        image_patch_token=3,
        image_start_token=4,
    )
    return UniVisionConfig(language_model, FlowHeadConfig(diffloss_w=768, diffloss_d=max(1, 12 // shallower)), mingtok)


def reduced_model(tokens: int = 256, shallower: int = 2) -> UniVision:
    """The reduced model with random weights, the same at every call."""
    config = reduced_config(tokens, shallower)
    model = UniVision(config, ChatFormat.from_folder(BUILT_IN), flow_hidden=FLOW_HIDDEN, device="meta")
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) or "norm" in type(module).__name__.lower():
                parameter.data.fill_(float(name == "weight"))
            else:
                parameter.data.normal_(0, WEIGHT_SPREAD, generator=generator)
    model.fingerprint = model.mingtok.fingerprint = "reduced"
    return model.eval().requires_grad_(False)
