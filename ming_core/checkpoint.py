"""Checkpoint folders in and out: config.json, safetensors (one file, or an index with shards), tokenizer.json.

Loading builds the model without memory (meta device), then takes each tensor straight from its file to its place on
the target device and in the target dtype: the peak is the model plus one tensor. Everything is checked before
anything is read: what is missing, unexpected, misshapen or cut off is named, with the remedy.

Module names are the published keys but for a few prefixes (`PUBLISHED_PREFIXES`) and the experts, whose weights are
stacked here and published one by one (`published_slots`).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .config import ConfigError, MingTokConfig, UniVisionConfig, read_config, write_config
from .files import write_whole
from .mingtok import MingTok
from .prompts import ChatFormat
from .univision import UniVision

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
AGAIN = "download the checkpoint again"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAFETENSORS_DTYPES = ("F32", "F16", "BF16")
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


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be loaded: names file, tensor, what was expected and found, and the remedy."""


class Slot(NamedTuple):
    """Where a published tensor goes: a parameter, or a slice of one."""

    parameter: str
    index: tuple  # () for the whole parameter
    shape: tuple[int, ...]


class Stored(NamedTuple):
    """Where a published tensor comes from."""

    file: Path
    key: str  # its name in the file
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes in the file
    end: int


def load_mingtok(
    folder: str | Path, *, device: Any = "cpu", dtype: torch.dtype = torch.float32, operations: Any = nn
) -> MingTok:
    """Load a MingTok checkpoint folder, or the MingTok inside a Ming-UniVision one. Raises CheckpointError."""
    folder = Path(folder)
    files = CheckpointFiles(folder)
    if checkpoint_kind(folder) == "univision":
        config = _univision_config(folder, files)[0].mingtok_config
        files = files.only_vision()
    else:
        config = _config(MingTokConfig, folder)
    model = MingTok(config, operations=operations, device="meta", dtype=dtype)
    files.fill(model, device, dtype)
    model.fingerprint = files.mingtok_fingerprint(config)
    return model.eval()


def load_univision(
    folder: str | Path,
    *,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    quantization: str | None = None,
    operations: Any = nn,
) -> UniVision:
    """Load a Ming-UniVision checkpoint folder, its tokenizer included. quantization: None. Raises CheckpointError."""
    if quantization is not None:
        raise ValueError(f"quantization {quantization!r} is not available: only None is")
    folder = Path(folder)
    files = CheckpointFiles(folder)
    config, flow_hidden = _univision_config(folder, files)
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
                "the two files belong to different checkpoints"
            )
    model = UniVision(config, chat, flow_hidden=flow_hidden, operations=operations, device="meta", dtype=dtype)
    files.fill(model, device, dtype)
    model.mingtok.fingerprint = files.mingtok_fingerprint(config.mingtok_config)
    model.fingerprint = files.fingerprint()
    return model.eval()


