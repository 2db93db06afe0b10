"""The published size for real: a checkpoint of random weights, which is loaded and draws.

    python benchmarks/full_size.py make FOLDER                     37.6 GB of random bf16 weights, in shards
    python benchmarks/full_size.py run FOLDER [--precision int4]   load it and draw: memory, load time, time a token

Random weights draw noise, but bytes and time do not depend on their values. On a GPU, `run` times whole images in bf16,
int8 and int4, without and with CUDA graphs ("nan" from the first graph that fails on), and compares them with the time
that reading their weights takes at the copy bandwidth measured in the same run. Each figure takes four drawings: give
--precision where time is short.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import statistics
import threading
import time
from pathlib import Path

import project  # noqa: F401 - puts ming_core on the import path
import torch
from safetensors.torch import save_file
from torch import Tensor

import ming_core
from ming_core import Conversation, Engine, UniVision
from ming_core.checkpoint import INDEX, in_shards
from ming_core.checkpoint.keys import checkpoint_keys
from ming_core.config import MingTokConfig, UniVisionConfig, read_config, write_config
from ming_core.cost import bandwidth, token_bytes, weight_bytes
from ming_core.cuda_graphs import Recorder

GB = 1e9
SHARD = 2e9  # bytes
POOL = 1 << 26  # random values that all tensors are cut from: sampling 18.8 billion would take much longer
PRECISIONS = ["bf16", "int8", "int4"]
PROMPT = "Please generate the corresponding image based on the description. A cat on a red sofa."
SPECIAL_TOKENS = {  # published ids
    "<|endoftext|>": 126081,
    "<role>": 126340,
    "</role>": 126341,
    "<imagePatch>": 126346,
    "<image>": 126347,
    "</image>": 126348,
}


# --- make -----------------------------------------------------------------------------------------------------------


def make(folder: Path, config: UniVisionConfig) -> None:
    """Write config.json, tokenizer.json and shards of weights: random, of standard deviation 1/sqrt(fan in)."""
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise SystemExit(f"{folder} exists already: remove it, or give another folder") from None
    (folder / "config.json").write_text(json.dumps({"model_type": "mingunivision", **write_config(config)}, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    keys = checkpoint_keys(UniVision(config, device="meta", dtype=torch.bfloat16))
    shards = list(in_shards({key: 2 * torch.Size(part.shape).numel() for key, part in keys.items()}, SHARD))
    weight_map: dict[str, str] = {}
    total = 0
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).bfloat16()
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {key: random_tensor(key, keys[key].shape, pool) for key in shard}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
        print(f"{name}: {total / GB:.1f} GB after {time.perf_counter() - started:.0f} s", flush=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def random_tensor(key: str, shape: tuple[int, ...], pool: Tensor) -> Tensor:
    """A bf16 tensor cut from the pool at a place that depends on the key; weights of norms are 1 and biases 0."""
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
    """The tokenizer.json of a tokenizer whose tokens are single bytes, with the published special ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = [
        {"id": i, "content": t, "special": True, "normalized": False, "single_word": False, "lstrip": False}
        | {"rstrip": False}
        for t, i in SPECIAL_TOKENS.items()
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {token: i for i, token in enumerate(sorted(ByteLevel.alphabet()))} | SPECIAL_TOKENS
    return {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


# --- run ------------------------------------------------------------------------------------------------------------


class MemoryWatch:
    """The peak memory of this process while the context is entered, in bytes.

    `anonymous` is memory that the process needs; `resident` also has mapped pages of files, which the system takes back
    when it needs them. Both are 0 where /proc does not tell.
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
            return "unknown on this system"
        return f"{self.anonymous / GB:.2f} GB, {self.resident / GB:.2f} GB with mapped files"

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            with contextlib.suppress(OSError, KeyError):
                lines = Path("/proc/self/status").read_text().splitlines()
                sizes = {k: int(v.split()[0]) << 10 for k, _, v in (x.partition(":") for x in lines) if "Rss" in k}
                self.anonymous = max(self.anonymous, sizes["RssAnon"])
                self.resident = max(self.resident, sizes["RssAnon"] + sizes["RssFile"])


class EnoughTokens(Exception):
    """Raised to stop a drawing after the requested number of tokens."""


def run_on_cpu(folder: Path, precision: str, tokens: int) -> None:
    """Load the checkpoint, draw some tokens, and print memory and time as a table."""
    config = read_config(UniVisionConfig, json.loads((folder / "config.json").read_text()))
    most = config.llm_config.num_image_tokens_for_gen
    if not 2 <= tokens <= most:  # the time of the first one includes the prompt
        raise SystemExit(f"--tokens is {tokens}: it must be 2 to {most}")
    with MemoryWatch() as loading:
        started = time.perf_counter()
        engine = load(folder, precision, "cpu")
        seconds = time.perf_counter() - started
    times = [time.perf_counter()]

    def on_token(progress: ming_core.Progress) -> None:
        times.append(time.perf_counter())
        if progress.done == tokens:
            raise EnoughTokens

    with MemoryWatch() as drawing, contextlib.suppress(EnoughTokens):
        engine.generate_image(Conversation(), PROMPT, on_token=on_token)
    each = [b - a for a, b in itertools.pairwise(times)]
    rows = {
        "precision": precision,
        "weights": f"{weight_bytes(engine.network) / GB:.2f} GB",
        "loaded in": f"{seconds:.0f} s",
        "peak memory while loading": f"{loading}",
        "peak memory while drawing": f"{drawing}",
        "prompt and first image token": f"{each[0]:.1f} s",
        "image token, two guidance rows": f"{statistics.median(each[1:]):.2f} s (median of {len(each) - 1})",
        "threads": f"{torch.get_num_threads()}, torch {torch.__version__}",
    }
    print("| what | found |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items()))


def run_on_gpu(folder: Path, precisions: list[str]) -> None:
    """Time whole images in these precisions, and print them as a table."""
    copies = bandwidth(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {copies / GB:.0f} GB/s\n")
    columns = ("precision", "images", "rows", "seconds", "with graphs", "floor, s", "ratio", "ratio with graphs")
    print_row(*columns)
    print_row(*["---"] * len(columns))
    for precision in precisions:
        try:
            engine = load(folder, precision, "cuda")
            # warms up, and is the past of a second round
            first = engine.generate_image(Conversation(), PROMPT, max_new_tokens=1)
            for images in (1, 4):
                for rows, past in ((2, Conversation()), (3, first.conversation)):
                    plain, graphs = (drawing_time(engine, past, images, recorded) for recorded in (False, True))
                    floor = image_bytes(engine.network, images, rows) / copies
                    if Recorder.failed:  # after one failure this process records no more graphs
                        graphs = math.nan
                    figures = (plain, graphs, floor, plain / floor, graphs / floor)
                    print_row(precision, images, rows, *(f"{figure:.2f}" for figure in figures))
        except torch.OutOfMemoryError:
            print_row(precision, "does not fit", *[""] * (len(columns) - 2))
        engine = first = None
        torch.cuda.empty_cache()


def print_row(*cells: object) -> None:
    """Print one row of a Markdown table at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def drawing_time(engine: Engine, past: Conversation, images: int, graphs: bool) -> float:
    """Seconds of a round that draws, with CUDA graphs or without: the median of three after one to warm up."""
    engine.network.language_model.cuda_graphs = graphs
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.generate_images(past, PROMPT, seeds=range(images), max_new_tokens=1)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def image_bytes(network: UniVision, images: int, rows: int) -> float:
    """Bytes of weights that drawing has to read; the language model runs once more than there are tokens."""
    token = token_bytes(network, rows, network.config.vishead_diffloss_config.steps, images)
    tokens = network.config.llm_config.num_image_tokens_for_gen
    return tokens * token.total + token.language_model


def load(folder: Path, precision: str, device: str) -> Engine:
    """Load the checkpoint in one of PRECISIONS."""
    quantization = None if precision == "bf16" else precision
    return ming_core.load_univision(folder, device=device, dtype=torch.bfloat16, quantization=quantization)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make", help="write the checkpoint").add_argument("folder", type=Path, help="folder to make")
    run = commands.add_parser("run", help="load it and draw")
    run.add_argument("folder", type=Path, help="checkpoint folder")
    run.add_argument(
        "--precision", choices=PRECISIONS, help="precision of the weights (default: int4 on a CPU, all three on a GPU)"
    )
    run.add_argument("--tokens", type=int, default=6, help="image tokens to draw on a CPU (%(default)s)")
    run.add_argument("--device", choices=["cpu", "cuda"], help="where to run (default: cuda if available)")
    options = parser.parse_args()
    if options.command == "make":
        make(options.folder, UniVisionConfig(mingtok_config=MingTokConfig()))
    elif (options.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        run_on_gpu(options.folder, [options.precision] if options.precision else PRECISIONS)
    else:
        run_on_cpu(options.folder, options.precision or "int4", options.tokens)


if __name__ == "__main__":
    main()
