"""Atomic writing of files and folders, headers of safetensors files, and small ones with a JSON entry of our own."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .json_files import MAX_BYTES, FileError, check_regular, read_json, unreadable

HEADER = "ming"  # the metadata entry that holds the JSON
DIGEST = "ming_digest"  # the metadata entry that holds the digest of the JSON and the tensors; older files lack it
BITS = {  # of an element, by its name in a header
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
MAX_ELEMENTS = 1 << 48  # of a tensor; no disk holds more, and products of a few such sizes stay exact
DRAFT = ".ming-draft-"  # beginning of the name of a file that is being written
DRAFTS_ARE_KEPT = 3600.0  # seconds; no file takes that long
SAVE_AGAIN = "save it again, or use a copy"


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


def read_header(file: str | Path, *, remedy: str = SAVE_AGAIN) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors by key, metadata) of a safetensors file, as its header lists them; no tensor is read.

    The header is checked against the format: types, shapes, dtypes, and offsets that cover the rest of the file without
    gap or overlap. Raises MissingFileError and FileError, where the file is at fault with `remedy`.
    """
    file = Path(file)
    size = check_regular(file).st_size
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise FileError(f"{file} is cut off, or not a safetensors file ({size} bytes): {remedy}")
            if length > MAX_BYTES:
                raise FileError(f"{file}: its header is too long ({length} bytes, at most {MAX_BYTES}): {remedy}")
            text = stream.read(length)
    except OSError as error:
        raise unreadable(file, error) from None
    header = read_json(text, what=f"{file}: the header", remedy=remedy)
    try:
        if not isinstance(header, dict):
            raise _HeaderFault("it is not a JSON object")
        metadata = _metadata(header.pop("__metadata__", None))
        tensors = {key: _tensor_info(file, key, entry, 8 + length) for key, entry in header.items()}
        _check_offsets(tensors, 8 + length, size)
    except _CutOff as error:
        raise FileError(f"{file} is cut off in {error}; {remedy}") from None
    except _HeaderFault as error:
        raise FileError(f"{file}: the header is damaged ({error}); {remedy}") from None
    return tensors, metadata


class _HeaderFault(Exception):
    """What is wrong in a header."""


class _CutOff(_HeaderFault):
    """The file ends before its last tensor does."""


def _metadata(found: Any) -> dict[str, str]:
    metadata = {} if found is None else found
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _HeaderFault("its metadata are not an object of texts")
    return metadata


