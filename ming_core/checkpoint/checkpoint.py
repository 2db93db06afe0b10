"""Checkpoint folders in and out: config.json, safetensors (one file, or an index with shards), tokenizer.json.

Loading builds the model without memory (meta device), then takes each tensor straight from its file to its place on
the target device and in the target dtype, quantised on its way if that is asked for: the peak is the model plus one
tensor. Shards are read one after the other, from front to back. Everything is checked before anything is read: what is
missing, unexpected, misshapen or cut off is named, with the remedy.

Which tensor is where on disk, stored.py says; where it goes in the model, published.py. A quantised folder has an entry
`quantization_config` in config.json.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..config import ConfigError, MingTokConfig, UniVisionConfig, read_config, write_config
from ..engine import Engine
from ..files import write_whole, written_together
from ..mingtok import MingTok
from ..prompts import ChatFormat
from ..quantization import FORMATS, SCALE, Quantized, arrange_plainly, quantize
from ..univision import UniVision
from .keys import IGNORED, QUANTIZED_DTYPES, Slot, published_slots
from .reader import INDEX, REDOWNLOAD_HINT, WEIGHTS, CheckpointError, CheckpointReader, TensorReader, unreadable

log = logging.getLogger(__name__)

QUANT_METHOD = "ming_weight_only"  # in config.json, so that no one takes the weights for another library's
SHARD = 1 << 30  # bytes; a larger model is saved in files of about this size, of which one is in memory twice
SAVED = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # the names of weights that saving gives

OnProgress = Callable[[int, int], None] | None


class Origin(NamedTuple):
    """`quantization_config` of a quantised folder: how its weights are stored, and what they were made from."""

    quantization: str
    fingerprint: str
    mingtok_fingerprint: str


def load_mingtok(
    folder: str | Path,
    *,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    operations: Any = nn,
    on_progress: OnProgress = None,
) -> MingTok:
    """Load a MingTok checkpoint folder, or the MingTok inside a Ming-UniVision one. Raises CheckpointError.

    on_progress(bytes read, bytes in all) is called after every tensor; raise from it to stop.
    """
    folder = Path(folder)
    files, entries = CheckpointReader(folder), _entries(folder)
    model = _blank_mingtok(folder, files, entries, dtype, operations)
    if _kind(entries) == "univision":
        files = files.only_vision()
    fill(model, files, device, dtype, on_progress=on_progress)
    origin = _origin(folder, entries)
    model.fingerprint = origin.mingtok_fingerprint if origin else files.mingtok_fingerprint(model.config)
    return model.eval()


def load_univision(
    folder: str | Path,
    *,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    operations: Any = nn,
    on_progress: OnProgress = None,
) -> Engine:
    """Load a Ming-UniVision checkpoint folder, its tokenizer included. Raises CheckpointError.

    quantization: None, "int8" or "int4" (quantization.py says what that does to which weights). They are quantised
    as they are read, so that 37.6 GB of bf16 become 19.8 or 12.0 GB without ever being whole in memory. A folder that
    is quantised already is loaded as it is, with None or its own format. on_progress: as in `load_mingtok`.
    """
    folder = Path(folder)
    files, entries = CheckpointReader(folder), _entries(folder)
    network = _blank_univision(folder, files, entries, dtype, quantization, operations)
    chat = _chat(folder, network.config)
    fill(network, files, device, dtype, None if network.quantization else quantization, on_progress)
    origin, config = _origin(folder, entries), network.mingtok.config
    network.mingtok.fingerprint = origin.mingtok_fingerprint if origin else files.mingtok_fingerprint(config)
    return Engine(network.eval(), chat, origin.fingerprint if origin else files.fingerprint())


def save_mingtok(model: MingTok, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a MingTok as a published folder. Raises FileError; what cannot be written whole changes nothing."""
    _save(model, write_config(model.config), {}, Path(folder), dtype)


