"""The commands that run tests: how pytest is started, and what happens when something is missing or interrupts."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from ming_univision.runner import testing
from ming_univision.tests.comfyui import finding


class Child:
    """A double of a process. It notes how it was started, and `wait` returns or raises these outcomes in turn."""

    def __init__(self, *outcomes) -> None:
        self.started, self.outcomes = [], list(outcomes)

    def __call__(self, command, **options) -> Child:
        self.started.append((command, options))
        return self

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_) -> None:
        pass

    def wait(self) -> int:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def test_pytest_runs_in_the_project_says_what_it_left_out_and_its_exit_code_is_kept(monkeypatch):
    child = Child(5, 0)
    monkeypatch.setattr(testing.subprocess, "Popen", child)
    base = [sys.executable, "-m", "pytest", "-rs"]
    assert testing.run_tests(["-x"]) == 5
    assert testing.run_tests(["--golden=mine"]) == 0
    assert [command for command, _ in child.started] == [[*base, "-x"], [*base, "--golden=mine"]]
    assert all(options == {"cwd": testing.ROOT} for _, options in child.started)
    assert (testing.ROOT / "quickstart.py").is_file()


def test_ctrl_c_lets_pytest_stop_what_it_has_started(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    child = Child(KeyboardInterrupt(), KeyboardInterrupt(), 2)
    monkeypatch.setattr(testing.subprocess, "Popen", child)
    assert testing.run_tests() == 2 and not child.outcomes
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def machine(monkeypatch):
    """A machine that has a ComfyUI."""
    monkeypatch.setattr(finding, "find_checkout", lambda given: Path(given or "found"))
    monkeypatch.setattr(finding, "find_python", lambda checkout, given: Path(given or checkout / "python"))
    monkeypatch.setattr(finding, "find_browser", lambda given: Path(given))
    monkeypatch.setattr(finding, "has_gpu", lambda python, checkout: False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, [f"--comfyui={Path('found')}", f"--comfyui-python={Path('found/python')}"]),
        (
            {"checkout": "x", "python": "p", "browser": "b", "keep": True, "only": "page or memory"},
            ["--comfyui=x", "--comfyui-python=p", "--comfyui-browser=b", "--comfyui-keep", "-k", "page or memory"],
        ),
    ],
)
def test_comfyui_runs_the_end_to_end_checks_on_what_was_named_or_found(machine, monkeypatch, options, said):
    child = Child(1)
    monkeypatch.setattr(testing.subprocess, "Popen", child)
    assert testing.run_comfyui_checks(**options) == 1
    ((command, _),) = child.started
    assert command == [sys.executable, "-m", "pytest", "tests/comfyui", "-rN", *said]


def test_comfyui_without_a_checkout_or_with_a_broken_one_says_what_to_do(machine, monkeypatch, capsys):
    def broken(*_):
        raise finding.NotFound("Install it with: that command")

    monkeypatch.setattr(testing.subprocess, "Popen", None)
    monkeypatch.setattr(finding, "find_checkout", lambda given: None)
    assert testing.run_comfyui_checks() == 2 and "COMFYUI_DIR" in capsys.readouterr().err
    for name in ("has_gpu", "find_python", "find_checkout"):
        monkeypatch.setattr(finding, "find_checkout", lambda given: Path("found"))
        monkeypatch.setattr(finding, name, broken)
        assert testing.run_comfyui_checks() == 2 and "that command" in capsys.readouterr().err
