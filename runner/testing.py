"""Runs the test suite, and the part of it that checks the pack in a real ComfyUI."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_tests(arguments: Sequence[str] = ()) -> int:
    """Runs the whole suite and prints what was left out and why. `arguments` are passed to pytest."""
    return run_pytest(["-rs", *arguments])


def run_comfyui_checks(
    *,
    checkout: str | None = None,
    python: str | None = None,
    browser: str | None = None,
    only: str | None = None,
    keep: bool = False,
) -> int:
    """Checks the pack in a real ComfyUI server and browser, and returns the exit code of the process.

    `run_tests` does the same if it finds a ComfyUI. Here it is an error if there is none.
    """
    from ..tests.comfyui import finding  # a published pack comes without its tests

    try:
        folder = finding.find_checkout(checkout)
        if folder is None:
            raise finding.NotFound(finding.NO_CHECKOUT)
        interpreter = finding.find_python(folder, python)
        finding.has_gpu(interpreter, folder)  # raises NotFound without PyTorch
        found = {"comfyui": folder, "comfyui-python": interpreter}
        if browser:
            found["comfyui-browser"] = finding.find_browser(browser)
    except finding.NotFound as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    arguments = [f"--{name}={path}" for name, path in found.items()]  # one word each: pytest would run a lone path
    if keep:
        arguments.append("--comfyui-keep")
    if only:
        arguments += ["-k", only]
    return run_pytest(["tests/comfyui", "-rN", *arguments])  # these checks print a summary of their own


def run_pytest(arguments: Sequence[str]) -> int:
    """Runs pytest and returns its exit code. It is never killed, so that it stops the servers that it started."""
    with subprocess.Popen([sys.executable, "-m", "pytest", *arguments], cwd=ROOT) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            while True:
                try:
                    return child.wait()
                except KeyboardInterrupt:  # Ctrl-C reaches pytest as well
                    continue
        finally:
            signal.signal(signal.SIGTERM, before)
