"""Random weights for training from nothing."""

from __future__ import annotations

import torch
from torch import nn

from ming_core.flow_head import FinalLayer, ResBlock
from ming_core.language_model import RMSNorm

# Layers whose output is added to a residual stream begin small. Those that modulate it in the flow head begin at 0.
_RESIDUAL = (
    *("attn.proj.weight", "mlp.w3.weight", "mlp.fc2.weight"),
    *("attention.dense.weight", "down_proj.weight", "experts.down.values"),
)
_RESIDUAL_SCALE = 0.3
_MODULATION = ("adaLN_modulation.1.weight", "linear.weight")
_EMBEDDING_STD = 0.3  # about that of projected image features
_TABLE_STD = 0.05  # position table and class token
_LOGITS_STD = 0.02


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator) -> None:
    """Fill a model with random weights, of a scale that follows from the width of their input."""
    for module in model.modules():
        norm = isinstance(module, (nn.LayerNorm, RMSNorm))
        for name, param in module.named_parameters(recurse=False):
            if norm and name == "weight":
                param.fill_(1.0)
            elif param.ndim < 2:
                param.zero_()
            elif param.ndim == 4:  # a convolution
                param.normal_(0, param[0].numel() ** -0.5, generator=generator)
            else:
                param.normal_(0, param.shape[-1] ** -0.5, generator=generator)
        if isinstance(module, nn.Embedding):
            module.weight.normal_(0, _EMBEDDING_STD, generator=generator)
        elif isinstance(module, (ResBlock, FinalLayer)):
            for name, param in module.named_parameters():
                if name in _MODULATION:
                    param.zero_()
    for name, param in model.named_parameters():
        if name.endswith(_RESIDUAL):
            param.mul_(_RESIDUAL_SCALE)
        elif name.endswith(("cls_token", "pos_embed")):
            param.normal_(0, _TABLE_STD, generator=generator)
        elif name.endswith("lm_head.weight"):
            param.normal_(0, _LOGITS_STD, generator=generator)
