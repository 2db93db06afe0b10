"""The house itself: style, floors, and a library that stands without ComfyUI."""

import ast
import subprocess
import sys

import pytest
from ming_univision.nodes.host import PACK

SOURCES = [p for folder in ("ming_core", "nodes") for p in sorted((PACK / folder).rglob("*.py"))]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def imports(path) -> set[str]:
    """Absolute top-level names that a file imports, and relative ones with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or "") if node.level else node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACK).as_posix())
def test_only_the_host_knows_comfyui_and_the_library_never_looks_up(path):
    found = imports(path)
    if path.name != "host.py":
        assert not found & {"comfy", "folder_paths", "server", "execution", "comfy_api"}
    assert not found & {"nodes", "ming_core"}  # bare names are ComfyUI's
    if "ming_core" in path.parts:
        depth = len(path.relative_to(PACK / "ming_core").parts)
        assert all(len(name) - len(name.lstrip(".")) <= depth for name in found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACK).as_posix())
def test_the_library_does_not_touch_the_global_random_state_and_reads_no_pickles(path):
    source = path.read_text(encoding="utf-8")
    for word in ("torch.manual_seed(", "np.random.seed(", "random.seed("):
        assert word not in source
    if "training" not in path.parts:  # a training run reads back its own state
        assert "torch.load(" not in source and "pickle" not in imports(path)


def test_the_library_imports_by_itself_without_comfyui_and_without_the_nodes():
    code = (
        "import sys, ming_core; assert 'comfy' not in sys.modules and 'nodes' not in sys.modules; ming_core.UniVision"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_pack_can_be_loaded_under_any_name():
    code = (
        "import importlib.util, sys; s = importlib.util.spec_from_file_location('a/b-c', '__init__.py', "
        "submodule_search_locations=['.']); m = importlib.util.module_from_spec(s); sys.modules['a/b-c'] = m; "
        "s.loader.exec_module(m); assert len(m.NODE_CLASS_MAPPINGS) == 20"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
