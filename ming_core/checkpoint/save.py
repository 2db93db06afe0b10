"""Saving: a model becomes a folder like the published ones, which loads the same.

A large model is saved in shards, so that only one of them is in memory twice. What cannot be written whole changes
nothing in the folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..config import write_config
from ..engine import Engine
from ..files import write_whole, written_together
from ..mingtok import MingTok
from ..quantization import unpack_weights
from .config import QuantizationOrigin
from .keys import QUANTIZED_DTYPES, SCALE, checkpoint_keys
from .reader import INDEX, WEIGHTS

SHARD = 1 << 30  # bytes; about the size of the files that a larger model is saved in
SAVED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # the names of weights that saving gives


def save_mingtok(model: MingTok, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a MingTok as a published folder. Raises FileError; what cannot be written whole changes nothing."""
    _save(model, {"config.json": _json(write_config(model.config))}, Path(folder), dtype)


def save_univision(
    engine: Engine, folder: str | Path, tokenizer: Mapping[str, str], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a Ming-UniVision as a published folder. tokenizer: file name -> content, tokenizer.json among them.

    dtype is that of the weights that are not quantized. A quantized model makes a quantized folder. Raises FileError;
    what cannot be written whole changes nothing.
    """
    network = engine.network
    config = dataclasses.replace(network.config, mingtok_config=network.mingtok.config)
    entries = {"model_type": "mingunivision", **write_config(config)}
    if network.quantization:
        origin = QuantizationOrigin(network.quantization, engine.fingerprint, network.mingtok.fingerprint)
        if not all(origin):
            raise ValueError(
                "this model was not loaded from a checkpoint, so a quantized copy cannot name its original: save it, "
                "load it and quantize it then"
            )
        entries["quantization_config"] = origin.entry()
    _save(network, {**tokenizer, "config.json": _json(entries)}, Path(folder), dtype)


def _save(model: nn.Module, others: Mapping[str, str], folder: Path, dtype: torch.dtype) -> None:
    """Write the tensors in one file or in shards, and the other files (name -> content), config.json as the last."""
    unpack_weights(model)
    tensors = {
        key: model.get_submodule(part.module).get_parameter(part.parameter)[part.place].detach()
        for key, part in checkpoint_keys(model).items()
    }
    dtypes = {key: _stored_dtype(key, tensor, dtype) for key, tensor in tensors.items()}
    sizes = {key: math.prod(tensor.shape) * dtypes[key].itemsize for key, tensor in tensors.items()}
    shards = list(in_shards(sizes, SHARD))
    one = len(shards) == 1
    names = [WEIGHTS] if one else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    stale = [path.name for path in folder.glob("model*") if SAVED.fullmatch(path.name) and path.name not in names]
    weight_map: dict[str, str] = {}
    with written_together(folder, [INDEX, *stale] if one else stale) as fresh:
        for name, keys in zip(names, shards, strict=True):
            shard = {key: tensors[key].to("cpu", dtypes[key]).contiguous() for key in keys}
            write_whole(fresh / name, save(shard, {"format": "pt"}))
            weight_map |= dict.fromkeys(keys, name)
        if not one:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_whole(fresh / INDEX, json.dumps(index, indent=1).encode())
        for name, content in others.items():
            write_whole(fresh / name, content.encode())


def _stored_dtype(key: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Quantized values stay as they are; their scales are bf16, which they were rounded to; all else is `dtype`."""
    if tensor.dtype in QUANTIZED_DTYPES:
        return tensor.dtype
    return torch.bfloat16 if key.endswith(SCALE) else dtype


def in_shards(sizes: Mapping[str, int], limit: int) -> Iterable[list[str]]:
    """Split keys into consecutive groups whose tensors take up to `limit` bytes together."""
    keys: list[str] = []
    filled = 0
    for key, size in sizes.items():
        if keys and filled + size > limit:
            yield keys
            keys, filled = [], 0
        keys.append(key)
        filled += size
    yield keys


def _json(entries: Mapping) -> str:
    return json.dumps(entries, indent=2)
