"""The published names of tensors, and where in our models each of them goes.

Module names are the published keys but for a few prefixes (`PUBLISHED_PREFIXES`) and the experts, whose weights are
stacked here and published one by one. A quantised folder has the same keys with whole numbers in them, and a
`weight_scale` beside each (see few_bits.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from ..quantization import SCALE
from ..univision import UniVision

SAFETENSORS_DTYPES = ("F32", "F16", "BF16")
QUANTIZED_DTYPES = {torch.int8: "I8", torch.uint8: "U8"}

# ours -> published
PUBLISHED_PREFIXES = {
    "mingtok.": "vision.",
    "language_model.": "model.",
    "flow_head.vis_head.": "model.vis_head.",
    "flow_head.net.": "model.diffloss.net.",
}
# In published checkpoints without a use here: the router for audio, and a buffer that is computed from the config.
IGNORED = re.compile(r"(^|\.)(audio_gate\.weight|rotary_emb\.inv_freq)$")


class Slot(NamedTuple):
    """Where a published tensor goes: a parameter, or a slice of one."""

    parameter: str
    index: tuple  # () for the whole parameter
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = SAFETENSORS_DTYPES  # that it may be stored in


def published_slots(model: nn.Module) -> dict[str, Slot]:
    """For every published key that this model needs, the place it goes to."""
    slots = {}
    for name, parameter in model.named_parameters():
        published = name
        for ours, theirs in PUBLISHED_PREFIXES.items():
            if isinstance(model, UniVision) and name.startswith(ours):
                published = theirs + name.removeprefix(ours)
        stem, experts, last = published.rpartition("experts.")
        dtypes = (QUANTIZED_DTYPES[parameter.dtype],) if parameter.dtype in QUANTIZED_DTYPES else SAFETENSORS_DTYPES
        if experts and last.removesuffix(SCALE) in ("gate_up", "down"):
            for expert in range(parameter.shape[0]):
                for key, index in _expert_slots(f"{stem}experts.{expert}.", last, parameter.shape[1:]):
                    shape = tuple(parameter[expert][index].shape)
                    slots[key] = Slot(name, (expert, *index), shape, dtypes)
        else:
            slots[published] = Slot(name, (), tuple(parameter.shape), dtypes)
    return slots


def _expert_slots(prefix: str, last: str, shape: tuple[int, ...]) -> Iterable[tuple[str, tuple]]:
    """Published keys of one expert, and where in its part (of this shape) of a stacked parameter they go."""
    suffix = SCALE if last.endswith(SCALE) else ""
    if last.removesuffix(SCALE) == "down":
        yield f"{prefix}down_proj.weight{suffix}", ()
        return
    before = (slice(None),) if len(shape) == 3 else ()  # the groups of int4 scales come before the rows
    half = shape[len(before)] // 2
    yield f"{prefix}gate_proj.weight{suffix}", (*before, slice(0, half))
    yield f"{prefix}up_proj.weight{suffix}", (*before, slice(half, 2 * half))
