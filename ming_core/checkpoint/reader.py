"""The safetensors files of a checkpoint folder: which tensor is where, read from the files' headers alone.

One file, or an index with shards. Whatever is missing, damaged or cut off is named, with the remedy: only what has to
be fetched again is said to be. Tensors are read when they are asked for, with one file open at a time.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import MingTokConfig
from ..files import TensorInfo, read_header
from ..json_files import FileError, MissingFileError, read_json

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
REDOWNLOAD_FILE = "download this file again"  # one, not the whole 37.6 GB
REDOWNLOAD_HINT = "download the checkpoint again"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SCALED_FP8 = re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input|comfy_quant|weight_scale_inv)$")
LORA = re.compile(r"lora_|\.(alpha|dora_scale)$")
FINGERPRINT_BYTES = 4096  # read from each end of every tensor
VISION = "vision."  # begins the keys of the MingTok inside a Ming-UniVision checkpoint


class CheckpointError(FileError):
    """A checkpoint folder that cannot be loaded: names file, tensor, what was expected and found, and the remedy."""


class CheckpointReader:
    """The tensors of a folder, by key, as the headers of its files list them. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        weight_map: dict[str, str] = {}
        if os.path.lexists(folder / INDEX):
            weight_map = _read_index(folder / INDEX)
            files = [folder / name for name in sorted(set(weight_map.values()))]
            _check_shards(folder, weight_map, files)
        else:
            files = [_single_file(folder)]
        for file in files:
            self.tensors.update(_read_header(file))
        for key, name in weight_map.items():
            if key not in self.tensors or self.tensors[key].file.name != name:
                raise CheckpointError(
                    f"{folder / name} lacks {key}, which {INDEX} places there: download both files again"
                )

        _check_obstacles(folder, self.tensors)

    def only_vision(self) -> CheckpointReader:
        """The MingTok inside a Ming-UniVision checkpoint, under the keys of a MingTok checkpoint."""
        other = copy.copy(self)
        other.tensors = {key.removeprefix(VISION): x for key, x in self.tensors.items() if key.startswith(VISION)}
        return other

    def fingerprint(self) -> str:
        """Identifies all tensors, whatever the shards and the order."""
        return _fingerprint(self.tensors, b"")

    def mingtok_fingerprint(self, config: MingTokConfig) -> str:
        """Identifies what latents and features depend on; the same inside a Ming-UniVision checkpoint and alone."""
        stages = ("low_level_encoder.", "semantic_decoder.")
        chosen = {key: info for key, info in self.tensors.items() if key.removeprefix(VISION).startswith(stages)}
        return _fingerprint(chosen, struct.pack("<dd", config.mean, config.scaling_factor))


class TensorReader:
    """Reads tensors, with one file open at a time."""

    def __enter__(self) -> TensorReader:
        self._file: Path | None = None
        self._handle: Any = None
        return self

    def __exit__(self, *_: object) -> None:
        self._handle = None

    def read(self, info: TensorInfo) -> Tensor:
        try:
            if info.file != self._file:
                self._handle = None  # before the next one is mapped
                self._file, self._handle = info.file, safe_open(str(info.file), framework="pt")
            return self._handle.get_tensor(info.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{info.file}: tensor {info.key} cannot be read ({error}): {REDOWNLOAD_FILE}"
            ) from error


