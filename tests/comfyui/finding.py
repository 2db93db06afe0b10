"""Finds what the end-to-end checks need on this machine: a ComfyUI checkout, its Python, a browser.

It needs the standard library only. It installs nothing, and says what to do about what is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent.parent

# Where comfy-cli puts ComfyUI unless it is told otherwise: on Linux, and on Windows and macOS.
COMFY_CLI = (Path("comfy", "ComfyUI"), Path("Documents", "comfy", "ComfyUI"))

NO_CHECKOUT = (
    "no ComfyUI checkout was found: name one with `python quickstart.py comfyui --dir CHECKOUT` or in the environment "
    "variable COMFYUI_DIR (a clone of ComfyUI with its requirements installed; comfy-cli makes one: comfy install)"
)
NO_BROWSER = (
    "no Chromium, Chrome or Edge was found: install one (sudo apt install chromium, brew install --cask chromium, "
    "winget install Google.Chrome), or name it with --browser PATH or in CHROME_PATH"
)

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
)
BROWSER_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
    "%ProgramFiles%/Google/Chrome/Application/chrome.exe",
    "%ProgramFiles(x86)%/Google/Chrome/Application/chrome.exe",
    "%LocalAppData%/Google/Chrome/Application/chrome.exe",
    "%ProgramFiles(x86)%/Microsoft/Edge/Application/msedge.exe",
    "%ProgramFiles%/Microsoft/Edge/Application/msedge.exe",
)


class NotFound(Exception):
    """Something that was named does not exist. The message says what was expected."""


def find_checkout(given: str | None = None) -> Path | None:
    """The ComfyUI checkout that is given, of COMFYUI_DIR, around this pack, or of comfy-cli, in this order; or None."""
    named = given or os.environ.get("COMFYUI_DIR")
    if named:
        folder = Path(named).expanduser().resolve()
        if not is_checkout(folder):
            raise NotFound(f"{folder} is not a ComfyUI checkout: it has no main.py beside a folder comfy")
        return folder
    likely = [PACK.parent.parent] if PACK.parent.name == "custom_nodes" else []
    return first([*likely, *(Path.home() / place for place in COMFY_CLI)], is_checkout)


def add_options(words: argparse.ArgumentParser) -> None:
    """The options of a script for the ComfyUI that it is to use; `found` takes them."""
    words.add_argument("--comfyui", metavar="DIR", help="its checkout (default: the one that is found)")
    words.add_argument("--comfyui-python", metavar="FILE", help="the Python that has its requirements")


def found(options: argparse.Namespace) -> tuple[Path, Path]:
    """The checkout and the Python that the options name. Raises NotFound."""
    checkout = find_checkout(options.comfyui)
    if checkout is None:
        raise NotFound(NO_CHECKOUT)
    return checkout, find_python(checkout, options.comfyui_python)


def is_checkout(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def find_python(checkout: Path, given: str | None = None) -> Path:
    """The server's Python: one that is given, of COMFYUI_PYTHON, of the checkout, or the calling one, in this order."""
    named = given or os.environ.get("COMFYUI_PYTHON")
    if named:
        return program(named, "--python")
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    beside = [folder / name / inside for folder in (checkout, checkout.parent) for name in ("venv", ".venv")]
    portable = [checkout.parent / "python_embeded" / "python.exe"]  # ComfyUI's own spelling
    # quickstart.py starts again in this pack's environment, and this variable has the Python that started it first.
    calling = Path(os.environ.get("QUICKSTART_CALLER") or sys.executable)
    return first([*beside, *portable], Path.is_file) or calling


def find_browser(given: str | None = None) -> Path | None:
    """The browser that is given, of CHROME_PATH, on the PATH, or in a usual place, in this order; or None."""
    named = given or os.environ.get("CHROME_PATH")
    if named:
        return program(named, "--browser")
    on_path = [Path(found) for found in map(shutil.which, BROWSERS) if found]
    return first([*on_path, *(Path(os.path.expandvars(place)) for place in BROWSER_PLACES)], Path.is_file)


def program(named: str, option: str) -> Path:
    found = shutil.which(os.path.expanduser(named))
    if not found:
        raise NotFound(f"{option} {named}: there is no such program")
    return Path(found).absolute()  # not resolved: the Python of an environment is a link, and only works as one


def first(paths: Iterable[Path], fits: Callable[[Path], bool]) -> Path | None:
    return next((path for path in paths if fits(path)), None)


def has_gpu(python: Path, checkout: Path) -> bool:
    """Whether that Python's PyTorch can compute on a GPU. Raises NotFound where there is no PyTorch."""
    code = (
        "import torch; xpu = getattr(torch, 'xpu', None); mps = torch.backends.mps.is_available(); "
        "print(torch.cuda.is_available() or mps or bool(xpu and xpu.is_available()))"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise NotFound(f"{python} cannot import PyTorch ({said}). {remedy(python, checkout)}")
    return done.stdout.split()[-1] == "True"


def remedy(python: Path, checkout: Path) -> str:
    return (
        f"Install ComfyUI's requirements with: {python} -m pip install -r {checkout / 'requirements.txt'}\n"
        "or name a Python that has them, with --python or in COMFYUI_PYTHON."
    )
