"""Checkpoint folders in and out: config.json, safetensors (one file, or an index with shards), tokenizer.json.

Loading builds the model without memory (meta device), then takes each tensor straight from its file to its place on
the target device and in the target dtype, quantised on its way if that is asked for: the peak is the model plus one
tensor. Shards are read one after the other, from front to back. Everything is checked before anything is read: what is
missing, unexpected, misshapen or cut off is named, with the remedy.

Module names are the published keys but for a few prefixes (`PUBLISHED_PREFIXES`) and the experts, whose weights are
stacked here and published one by one (`published_slots`). A quantised folder has the same keys with whole numbers in
them, a `weight_scale` beside each, and an entry `quantization_config` in config.json (see quantization.py).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .config import ConfigError, MingTokConfig, UniVisionConfig, read_config, write_config
from .files import write_whole, written_together
from .mingtok import MingTok
from .prompts import ChatFormat
from .quantization import FORMATS, SCALE, Quantized, arrange_plainly, quantize
from .univision import UniVision

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
AGAIN = "download the checkpoint again"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS_DTYPES = ("F32", "F16", "BF16")
QUANTIZED_DTYPES = {torch.int8: "I8", torch.uint8: "U8"}
QUANT_METHOD = "ming_weight_only"  # in config.json, so that no one takes the weights for another library's
SHARD = 1 << 30  # bytes; a larger model is saved in files of about this size, of which one is in memory twice
MAX_HEADER = 100 << 20  # bytes; the published model's largest is some hundred KB
FINGERPRINT_BYTES = 4096  # read from each end of every tensor

# ours -> published
PUBLISHED_PREFIXES = {
    "mingtok.": "vision.",
    "language_model.": "model.",
    "flow_head.vis_head.": "model.vis_head.",
    "flow_head.net.": "model.diffloss.net.",
}
# In published checkpoints without a use here: the router for audio, and a buffer that is computed from the config.
IGNORED = re.compile(r"(^|\.)(audio_gate\.weight|rotary_emb\.inv_freq)$")


OnProgress = Callable[[int, int], None] | None


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be loaded: names file, tensor, what was expected and found, and the remedy."""


class Slot(NamedTuple):
    """Where a published tensor goes: a parameter, or a slice of one."""

    parameter: str
    index: tuple  # () for the whole parameter
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = SAFETENSORS_DTYPES  # that it may be stored in


class Origin(NamedTuple):
    """`quantization_config` of a quantised folder: how its weights are stored, and what they were made from."""

    quantization: str
    fingerprint: str
    mingtok_fingerprint: str


