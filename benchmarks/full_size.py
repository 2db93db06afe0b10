"""The published size, for real: a checkpoint of random weights, loaded and drawn with.

    python benchmarks/full_size.py make FOLDER                     37.6 GB of random bf16 weights, in shards
    python benchmarks/full_size.py run FOLDER [--precision int4]   load it and draw: memory, load time, time a token

Random weights draw noise; what is measured (bytes, time) does not depend on what they say. On a GPU, `run` times
whole pictures at bf16, int8 and int4, and compares them with the time that their weights take to be read at the copy
bandwidth of the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ming_core import UniVision  # noqa: E402 - found through the line above
from ming_core.checkpoint import INDEX, published_slots  # noqa: E402
from ming_core.config import MingTokConfig, UniVisionConfig, write_config  # noqa: E402

GB = 1e9
SHARD = 2e9  # bytes
POOL = 1 << 26  # random values that all tensors are cut from: drawing 18.8 billion would take much longer
SPECIAL = {  # published ids
    "<|endoftext|>": 126081,
    "<role>": 126340,
    "</role>": 126341,
    "<imagePatch>": 126346,
    "<image>": 126347,
    "</image>": 126348,
}


# --- make -----------------------------------------------------------------------------------------------------------


def make(folder: Path) -> None:
    """Write config.json, tokenizer.json and shards of random weights: normal, of standard deviation 1/sqrt(fan in)."""
    started = time.perf_counter()
    config = UniVisionConfig(mingtok_config=MingTokConfig())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mingunivision", **write_config(config)}, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    slots = published_slots(UniVision(config, device="meta", dtype=torch.bfloat16))
    shards = list(in_shards({key: slot.shape for key, slot in slots.items()}))
    weight_map, total = {}, 0
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).bfloat16()
    for i, shapes in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {key: random_tensor(key, shape, pool) for key, shape in shapes.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
        print(f"{name}: {total / GB:.1f} GB after {time.perf_counter() - started:.0f} s", flush=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def in_shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Consecutive tensors that make up to SHARD bytes in bf16."""
    part: dict[str, tuple[int, ...]] = {}
    filled = 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if part and filled + size > SHARD:
            yield part
            part, filled = {}, 0
        part[key] = shape
        filled += size
    yield part


def random_tensor(key: str, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """bf16, a stretch of the pool that the key chooses; norms are 1 and biases 0."""
    if key.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    size = torch.Size(shape).numel()
    fan_in = size // shape[0] if "embed" not in key else shape[-1]
    begin = sum(key.encode()) * 7919 % POOL
    whole = pool.repeat(-(-(begin + size) // POOL)) if begin + size > POOL else pool
    return (whole[begin : begin + size] * fan_in**-0.5).view(shape)


def byte_tokenizer() -> dict:
    """tokenizer.json of a tokenizer whose tokens are single bytes, with the published special ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = [
        {"id": i, "content": t, "special": True, "normalized": False, "single_word": False, "lstrip": False}
        | {"rstrip": False}
        for t, i in SPECIAL.items()
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))} | SPECIAL
    return {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make")
    command.add_argument("folder", type=Path)
    options = parser.parse_args()
    make(options.folder)


if __name__ == "__main__":
    main()
