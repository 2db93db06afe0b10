"""What an image token costs at least: the weights that are read for it, at the speed that memory is read.

Drawing is bound by reading weights. So a time means little by itself, and its multiple of this floor tells how much
could still be gained.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import nn

from .language_model import DecoderLayer
from .univision import UniVision

BUFFER = 1 << 29  # bytes that are read to measure a bandwidth: more than any cache holds
REPEATS = 5


class TokenBytes(NamedTuple):
    """Bytes of weights that are read for one image token of every image of a batch, by part."""

    language_model: float
    flow_head: float
    semantic_decoder: float  # with the projection to the language model

    @property
    def total(self) -> float:
        return sum(self)


def token_bytes(network: UniVision, rows: int, steps: int, images: int = 1) -> TokenBytes:
    """Bytes of weights that an image token reads: all of them once, the flow head's blocks once a step.

    rows: guidance rows an image. They are assumed to choose their experts independently: b rows read
    E * (1 - (1 - k/E)^b) of E experts. Works on the meta device too.
    """
    config, net = network.config.llm_config, network.flow_head.net
    read = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** (images * rows)
    language = 0.0
    for layer in cast("list[DecoderLayer]", list(network.language_model.model.layers)):
        stacked = getattr(layer.mlp, "experts", None)  # a dense layer has none
        experts = weight_bytes(stacked) if stacked is not None else 0
        language += weight_bytes(layer) - experts + experts * read
    blocks = net._blocks
    modulations = [net.cond_embed, net.final_layer.adaLN_modulation, *(block.adaLN_modulation for block in blocks)]
    once = sum(map(weight_bytes, [network.flow_head.vis_head, *modulations]))
    step = sum(map(weight_bytes, [net.input_proj, net.final_layer.linear, *(block.mlp for block in blocks)]))
    semantic = weight_bytes(network.mingtok.semantic_decoder) + weight_bytes(network.linear_proj)
    return TokenBytes(language, once + steps * step, semantic)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights."""
    return sum(parameter.nbytes for parameter in module.parameters())


def bandwidth(device: torch.device, size: int = BUFFER) -> float:
    """Bytes per second: what the threads of torch read on a CPU, what a copy reads and writes on a GPU.

    The best of several measurements, since other work can only slow one down.
    """
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source) if device.type != "cpu" else source

    def read() -> None:
        # a product of a vector with itself reads every value once
        torch.dot(source, source) if device.type == "cpu" else target.copy_(source)

    moved = source.nbytes if device.type == "cpu" else 2 * source.nbytes
    return moved / min(seconds(read, device) for _ in range(REPEATS))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes: CPU time of a single thread, which other processes hardly disturb, else wall time."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronize(device)
    started = clock()
    run()
    synchronize(device)
    return clock() - started


def synchronize(device: torch.device) -> None:
    """Wait for all that was queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
