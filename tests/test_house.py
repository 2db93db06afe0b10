"""The structure of the project: style, types, rooms that only import downwards, and a library that stands alone."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ming_univision.nodes.host import PACK

# For each room the rooms that it may import besides itself. A folder inside a room may have a rule of its own.
ROOMS = {
    "ming_core": set(),
    "tiny_shapes/world": set(),
    "tiny_shapes/evaluation": {"ming_core", "tiny_shapes/world"},
    "tiny_shapes/training": {"ming_core", "tiny_shapes/world", "tiny_shapes/evaluation"},
    "tiny_shapes/ablation": {"ming_core", "tiny_shapes/world", "tiny_shapes/evaluation", "tiny_shapes/training"},
    "nodes": {"ming_core", "tiny_shapes/world"},
    "runner": {"ming_core", "nodes"},
}
COMFYUI = {"comfy", "comfy_execution", "comfy_extras", "comfy_api", "folder_paths", "server", "execution"}
SHIM = PACK / "ming_core" / "training" / "__main__.py"  # runs tiny_shapes.training under its old name, for one release
SOURCES = [path for room in ROOMS for path in sorted((PACK / room).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(PACK).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_level(tree: ast.AST) -> list[ast.AST]:
    """All nodes of a module that are run when it is imported, and those below `if TYPE_CHECKING`."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            found += [node, *module_level(node)]
    return found


def imports(path: Path, nodes: list[ast.AST]) -> set[str]:
    """What these nodes import, as absolute dotted names; a relative import is resolved to a path below the pack."""
    package = path.relative_to(PACK).parent.parts
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            assert node.level <= len(package) + 1, f"{name_of(path)} imports from outside the pack"
            module = [*base, *filter(None, (node.module or "").split("."))]
            found |= {".".join([*module, alias.name]) for alias in node.names}
    return found


def file_of(name: str) -> Path | None:
    """The file of the pack that an imported dotted name is, or is in."""
    parts = name.split(".")
    for end in (len(parts), len(parts) - 1):  # the last one may be a name inside a module
        path = PACK.joinpath(*parts[:end])
        if end and path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if end and (path / "__init__.py").is_file():
            return path / "__init__.py"
    return None


def imported_files(path: Path, nodes: list[ast.AST]) -> set[Path]:
    return {file for name in imports(path, nodes) if (file := file_of(name))}


def room_of(path: Path) -> str | None:
    return next((room for room in ROOMS if path.is_relative_to(PACK / room)), None)


# --- Style and types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mypy"), reason="mypy is not installed (requirements-dev.txt)")
def test_the_type_checker_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=PACK, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- Rooms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in SOURCES if p != SHIM], ids=name_of)
def test_a_room_only_imports_the_rooms_below_it(path):
    """Also inside functions: an import that is late is an import."""
    room = room_of(path)
    allowed = {room, *ROOMS[room]}
    for file in imported_files(path, list(ast.walk(parsed(path)))):
        of_tests = name_of(path) == "runner/testing.py" and file.is_relative_to(PACK / "tests")  # starts them
        assert room_of(file) in allowed or of_tests, name_of(file)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_the_host_imports_comfyui(path):
    found = {name.split(".")[0] for name in imports(path, list(ast.walk(parsed(path))))}
    assert not found & COMFYUI or name_of(path) == "nodes/host.py"


@pytest.mark.parametrize("room", ["ming_core", "nodes", "runner"])
def test_what_comfyui_loads_imports_its_own_files_by_relative_names_only(room):
    """Bare names are ComfyUI's there: it has a module `nodes` of its own."""
    for path in sorted((PACK / room).rglob("*.py")):
        for node in ast.walk(parsed(path)):
            bare = isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
            assert not (bare and imported_files(path, [node])), f"{name_of(path)}:{node.lineno}"


def test_no_file_imports_itself_by_way_of_others():
    """Packages may collect names from their own files; what is told apart here is the files."""
    graph = {path: imported_files(path, module_level(parsed(path))) - {path} for path in SOURCES}
    done: set[Path] = set()

    def visit(path: Path, way: list[Path]) -> None:
        assert path not in way, " -> ".join(name_of(p) for p in [*way[way.index(path) :], path])
        if path not in done:
            for other in sorted(graph.get(path, ())):
                visit(other, [*way, path])
            done.add(path)

    for path in SOURCES:
        visit(path, [])


# --- Habits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_touches_the_global_random_state_or_reads_pickles(path):
    source = path.read_text(encoding="utf-8")
    for word in ("torch.manual_seed(", "torch.random.manual_seed(", "np.random.seed(", "random.seed("):
        assert word not in source
    if not path.is_relative_to(PACK / "tiny_shapes" / "training"):  # a training run reads back its own state
        assert "torch.load(" not in source
        assert "pickle" not in {name.split(".")[0] for name in imports(path, list(ast.walk(parsed(path))))}


# --- By itself ----------------------------------------------------------------------------------------------------


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=PACK, capture_output=True, text=True)


def test_the_library_imports_by_itself_without_comfyui_and_the_other_rooms():
    done = run(
        "import sys, ming_core; ming_core.UniVision; "
        "assert not {'comfy', 'nodes', 'runner', 'tiny_shapes', 'transformers'} & set(sys.modules)"
    )
    assert done.returncode == 0, done.stderr


def test_the_world_imports_by_itself_without_the_library_and_torch():
    done = run("import sys, tiny_shapes.world; assert not {'ming_core', 'torch'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_pack_can_be_loaded_under_any_name():
    nodes = len(json.loads((PACK / "node_list.json").read_text(encoding="utf-8")))
    done = run(
        "import importlib.util, sys; s = importlib.util.spec_from_file_location('a/b-c', '__init__.py', "
        "submodule_search_locations=['.']); m = importlib.util.module_from_spec(s); sys.modules['a/b-c'] = m; "
        f"s.loader.exec_module(m); assert len(m.NODE_CLASS_MAPPINGS) == {nodes}"
    )
    assert done.returncode == 0, done.stderr
