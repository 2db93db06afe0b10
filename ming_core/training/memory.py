"""The memory that a training takes, counted before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import psutil
import torch
from torch import nn

from ..flow_head import ResBlock
from ..quantization import QuantizedWeight
from ..quantization.formats import width_of
from ..univision import UniVision
from .loss import FLOW_ROWS

GB = 1e9
TRAINED = 16  # bytes of a trained value in float32: itself, its gradient, and two moments of the optimizer


class Load(NamedTuple):
    """What is computed at once.

    sequences  of a pass
    length     tokens of the longest one
    images     to draw, of a pass
    predicted  text tokens to predict, of a pass
    times      for each token to draw
    """

    sequences: int
    length: int
    images: int
    predicted: int
    times: int


class Memory(NamedTuple):
    """Bytes: weights of the model, trained values with what belongs to them, and what is computed."""

    weights: int
    trained: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = f"weights {self.weights / GB:.2f}, adapters {self.trained / GB:.2f}, activations "
        return f"{self.total / GB:.2f} GB ({parts}{self.activations / GB:.2f})"


def count_memory(network: UniVision, values: int, load: Load, *, checkpointing: bool = True, shards: int = 1) -> Memory:
    """The memory of training `values` values beside a network, which may be on the meta device.

    shards: processes that share out the layers of the language model; each gathers one of them at a time, twice: as it
    comes from the others, and as it is computed with.
    """
    weights = sum(p.nbytes for p in network.parameters())
    if shards > 1:
        layers = [sum(p.nbytes for p in layer.parameters()) for layer in network.language_model.model.layers]
        weights += -(-sum(layers) // shards) - sum(layers) + 2 * max(layers)
    return Memory(weights, values * TRAINED, _activations(network, values, load, checkpointing))


def _activations(network: UniVision, values: int, load: Load, checkpointing: bool) -> int:
    config, size = network.config.llm_config, network.dtype.itemsize
    tokens, hidden = load.sequences * load.length, config.hidden_size
    drawn = load.images * config.num_image_tokens_for_gen * load.times
    head, layers = network.flow_head, list(network.language_model.model.layers)
    blocks = cast(list[ResBlock], list(head.net.res_blocks))
    width, inner = network.config.vishead_diffloss_config.diffloss_w, _inner(blocks[0])

    # a layer on its way back: its own activations, as many gradients, and weights that are dequantized for it
    attention = 4 * (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim + 4 * hidden
    scores = 2 * load.sequences * config.num_attention_heads * load.length**2 * 4
    shared = 3 * max(config.num_shared_experts, 1) * config.moe_intermediate_size
    pairs = config.num_experts_per_tok
    expert = pairs * ((2 * hidden + 4 * config.moe_intermediate_size) * size + 2 * hidden * 4)
    of_layer = tokens * ((attention + shared + 4 * hidden) * size + 3 * hidden * 4 + expert)
    rows = min(drawn, FLOW_ROWS)
    of_block = rows * (9 * width + 4 * inner) * size
    kept_layers, kept_blocks = (1, 1) if checkpointing else (len(layers), len(blocks))
    language = 2 * of_layer * kept_layers + scores + _dequantized(layers, kept_layers)
    drawing = 2 * of_block * kept_blocks + _dequantized(blocks, kept_blocks)

    # inputs of all layers and blocks are kept, and of the flow head also conditions, latents and noise
    kept = tokens * hidden * size * (len(layers) + 4) + drawn * width * size * (len(blocks) + 4)
    mask = load.sequences * load.length**2 * (1 + 4)
    logits = 6 * load.predicted * config.vocab_size * 4  # the teacher's among them
    adapters = values * size  # copies of the trained values in the dtype that is computed in
    features = network.mingtok.working_memory(max(load.images, 1) * 2, config.num_image_tokens_for_gen)
    return kept + mask + adapters + max(language, drawing, features, logits)


def _inner(block: ResBlock) -> int:
    """The width inside a block of the flow head."""
    weight = block.mlp.w12.values if isinstance(block.mlp.w12, QuantizedWeight) else block.mlp.w12.weight
    return weight.shape[-2] // 2


def _dequantized(modules: Sequence[nn.Module], count: int) -> int:
    """Bytes that the quantized weights of the largest `count` modules take when they are dequantized for a product."""
    sizes = sorted((_plain_bytes(module) for module in modules), reverse=True)
    return sum(sizes[:count])


def _plain_bytes(module: nn.Module) -> int:
    return sum(
        each.values.shape[:-1].numel() * width_of(each.values) * each.scale.dtype.itemsize
        for each in module.modules()
        if isinstance(each, QuantizedWeight)
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where there is no way to know."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type in ("cpu", "mps") else None


def refusal(memory: Memory, free: int | None, device: torch.device) -> str | None:
    """What to say if the memory is not there; None if it is."""
    if free is None or memory.total <= free:
        return None
    return (
        f"this training takes {memory}, and {device} has {free / GB:.2f} GB free: choose --precision int8 or int4, "
        "lower --pass-batch, --rank or the length of the texts, or close other programs"
    )
