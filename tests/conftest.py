"""Loads the pack as ComfyUI does, as a package, under the name `ming_univision`; offers the recorded cases."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import weakref
from pathlib import Path
from typing import NamedTuple

# Before torch is imported: two threads at most, so that the tests do not starve on small machines.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
PACK = "ming_univision"
sys.path.append(str(ROOT))  # tiny_shapes and its training import the library by its own name


def load_pack() -> None:
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = pack
    spec.loader.exec_module(pack)


if importlib.util.find_spec("comfy"):  # only where somebody has put ComfyUI on the path
    import comfy.cli_args

    comfy.cli_args.args.cpu = True

if PACK not in sys.modules:
    load_pack()


class Case(NamedTuple):
    """One recorded case: its folder, its config.json, its tensors."""

    folder: Path
    config: dict
    io: dict[str, torch.Tensor]
    rounds: list[dict]


def pytest_addoption(parser: pytest.Parser) -> None:
    fuller, part = ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden"
    parser.addoption("--golden", default=fuller if fuller.is_dir() else part, help="folder of the recorded cases")
    comfyui = parser.getgroup("comfyui", "end-to-end checks in a real ComfyUI")
    comfyui.addoption("--comfyui", metavar="DIR", help="its checkout (default: the one that is found)")
    comfyui.addoption("--comfyui-python", metavar="FILE", help="the Python that has its requirements")
    comfyui.addoption("--comfyui-browser", metavar="FILE", help="a Chromium, Chrome or Edge")
    comfyui.addoption("--comfyui-keep", action="store_true", help="keep the temporary folders of servers and browsers")


@pytest.fixture(scope="session")
def golden_folder(request: pytest.FixtureRequest) -> Path:
    folder = Path(request.config.getoption("--golden"))
    assert folder.is_dir(), f"--golden {folder}: no such folder"
    return folder


@pytest.fixture(scope="session")
def golden(golden_folder: Path):
    """golden(name) -> Case; skips the test where the folder has only a part of the cases."""

    def read(name: str) -> Case:
        folder = golden_folder / name
        if not folder.is_dir():
            pytest.skip(f"{name} is not among the cases of {golden_folder}")
        config, case = folder / "config.json", folder / "case.json"
        return Case(
            folder,
            json.loads(config.read_text()) if config.exists() else {},
            load_file(folder / "io.safetensors") if (folder / "io.safetensors").exists() else {},
            json.loads(case.read_text())["rounds"] if case.exists() else [],
        )

    return read


@pytest.fixture(scope="session")
def checkpoint_folder() -> Path:
    """A small whole checkpoint with random weights that is always here: 32x32 pictures of 16 tokens."""
    return ROOT / "tests" / "golden" / "edit_round"


@pytest.fixture
def model(checkpoint_folder: Path):
    """A freshly loaded small Ming-UniVision."""
    from ming_univision.ming_core import load_univision

    return load_univision(checkpoint_folder)


@pytest.fixture
def picture(model):
    """Features of a random picture."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        return model.mingtok.semantic_features(model.mingtok.encode(pixels))


@pytest.fixture
def captured_steps(monkeypatch):
    """The steps of the last drawing, which may be replayed as graphs, by the names of their functions."""
    from ming_univision.ming_core import cuda_graphs

    steps = {}

    class Noted(cuda_graphs.CapturedStep):
        def __init__(self, function, record):
            super().__init__(function, record)
            steps[function.__name__] = self

    monkeypatch.setattr(cuda_graphs, "CapturedStep", Noted)
    return steps


@pytest.fixture
def tensors_alive(monkeypatch):
    """Counts, while checkpoints are loaded: [tensors read, most of them that were alive at once]."""
    from ming_univision.ming_core.checkpoint.reader import TensorReader

    alive, counts, read = [], [0, 0], TensorReader.read

    def watched(self, stored):
        tensor = read(self, stored)
        alive.append(weakref.ref(tensor))
        counts[:] = len(alive), max(counts[1], sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(TensorReader, "read", watched)
    return counts


@pytest.fixture
def photograph():
    """An image without a plain ground: a gradient in each channel."""
    gradients = (Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90))
    return Image.merge("RGB", gradients)
