"""The slice of fuzzing that always runs: the same examples every time, some dozens of each kind."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ming_univision.ming_core import Engine, Features, load_univision
from ming_univision.nodes import host

MOST = 600 << 20  # bytes that the tests may take beyond what is in use at first; a bad file could ask for terabytes


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="session")
def checkpoint(folder: Path) -> Path:
    """A whole small checkpoint with random weights, `tiny` in the models folder."""
    source = host.PACK / "tests" / "golden" / "edit_round"
    tiny = folder / "models" / "tiny"
    tiny.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tiny)
    return tiny


@pytest.fixture(scope="session")
def engine(checkpoint: Path) -> Engine:
    return load_univision(checkpoint)


@pytest.fixture(scope="session")
def features(engine: Engine) -> Features:
    """Features of two random images."""
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        return engine.mingtok.semantic_features(engine.mingtok.encode(pixels))


@pytest.fixture(autouse=True)
def folders(folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The nodes see these folders, and nothing else."""
    for name in ("input", "output"):
        (folder / name).mkdir(exist_ok=True)
    monkeypatch.setattr(host, "model_folders", lambda: [checkpoint.parent])
    with host.folders(output=folder / "output", input=folder / "input"), torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def no_memory_beyond_bounds() -> Iterator[None]:
    """Fails a test in which the process took more memory than any of its examples needs."""
    resource = pytest.importorskip("resource") if sys.platform != "win32" else None
    if resource is None:  # Windows does not count it
        yield
        return
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before < MOST
