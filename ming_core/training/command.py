"""Train a LoRA for a Ming-UniVision from a folder of pictures and texts.

    python -m ming_core.training lora --model models/tiny-shapes --data my-pictures --out my-lora.safetensors

The folder may have any of these:

    name.png, name.txt                          drawing; the text is the prompt
    name_before.png, name_after.png, name.txt   editing
    name.jsonl, name.png                        questions: {"question": "...", "answer": "..."} a line
    name.jsonl                                  questions without a picture

Beside the LoRA a folder my-lora.training is made, with encoded pictures, checkpoints, log.csv and loss.png. If the
training was interrupted (Ctrl-C), the same command with --resume continues it. With several GPUs:
torchrun --nproc-per-node 2 -m ming_core.training lora ...
where each holds the whole model; with --shard each holds its share of the layers.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..checkpoint.folder import Checkpoint
from ..checkpoint.load import load_univision
from ..engine import Engine
from ..images import FITS
from ..prompts import ChatFormat
from ..quantization import FORMATS, quantize
from ..univision import UniVision
from .adapters import DEFAULT_GROUPS, GROUPS, TrainedLayers, choose_layers, count_values
from .batches import QUIZ, Noising, SampleStream
from .cache import EncodedImage, ImageCache
from .command_line import documented_parser
from .data import Found, Sample, pictures_of, read_folder
from .loop import LOG, STATE, Plan, Training
from .loss import LoraLoss
from .memory import Load, count_memory, free_memory, refusal
from .plot import plot_log
from .processes import Processes, joined

log = logging.getLogger(__name__)

TEMPLATE_TOKENS = 32  # of the tags around a prompt, more than they take
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRECISIONS = ("auto", "fp32", "bf16", *FORMATS)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        with joined(options.device) as processes:
            level = logging.INFO if processes.first else logging.ERROR
            logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
            return _train(options, processes)
    except (ValueError, RuntimeError) as error:  # FileError and CheckpointError are ValueErrors
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: give the same command with --resume to continue", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace, processes: Processes) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    work = options.out.with_suffix(".training")
    _check_out(options, work)
    checkpoint = Checkpoint.open(options.model)
    chat, (config, _) = ChatFormat.from_folder(options.model), checkpoint.univision_config
    dtype, quantization = choose_precision(options.precision, checkpoint, processes.device)
    network = checkpoint.univision(dtype)  # on the meta device: for its sizes
    if (to := checkpoint.check_quantization(quantization)) is not None:
        quantize(network, to)

    found = _read(options.data, options, network, chat)
    others = _read(options.others, options, network, chat) if options.others else None
    layers = choose_layers(network, options.layers)
    values = count_values(layers, options.rank)
    log.info("adapters: rank %d beside %d layers, %.2f million values", options.rank, len(layers), values / 1e6)
    samples = [*found.samples, *(others.samples if others else ())]
    load = _load(samples, options, network, chat)
    shards = processes.count if options.shard else 1
    memory = count_memory(network, values, load, checkpointing=options.checkpointing, shards=shards)
    log.info("memory: %s", memory)
    if why := refusal(memory, free_memory(processes.device), processes.device):
        raise ValueError(why)

    if options.shard:
        engine = _sharded(checkpoint, processes, dtype, quantization)
    else:
        engine = load_univision(checkpoint, device=processes.device, dtype=dtype, quantization=quantization)
    images = _encode(samples, engine, options.fit, work / "cache", processes)
    alpha = options.rank if options.alpha is None else options.alpha
    adapters = TrainedLayers(layers, options.rank, alpha, seed=options.seed, device=processes.device)
    stream = SampleStream(
        found.samples,
        images,
        chat,
        config.drawing_grid,
        seed=options.seed,
        dropping=options.dropping,
        others=(others.samples if others else (), options.others_share),
    )
    plan = Plan(
        options.steps,
        options.batch,
        options.pass_batch or options.batch,
        options.lr,
        checkpoint_steps=options.checkpoint_steps,
        noising=Noising(times=options.times),
    )
    training = Training(
        plan,
        LoraLoss(engine.network, adapters, checkpointing=options.checkpointing),
        stream,
        processes,
        work,
        about={
            "model": engine.fingerprint,
            "rank": options.rank,
            "alpha": alpha,
            "layers": sorted(options.layers),
            "seed": options.seed,
        },
        save=lambda: adapters.save(options.out, engine.network, DTYPES[options.save_precision]),
    )
    if options.resume and training.resume():
        log.info("continuing from step %d", training.step)
    try:
        training.run()
    finally:
        if processes.first:
            plot_log(work / LOG, work / "loss.png")
    log.info("written: %s", options.out)
    return 0


def _sharded(checkpoint: Checkpoint, processes: Processes, dtype: torch.dtype, quantization: str | None) -> Engine:
    """A model of whose layers each process has a share. It is loaded beside the device, whole for a while."""
    if processes.count == 1:
        raise ValueError("--shard is for several processes: start them with torchrun, or leave --shard out")
    with processes.in_turn():
        engine = load_univision(checkpoint, dtype=dtype, quantization=quantization)
        processes.shard(engine.network.language_model.model.layers)
        engine.network.to(processes.device)
    return engine


def _check_out(options: argparse.Namespace, work: Path) -> None:
    """Refuse to overwrite a training that could be continued."""
    if options.out.suffix != ".safetensors":
        raise ValueError(f"--out is {options.out}: give a file that ends in .safetensors")
    if (work / STATE).exists() and not options.resume:
        raise ValueError(
            f"{work} has a training already: add --resume to continue it, remove that folder to begin anew, or give "
            "another --out"
        )


def choose_precision(precision: str, checkpoint: Checkpoint, device: torch.device) -> tuple[torch.dtype, str | None]:
    """(dtype to compute in, format of quantized weights or None) for --precision."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float32  # bf16 is slow on most CPUs
    if precision in FORMATS:
        return half, precision
    return DTYPES.get(precision, half), checkpoint.quantization


