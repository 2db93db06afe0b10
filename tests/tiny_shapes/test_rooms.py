"""The rooms of tiny_shapes, each above the one before: world, evaluation, training, ablation; and no circle in any."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "tiny_shapes"
ROOMS = ("world", "evaluation", "training", "ablation")  # from the bottom up
FILES = sorted(FOLDER.glob("*/*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports."""
    package = ["tiny_shapes", path.parent.name]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(FOLDER).as_posix())
def test_a_room_imports_only_rooms_below_it_and_never_the_pack(path):
    room = ROOMS.index(path.parent.name)
    found = imports(path)
    above = {f"tiny_shapes.{name}" for name in ROOMS[room + 1 :]}
    assert not {name for name in found if ".".join(name.split(".")[:2]) in above}
    assert not {name.split(".")[0] for name in found} & {"nodes", "runner", "comfy", "ming_univision"}
    if path.parent.name == "world":
        assert not {name.split(".")[0] for name in found} & {"ming_core", "torch"}


@pytest.mark.parametrize("room", ROOMS)
def test_the_files_of_a_room_do_not_import_one_another_in_a_circle(room):
    prefix = f"tiny_shapes.{room}."
    graph = {
        prefix + path.stem: {name for name in imports(path) if name.startswith(prefix)}
        for path in FILES
        if path.parent.name == room and path.stem != "__init__"
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)
