"""The keys of a checkpoint's tensors, and the parameter that each of them belongs to.

Names of modules are the published keys but for a few prefixes (`PREFIXES`) and the weights of the experts, which are
stacked here and published one by one. A quantized folder has the same keys with whole numbers in them, and beside each
of these a `weight_scale` (quantization/formats.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from ..experts import StackedWeight
from ..quantization import QuantizedWeight
from ..univision import UniVision

SCALE = "_scale"  # ends the keys of scales
SAFETENSORS_DTYPES = ("F32", "F16", "BF16")
# Read too, and converted: what other programs make of a checkpoint. fp8 only without scales (reader.py).
OTHER_DTYPES = ("F64", "F8_E4M3", "F8_E5M2")
QUANTIZED_DTYPES = {torch.int8: "I8", torch.uint8: "U8"}

PREFIXES = {  # names of modules -> keys, in a Ming-UniVision
    "mingtok.": "vision.",
    "language_model.": "model.",
    "flow_head.vis_head.": "model.vis_head.",
    "flow_head.net.": "model.diffloss.net.",
}
# Keys of published checkpoints without a use here: the router for audio, and a buffer that is computed from the config.
IGNORED = re.compile(r"(^|\.)(audio_gate\.weight|rotary_emb\.inv_freq)$")


class ParamSlice(NamedTuple):
    """Where a tensor of a checkpoint belongs: in a parameter, or in a slice of one."""

    module: str  # the name of the module, and of its parameter
    parameter: str
    place: tuple  # its index in the parameter; () for the whole
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = (*SAFETENSORS_DTYPES, *OTHER_DTYPES)  # that a file may hold it in


def checkpoint_keys(model: nn.Module) -> dict[str, ParamSlice]:
    """Every key that this model needs, with the place in the model that it belongs to."""
    keys = {}
    for path, module in model.named_modules():
        published = published_name(path) if isinstance(model, UniVision) else path
        for name, parameter in module.named_parameters(recurse=False):
            dtype = QUANTIZED_DTYPES.get(parameter.dtype)
            dtypes = (dtype,) if dtype else (*SAFETENSORS_DTYPES, *OTHER_DTYPES)
            last = name
            if isinstance(module, (QuantizedWeight, StackedWeight)):
                last = {"values": "weight", "scale": "weight" + SCALE}.get(name, name)
            if isinstance(module, StackedWeight):
                for key, index in _expert_keys(published, last, tuple(parameter.shape)):
                    shape = tuple(parameter[index].shape)
                    keys[key] = ParamSlice(path, name, index, shape, dtypes)
            else:
                key = f"{published}.{last}".removeprefix(".")
                keys[key] = ParamSlice(path, name, (), tuple(parameter.shape), dtypes)
    return keys


def published_name(path: str) -> str:
    """The name of a module of a Ming-UniVision in published checkpoints."""
    for ours, theirs in PREFIXES.items():
        if path.startswith(ours):
            return theirs + path.removeprefix(ours)
    return path


def _expert_keys(stacked: str, last: str, shape: tuple[int, ...]) -> Iterable[tuple[str, tuple]]:
    """The keys of all experts that a stacked parameter holds, and where in it they belong.

    stacked: the path of the module, ....experts.gate_up or ....experts.down
    """
    experts, _, name = stacked.rpartition(".")
    for expert in range(shape[0]):
        if name == "down":
            yield f"{experts}.{expert}.down_proj.{last}", (expert,)
            continue
        before = (slice(None),) if len(shape) == 4 else ()  # the groups of int4 scales come before the rows
        half = shape[1 + len(before)] // 2
        yield f"{experts}.{expert}.gate_proj.{last}", (expert, *before, slice(0, half))
        yield f"{experts}.{expert}.up_proj.{last}", (expert, *before, slice(half, 2 * half))