def _tensor_info(file: Path, key: str, entry: Any, start: int) -> TensorInfo:
    """The checked entry of a tensor; `start` is where the tensors begin in the file."""
    name = key if len(key) <= 200 else f"{key[:200]}..."
    if not key.isprintable():  # also half a character, which nothing could hash or print
        raise _HeaderFault(f"a tensor is called {name!a}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _HeaderFault(f"the entry of {name} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _HeaderFault(f"the dtype of {name} is {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or math.prod(shape) > MAX_ELEMENTS:
        raise _HeaderFault(f"the shape of {name} is {str(shape)[:100]}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _HeaderFault(f"the data_offsets of {name} are {str(offsets)[:100]}")
    begin, end = offsets
    if (end - begin) * 8 != math.prod(shape) * BITS[dtype]:
        raise _HeaderFault(f"{name} is {dtype} {shape} in {end - begin} bytes")
    return TensorInfo(file, key, dtype, tuple(shape), start + begin, start + end)


def _are_sizes(values: Any) -> bool:
    """Whether this is a list of plausible whole numbers from 0 on; their product is exact in short time."""
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in values)
    )


def _check_offsets(tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """The tensors must cover everything behind the header, each byte once."""
    at, before = start, "the header"
    in_order = sorted(tensors.values(), key=lambda info: (info.begin, info.end))
    end = max((info.end for info in in_order), default=start)
    if end > size:
        cut = next(info.key for info in in_order if info.end > size)
        raise _CutOff(f"tensor {cut}: {size} bytes of {end}")
    for info in in_order:
        if info.begin != at:
            what = "overlaps" if info.begin < at else "leaves a gap behind"
            raise _HeaderFault(f"tensor {info.key} {what} {before}")
        at, before = info.end, info.key
    if at != size:
        raise _HeaderFault(f"{size - at} bytes at the end belong to no tensor")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `tensors`, the JSON-able `about` and a digest of both; on any failure the folder is left as it was.

    Raises FileError.
    """
    stored = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(dict(about), ensure_ascii=False)
    write_whole(path, save(stored, {HEADER: text, DIGEST: _digest(stored, text)}))


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    """Identifies names, dtypes, shapes and bytes of the tensors, and the text of `about`."""
    digest = hashlib.blake2b(digest_size=32)

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)

    add(about.encode())
    for name, tensor in sorted(tensors.items()):
        add(f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode())
        add(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_whole(path: str | Path, data: bytes) -> None:
    """Put `data` at `path` in one step, and create its folder. Raises FileError; no partial file is left behind."""
    path = Path(path)
    at_fault = path.parent
    try:
        with draft_in(path.parent) as draft:
            draft.write_bytes(data)
            at_fault = path  # the folder took the data, so it can only be the file that is in the way
            move(draft, path)
    except OSError as error:
        raise _unwritable(at_fault, error) from error


@contextlib.contextmanager
def draft_in(folder: Path) -> Iterator[Path]:
    """A path in a folder, which is created, to write a file to before it gets its name; it is removed at the end.

    Only a process that is killed leaves a draft behind. It is hidden, and removed by one of the next to write there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(f"{DRAFT}*"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - abandoned.stat().st_mtime > DRAFTS_ARE_KEPT:
                abandoned.unlink()
    draft = folder / f"{DRAFT}{secrets.token_hex(8)}"
    try:
        yield draft
    finally:
        with contextlib.suppress(OSError):  # it has its name if all went well
            draft.unlink()


@contextlib.contextmanager
def written_together(folder: Path, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write files into, which are moved to `folder` once all are written; `stale` ones there are removed.

    Raises FileError. If one cannot be written, none is moved; if one cannot be moved, those before it have been.
    """
    fresh = folder / f".new.{secrets.token_hex(8)}"
    try:
        yield fresh
        # largest first: the file that may be in use is the weights, and then nothing has been moved yet
        for path in sorted(fresh.iterdir(), key=lambda path: -path.stat().st_size):
            move(path, folder / path.name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def write_whole_folder(write: Callable[[Path], None], folder: Path) -> None:
    """Have `write` fill a temporary folder, then rename it: a reader never finds a partial one. Raises FileError."""
    # names that nobody uses for folders of their own: a folder that has one is removed
    fresh, old = (folder.with_name(f".{folder.name}.ming-{suffix}") for suffix in ("new", "old"))
    try:
        if old.exists() and not folder.exists():  # an earlier run was killed between the two renames
            move(old, folder)
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise _unwritable(folder, error) from error
        raise
    try:
        if folder.exists():
            move(folder, old)
        move(fresh, folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            with contextlib.suppress(OSError):  # then the next run brings it back
                move(old, folder)
        raise FileError(
            f"{folder} cannot be replaced ({error.strerror or error}): the complete new folder is {fresh}; "
            "close the programs that use the old one, then rename it"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def move(path: Path, to: Path) -> None:
    """Rename, with retries: Windows refuses while any program, such as a virus scanner, has a file of it open."""
    for seconds in (0.5, 1.0, 2.0):
        try:
            path.replace(to)
            return
        except PermissionError:
            time.sleep(seconds)
    path.replace(to)


def file_format(path: str | Path) -> str:
    """The about["format"] of a file that `write_tensors` made, "" for any other safetensors file. Raises FileError."""
    with _opened(path) as (_, about, _):
        return _format(about)


def check_format(path: str | Path, wanted: str) -> None:
    """Raises FileError for a file that is not of this format; only its header is read."""
    with _opened(path) as (_, about, _):
        _require_format(path, about, wanted)


def read_tensors(path: str | Path, wanted: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about) of a file that `write_tensors` made with about["format"] == wanted.

    Raises FileError, also where a byte is another one than was written. Files of the first versions have no digest, and
    are taken as they are.
    """
    with _opened(path) as (file, about, metadata):
        _require_format(path, about, wanted)
        # cloned: a mapped tensor would keep the file open, and change when the file does
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    if not _is_text(about):
        raise FileError(f"{path} is damaged: it has text that is not Unicode; {SAVE_AGAIN}")
    unknown = set(metadata) - {HEADER, DIGEST}  # no version wrote any other: the name of the digest is damaged
    if unknown or metadata.get(DIGEST) not in (None, _digest(tensors, metadata[HEADER])):
        raise FileError(
            f"{path} is damaged: its content has changed since it was saved (the digest differs); {SAVE_AGAIN}"
        )
    return tensors, about


def _is_text(about: Any) -> bool:
    """Whether no text in it has half a character (a lone surrogate), which JSON can spell and no file can hold."""
    try:
        json.dumps(about, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _format(about: Any) -> str:
    found = about.get("format") if isinstance(about, dict) else None
    return found if isinstance(found, str) else ""


def _require_format(path: str | Path, about: Any, wanted: str) -> None:
    found = _format(about)
    if found != wanted:
        kind = f'"{found[:60]}"' if found else "unknown"
        raise FileError(f'{path}: the format of this file is {kind}, expected "{wanted}": choose another file')


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any], dict[str, str]]]:
    """The open file, its `about` and all metadata; any problem while it is read is a FileError."""
    _, metadata = read_header(path)
    about = read_json(metadata.get(HEADER, "{}").encode("utf-8", "surrogatepass"), what=str(path), remedy=SAVE_AGAIN)
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file, about, metadata
    except FileError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path}: damaged or not a safetensors file ({error}); {SAVE_AGAIN}") from None


def _unwritable(path: Path, error: OSError) -> FileError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return FileError(f"cannot write {path}: {error.strerror}; free space on its disk")
    return FileError(f"cannot write {path}: {error.strerror or error}; choose a folder that you may write to")