class Stored(NamedTuple):
    """Where a published tensor comes from."""

    file: Path
    key: str  # its name in the file
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes in the file
    end: int

    @property
    def place(self) -> tuple[Path, int]:
        """Sorts tensors as they lie on disk."""
        return self.file, self.begin


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
    files = CheckpointFiles(folder)
    model, origin = _blank(folder, files, "mingtok", dtype, None, operations)
    if checkpoint_kind(folder) == "univision":
        files = files.only_vision()
    files.fill(model, device, dtype, on_progress=on_progress)
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
) -> UniVision:
    """Load a Ming-UniVision checkpoint folder, its tokenizer included. Raises CheckpointError.

    quantization: None, "int8" or "int4" (quantization.py says what that does to which weights). They are quantised
    as they are read, so that 37.6 GB of bf16 become 19.8 or 12.0 GB without ever being whole in memory. A folder that
    is quantised already is loaded as it is, with None or its own format. on_progress: as in `load_mingtok`.
    """
    folder = Path(folder)
    files = CheckpointFiles(folder)
    model, origin = _blank(folder, files, "univision", dtype, quantization, operations)
    try:
        chat = ChatFormat.from_folder(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    llm = model.config.llm_config
    for name, ours, theirs in (
        ("eos_token_id", llm.eos_token_id, chat.end_id),
        ("image_start_token", llm.image_start_token, chat.image_open_id),
        ("image_patch_token", llm.image_patch_token, chat.patch_id),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"{folder / 'config.json'}: {name} is {ours}, but tokenizer.json says {theirs}: "
                f"the two files belong to different checkpoints; {AGAIN}"
            )
    model.chat = chat
    files.fill(model, device, dtype, None if origin else quantization, on_progress)
    config = model.config.mingtok_config
    model.mingtok.fingerprint = origin.mingtok_fingerprint if origin else files.mingtok_fingerprint(config)
    model.fingerprint = origin.fingerprint if origin else files.fingerprint()
    return model.eval()


def save_mingtok(model: MingTok, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a MingTok as a published folder. Raises FileError; what cannot be written whole changes nothing."""
    _save(model, write_config(model.config), {}, Path(folder), dtype)


def save_univision(
    model: UniVision, folder: str | Path, tokenizer: Mapping[str, str], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a UniVision as a published folder. tokenizer: file name -> content, tokenizer.json among them.

    dtype is that of the weights that are not quantised. A quantised model makes a quantised folder. Raises FileError;
    what cannot be written whole changes nothing.
    """
    config = dataclasses.replace(model.config, mingtok_config=model.mingtok.config)
    entries = {"model_type": "mingunivision", **write_config(config)}
    if model.quantization:
        origin = Origin(model.quantization, model.fingerprint, model.mingtok.fingerprint)
        entries["quantization_config"] = {"quant_method": QUANT_METHOD, **origin._asdict()}
    _save(model, entries, tokenizer, Path(folder), dtype)


def checkpoint_kind(folder: str | Path) -> str | None:
    """ "mingtok", "univision", or None for a folder that holds neither; reads config.json only."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    return "univision" if "llm_config" in config else "mingtok" if "low_level_encoder" in config else None


def checkpoint_bytes(folder: str | Path, kind: str, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Memory that the weights of a folder take once loaded as a "mingtok" or "univision". Raises CheckpointError.

    Reads the config and the headers of the weights only.
    """
    folder = Path(folder)
    model, origin = _blank(folder, CheckpointFiles(folder), kind, dtype, quantization, nn)
    if quantization and not origin:
        quantize(model, quantization)
    return sum(p.nbytes for p in model.parameters())


def stored_quantization(folder: str | Path) -> str | None:
    """The format of a quantised folder, None for another one. Raises CheckpointError."""
    origin = _origin(Path(folder))
    return origin.quantization if origin else None


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


class CheckpointFiles:
    """The safetensors of a folder: what is stored where, read from their headers alone. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = self._find()
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            self.tensors.update(_read_header(file))
        if (folder / INDEX).is_file():
            self._check_index()

    def only_vision(self) -> CheckpointFiles:
        """The MingTok inside a Ming-UniVision checkpoint, under its keys without `vision.`."""
        other = copy.copy(self)
        other.tensors = {k.removeprefix("vision."): s for k, s in self.tensors.items() if k.startswith("vision.")}
        return other

    def _find(self) -> list[Path]:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such folder; put the checkpoint there or choose another one")
        if (self.folder / INDEX).is_file():
            return [self.folder / name for name in sorted(set(self._index().values()))]
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        found = sorted(self.folder.glob("*.safetensors"))
        if len(found) == 1:
            return found
        if found:
            raise CheckpointError(f"{self.folder / INDEX} is missing beside {len(found)} shards: {AGAIN}")
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{self.folder / pickles[0]} is a pickle file, which can run code when it is read, and is refused: "
                "get the checkpoint as safetensors"
            )
        raise CheckpointError(f"{self.folder / WEIGHTS} is missing: {AGAIN}")

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
                raise TypeError("weight_map")
        except OSError as error:
            raise _unreadable(path, error) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}): {AGAIN}") from None
        for name in index.values():
            if name in ("", "..") or Path(name).name != name:
                raise CheckpointError(f"{path} names a shard outside the folder ({name}): {AGAIN}")
        return index

    def _check_index(self) -> None:
        for name, file in self._index().items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(f"{self.folder / file} lacks {name}, which {INDEX} places there: {AGAIN}")

    @torch.inference_mode(False)  # nodes load under it, and weights that are made there could not be written to outside
    def fill(
        self,
        model: nn.Module,
        device: Any,
        dtype: torch.dtype,
        quantization: str | None = None,
        on_progress: OnProgress = None,
    ) -> None:
        """Give every parameter of a model on the meta device its memory and its values.

        quantization: quantise on the way; the model is not, yet.
        """
        slots = published_slots(model)
        self._check(slots)
        done, total = 0, sum(self.tensors[key].end - self.tensors[key].begin for key in slots)
        if quantization:
            quantize(model, quantization)
        with _Reader() as reader:
            # from front to back of one file after the other: read ahead by the system, and given back when done
            for key in sorted(slots, key=lambda key: self.tensors[key].place):
                slot, stored = slots[key], self.tensors[key]
                owner, _, attribute = slot.parameter.rpartition(".")
                module = model.get_submodule(owner)
                _give_memory(module, attribute, device, dtype)
                if quantization and isinstance(module, Quantized) and attribute in module.NAMES:
                    module.store(attribute, slot.index, reader.read(stored).to(device))
                else:
                    values = getattr(module, attribute).data
                    values[slot.index] = reader.read(stored)
                    self._check_scale(stored, values[slot.index])
                done += stored.end - stored.begin
                if on_progress:
                    on_progress(done, total)

    def _check_scale(self, stored: Stored, scale: Tensor) -> None:
        if stored.key.endswith(SCALE) and not scale.isfinite().all():
            raise CheckpointError(f"{stored.file}: tensor {stored.key} holds values that are no numbers: {AGAIN}")

    def _check(self, slots: Mapping[str, Slot]) -> None:
        """Raises CheckpointError unless the files hold exactly these tensors (and some that are ignored)."""
        fits = "config.json and the weights belong to different checkpoints, or the download is not whole"
        missing = [key for key in slots if key not in self.tensors]
        if missing:
            shape = list(slots[missing[0]].shape)
            raise CheckpointError(
                f"{self.folder}: tensor {missing[0]} {shape} is missing{_and_more(missing)}: {fits}; {AGAIN}"
            )
        unexpected = [key for key in self.tensors if key not in slots and not IGNORED.search(key)]
        if unexpected:
            stored = self.tensors[unexpected[0]]
            raise CheckpointError(
                f"{stored.file}: tensor {unexpected[0]} {list(stored.shape)} is not expected{_and_more(unexpected)}: "
                f"{fits}"
            )
        for key, slot in slots.items():
            stored = self.tensors[key]
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

    def fingerprint(self) -> str:
        """Identifies all stored tensors, whatever the shards and the order."""
        return self._fingerprint(self.tensors, b"")

    def mingtok_fingerprint(self, config: MingTokConfig) -> str:
        """Identifies what latents and features depend on; the same inside a Ming-UniVision checkpoint and alone."""
        stages = ("low_level_encoder.", "semantic_decoder.")
        chosen = {k: s for k, s in self.tensors.items() if k.removeprefix("vision.").startswith(stages)}
        return self._fingerprint(chosen, struct.pack("<dd", config.mean, config.scaling_factor))

    def _fingerprint(self, tensors: Mapping[str, Stored], more: bytes) -> str:
        digests = {}
        in_place = sorted(tensors.items(), key=lambda item: item[1].place)
        for file, tensors_there in itertools.groupby(in_place, key=lambda item: item[1].file):
            with open(file, "rb") as stream:
                for key, stored in tensors_there:
                    stream.seek(stored.begin)
                    head = stream.read(min(FINGERPRINT_BYTES, stored.end - stored.begin))
                    stream.seek(max(stored.begin, stored.end - FINGERPRINT_BYTES))
                    tail = stream.read(stored.end - stream.tell())
                    name = key.removeprefix("vision.")
                    about = f"{name}|{','.join(map(str, stored.shape))}|".encode()
                    digests[name] = hashlib.sha256(about + head + tail).digest()
        return hashlib.sha256(more + b"".join(digests[name] for name in sorted(digests))).hexdigest()


class _Reader:
    """Reads tensors, with one file open at a time."""

    def __enter__(self) -> _Reader:
        self._file, self._handle = None, None
        return self

    def __exit__(self, *_: object) -> None:
        self._handle = None

    def read(self, stored: Stored) -> Tensor:
        try:
            if stored.file != self._file:
                self._handle = None  # before the next one is mapped
                self._file, self._handle = stored.file, safe_open(str(stored.file), framework="pt")
            return self._handle.get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{stored.file}: tensor {stored.key} cannot be read ({error}): {AGAIN}") from error


def _give_memory(module: nn.Module, attribute: str, device: Any, dtype: torch.dtype) -> None:
    """Replace a parameter on the meta device, and the scale that belongs to it, by uninitialised memory."""
    for name in (attribute, attribute + SCALE):
        parameter = getattr(module, name, None)
        if parameter is not None and parameter.is_meta:
            kind = dtype if parameter.is_floating_point() else parameter.dtype
            value = torch.empty(parameter.shape, device=device, dtype=kind)
            module.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _read_header(file: Path) -> dict[str, Stored]:
    """Names, dtypes, shapes and places of a safetensors file's tensors; checks that the file is whole."""
    try:
        with open(file, "rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{file} is cut off, or no safetensors file ({size} bytes): {AGAIN}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start = 8 + length
        found = {
            name: Stored(
                file, name, h["dtype"], tuple(h["shape"]), start + h["data_offsets"][0], start + h["data_offsets"][1]
            )
            for name, h in header.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: {AGAIN}") from None
    except OSError as error:
        raise _unreadable(file, error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged ({error!r}): {AGAIN}") from None
    needed = max((s.end for s in found.values()), default=start)
    if size < needed:
        cut = next(name for name, s in found.items() if s.end > size)
        raise CheckpointError(f"{file} is cut off in tensor {cut}: {size} bytes of {needed}; {AGAIN}")
    return found


def _blank(
    folder: Path, files: CheckpointFiles, kind: str, dtype: torch.dtype, quantization: str | None, operations: Any
) -> tuple[Any, Origin | None]:
    """A model of a folder on the meta device, with its weights as the folder has them (quantised or not)."""
    if quantization not in (None, *FORMATS):
        raise ValueError(f"quantization {quantization!r} is unknown: give None or one of {', '.join(FORMATS)}")
    make = {"operations": operations, "device": "meta", "dtype": dtype}
    origin = _origin(folder)
    if kind == "mingtok":
        inside = checkpoint_kind(folder) == "univision"
        config = _univision_config(folder, files)[0].mingtok_config if inside else _config(MingTokConfig, folder)
        return MingTok(config, **make), origin
    if origin and quantization not in (None, origin.quantization):
        raise CheckpointError(
            f"{folder} is quantised to {origin.quantization} already: load it without asking for {quantization}, or "
            "quantise the original checkpoint"
        )
    config, flow_hidden = _univision_config(folder, files)
    model = UniVision(config, flow_hidden=flow_hidden, **make)
    if origin:
        quantize(model, origin.quantization)
    return model, origin


def _origin(folder: Path) -> Origin | None:
    path = folder / "config.json"
    try:
        entry = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None  # reading the config proper says what is wrong
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
        raise CheckpointError(f"{path}: quantization_config lacks one of {', '.join(Origin._fields)}: {AGAIN}")
    return Origin(*values)


def _univision_config(folder: Path, files: CheckpointFiles) -> tuple[UniVisionConfig, int | None]:
    """The config with MingTok's part filled in, and the flow head's sizes as its tensors have them."""
    config = _config(UniVisionConfig, folder)
    if config.mingtok_config is None:
        config = dataclasses.replace(config, mingtok_config=_sibling_mingtok(folder, files) or MingTokConfig())
    shape = {k.removeprefix("model.diffloss.net."): s.shape for k, s in files.tensors.items() if ".diffloss." in k}
    try:
        depth = 1 + max(int(k.split(".")[1]) for k in shape if k.startswith("res_blocks."))
        width, hidden = shape["input_proj.weight"][0], shape["res_blocks.0.mlp.w12.weight"][0] // 2
    except (KeyError, ValueError, IndexError):
        return config, None  # a tensor of the head is missing: the full check names it
    flow = dataclasses.replace(config.vishead_diffloss_config, diffloss_w=width, diffloss_d=depth)
    return dataclasses.replace(config, vishead_diffloss_config=flow), hidden


def _sibling_mingtok(folder: Path, files: CheckpointFiles) -> MingTokConfig | None:
    """The config of the MingTok checkpoint beside this folder that has the shapes of the one inside."""
    inside = {key: stored.shape for key, stored in files.only_vision().tensors.items()}
    found = {}
    for other in sorted(folder.resolve().parent.iterdir()):
        if "mingtok" in other.name.lower() and checkpoint_kind(other) == "mingtok":
            config = _config(MingTokConfig, other)
            slots = published_slots(MingTok(config, device="meta"))
            if all(inside.get(key) == slot.shape for key, slot in slots.items()):
                found[config] = other
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: its config.json has no mingtok_config, and {' and '.join(map(str, found.values()))} differ: "
            "leave only the MingTok that belongs to it beside it"
        )
    return next(iter(found), None)


def _config(cls: type, folder: Path) -> Any:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        expected = "llm_config" if cls is UniVisionConfig else "low_level_encoder"
        if not isinstance(values, dict) or expected not in values:
            raise CheckpointError(f"{path} has no {expected}: this folder holds another kind of model")
        return read_config(cls, values)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: {AGAIN}") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {AGAIN}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): {AGAIN}") from None


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
    stale = [INDEX] if len(shards) == 1 else []  # of what was there before
    with written_together(folder, stale) as fresh:
        for i, keys in enumerate(shards):
            name = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
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


def tokenizer_files(folder: Path) -> dict[str, str]:
    """What `save_univision` takes: the texts of a checkpoint's tokenizer files, by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("tokenizer*.json")}


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


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error.strerror or error}): see that it is a file you may read")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