def save_univision(
    engine: Engine, folder: str | Path, tokenizer: Mapping[str, str], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a Ming-UniVision as a published folder. tokenizer: file name -> content, tokenizer.json among them.

    dtype is that of the weights that are not quantised. A quantised model makes a quantised folder. Raises FileError;
    what cannot be written whole changes nothing.
    """
    network = engine.network
    config = dataclasses.replace(network.config, mingtok_config=network.mingtok.config)
    entries = {"model_type": "mingunivision", **write_config(config)}
    if network.quantization:
        origin = Origin(network.quantization, engine.fingerprint, network.mingtok.fingerprint)
        if not all(origin):
            raise ValueError(
                "this model was never loaded, so nothing says what was quantised: save it, load and quantise"
            )
        entries["quantization_config"] = {"quant_method": QUANT_METHOD, **origin._asdict()}
    _save(network, entries, tokenizer, Path(folder), dtype)


def checkpoint_kind(folder: str | Path) -> str | None:
    """ "mingtok", "univision", or None for a folder that holds neither; reads config.json only."""
    try:
        return _kind(_entries(Path(folder)))
    except CheckpointError:
        return None


def checkpoint_bytes(folder: str | Path, kind: str, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Memory that the weights of a folder take once loaded as a "mingtok" or "univision". Raises CheckpointError.

    Reads the config and the headers of the weights only.
    """
    folder = Path(folder)
    files, entries = CheckpointReader(folder), _entries(folder)
    if kind == "mingtok":
        model = _blank_mingtok(folder, files, entries, dtype, nn)
    else:
        model = _blank_univision(folder, files, entries, dtype, quantization, nn)
        if quantization and not model.quantization:
            quantize(model, quantization)
    return sum(p.nbytes for p in model.parameters())


def stored_quantization(folder: str | Path) -> str | None:
    """The format of a quantised folder, None for another one. Raises CheckpointError."""
    origin = _origin(Path(folder), _entries(Path(folder)))
    return origin.quantization if origin else None


def tokenizer_files(folder: Path) -> dict[str, str]:
    """What `save_univision` takes: the texts of a checkpoint's tokenizer files, by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("tokenizer*.json")}


# --- Filling a model ------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # nodes load under it, and weights that are made there could not be written to outside
def fill(
    model: nn.Module,
    files: CheckpointReader,
    device: Any,
    dtype: torch.dtype,
    quantization: str | None = None,
    on_progress: OnProgress = None,
) -> None:
    """Give every parameter of a model on the meta device its memory and its values.

    quantization: quantise on the way; the model is not, yet. Raises CheckpointError.
    """
    slots, tensors = published_slots(model), files.tensors
    _check(files, slots)
    done, total = 0, sum(tensors[key].end - tensors[key].begin for key in slots)
    if quantization:
        quantize(model, quantization)
    with TensorReader() as reader:
        # from front to back of one file after the other: read ahead by the system, and given back when done
        for key in sorted(slots, key=lambda key: tensors[key].place):
            slot, stored = slots[key], tensors[key]
            owner, _, attribute = slot.parameter.rpartition(".")
            module = model.get_submodule(owner)
            _give_memory(module, attribute, device, dtype)
            if quantization and isinstance(module, Quantized) and attribute in module.NAMES:
                module.store(attribute, slot.index, reader.read(stored).to(device))
            else:
                values = getattr(module, attribute).data
                values[slot.index] = reader.read(stored)
                if key.endswith(SCALE) and not values[slot.index].isfinite().all():
                    raise CheckpointError(
                        f"{stored.file}: tensor {key} holds values that are no numbers: {REDOWNLOAD_HINT}"
                    )
            done += stored.end - stored.begin
            if on_progress:
                on_progress(done, total)


def _give_memory(module: nn.Module, attribute: str, device: Any, dtype: torch.dtype) -> None:
    """Replace a parameter on the meta device, and the scale that belongs to it, by uninitialised memory."""
    for name in (attribute, attribute + SCALE):
        parameter = getattr(module, name, None)
        if parameter is not None and parameter.is_meta:
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            value = torch.empty(parameter.shape, device=device, dtype=kind)
            module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _check(files: CheckpointReader, slots: Mapping[str, Slot]) -> None:
    """Raises CheckpointError unless the files hold exactly these tensors (and some that are ignored)."""
    fits = "config.json and the weights belong to different checkpoints, or the download is not whole"
    missing = [key for key in slots if key not in files.tensors]
    if missing:
        shape = list(slots[missing[0]].shape)
        raise CheckpointError(
            f"{files.folder}: tensor {missing[0]} {shape} is missing{_and_more(missing)}: {fits}; {REDOWNLOAD_HINT}"
        )
    unexpected = [key for key in files.tensors if key not in slots and not IGNORED.search(key)]
    if unexpected:
        stored = files.tensors[unexpected[0]]
        raise CheckpointError(
            f"{stored.file}: tensor {unexpected[0]} {list(stored.shape)} is not expected{_and_more(unexpected)}: {fits}"
        )
    for key, slot in slots.items():
        stored = files.tensors[key]
        if stored.shape != slot.shape:
            raise CheckpointError(
                f"{stored.file}: tensor {key} is {list(stored.shape)}, expected {list(slot.shape)} by config.json: "
                f"{fits}"
            )
        if stored.dtype not in slot.dtypes:
            expected = slot.dtypes[0] if len(slot.dtypes) == 1 else f"one of {', '.join(slot.dtypes)}"
            remedy = "get the checkpoint in bf16, fp16 or fp32" if len(slot.dtypes) > 1 else fits
            raise CheckpointError(
                f"{stored.file}: tensor {key} is stored as {stored.dtype}, expected {expected}: {remedy}"
            )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# --- What config.json says ------------------------------------------------------------------------------------------


def _entries(folder: Path) -> dict[str, Any]:
    """All entries of config.json; none where it holds something else. Raises CheckpointError."""
    path = folder / "config.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {REDOWNLOAD_HINT}") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {REDOWNLOAD_HINT}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}): {REDOWNLOAD_HINT}") from None
    return entries if isinstance(entries, dict) else {}


def _kind(entries: Mapping[str, Any]) -> str | None:
    return "univision" if "llm_config" in entries else "mingtok" if "low_level_encoder" in entries else None


def _config(cls: type, folder: Path, entries: Mapping[str, Any]) -> Any:
    path = folder / "config.json"
    expected = "llm_config" if cls is UniVisionConfig else "low_level_encoder"
    if expected not in entries:
        raise CheckpointError(f"{path} has no {expected}: this folder holds another kind of model")
    try:
        return read_config(cls, entries)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _origin(folder: Path, entries: Mapping[str, Any]) -> Origin | None:
    path, entry = folder / "config.json", entries.get("quantization_config")
    if entry is None:
        return None
    known = isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD
    if not known or entry.get("quantization") not in FORMATS:
        raise CheckpointError(
            f"{path}: quantization_config {entry!r} is not supported: get the checkpoint in bf16, or quantised by "
            f"this library to {' or '.join(FORMATS)}"
        )
    values = [entry.get(name) for name in Origin._fields]
    if not all(isinstance(value, str) and value for value in values):
        raise CheckpointError(
            f"{path}: quantization_config lacks one of {', '.join(Origin._fields)}: {REDOWNLOAD_HINT}"
        )
    return Origin(*values)


def _blank_mingtok(
    folder: Path, files: CheckpointReader, entries: Mapping[str, Any], dtype: torch.dtype, operations: Any
) -> MingTok:
    """The MingTok of a folder of either kind, on the meta device."""
    if _kind(entries) == "univision":
        config = _univision_config(folder, files, entries)[0].mingtok_config
    else:
        config = _config(MingTokConfig, folder, entries)
    return MingTok(config, operations=operations, device="meta", dtype=dtype)


def _blank_univision(
    folder: Path,
    files: CheckpointReader,
    entries: Mapping[str, Any],
    dtype: torch.dtype,
    quantization: str | None,
    operations: Any,
) -> UniVision:
    """The UniVision of a folder on the meta device, quantised where the folder is; `quantization`: asked for."""
    if quantization not in (None, *FORMATS):
        raise ValueError(f"quantization {quantization!r} is unknown: give None or one of {', '.join(FORMATS)}")
    origin = _origin(folder, entries)
    if origin and quantization not in (None, origin.quantization):
        raise CheckpointError(
            f"{folder} is quantised to {origin.quantization} already: load it without asking for {quantization}, or "
            "quantise the original checkpoint"
        )
    config, flow_hidden = _univision_config(folder, files, entries)
    model = UniVision(config, flow_hidden=flow_hidden, operations=operations, device="meta", dtype=dtype)
    if origin:
        quantize(model, origin.quantization)
    return model


def _univision_config(
    folder: Path, files: CheckpointReader, entries: Mapping[str, Any]
) -> tuple[UniVisionConfig, int | None]:
    """The config with MingTok's part filled in, and the flow head's sizes as its tensors have them."""
    config = _config(UniVisionConfig, folder, entries)
    if config.mingtok_config is None:
        config = dataclasses.replace(config, mingtok_config=_sibling_mingtok(folder, files) or MingTokConfig())
    shape = {k.removeprefix("model.diffloss.net."): s.shape for k, s in files.tensors.items() if ".diffloss." in k}
    try:
        depth = 1 + max(int(k.split(".")[1]) for k in shape if k.startswith("res_blocks."))
        width, hidden = shape["input_proj.weight"][0], shape["res_blocks.0.mlp.w12.weight"][0] // 2
    except (KeyError, ValueError, IndexError):
        return config, None  # a tensor of the head is missing: the full check names it
    try:
        flow = dataclasses.replace(config.vishead_diffloss_config, diffloss_w=width, diffloss_d=depth)
    except ConfigError as error:
        raise CheckpointError(f"{folder}: by the weights, {error}: {REDOWNLOAD_HINT}") from error
    return dataclasses.replace(config, vishead_diffloss_config=flow), hidden


def _sibling_mingtok(folder: Path, files: CheckpointReader) -> MingTokConfig | None:
    """The config of the MingTok checkpoint beside this folder that has the shapes of the one inside."""
    inside = {key: stored.shape for key, stored in files.only_vision().tensors.items()}
    found = {}
    for other in _siblings(folder):
        if "mingtok" not in other.name.lower() or checkpoint_kind(other) != "mingtok":
            continue
        try:
            config = _config(MingTokConfig, other, _entries(other))
        except CheckpointError as error:
            log.info("not the MingTok of %s: %s", folder, error)
            continue
        slots = published_slots(MingTok(config, device="meta"))
        if all(inside.get(key) == slot.shape for key, slot in slots.items()):
            found[config] = other
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: its config.json has no mingtok_config, and {' and '.join(map(str, found.values()))} differ: "
            "leave only the MingTok that belongs to it beside it"
        )
    return next(iter(found), None)


def _siblings(folder: Path) -> Iterator[Path]:
    """What lies beside a folder, and where the folder is a link, beside what it leads to."""
    for parent in dict.fromkeys((folder.absolute().parent, folder.resolve().parent)):
        try:
            yield from sorted(parent.iterdir())
        except OSError as error:
            log.info("%s cannot be looked into: %s", parent, error)


def _chat(folder: Path, config: UniVisionConfig) -> ChatFormat:
    """The folder's tokenizer, which must be that of its config. Raises CheckpointError."""
    try:
        chat = ChatFormat.from_folder(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    llm = config.llm_config
    for name, ours, theirs in (
        ("eos_token_id", llm.eos_token_id, chat.end_id),
        ("image_start_token", llm.image_start_token, chat.image_open_id),
        ("image_patch_token", llm.image_patch_token, chat.patch_id),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"{folder / 'config.json'}: {name} is {ours}, but tokenizer.json says {theirs}: "
                f"the two files belong to different checkpoints; {REDOWNLOAD_HINT}"
            )
    return chat


# --- Saving ---------------------------------------------------------------------------------------------------------


def _save(model: nn.Module, config: dict, others: Mapping[str, str], folder: Path, dtype: torch.dtype) -> None:
    """Tensors, config and other files; in shards if they are many, so that only one shard is in memory twice."""
    arrange_plainly(model)
    parameters = dict(model.named_parameters())
    slots = published_slots(model)
    sizes = {
        key: math.prod(slot.shape) * _stored_dtype(key, slot, parameters, dtype).itemsize for key, slot in slots.items()
    }
    shards = list(in_shards(sizes, SHARD))
    weight_map = {}
    if len(shards) == 1:
        names, stale = [WEIGHTS], [INDEX]
    else:
        names, stale = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))], []
    stale += [path.name for path in folder.glob("model*") if SAVED.fullmatch(path.name) and path.name not in names]
    with written_together(folder, stale) as fresh:
        for name, keys in zip(names, shards, strict=True):
            tensors = {}
            for key in keys:
                slot = slots[key]
                value = parameters[slot.parameter][slot.index].detach()
                tensors[key] = value.to("cpu", _stored_dtype(key, slot, parameters, dtype)).contiguous()
            write_whole(fresh / name, save(tensors, {"format": "pt"}))
            weight_map |= dict.fromkeys(keys, name)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            write_whole(fresh / INDEX, json.dumps(index, indent=1).encode())
        for name, content in {**others, "config.json": json.dumps(config, indent=2)}.items():
            write_whole(fresh / name, content.encode())


def _stored_dtype(key: str, slot: Slot, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    """Quantised values as they are, their scales in bf16, which they were rounded to, and all else in `dtype`."""
    own = parameters[slot.parameter].dtype
    return own if own in QUANTIZED_DTYPES else torch.bfloat16 if key.endswith(SCALE) else dtype


def in_shards(sizes: Mapping[str, int], limit: int) -> Iterable[list[str]]:
    """Consecutive keys of tensors that take up to `limit` bytes together."""
    keys: list[str] = []
    filled = 0
    for key, size in sizes.items():
        if keys and filled + size > limit:
            yield keys
            keys, filled = [], 0
        keys.append(key)
        filled += size
    yield keys
