"""`quickstart.py download`: fetches a published checkpoint from the Hugging Face Hub, whole and checked.

What is fetched is one revision of the repository: its config, weights and tokenizer, never its code. A file arrives as
NAME.<digest>.part beside its place and takes its name once it has the size and the digest that the hub states; what has
that name already stays until then. An interrupted download goes on in the middle of a file; `hf_hub_download` would
begin that file again, and a shard has gigabytes. Run once more, it checks what is there and fetches what is damaged.
Exit codes of `main`: 0 all is there, 1 failed, 2 refused before anything was fetched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from ..ming_core.checkpoint.reader import CheckpointError, CheckpointReader
from ..nodes import host
from ..nodes.filenames import nearest_existing
from ..nodes.loaders import GB, PUBLISHED

WANTED = re.compile(r"[\w.-]+\.(json|safetensors)|LICENSE[\w.-]*")  # at the top of the repository
ATTEMPTS = 3  # at a file that arrives damaged
BLOCK = 1 << 24  # bytes read at once

REPOSITORIES = {repository.split("/")[1]: repository for repository, _ in PUBLISHED.values()}


class DownloadError(Exception):
    """What went wrong and what to do about it, for the user."""


class Refused(DownloadError):
    """Nothing was fetched."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository. `digest`: hex, sha256 of large files (64 digits), git's sha1 of small ones (40)."""

    name: str
    size: int
    digest: str

    def part(self, folder: Path) -> Path:
        """Where it is collected. The digest in the name keeps the parts of two revisions apart."""
        return folder / f"{self.name}.{self.digest[:12]}.part"

    def fault(self, path: Path) -> str | None:
        """What is wrong with a copy of this file; None when it is whole."""
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
    """Fetches the checkpoint `name` into a folder of that name in `to` and returns the process's exit code.

    `to` None: where this pack looks for models. `endpoint` None: the hub, or the mirror that HF_ENDPOINT names.
    """
    folder = Path(to or host.own_model_folder()).expanduser().absolute() / name
    endpoint = endpoint or constants.ENDPOINT
    try:
        with _explained(endpoint, folder):
            download(REPOSITORIES[name], folder, endpoint)
    except Refused as error:
        _say(f"Refused: {error}")
        return 2
    except DownloadError as error:
        _say(f"Failed: {error}")
        return 1
    _say(f'Done: "{name}" is whole, in {folder}')
    return 0


def download(repository: str, folder: Path, endpoint: str) -> None:
    """Makes `folder` the checkpoint of `repository`. Raises DownloadError, and what networks and disks raise."""
    revision, files = remote_files(repository, endpoint)
    total = sum(file.size for file in files)
    _say(f"{repository} at {endpoint}, revision {revision[:12]}: {len(files)} files, {_size(total)}\ninto {folder}")
    missing = [file for file in files if not _is_there(file, folder)]
    if missing:
        _make_room(folder, missing)
    for number, file in enumerate(missing, start=1):
        _say(f"[{number}/{len(missing)}] {file.name}, {_size(file.size)}")
        url = hf_hub_url(repository, file.name, revision=revision, endpoint=endpoint)
        fetch(file, url, folder)
    try:
        CheckpointReader(folder)  # headers, and each shard that the index names
    except CheckpointError as error:
        raise DownloadError(f"all files are as the hub has them, but cannot be read: {error}") from error


def remote_files(repository: str, endpoint: str) -> tuple[str, list[RemoteFile]]:
    """(revision, the files that make the checkpoint) as the hub lists them now, small ones first."""
    info = HfApi(endpoint=endpoint).model_info(repository, files_metadata=True)
    files = [
        RemoteFile(s.rfilename, s.lfs.size, s.lfs.sha256) if s.lfs else RemoteFile(s.rfilename, s.size, s.blob_id)
        for s in info.siblings or []
        if WANTED.fullmatch(s.rfilename)
    ]
    if not any(file.name.endswith(".safetensors") for file in files):
        raise Refused(f"{repository} at {endpoint} has no safetensors files")
    return info.sha, sorted(files, key=lambda file: (file.size > GB / 10, file.name))


def fetch(file: RemoteFile, url: str, folder: Path) -> None:
    """Fetches one file, from where its part ends. Raises DownloadError for one that keeps arriving damaged."""
    part = file.part(folder)
    for outdated in folder.glob(f"{file.name}.*.part"):
        if outdated != part:
            outdated.unlink()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # a part of what was compressed has no sequel
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
            _say(f"{file.name} broke off at {arrived} bytes of {file.size} and is gone on with")
            continue
        damaged += 1
        _say(f"{file.name} arrived damaged ({fault}) and is fetched again")
        if arrived >= file.size:
            part.unlink()
    raise DownloadError(f"{file.name} arrived damaged {ATTEMPTS} times: something on the way changes it; try later")


class _WrongSize(Exception):
    """Another number of bytes than was announced has arrived, without an error."""


def _get(file: RemoteFile, url: str, stream: BinaryIO, have: int, headers: dict[str, str]) -> None:
    options = {"resume_size": have, "headers": headers, "expected_size": file.size, "displayed_filename": file.name}
    try:
        http_get(url, stream, **options)
    except (HTTPError, HfHubHTTPError):
        raise
    except OSError as error:
        if error.errno is None:  # the hub's library says so with an OSError that no system call gave
            raise _WrongSize from error
        raise


def _is_there(file: RemoteFile, folder: Path) -> bool:
    """Whether the file is there and whole; a damaged one is named."""
    path = folder / file.name
    if not path.is_file():
        return False
    if file.size > GB:
        _say(f"checking {file.name} ...")
    fault = file.fault(path)
    if fault is not None:
        _say(f"{path} is damaged, or of another revision ({fault}), and is fetched again")
    return fault is None


def _make_room(folder: Path, missing: list[RemoteFile]) -> None:
    """Says what is about to be fetched, and makes the folder where the disk has room for it."""
    here = sum(min(part.stat().st_size, f.size) for f in missing if (part := f.part(folder)).exists())
    needed = sum(file.size for file in missing) - here
    existing = nearest_existing(folder)
    if existing is None:
        raise Refused(f"there is no {folder.anchor} to make {folder} on: choose another folder with --to")
    free = shutil.disk_usage(existing).free
    _say(f"to download: {_size(needed)}; free on that disk: {_size(free)}")
    if needed > free:
        raise Refused(
            f"{_size(needed)} are to be downloaded, and {existing} has {_size(free)} free: make room for "
            f"{_size(needed - free)} more, or choose another disk with --to"
        )
    folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _explained(endpoint: str, folder: Path) -> Iterator[None]:
    """Network and disk errors as DownloadError, with what to do."""
    again = "start the same command again and it goes on where it stopped"
    if constants.HF_HUB_OFFLINE:
        raise Refused("the environment variable HF_HUB_OFFLINE forbids downloads: unset it, and start again")
    try:
        yield
    except RepositoryNotFoundError as error:
        raise Refused(f"{endpoint} does not have this model, or not for you ({_line(error)})") from error
    except (HTTPError, HfHubHTTPError) as error:
        raise DownloadError(
            f"{endpoint} cannot be reached, or broke off ({_line(error)}): mend the network, or name a mirror in the "
            f"environment variable HF_ENDPOINT; {again}"
        ) from error
    except OSError as error:
        raise DownloadError(f"{folder} cannot be filled ({_line(error)}): mend that; {again}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _size(count: int) -> str:
    return f"{count / GB:.1f} GB" if count >= GB / 10 else f"{count / 1e6:.1f} MB"


def _say(text: str) -> None:
    print(text, flush=True)
