"""What the registry and managers of node packs read: pyproject.toml, .comfyignore, the icon, the list of nodes."""

import importlib.util
import json
import re
import sys

import numpy as np
import pytest
from ming_univision.nodes import NODE_CLASS_MAPPINGS
from ming_univision.nodes.host import PACK
from PIL import Image

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))


def test_pyproject_says_what_the_registry_asks_for(pyproject):
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z](?:[A-Za-z0-9]|[-_.](?=[A-Za-z0-9])){0,98}", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"]) and project["description"]
    assert (PACK / project["license"]["file"]).read_text(encoding="utf-8").lstrip().startswith("Apache License")
    owner = comfy["PublisherId"]
    assert project["urls"]["Repository"] == f"https://github.com/{owner}/ComfyUI-Ming-UniVision"
    assert all(url.startswith(project["urls"]["Repository"]) for url in project["urls"].values())
    assert comfy["Icon"].startswith(f"https://raw.githubusercontent.com/{owner}/ComfyUI-Ming-UniVision/main/")
    assert comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.3.64"


def test_the_version_is_in_the_changelog_and_the_dependencies_are_those_of_the_requirements(pyproject):
    project = pyproject["project"]
    versions = re.findall(r"^## (\S+)$", (PACK / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == project["version"]
    lines = (PACK / "requirements.txt").read_text().splitlines()
    assert project["dependencies"] == [line for line in lines if line and not line.startswith("#")]


def test_the_icon_is_a_small_square_and_what_its_script_draws(pyproject):
    path = PACK / pyproject["tool"]["comfy"]["Icon"].split("/main/")[1]
    spec = importlib.util.spec_from_file_location("icon", path.with_suffix(".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with Image.open(path) as committed:
        assert committed.width == committed.height <= 400  # the registry takes 800x400 at most
        drawn = np.asarray(module.icon(), dtype=int)
        assert np.abs(drawn - np.asarray(committed, dtype=int)).max() <= 2  # versions of Pillow round differently


def test_the_list_of_nodes_is_that_of_the_mappings():
    listed = json.loads((PACK / "node_list.json").read_text(encoding="utf-8"))
    assert listed == {node_id: node.DESCRIPTION for node_id, node in NODE_CLASS_MAPPINGS.items()}


def test_a_published_pack_has_what_it_runs_on():
    lines = (PACK / ".comfyignore").read_text().splitlines()
    assert all(line.startswith("/") for line in lines)  # else "docs/" would take web/docs/ along
    left_out = {line.strip("/") for line in lines}
    assert all((PACK / name).exists() for name in left_out)
    needed = {
        "__init__.py",
        "nodes",
        "ming_core",
        "tiny_shapes",
        "runner",
        "models",
        "web",
        "locales",
        "workflows",
        "LICENSE",
    }
    needed |= {"requirements.txt", "quickstart.py", "requirements-dev.txt", "constraints.txt"}  # and set up by itself
    assert not left_out & needed and all((PACK / name).exists() for name in needed)