def _read(folder: Path, options: argparse.Namespace, network: UniVision, chat: ChatFormat) -> Found:
    """What a folder has, reported."""
    llm = network.config.llm_config
    most = llm.max_position_embeddings - 2 * (llm.num_image_tokens_for_gen + 2) - TEMPLATE_TOKENS
    found = read_folder(folder, network.mingtok.native_side, options.fit, lambda text: len(chat.encode(text)), most)
    for line in found.report():
        log.info("%s", line)
    return found


def _load(samples: Items[Sample], options: argparse.Namespace, network: UniVision, chat: ChatFormat) -> Load:
    """The most that a pass may have to compute."""
    tokens = network.config.llm_config.num_image_tokens_for_gen + 2
    longest = answers = 0
    for sample in samples:
        texts = sorted((len(chat.encode(text)) + TEMPLATE_TOKENS for text in sample.texts), reverse=True)
        said = sum(texts[: 2 * QUIZ])
        longest = max(longest, said + len(sample.pictures) * tokens)
        answers = max(answers, said if sample.questions else 2)
    # the prompt of one sample may come with the images of another
    count = options.pass_batch or options.batch
    return Load(count, longest, count, count * answers, options.times)


def _encode(
    samples: list[Sample], engine: Engine, fit: str, folder: Path, processes: Processes
) -> dict[Path, EncodedImage]:
    """Encode all pictures: the first process writes what is new, the others read it."""
    paths = list(pictures_of(samples))
    cache = ImageCache(engine.mingtok, fit, folder)

    def load(on_image: Callable[[], Any] | None = None) -> dict[Path, EncodedImage]:
        return cache.load(paths, write=processes.first, on_image=on_image)

    if not processes.first:
        processes.wait()
        return load()
    with tqdm(total=len(paths), unit="picture", desc="encoding", file=sys.stderr) as progress:
        images = load(progress.update)
    processes.wait()
    return images


def parser() -> argparse.ArgumentParser:
    made = documented_parser("python -m ming_core.training lora", __doc__)
    add = made.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="a Ming-UniVision checkpoint")
    add("--data", type=Path, required=True, metavar="FOLDER", help="pictures and texts")
    add("--out", type=Path, required=True, metavar="FILE", help="the LoRA to write, a .safetensors file")
    add("--rank", type=_positive, default=16, help="of the adapters (%(default)s)")
    add("--alpha", type=float, help="the adapters count alpha / rank; default: the rank")
    add("--layers", nargs="+", choices=list(GROUPS), default=list(DEFAULT_GROUPS), help="to train beside (%(default)s)")
    add("--steps", type=_positive, default=1000, help="of the optimizer (%(default)s)")
    add("--lr", type=float, default=1e-4, help="learning rate (%(default)s)")
    add("--batch", type=_positive, default=4, help="samples of a step, in each process (%(default)s)")
    add("--pass-batch", type=_positive, metavar="N", help="of these, samples at once, to save memory; default: all")
    add("--times", type=_positive, default=2, help="noise levels that every image token is drawn at (%(default)s)")
    add("--dropping", type=_share, default=0.15, help="share of samples without their prompt (%(default)s)")
    add("--others", type=Path, metavar="FOLDER", help="more pictures and texts, of what is to stay as it is")
    add("--others-share", type=_share, default=0.5, help="share of samples that are of --others (%(default)s)")
    add("--fit", choices=FITS, default=FITS[0], help="how pictures are made square (%(default)s)")
    add("--precision", choices=PRECISIONS, default="auto", help="of the model: bf16 on a GPU, else fp32 (%(default)s)")
    add("--save-precision", choices=DTYPES, default="bf16", help="of the LoRA (%(default)s)")
    add("--shard", action="store_true", help="share out the layers among the processes, for a model that does not fit")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add("--resume", action="store_true", help="continue from the last checkpoint, if there is one")
    add("--checkpoint-steps", type=_positive, default=200, metavar="N", help="steps between checkpoints (%(default)s)")
    add("--device", help='"cpu" or "cuda"; default: cuda if there is one')
    add("--threads", type=_positive, help="CPU threads; default: torch's own choice")
    add(
        "--no-checkpointing",
        dest="checkpointing",
        action="store_false",
        help="keep all activations: faster, and takes much more memory",
    )
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to 1")
    return value
