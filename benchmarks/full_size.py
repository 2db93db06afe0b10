"""The published size, for real: a checkpoint of random weights, loaded and drawn with.

    python benchmarks/full_size.py make FOLDER                     37.6 GB of random bf16 weights, in shards
    python benchmarks/full_size.py run FOLDER [--precision int4]   load it and draw: memory, load time, time a token

Random weights draw noise; what is measured (bytes, time) does not depend on what they say. On a GPU, `run` times
whole pictures at bf16, int8 and int4, and compares them with the time that their weights take to be read at the copy
bandwidth of the same run; once plainly and once by CUDA graphs ("nan" from the first that fails on). Four drawings a
figure: one precision a call where time is short.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import threading
import time
from pathlib import Path

import here  # noqa: F401 - ming_core is found through it
import torch
from safetensors.torch import save_file
from torch import Tensor

import ming_core
from ming_core import Conversation, UniVision
from ming_core.checkpoint import in_shards
from ming_core.checkpoint.keys import published_slots
from ming_core.checkpoint.reader import INDEX
from ming_core.config import MingTokConfig, UniVisionConfig, read_config, write_config
from ming_core.cuda_graphs import SWITCH, Recorder

GB = 1e9
SHARD = 2e9  # bytes
POOL = 1 << 26  # random values that all tensors are cut from: drawing 18.8 billion would take much longer
PRECISIONS = ["bf16", "int8", "int4"]
PROMPT = "Please generate the corresponding image based on the description. A cat on a red sofa."
SPECIAL = {  # published ids
    "<|endoftext|>": 126081,
    "<role>": 126340,
    "</role>": 126341,
    "<imagePatch>": 126346,
    "<image>": 126347,
    "</image>": 126348,
}


# --- make -----------------------------------------------------------------------------------------------------------


def make(folder: Path, config: UniVisionConfig) -> None:
    """Write config.json, tokenizer.json and shards of random weights: normal, of standard deviation 1/sqrt(fan in)."""
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} is there already: remove it, or name another folder") from None
    (folder / "config.json").write_text(json.dumps({"model_type": "mingunivision", **write_config(config)}, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    slots = published_slots(UniVision(config, device="meta", dtype=torch.bfloat16))
    shards = list(in_shards({key: 2 * torch.Size(slot.shape).numel() for key, slot in slots.items()}, SHARD))
    weight_map, total = {}, 0
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).bfloat16()
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {key: random_tensor(key, slots[key].shape, pool) for key in keys}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
        print(f"{name}: {total / GB:.1f} GB after {time.perf_counter() - started:.0f} s", flush=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


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


# --- run ------------------------------------------------------------------------------------------------------------


class MemoryWatch:
    """The most memory of this process, in bytes, while it is entered.

    `anonymous` is what it cannot do without; `resident` has mapped pages of files in it as well, which the system
    takes back when it needs them. Both 0 where Linux does not say.
    """

    def __enter__(self) -> MemoryWatch:
        self.anonymous = self.resident = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def __str__(self) -> str:
        if not self.anonymous:
            return "not known here"
        return f"{self.anonymous / GB:.2f} GB, {self.resident / GB:.2f} GB with mapped files"

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            with contextlib.suppress(OSError, KeyError):
                lines = Path("/proc/self/status").read_text().splitlines()
                sizes = {k: int(v.split()[0]) << 10 for k, _, v in (x.partition(":") for x in lines) if "Rss" in k}
                self.anonymous = max(self.anonymous, sizes["RssAnon"])
                self.resident = max(self.resident, sizes["RssAnon"] + sizes["RssFile"])


class Enough(Exception):
    """Raised after as many tokens as were asked for."""


def run_on_cpu(folder: Path, precision: str, tokens: int) -> None:
    config = read_config(UniVisionConfig, json.loads((folder / "config.json").read_text()))
    most = config.llm_config.num_image_tokens_for_gen
    if not 2 <= tokens <= most:  # the first one has the prompt's time in it
        raise SystemExit(f"--tokens {tokens}: give 2 to {most}")
    with MemoryWatch() as loading:
        started = time.perf_counter()
        model = load(folder, precision, "cpu")
        seconds = time.perf_counter() - started
    times = [time.perf_counter()]

    def on_token(progress: ming_core.Progress) -> None:
        times.append(time.perf_counter())
        if progress.done == tokens:
            raise Enough

    with MemoryWatch() as drawing, contextlib.suppress(Enough):
        model.generate_image(Conversation(), PROMPT, on_token=on_token)
    each = [b - a for a, b in itertools.pairwise(times)]
    rows = {
        "precision": precision,
        "weights": f"{weight_bytes(model) / GB:.2f} GB",
        "loaded in": f"{seconds:.0f} s",
        "most memory while loading": f"{loading}",
        "most memory while drawing": f"{drawing}",
        "prompt and first image token": f"{each[0]:.1f} s",
        "an image token, two guidance rows": f"{statistics.median(each[1:]):.2f} s (median of {len(each) - 1})",
        "threads": f"{torch.get_num_threads()}, torch {torch.__version__}",
    }
    print("| what | found |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items()))


def run_on_gpu(folder: Path, precisions: list[str]) -> None:
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {bandwidth / GB:.0f} GB/s\n")
    columns = ("precision", "pictures", "rows", "seconds", "by graphs", "floor, s", "ratio", "ratio by graphs")
    print_row(*columns)
    print_row(*["---"] * len(columns))
    for precision in precisions:
        try:
            model = load(folder, precision, "cuda")
            drawn = model.generate_image(Conversation(), PROMPT, max_new_tokens=1)  # warms up, and gives a second round
            for pictures in (1, 4):
                for rows, before in ((2, Conversation()), (3, drawn.conversation)):
                    plain, graphs = (drawing_time(model, before, pictures, switch) for switch in ("0", "1"))
                    floor = image_bytes(model, pictures, rows) / bandwidth
                    if Recorder.failed:  # once, and no graph is recorded in this process any more
                        graphs = math.nan
                    figures = (plain, graphs, floor, plain / floor, graphs / floor)
                    print_row(precision, pictures, rows, *(f"{figure:.2f}" for figure in figures))
        except torch.OutOfMemoryError:
            print_row(precision, "does not fit", *[""] * (len(columns) - 2))
        model = drawn = None
        torch.cuda.empty_cache()


def print_row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def drawing_time(model: UniVision, before: Conversation, pictures: int, graphs: str) -> float:
    """Seconds of a round that draws, with CUDA graphs ("1") or without; the median of three after one to warm up."""
    os.environ[SWITCH] = graphs
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        model.generate_images(before, PROMPT, seeds=list(range(pictures)), max_new_tokens=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes a second that the GPU reads and writes when it copies 2 GB; measured while no model is there."""
    source = torch.empty(int(2e9), dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    moved = 2 * source.nbytes
    del source, target
    torch.cuda.empty_cache()
    return moved / min(times)


def image_bytes(model: UniVision, pictures: int, rows: int) -> float:
    """Bytes of weights that drawing must read: each once a token, the head's blocks once a step.

    Rows are taken to choose their experts independently: of E, b rows read E * (1 - (1 - k/E)^b).
    """
    config, net = model.config, model.flow_head.net
    llm, tokens = config.llm_config, config.llm_config.num_image_tokens_for_gen
    layers = model.language_model.model.layers
    experts = sum(weight_bytes(layer.mlp.experts) for layer in layers)
    read = 1 - (1 - llm.num_experts_per_tok / llm.num_experts) ** (pictures * rows)
    language = weight_bytes(layers) - experts + experts * read
    modulations = [net.cond_embed, net.final_layer.adaLN_modulation, *(b.adaLN_modulation for b in net.res_blocks)]
    once = [model.flow_head.vis_head, model.mingtok.semantic_decoder, model.linear_proj, *modulations]
    step = [net.input_proj, net.final_layer.linear, *(b.mlp for b in net.res_blocks)]
    steps = config.vishead_diffloss_config.steps
    a_token = sum(map(weight_bytes, once)) + steps * sum(map(weight_bytes, step))
    return (tokens + 1) * language + tokens * a_token


def weight_bytes(module: torch.nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def load(folder: Path, precision: str, device: str) -> UniVision:
    quantization = None if precision == "bf16" else precision
    return ming_core.load_univision(folder, device=device, dtype=torch.bfloat16, quantization=quantization)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make", help="write the checkpoint").add_argument("folder", type=Path)
    run = commands.add_parser("run", help="load it and draw")
    run.add_argument("folder", type=Path)
    run.add_argument("--precision", choices=PRECISIONS, help="default: int4 on a CPU, all three on a GPU")
    run.add_argument("--tokens", type=int, default=6, help="image tokens to draw on a CPU (%(default)s)")
    run.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, UniVisionConfig(mingtok_config=MingTokConfig()))
    elif (options.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        run_on_gpu(options.folder, [options.precision] if options.precision else PRECISIONS)
    else:
        run_on_cpu(options.folder, options.precision or "int4", options.tokens)


if __name__ == "__main__":
    main()
