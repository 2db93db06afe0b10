"""The safetensors files of a checkpoint folder: which tensor is where, read from the files' headers alone.

One file, or an index with shards. Whatever is missing, damaged or cut off is named, with the remedy. Tensors are read
when they are asked for, with one file open at a time.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import MingTokConfig

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
REDOWNLOAD_HINT = "download the checkpoint again"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100 << 20  # bytes; the published model's largest is some hundred KB
FINGERPRINT_BYTES = 4096  # read from each end of every tensor
VISION = "vision."  # begins the keys of the MingTok inside a Ming-UniVision checkpoint


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be loaded: names file, tensor, what was expected and found, and the remedy."""


class TensorInfo(NamedTuple):
    """Where a tensor lies on disk, and what it is."""

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


class CheckpointReader:
    """The tensors of a folder, by key, as the headers of its files list them. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        weight_map: dict[str, str] = {}
        if (folder / INDEX).is_file():
            weight_map = _read_index(folder / INDEX)
            files = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            files = [_single_file(folder)]
        for file in files:
            self.tensors.update(_read_header(file))
        for key, name in weight_map.items():
            if key not in self.tensors or self.tensors[key].file.name != name:
                raise CheckpointError(f"{folder / name} lacks {key}, which {INDEX} places there: {REDOWNLOAD_HINT}")

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
                f"{info.file}: tensor {info.key} cannot be read ({error}): {REDOWNLOAD_HINT}"
            ) from error


def _single_file(folder: Path) -> Path:
    """The only file with weights in a folder without an index."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; put the checkpoint there or choose another one")
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder / INDEX} is missing beside {len(found)} shards: {REDOWNLOAD_HINT}")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]} is a pickle file, which can run code when it is read, and is refused: "
            "get the checkpoint as safetensors"
        )
    raise CheckpointError(f"{folder / WEIGHTS} is missing: {REDOWNLOAD_HINT}")


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map: key -> name of the shard."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map")
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}): {REDOWNLOAD_HINT}") from None
    for name in weight_map.values():
        if name in ("", "..") or Path(name).name != name:
            raise CheckpointError(f"{path} names a shard outside the folder ({name}): {REDOWNLOAD_HINT}")
    return weight_map


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file's header lists; checks that the file is whole."""
    try:
        with open(file, "rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{file} is cut off, or not a safetensors file ({size} bytes): {REDOWNLOAD_HINT}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        start = 8 + length
        tensors = {
            key: TensorInfo(
                file, key, h["dtype"], tuple(h["shape"]), start + h["data_offsets"][0], start + h["data_offsets"][1]
            )
            for key, h in header.items()
        }
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing: {REDOWNLOAD_HINT}") from None
    except OSError as error:
        raise unreadable(file, error) from None
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}): {REDOWNLOAD_HINT}") from None
    needed = max((info.end for info in tensors.values()), default=start)
    if size < needed:
        cut = next(key for key, info in tensors.items() if info.end > size)
        raise CheckpointError(f"{file} is cut off in tensor {cut}: {size} bytes of {needed}; {REDOWNLOAD_HINT}")
    return tensors


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


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What to raise where a file of the folder is there and cannot be read."""
    return CheckpointError(
        f"{path} cannot be read ({error.strerror or error}): make sure that it is a file and that you may read it"
    )
