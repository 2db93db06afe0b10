"""Downloads a published checkpoint from the Hugging Face Hub and verifies it: `python quickstart.py download [NAME]`.

One revision of the repository is downloaded: its config, weights and tokenizer, never its code. The published model
keeps its tokenizer beside its code, in another repository: where a model that reads text lacks the two files, they are
downloaded from there, and the folder is not complete without them. A file arrives as
NAME.<digest>.part beside its final place and gets its name when its size and digest are those that the hub states; an
older file of that name stays until then. An interrupted download resumes in the middle of a file, where
`hf_hub_download` would start a file of several gigabytes again. A second run verifies what is there and downloads only
what is missing or damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers, get_session

from ..ming_core.checkpoint import CheckpointError, checkpoint_kind
from ..ming_core.checkpoint.reader import CheckpointReader
from ..ming_core.json_files import FileError, read_json
from ..ming_core.prompts import ChatFormat
from ..ming_core.text_tokenizer import SOURCE, TOKENIZER, TOKENIZER_CONFIG
from ..nodes import host
from ..nodes.filenames import nearest_existing
from ..nodes.models import GB, PUBLISHED

WANTED = re.compile(r"[\w.-]+\.(json|safetensors)|LICENSE[\w.-]*")  # at the top of the repository
ATTEMPTS = 3  # for a file that arrives damaged
BLOCK = 1 << 24  # bytes that are read at once

# GitHub's list of SOURCE: names, sizes and git digests of the files, and where to download them
TOKENIZER_LISTING = "https://api.github.com/repos/inclusionAI/Ming-UniVision/contents/mingunivision"

REPOSITORIES = {repository.split("/")[1]: repository for repository, _ in PUBLISHED.values()}


class DownloadError(Exception):
    """A download failed. The message says what to do about it."""


class DownloadRefused(DownloadError):
    """A download was refused before it began."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository. `digest` in hex is the sha256 of a large file (64 digits), or git's sha1 (40)."""

    name: str
    size: int
    digest: str

    def part(self, folder: Path) -> Path:
        """The file that collects what has arrived. The digest keeps the parts of two revisions apart."""
        return folder / f"{self.name}.{self.digest[:12]}.part"

    def fault(self, path: Path) -> str | None:
        """What is wrong with a copy of this file; None if it is complete."""
        found = path.stat().st_size
        if found != self.size:
            return f"{found} bytes instead of {self.size}"
        if len(self.digest) == 64:
            kind, hasher = "sha256", hashlib.sha256()
        else:
            kind, hasher = "git digest", hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with open(path, "rb") as stream:
            while block := stream.read(BLOCK):
                hasher.update(block)
        return None if hasher.hexdigest() == self.digest else f"{kind} {hasher.hexdigest()} instead of {self.digest}"


def main(name: str, *, to: str | Path | None = None, endpoint: str | None = None) -> int:
    """Downloads the checkpoint `name` into a folder of that name in `to`; returns the exit code of the process.

    Args:
        to: None means the folder where this pack looks for models.
        endpoint: None means the hub, or the mirror that HF_ENDPOINT names.
    """
    folder = Path(to or host.own_model_folder()).expanduser().absolute() / name
    endpoint = endpoint or constants.ENDPOINT
    try:
        with _explain_errors(endpoint, folder):
            download(REPOSITORIES[name], folder, endpoint)
    except DownloadRefused as error:
        _say(f"Refused: {error}")
        return 2
    except DownloadError as error:
        _say(f"Failed: {error}")
        return 1
    _say(f"Done: {name} is complete, in {folder}")
    return 0


