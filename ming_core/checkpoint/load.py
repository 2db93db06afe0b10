"""Loading: a model is built without memory (on the meta device), then filled tensor by tensor.

Each tensor goes straight from its file to its place on the target device and in the target dtype, quantized on its way
if that is asked for: the peak is the model plus one tensor. Shards are read one after the other, from front to back.
Everything is checked before any weight is read: what is missing, misshapen or cut off is named, with the remedy. What
no part of the model asks for is one line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import UniVisionConfig
from ..engine import Engine
from ..files import TensorInfo
from ..mingtok import MingTok
from ..prompts import ChatFormat
from ..quantization import QuantizedWeight, quantize
from ..text_tokenizer import FETCH
from ..univision import UniVision
from .config import MISMATCH
from .folder import Checkpoint
from .keys import IGNORED, OTHER_DTYPES, ParamSlice, checkpoint_keys
from .reader import REDOWNLOAD_FILE, REDOWNLOAD_HINT, CheckpointError, CheckpointReader, TensorReader, and_more

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None] | None


def load_mingtok(
    folder: str | Path | Checkpoint,
    *,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    operations: Any = nn,
    on_progress: OnProgress = None,
) -> MingTok:
    """Load a MingTok checkpoint folder, or the MingTok inside a Ming-UniVision one. Raises CheckpointError.

    on_progress(bytes read, bytes in all) is called after every tensor; raise from it to stop.
    """
    checkpoint = Checkpoint.open(folder)
    reader = checkpoint.reader
    if checkpoint.config.kind == "univision":
        reader = reader.only_vision()
    model = checkpoint.mingtok(dtype, operations)
    fill(model, reader, device, dtype, on_progress=on_progress)
    model.fingerprint = checkpoint.mingtok_fingerprint
    return model.eval()


def load_univision(
    folder: str | Path | Checkpoint,
    *,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    operations: Any = nn,
    on_progress: OnProgress = None,
) -> Engine:
    """Load a Ming-UniVision checkpoint folder, its tokenizer included. Raises CheckpointError.

    quantization: None, "int8" or "int4" (quantization/layers.py says which weights that changes). Weights are quantized
    as they are read, so that 37.6 GB of bf16 become 19.8 or 12.0 GB without ever being whole in memory. A folder that
    is quantized already is loaded as it is, with None or its own format. on_progress: as in `load_mingtok`.
    """
    checkpoint = Checkpoint.open(folder)
    reader = checkpoint.reader
    to = checkpoint.check_quantization(quantization)
    network = checkpoint.univision(dtype, operations)
    chat = _chat(checkpoint.folder, network.config)
    fill(network, reader, device, dtype, to, on_progress)
    network.mingtok.fingerprint = checkpoint.mingtok_fingerprint
    return Engine(network.eval(), chat, checkpoint.fingerprint)


def checkpoint_kind(folder: str | Path | Checkpoint) -> str | None:
    """ "mingtok", "univision", or None for a folder that holds neither; reads config.json only."""
    return Checkpoint.open(folder).kind


def checkpoint_bytes(
    folder: str | Path | Checkpoint, kind: str, dtype: torch.dtype, quantization: str | None = None
) -> int:
    """Memory that the weights of a folder take once loaded as a "mingtok" or "univision". Raises CheckpointError.

    Reads the config and the headers of the weights only.
    """
    return Checkpoint.open(folder).bytes(kind, dtype, quantization)


def stored_quantization(folder: str | Path | Checkpoint) -> str | None:
    """The format of a quantized folder; None for another folder. Raises CheckpointError."""
    return Checkpoint.open(folder).quantization


@torch.inference_mode(False)  # nodes load under it, and weights that are made there could not be written to outside
def fill(
    model: nn.Module,
    reader: CheckpointReader,
    device: Any,
    dtype: torch.dtype,
    quantization: str | None = None,
    on_progress: OnProgress = None,
) -> None:
    """Give every parameter of a model on the meta device its memory and its values.

    quantization: quantize a UniVision, which is not yet, on the way. Raises CheckpointError.
    """
    keys, tensors = checkpoint_keys(model), reader.tensors
    _check(reader, keys)
    done, total = 0, sum(tensors[key].end - tensors[key].begin for key in keys)
    if quantization and isinstance(model, UniVision):
        quantize(model, quantization)
    with TensorReader() as files:
        # from front to back of one file after the other: read ahead by the system, and given back when done
        for key in sorted(keys, key=lambda key: tensors[key].place):
            part, info = keys[key], tensors[key]
            module = model.get_submodule(part.module)
            _give_memory(module, part.parameter, device, dtype)
            if quantization and isinstance(module, QuantizedWeight) and part.parameter != "bias":
                module.fill(part.place, _readable(files.read(info), info).to(device))
            else:
                values = getattr(module, part.parameter).data
                values[part.place] = _readable(files.read(info), info)
            done += info.end - info.begin
            if on_progress:
                on_progress(done, total)


def _readable(tensor: Tensor, info: TensorInfo) -> Tensor:
    """The tensor in a dtype that every device copies and computes with: not all of them do float64 or fp8.

    Raises CheckpointError for one with NaN or infinite values, which would make every image of the model black.
    """
    if info.dtype in OTHER_DTYPES:
        tensor = tensor.float()
    if tensor.is_floating_point() and tensor.numel():
        extremes = torch.stack(torch.aminmax(tensor))  # a small part of what reading takes; isfinite would double it
        if not extremes.isfinite().all():
            raise CheckpointError(f"{info.file}: tensor {info.key} holds NaN or infinite values: {REDOWNLOAD_FILE}")
    return tensor


def _give_memory(module: nn.Module, name: str, device: Any, dtype: torch.dtype) -> None:
    """Replace a parameter on the meta device by uninitialized memory; of quantized weights, values and scale."""
    quantized = isinstance(module, QuantizedWeight) and name != "bias"
    for each in ("values", "scale") if quantized else (name,):
        parameter = getattr(module, each)
        if parameter.is_meta:
            own = dtype if parameter.is_floating_point() else parameter.dtype
            value = torch.empty(parameter.shape, device=device, dtype=own)
            module.register_parameter(each, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _check(reader: CheckpointReader, keys: Mapping[str, ParamSlice]) -> None:
    """Raises CheckpointError unless the files hold these tensors. Others are named in the log."""
    missing = [key for key in keys if key not in reader.tensors]
    if missing:
        shape = list(keys[missing[0]].shape)
        raise CheckpointError(
            f"{reader.folder}: tensor {missing[0]} {shape} is missing{and_more(missing)}: {MISMATCH}; {REDOWNLOAD_HINT}"
        )
    scales = [f"{key}_scale" for key in keys if f"{key}_scale" in reader.tensors and f"{key}_scale" not in keys]
    if scales:
        raise CheckpointError(
            f"{reader.folder}: its weights are quantized (it has {scales[0]}), and its config.json has no "
            "quantization_config that says how: restore it, or quantize the model again"
        )
    for key, part in keys.items():
        info = reader.tensors[key]
        if info.shape != part.shape:
            raise CheckpointError(
                f"{info.file}: tensor {key} is {list(info.shape)}, expected {list(part.shape)} by config.json: "
                f"{MISMATCH}"
            )
        if info.dtype not in part.dtypes:
            expected = part.dtypes[0] if len(part.dtypes) == 1 else f"one of {', '.join(part.dtypes)}"
            remedy = "get the checkpoint in bf16, fp16 or fp32" if len(part.dtypes) > 1 else MISMATCH
            raise CheckpointError(f"{info.file}: tensor {key} is stored as {info.dtype}, expected {expected}: {remedy}")
    unused = [key for key in reader.tensors if key not in keys and not IGNORED.search(key)]
    if unused:
        some = ", ".join(key[:100] for key in unused[:3])
        more = ", ..." if len(unused) > 3 else ""
        log.warning(
            "%s: %d tensors are of no part of the model, and not loaded: %s", reader.folder, len(unused), some + more
        )


def _chat(folder: Path, config: UniVisionConfig) -> ChatFormat:
    """The folder's tokenizer, which must be that of its config. Raises CheckpointError."""
    try:
        chat = ChatFormat.from_folder(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    llm, vocabulary = config.llm_config, chat.tokenizer.get_vocab(with_added_tokens=True)
    for name, ours, theirs in (
        ("eos_token_id", llm.eos_token_id, chat.end_id),
        ("image_start_token", llm.image_start_token, chat.image_open_id),
        ("image_patch_token", llm.image_patch_token, chat.patch_id),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"{folder / 'config.json'}: {name} is {ours}, but tokenizer.json says {theirs}: "
                f"the two files belong to different checkpoints; {FETCH}"
            )
    last = max(vocabulary, key=vocabulary.__getitem__)
    if vocabulary[last] >= llm.vocab_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: the token {last[:60]!r} has the id {vocabulary[last]}, but vocab_size in "
            f"config.json is {llm.vocab_size}: the two files belong to different checkpoints; {FETCH}"
        )
    return chat
