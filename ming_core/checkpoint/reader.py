"""A checkpoint folder's weights as they lie on disk: which tensor is where, read from the files' headers alone.

One safetensors file, or an index with shards. What is missing, damaged or cut off is named, with the remedy. Tensors
are read as they are asked for, with one file open at a time.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import MingTokConfig

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
REDOWNLOAD_HINT = "download the checkpoint again"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100 << 20  # bytes; the published model's largest is some hundred KB
FINGERPRINT_BYTES = 4096  # read from each end of every tensor


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be loaded: names file, tensor, what was expected and found, and the remedy."""


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


class CheckpointReader:
    """The safetensors of a folder: what is stored where, read from their headers alone. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = self._find()
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            self.tensors.update(_read_header(file))
        if (folder / INDEX).is_file():
            self._check_index()

    def only_vision(self) -> CheckpointReader:
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
            raise CheckpointError(f"{self.folder / INDEX} is missing beside {len(found)} shards: {REDOWNLOAD_HINT}")
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{self.folder / pickles[0]} is a pickle file, which can run code when it is read, and is refused: "
                "get the checkpoint as safetensors"
            )
        raise CheckpointError(f"{self.folder / WEIGHTS} is missing: {REDOWNLOAD_HINT}")

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
                raise TypeError("weight_map")
        except OSError as error:
            raise unreadable(path, error) from None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}): {REDOWNLOAD_HINT}") from None
        for name in index.values():
            if name in ("", "..") or Path(name).name != name:
                raise CheckpointError(f"{path} names a shard outside the folder ({name}): {REDOWNLOAD_HINT}")
        return index

    def _check_index(self) -> None:
        for name, file in self._index().items():
            if name not in self.tensors or self.tensors[name].file.name != file:
                raise CheckpointError(
                    f"{self.folder / file} lacks {name}, which {INDEX} places there: {REDOWNLOAD_HINT}"
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


class TensorReader:
    """Reads tensors, with one file open at a time."""

    def __enter__(self) -> TensorReader:
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
            raise CheckpointError(
                f"{stored.file}: tensor {stored.key} cannot be read ({error}): {REDOWNLOAD_HINT}"
            ) from error


def _read_header(file: Path) -> dict[str, Stored]:
    """Names, dtypes, shapes and places of a safetensors file's tensors; checks that the file is whole."""
    try:
        with open(file, "rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{file} is cut off, or no safetensors file ({size} bytes): {REDOWNLOAD_HINT}")
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
        raise CheckpointError(f"{file} is missing: {REDOWNLOAD_HINT}") from None
    except OSError as error:
        raise unreadable(file, error) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged ({error!r}): {REDOWNLOAD_HINT}") from None
    needed = max((s.end for s in found.values()), default=start)
    if size < needed:
        cut = next(name for name, s in found.items() if s.end > size)
        raise CheckpointError(f"{file} is cut off in tensor {cut}: {size} bytes of {needed}; {REDOWNLOAD_HINT}")
    return found


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read ({error.strerror or error}): see that it is a file you may read")