def save_mingtok(model: MingTok, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a MingTok as a published folder."""
    _save(model, write_config(model.config), Path(folder), dtype)


def save_univision(
    model: UniVision, folder: str | Path, tokenizer: Mapping[str, str], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write a UniVision as a published folder. tokenizer: file name -> content, tokenizer.json among them."""
    for name, content in tokenizer.items():
        write_whole(Path(folder) / name, content.encode())
    config = dataclasses.replace(model.config, mingtok_config=model.mingtok.config)
    _save(model, {"model_type": "mingunivision", **write_config(config)}, Path(folder), dtype)


def checkpoint_kind(folder: str | Path) -> str | None:
    """ "mingtok", "univision", or None for a folder that holds neither; reads config.json only."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    return "univision" if "llm_config" in config else "mingtok" if "low_level_encoder" in config else None


def checkpoint_values(folder: str | Path) -> int:
    """How many numbers a checkpoint holds; reads headers only. Raises CheckpointError."""
    return sum(math.prod(stored.shape) for stored in CheckpointFiles(Path(folder)).tensors.values())


def published_slots(model: nn.Module) -> dict[str, Slot]:
    """For every published key that this model needs, the place it goes to."""
    slots = {}
    for name, parameter in model.named_parameters():
        published = name
        for ours, theirs in PUBLISHED_PREFIXES.items():
            if isinstance(model, UniVision) and name.startswith(ours):
                published = theirs + name.removeprefix(ours)
        stem, experts, last = published.rpartition("experts.")
        if experts and last in ("gate_up", "down"):
            for expert in range(parameter.shape[0]):
                slots.update(_expert_slots(f"{stem}experts.{expert}.", name, last, expert, parameter))
        else:
            slots[published] = Slot(name, (), tuple(parameter.shape))
    return slots


def _expert_slots(prefix: str, name: str, last: str, expert: int, parameter: Tensor) -> Iterable[tuple[str, Slot]]:
    if last == "down":
        yield f"{prefix}down_proj.weight", Slot(name, (expert,), tuple(parameter.shape[1:]))
        return
    half = parameter.shape[1] // 2
    shape = (half, parameter.shape[2])
    yield f"{prefix}gate_proj.weight", Slot(name, (expert, slice(0, half)), shape)
    yield f"{prefix}up_proj.weight", Slot(name, (expert, slice(half, 2 * half)), shape)


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
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}): {AGAIN}") from None
        for name in index.values():
            if Path(name).name != name:
                raise CheckpointError(f"{path} names a shard outside the folder ({name}): {AGAIN}")
        return index

    def _check_index(self) -> None:
        for name, file in self._index().items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(f"{self.folder / file} lacks {name}, which {INDEX} places there: {AGAIN}")

    def fill(self, model: nn.Module, device: Any, dtype: torch.dtype) -> None:
        """Give every parameter of a model on the meta device its memory and its values."""
        slots = published_slots(model)
        self._check(slots)
        by_parameter: dict[str, list[tuple[str, Slot]]] = {}
        for key, slot in slots.items():
            by_parameter.setdefault(slot.parameter, []).append((key, slot))
        with _Readers() as readers:
            for name, pieces in by_parameter.items():
                owner, _, attribute = name.rpartition(".")
                module = model.get_submodule(owner)
                value = torch.empty(getattr(module, attribute).shape, device=device, dtype=dtype)
                for key, slot in pieces:
                    value[slot.index] = readers.read(self.tensors[key])
                module.register_parameter(attribute, nn.Parameter(value))

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
            if stored.dtype not in SAFETENSORS_DTYPES:
                raise CheckpointError(
                    f"{stored.file}: tensor {key} is stored as {stored.dtype}, expected one of "
                    f"{', '.join(SAFETENSORS_DTYPES)}: get the checkpoint in bf16, fp16 or fp32"
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
        for file in self.files:
            with open(file, "rb") as stream:
                for key, stored in sorted(tensors.items(), key=lambda item: item[1].begin):
                    if stored.file == file:
                        stream.seek(stored.begin)
                        head = stream.read(min(FINGERPRINT_BYTES, stored.end - stored.begin))
                        stream.seek(max(stored.begin, stored.end - FINGERPRINT_BYTES))
                        tail = stream.read(stored.end - stream.tell())
                        name = key.removeprefix("vision.")
                        about = f"{name}|{','.join(map(str, stored.shape))}|".encode()
                        digests[name] = hashlib.sha256(about + head + tail).digest()
        return hashlib.sha256(more + b"".join(digests[name] for name in sorted(digests))).hexdigest()


class _Readers:
    """Open shards, one handle each."""

    def __enter__(self) -> _Readers:
        self._open: dict[Path, Any] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def read(self, stored: Stored) -> Tensor:
        try:
            if stored.file not in self._open:
                self._open[stored.file] = safe_open(str(stored.file), framework="pt")
            return self._open[stored.file].get_tensor(stored.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{stored.file}: tensor {stored.key} cannot be read ({error}): {AGAIN}") from error


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged ({error!r}): {AGAIN}") from None
    needed = max((s.end for s in found.values()), default=start)
    if size < needed:
        cut = next(name for name, s in found.items() if s.end > size)
        raise CheckpointError(f"{file} is cut off in tensor {cut}: {size} bytes of {needed}; {AGAIN}")
    return found


def _univision_config(folder: Path, files: CheckpointFiles) -> tuple[UniVisionConfig, int | None]:
    """The config with MingTok's part filled in, and the flow head's sizes as its tensors have them."""
    config = _config(UniVisionConfig, folder)
    if config.mingtok_config is None:
        config = dataclasses.replace(config, mingtok_config=_sibling_mingtok(folder) or MingTokConfig())
    shape = {k.removeprefix("model.diffloss.net."): s.shape for k, s in files.tensors.items() if ".diffloss." in k}
    try:
        depth = 1 + max(int(k.split(".")[1]) for k in shape if k.startswith("res_blocks."))
        width, hidden = shape["input_proj.weight"][0], shape["res_blocks.0.mlp.w3.weight"][1]
    except (KeyError, ValueError, IndexError):
        return config, None  # a tensor of the head is missing: the full check names it
    flow = dataclasses.replace(config.vishead_diffloss_config, diffloss_w=width, diffloss_d=depth)
    return dataclasses.replace(config, vishead_diffloss_config=flow), hidden


def _sibling_mingtok(folder: Path) -> MingTokConfig | None:
    """The config of a MingTok checkpoint that lies beside this folder."""
    for other in sorted(folder.resolve().parent.iterdir()):
        if "mingtok" in other.name.lower() and (other / "config.json").is_file():
            return _config(MingTokConfig, other)
    return None


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
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {AGAIN}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is no JSON ({error}): {AGAIN}") from None


def _save(model: nn.Module, config: dict, folder: Path, dtype: torch.dtype) -> None:
    parameters = dict(model.named_parameters())
    tensors = {
        key: parameters[slot.parameter][slot.index].detach().to("cpu", dtype).contiguous()
        for key, slot in published_slots(model).items()
    }
    write_whole(folder / WEIGHTS, save(tensors, {"format": "pt"}))
    write_whole(folder / "config.json", json.dumps(config, indent=2).encode())


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