def _check_obstacles(folder: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError for weights that are there and whole, but in a form that is not a checkpoint's."""
    fp8 = any(info.dtype.startswith("F8") for info in tensors.values())
    for key, info in tensors.items():
        if SCALED_FP8.search(key) or (fp8 and "scale" in key.rpartition(".")[2]):
            raise CheckpointError(
                f"{info.file} is a scaled fp8 file (it has {key}): its weights mean nothing without their scales, "
                "and those are not supported; get the checkpoint in bf16, and choose the precision int8 or int4 to "
                "save memory"
            )
    if any("lora_" in key for key in tensors) and all(LORA.search(key) for key in tensors):
        raise CheckpointError(
            f"{folder} holds a LoRA ({next(iter(tensors))}{and_more(list(tensors))}), not a model: apply it to a "
            "loaded model with Ming LoRA, or merge it into the weights of its model"
        )


def _single_file(folder: Path) -> Path:
    """The only file with weights in a folder without an index."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; put the checkpoint there or choose another one")
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    found = _safetensors_in(folder)
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder / INDEX} is missing beside {len(found)} shards: {REDOWNLOAD_FILE}")
    pickles = [path for path in _files_in(folder) if path.suffix in PICKLES]
    if pickles:
        raise CheckpointError(
            f"{pickles[0]} is a pickle file, which can run code when it is read, and is refused: "
            "get the checkpoint as safetensors"
        )
    raise CheckpointError(f"{folder / WEIGHTS} is missing: {REDOWNLOAD_HINT}")


def _safetensors_in(folder: Path) -> list[Path]:
    return [path for path in _files_in(folder) if path.suffix == ".safetensors"]


def _files_in(folder: Path) -> list[Path]:
    """What lies in a folder, but for hidden files, such as those that macOS leaves beside others."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error.strerror or error}): make it readable") from None


def _check_shards(folder: Path, weight_map: Mapping[str, str], shards: Sequence[Path]) -> None:
    """Tell an index that was left beside a whole single file from one whose shards are missing."""
    missing = [shard for shard in shards if not os.path.lexists(shard)]
    for other in _safetensors_in(folder) if missing else ():
        if other not in shards and _holds(other, weight_map):
            raise CheckpointError(
                f"{folder / INDEX} names {missing[0].name}{and_more(missing)}, which is not there; {other.name} holds "
                f"the whole model: remove {INDEX}"
            )


def _holds(file: Path, keys: Mapping[str, str]) -> bool:
    """Whether a file has a tensor of each of these keys."""
    try:
        return keys.keys() <= _read_header(file).keys()
    except CheckpointError:
        return False


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: key -> name of the shard."""
    try:
        index = read_json(path, remedy=REDOWNLOAD_FILE)
    except FileError as error:
        raise CheckpointError(str(error)) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path} is damaged (it has no weight_map of file names): {REDOWNLOAD_FILE}")
    for name in weight_map.values():
        if name in ("", ".", "..") or Path(name).name != name or not name.isprintable():
            raise CheckpointError(f"{path} names a shard outside the folder ({name[:100]!a}): {REDOWNLOAD_FILE}")
    return weight_map


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file's header lists; checks that the file is whole."""
    try:
        return read_header(file, remedy=REDOWNLOAD_FILE)[0]
    except MissingFileError as error:
        raise missing(file, error) from None
    except FileError as error:
        raise CheckpointError(str(error)) from None


def missing(file: Path, error: MissingFileError) -> CheckpointError:
    """What to raise where a file is not there or, as in the cache of the hub, a link to it leads nowhere."""
    what = str(error) if os.path.islink(file) else f"{file} is missing"
    return CheckpointError(f"{what}: {REDOWNLOAD_FILE}")


def _fingerprint(tensors: Mapping[str, TensorInfo], more: bytes) -> str:
    """A hash of keys, shapes and the two ends of every tensor; `more` is hashed too."""
    digests = {}
    in_place = sorted(tensors.items(), key=lambda item: item[1].place)
    for file, tensors_there in itertools.groupby(in_place, key=lambda item: item[1].file):
        with open(file, "rb") as stream:
            for key, info in tensors_there:
                stream.seek(info.begin)
                head = stream.read(min(FINGERPRINT_BYTES, info.end - info.begin))
                stream.seek(max(info.begin, info.end - FINGERPRINT_BYTES))
                tail = stream.read(info.end - stream.tell())
                name = key.removeprefix(VISION)
                about = f"{name}|{','.join(map(str, info.shape))}|".encode()
                digests[name] = hashlib.sha256(about + head + tail).digest()
    return hashlib.sha256(more + b"".join(digests[name] for name in sorted(digests))).hexdigest()


def and_more(names: Sequence[object]) -> str:
    """What to write behind the first of several names."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
