"""What the end-to-end checks take for a ComfyUI, for its Python and for a browser, and what they say without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ming_univision.tests.comfyui import finding
from ming_univision.tests.comfyui.conftest import table_line

INSIDE = "Scripts/python.exe" if os.name == "nt" else "bin/python"


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch):
    """Nothing is named in the environment, installed, or in the home folder; the pack lies in a folder of its own."""
    for name in ("COMFYUI_DIR", "COMFYUI_PYTHON", "CHROME_PATH", "QUICKSTART_CALLER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    monkeypatch.setattr(finding, "PACK", tmp_path / "pack")
    monkeypatch.setattr(finding, "BROWSER_PLACES", (str(tmp_path / "Applications" / "chrome"),))


@pytest.mark.parametrize("first", ["passed", "skipped"])
def test_the_line_of_a_check_that_is_left_out_says_why(first):
    """A skip comes while setting up, or in the check; tidying up passes after it."""
    skip = SimpleNamespace(duration=0.1, failed=False, skipped=True, longrepr=("file", 3, "Skipped: no Chromium"))
    fine = SimpleNamespace(duration=0.1, failed=False, skipped=False, longrepr=None)
    phases = [skip, fine] if first == "skipped" else [fine, skip, fine]
    line = table_line("tests/comfyui/test_page.py::test_the_page[classic]", phases)
    assert line.startswith("left out") and line.endswith("the page: classic: no Chromium")


def checkout(folder: Path) -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


def program(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o755)
    return file


# --- The checkout -------------------------------------------------------------------------------------------------


def test_without_a_checkout_none_is_found_and_the_message_says_how_to_name_one():
    assert finding.find_checkout() is None
    assert "--dir" in finding.NO_CHECKOUT and "COMFYUI_DIR" in finding.NO_CHECKOUT


def test_the_one_given_comes_before_the_environments_the_packs_own_and_comfy_clis(tmp_path, monkeypatch):
    by_cli = checkout(tmp_path / "home" / "comfy" / "ComfyUI")
    assert finding.find_checkout() == by_cli
    around = checkout(tmp_path / "around")
    monkeypatch.setattr(finding, "PACK", around / "custom_nodes" / "pack")
    assert finding.find_checkout() == around
    named = checkout(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_DIR", str(named))
    assert finding.find_checkout() == named
    given = checkout(tmp_path / "given")
    assert finding.find_checkout(str(given)) == given


def test_comfy_clis_place_on_windows_and_macs_is_known(tmp_path):
    by_cli = checkout(tmp_path / "home" / "Documents" / "comfy" / "ComfyUI")
    assert finding.find_checkout() == by_cli


def test_a_custom_nodes_folder_that_is_not_comfyuis_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "PACK", tmp_path / "other" / "custom_nodes" / "pack")
    assert finding.find_checkout() is None


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_named_folder_that_is_no_checkout_is_an_error_rather_than_passed_over(tmp_path, monkeypatch, by):
    checkout(tmp_path / "home" / "comfy" / "ComfyUI")
    if by == "environment":
        monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    with pytest.raises(finding.NotFound, match=r"no main\.py beside a folder comfy"):
        finding.find_checkout(str(tmp_path) if by == "option" else None)


# --- Its Python ---------------------------------------------------------------------------------------------------


def test_the_python_is_the_one_given_then_the_checkouts_own_then_the_calling_one(tmp_path, monkeypatch):
    there = checkout(tmp_path / "all" / "ComfyUI")
    assert finding.find_python(there) == Path(sys.executable)
    monkeypatch.setenv("QUICKSTART_CALLER", "/the/caller")
    assert finding.find_python(there) == Path("/the/caller")
    portable = program(there.parent / "python_embeded" / "python.exe")
    assert finding.find_python(there) == portable
    beside = program(there.parent / ".venv" / INSIDE)
    assert finding.find_python(there) == beside
    inside = program(there / "venv" / INSIDE)
    assert finding.find_python(there) == inside
    monkeypatch.setenv("COMFYUI_PYTHON", str(beside))
    assert finding.find_python(there) == beside
    assert finding.find_python(there, str(inside)) == inside


def test_an_environments_python_is_not_resolved_to_the_one_that_it_was_made_from(tmp_path):
    if os.name == "nt":
        pytest.skip("environments on Windows have no links")
    (tmp_path / "python").symlink_to(sys.executable)
    assert finding.find_python(tmp_path, str(tmp_path / "python")) == tmp_path / "python"


def test_a_python_or_browser_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(finding.NotFound, match=r"--python .*absent: there is no such program"):
        finding.find_python(tmp_path, str(tmp_path / "absent"))
    with pytest.raises(finding.NotFound, match=r"--browser .*absent: there is no such program"):
        finding.find_browser(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("exit_status", "printed", "has"), [(0, "True\n", True), (0, "a warning\nFalse\n", False), (1, "", None)]
)
def test_pytorch_is_asked_for_a_gpu_and_its_absence_is_an_error_with_the_command_that_helps(
    tmp_path, monkeypatch, exit_status, printed, has
):
    done = subprocess.CompletedProcess([], exit_status, printed, "Traceback\nNo module named 'torch'")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    if has is None:
        with pytest.raises(finding.NotFound, match=r"No module named 'torch'(.|\n)*pip install -r .*requirements.txt"):
            finding.has_gpu(Path("python"), tmp_path)
    else:
        assert finding.has_gpu(Path("python"), tmp_path) is has


# --- The browser --------------------------------------------------------------------------------------------------


def test_the_browser_is_the_one_given_then_one_on_the_path_then_one_in_a_usual_place(tmp_path, monkeypatch):
    assert finding.find_browser() is None and "--browser" in finding.NO_BROWSER
    usual = program(tmp_path / "Applications" / "chrome")
    assert finding.find_browser() == usual
    name = "chromium.exe" if os.name == "nt" else "chromium"
    on_path = program(tmp_path / "programs" / name)
    assert finding.find_browser() == on_path
    monkeypatch.setenv("CHROME_PATH", str(usual))
    assert finding.find_browser() == usual
    assert finding.find_browser(str(on_path)) == on_path