def download(repository: str, folder: Path, endpoint: str) -> None:
    """Downloads `repository` into `folder`. Raises DownloadError, and what the network or the disk raises."""
    revision, files = remote_files(repository, endpoint)
    total = sum(file.size for file in files)
    _say(f"{repository} at {endpoint}, revision {revision[:12]}: {len(files)} files, {_size(total)}\ninto {folder}")
    missing = [file for file in files if not _is_complete(file, folder)]
    if missing:
        _make_folder(folder, missing)
    for number, file in enumerate(missing, start=1):
        _say(f"[{number}/{len(missing)}] {file.name}, {_size(file.size)}")
        url = hf_hub_url(repository, file.name, revision=revision, endpoint=endpoint)
        fetch(file, url, folder, build_hf_headers())
    if checkpoint_kind(folder) == "univision":
        complete_tokenizer(folder, {file.name for file in files})
    try:
        CheckpointReader(folder)  # reads the headers, and looks for every shard that the index names
    except CheckpointError as error:
        raise DownloadError(f"all files are the same as on the hub, but they cannot be read: {error}") from error


def remote_files(repository: str, endpoint: str) -> tuple[str, list[RemoteFile]]:
    """Returns (revision, files of the checkpoint) as the hub lists them now, small files first."""
    info = HfApi(endpoint=endpoint).model_info(repository, files_metadata=True)
    files = []
    for sibling in info.siblings or []:
        lfs = sibling.lfs
        size, digest = (lfs.size, lfs.sha256) if lfs else (sibling.size, sibling.blob_id)
        if WANTED.fullmatch(sibling.rfilename):
            if size is None or digest is None:
                raise DownloadRefused(f"{endpoint} does not state the size and digest of {sibling.rfilename}")
            files.append(RemoteFile(sibling.rfilename, size, digest))
    if info.sha is None or not any(file.name.endswith(".safetensors") for file in files):
        raise DownloadRefused(f"{repository} at {endpoint} has no safetensors files")
    return info.sha, sorted(files, key=lambda file: (file.size > GB / 10, file.name))


def complete_tokenizer(folder: Path, from_hub: Collection[str]) -> None:
    """Downloads from the code repository what the hub's repository lacks of the tokenizer. Raises DownloadError.

    Files that are in the folder already, where they make a tokenizer, are taken as they are.
    """
    lacking = [name for name in (TOKENIZER, TOKENIZER_CONFIG) if name not in from_hub]
    try:
        if lacking and not (all((folder / name).exists() for name in lacking) and _has_tokenizer(folder)):
            _say(f"the repository lacks {' and '.join(lacking)}; looking in {SOURCE}")
            for file, url in _tokenizer_files(lacking):
                if not _is_complete(file, folder):
                    _say(f"{file.name}, {_size(file.size)}")
                    fetch(file, url, folder, {})  # no headers for the hub: they may hold the user's token
        ChatFormat.from_folder(folder)
    except (HTTPError, HfHubHTTPError, DownloadError, ValueError, OSError) as error:
        raise DownloadError(
            f"{folder} is complete but for its tokenizer ({_one_line(error)[:500]}): run the same command again, or "
            f"copy {TOKENIZER} and {TOKENIZER_CONFIG} from {SOURCE} into it"
        ) from error


def _has_tokenizer(folder: Path) -> bool:
    try:
        ChatFormat.from_folder(folder)
    except ValueError:
        return False
    return True


def _tokenizer_files(names: Collection[str]) -> list[tuple[RemoteFile, str]]:
    """(file, address) of these files, as the code repository lists them now. Raises DownloadError, and HTTPError."""
    response = get_session().get(TOKENIZER_LISTING, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    response.raise_for_status()
    try:
        listing = read_json(response.content, what=TOKENIZER_LISTING)
        entries = {entry["name"]: entry for entry in listing}
        files = [entries[name] for name in names]
        return [(RemoteFile(str(f["name"]), int(f["size"]), str(f["sha"])), str(f["download_url"])) for f in files]
    except (FileError, KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"{TOKENIZER_LISTING} does not list {' and '.join(names)}") from error


def fetch(file: RemoteFile, url: str, folder: Path, headers: dict[str, str]) -> None:
    """Downloads one file, starting where its part ends. Raises DownloadError if it keeps arriving damaged."""
    part = file.part(folder)
    for outdated in folder.glob(f"{file.name}.*.part"):
        if outdated != part:
            outdated.unlink()
    headers = {**headers, "Accept-Encoding": "identity"}  # a compressed part could not be resumed
    damaged = 0
    while damaged < ATTEMPTS:
        have = part.stat().st_size if part.exists() else 0
        if have > file.size:
            part.unlink()
            have = 0
        with open(part, "ab") as stream, contextlib.suppress(_WrongSize):
            _get(file, url, stream, have, headers)
        fault, arrived = file.fault(part), part.stat().st_size
        if fault is None:
            os.replace(part, folder / file.name)
            return
        if have < arrived < file.size:
            _say(f"{file.name} was interrupted at {arrived} of {file.size} bytes, resuming")
            continue
        damaged += 1
        _say(f"{file.name} arrived damaged ({fault}), downloading it again")
        if arrived >= file.size:
            part.unlink()
    raise DownloadError(
        f"{file.name} arrived damaged {ATTEMPTS} times: a proxy or the server changes it; try again later, or name a "
        "mirror in the environment variable HF_ENDPOINT"
    )


class _WrongSize(Exception):
    """The number of bytes that arrived is not the number that was announced, and there was no error."""


def _get(file: RemoteFile, url: str, stream: BinaryIO, have: int, headers: dict[str, Any]) -> None:
    try:
        http_get(
            url,
            stream,
            resume_size=have,
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.name,
        )
    except (HTTPError, HfHubHTTPError):
        raise
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # how huggingface_hub says it; no system call failed
            raise _WrongSize from error
        raise


def _is_complete(file: RemoteFile, folder: Path) -> bool:
    """Whether the file is there and complete. Says so if it is damaged."""
    path = folder / file.name
    if not path.is_file():
        return False
    if file.size > GB:
        _say(f"verifying {file.name} ...")
    fault = file.fault(path)
    if fault is not None:
        _say(f"{path} is damaged or from another revision ({fault}), downloading it again")
    return fault is None


def _make_folder(folder: Path, missing: list[RemoteFile]) -> None:
    """Says how much is about to be downloaded, and makes the folder if the disk has room for it."""
    arrived = sum(min(part.stat().st_size, f.size) for f in missing if (part := f.part(folder)).exists())
    needed = sum(file.size for file in missing) - arrived
    existing = nearest_existing(folder)
    if existing is None:
        raise DownloadRefused(f"cannot make {folder}: {folder.anchor} does not exist; choose another folder with --to")
    free = shutil.disk_usage(existing).free
    _say(f"to download: {_size(needed)}; free on that disk: {_size(free)}")
    if needed > free:
        raise DownloadRefused(
            f"the download takes {_size(needed)}, and the disk of {existing} has {_size(free)} free: free "
            f"{_size(needed - free)} more, or choose another disk with --to"
        )
    folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _explain_errors(endpoint: str, folder: Path) -> Iterator[None]:
    """Turns errors of the network and the disk into a DownloadError that says what to do."""
    again = "then run the same command again to resume"
    if constants.HF_HUB_OFFLINE:
        raise DownloadRefused("the environment variable HF_HUB_OFFLINE forbids downloads: unset it and try again")
    try:
        yield
    except RepositoryNotFoundError as error:
        raise DownloadRefused(
            f"{endpoint} does not have this model, or you have no access to it ({_one_line(error)})"
        ) from error
    except (HTTPError, HfHubHTTPError, OSError) as error:
        # Below version 1.0 of huggingface_hub, errors of the network are OSErrors, without an error number.
        if isinstance(error, OSError) and error.errno:
            raise DownloadError(f"cannot write to {folder} ({_one_line(error)}): fix that, {again}") from error
        raise DownloadError(
            f"{endpoint} cannot be reached, or the connection was lost ({_one_line(error)}): check your connection, or "
            f"name a mirror in the environment variable HF_ENDPOINT, {again}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"


def _say(text: str) -> None:
    print(text, flush=True)
