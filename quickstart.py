"""Sets up an environment for this pack and runs commands in it, without ComfyUI.

    python quickstart.py demo [--image FILE] [--output DIR]
    python quickstart.py run WORKFLOW.json [--set NODE.INPUT=VALUE ...] [--image FILE] [--output DIR]
    python quickstart.py map WORKFLOW.json (--table FILE | --images FOLDER) --out DIR [--set NODE.INPUT=VALUE ...]
    python quickstart.py download [NAME] [--to DIR]
    python quickstart.py quantize SOURCE TARGET [--format int4]
    python quickstart.py doctor [--quick]
    python quickstart.py test [pytest's arguments]
    python quickstart.py comfyui [--dir CHECKOUT] [--python FILE] [--browser FILE]

The commands are in runner/cli.py. This file finds or makes the environment that they run in, and hands over.

The first call makes `.venv` beside this file. A stamp in it tells later calls that it is finished, so that they start
at once, and that an interrupted installation has to be made again. If the calling Python can import PyTorch 2.4 or
newer, PyTorch is not downloaded: `.venv` borrows its packages. That takes a .pth file, because a virtual environment
made from another one would inherit only the base installation's packages.

This file needs the standard library only, and it parses on Pythons that are too old to run it, to say so.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "quickstart.json"
PACKAGE = "ming_univision"  # what this folder is imported as, whatever it is called

TORCH = "torch==2.13.0"
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
CONSTRAINTS = "constraints.txt"
RESTARTED = "QUICKSTART_RESTARTED"  # set for the run inside .venv, to that folder
CALLER = "QUICKSTART_CALLER"  # set for the run inside .venv, to the Python that this was started with
OLDEST_PYTHON = (3, 10)
EXTRAS = {"ray": ("ray[data]==2.60.0", "about 150 MB, 500 MB on disk")}  # installed when a command needs them
OLDEST_TORCH = (2, 4)

# What PyTorch itself requires. A PyTorch that is installed already may need other versions than the tested ones.
TORCH_REQUIRES = (
    "filelock",
    "fsspec",
    "jinja2",
    "markupsafe",
    "mpmath",
    "networkx",
    "setuptools",
    "sympy",
    "typing_extensions",
)

# Prints the version of an importable PyTorch, and the package folders of it (first) and of its requirements.
TORCH_PROBE = """
import json, os, sys
import torch
folders = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages") and os.path.isdir(p)]
home = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
folders = [home, *(folder for folder in folders if folder != home)]
print(json.dumps({"version": torch.__version__, "folders": folders}))
"""


class SetupError(Exception):
    """A problem that the user has to solve; the message says how."""


def main(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        check_python()
        options = load_command_line().parse(argv)
        command = options.command
        if command.needs_tests:
            check_tests()
        if (in_environment() and is_finished()) or (command.runs_in_comfyui and has_requirements()):
            install_extras(command.extras(options))
            return hand_over(argv)
        prepare_environment()
        if os.environ.get(RESTARTED) == str(VENV) and not in_environment():
            raise SetupError(f"The Python in {VENV} belongs to another environment. Remove that folder and try again.")
        return run_again(argv)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


# --- Handing over -------------------------------------------------------------------------------------------------


def load_command_line() -> types.ModuleType:
    """Imports runner/cli.py by itself, to check a command line with it. It needs the standard library only."""
    spec = importlib.util.spec_from_file_location("quickstart_cli", str(ROOT / "runner" / "cli.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart_cli"] = module
    spec.loader.exec_module(module)
    return module


def load_pack() -> None:
    """Makes this folder the package PACKAGE, whose modules can then be imported.

    The package's own __init__ is for ComfyUI and does not run: it would import every node, and PyTorch.
    """
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(ROOT)]
    sys.modules[PACKAGE] = package


def hand_over(argv: list[str]) -> int:
    """Runs the command in this process and returns its exit code."""
    load_pack()
    return importlib.import_module(f"{PACKAGE}.runner.cli").main(argv)


def run_again(argv: list[str]) -> int:
    """Runs this file with the environment's Python, replacing this process if the system can do that."""
    command = [str(environment_python()), str(Path(__file__).resolve()), *argv]
    os.environ[RESTARTED] = str(VENV)
    os.environ[CALLER] = sys.executable  # it may be the Python that has ComfyUI's requirements
    sys.stdout.flush()
    if os.name != "nt":
        os.execv(command[0], command)
    with subprocess.Popen(command) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:  # Ctrl-C reaches the child as well, which ends by itself
                continue


def check_tests() -> None:
    """Raises SetupError in a copy without the tests, such as the one from the registry."""
    if not (ROOT / "tests").is_dir():
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        (address,) = re.findall(r'(?m)^Repository = "(.+)"', project)
        raise SetupError(f"This copy of the pack does not include the tests. They are in the repository: {address}")


def has_requirements() -> bool:
    """Whether the calling Python has the packages of requirements.txt, as ComfyUI's own Python has."""
    from importlib import metadata  # newer than the oldest Python that this file has to parse on

    lines = (ROOT / REQUIREMENTS[0]).read_text(encoding="utf-8").splitlines()
    try:
        versions = {name: metadata.version(name) for name in lines if name and not name.startswith("#")}
    except metadata.PackageNotFoundError:
        return False
    return is_new_enough(versions["torch"])


# --- The environment ----------------------------------------------------------------------------------------------


def environment_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def in_environment() -> bool:
    return Path(sys.prefix).resolve() == VENV.resolve()


def is_finished() -> bool:
    """Whether the installation of `.venv` was completed, from the requirement files as they are now."""
    stamp = read_stamp()
    return (
        stamp.get("finished") is True
        and stamp.get("requirements") == requirements_digest()
        and stamp.get("python") == python_version(environment_python())
        and borrowed_exist(stamp)
    )


def borrowed_exist(stamp: dict) -> bool:
    """Whether the package folders that the environment borrows still exist, with PyTorch in the first one."""
    folders = stamp.get("borrowed_folders", [])
    return all(map(os.path.isdir, folders)) and all(os.path.isdir(os.path.join(f, "torch")) for f in folders[:1])


def read_stamp() -> dict:
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp: dict) -> None:
    STAMP.write_text(json.dumps(stamp, indent=1), encoding="utf-8")


def requirements_digest() -> str:
    digest = hashlib.sha256(TORCH.encode())
    for name in (*REQUIREMENTS, CONSTRAINTS):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def python_version(python: Path) -> str | None:
    """Such as "3.11"; None if there is no such Python, or if it does not start."""
    found = output_of([str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    return found.strip() if found else None


def prepare_environment() -> None:
    """Finds or makes a finished `.venv`.

    An unfinished one that this script made is made again. One that somebody else made, or that is running this script,
    is installed into and never removed.
    """
    if is_finished():
        return
    stamp = read_stamp()
    if in_environment() or (environment_python().exists() and not stamp.get("made_here")):
        print(f"Using the environment {VENV}", flush=True)
        if not borrowed_exist(stamp):
            stamp = {**stamp, "borrowed_folders": []}  # PyTorch is installed instead
    else:
        found = find_torch(sys.executable)
        stamp = {"made_here": True, "borrowed_folders": found["folders"] if found else []}
        make_environment(stamp)
    python = environment_python()
    version = python_version(python)
    if version is None or tuple(map(int, version.split("."))) < OLDEST_PYTHON:
        raise SetupError(f"The Python in {VENV} is broken or too old. Remove that folder and try again.")
    try:
        write_stamp({**stamp, "finished": False})
    except OSError as error:
        raise SetupError(f"The folder {VENV} cannot be written to: {error}. Remove it and try again.") from error
    ensure_pip(str(python))
    torch = find_torch(str(python))
    announce(torch)
    install(python, torch)
    write_stamp({**stamp, "finished": True, "requirements": requirements_digest(), "python": version})
    print(f"The environment {VENV} is ready.\n", flush=True)


def make_environment(stamp: dict) -> None:
    """Makes `.venv` from the calling Python, with the borrowed folders after its own packages on the import path."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"This Python has no module {module}, which is needed to make an environment.\n{venv_remedy()}"
            )
    print(f"Making the environment {VENV} for Python {platform.python_version()} ...", flush=True)
    try:
        clear_environment()
        VENV.mkdir()
        write_stamp(stamp)  # from here on the folder is known to be made by this script
    except OSError as error:
        raise SetupError(f"The folder {VENV} cannot be made: {error}") from error
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(VENV)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if made.returncode != 0:
        output = made.stdout.decode("utf-8", "replace").strip()
        raise SetupError(f"The environment could not be made:\n{output}\n\n{venv_remedy()}")
    borrow(stamp["borrowed_folders"])


def clear_environment() -> None:
    if read_stamp().get("made_here"):
        old = VENV.with_name(f"{VENV.name}.quickstart-old")  # half removed, it would look like somebody else's
        shutil.rmtree(str(old), ignore_errors=True)
        VENV.rename(old)
        shutil.rmtree(str(old))
    elif VENV.exists() and not os.listdir(str(VENV)):
        VENV.rmdir()
    elif VENV.exists():
        raise SetupError(f"{VENV} exists but is not an environment. Move or remove it and try again.")


def borrow(folders: list[str]) -> None:
    """Adds package folders of the calling Python to the environment's import path, after its own."""
    if not folders:
        return
    encoding = "utf-8" if sys.version_info >= (3, 13) else locale.getpreferredencoding(False)  # as site reads it
    try:
        lines = ("\n".join(folders) + "\n").encode(encoding)
    except UnicodeEncodeError:
        return  # site could not read them either, so PyTorch is installed instead
    python = str(environment_python())
    # A new environment may have an old setuptools, which would hide the borrowed one that PyTorch requires.
    output_of([python, "-m", "pip", "uninstall", "--yes", "setuptools"])
    found = output_of([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    if not found:
        raise SetupError(f"{python} does not run. Remove the folder {VENV} and try again.")
    Path(found.strip(), "borrowed_packages.pth").write_bytes(lines)


def ensure_pip(python: str) -> None:
    """Installs pip if it is missing: some tools make environments without it."""
    commands = [python, "-m", "pip", "--version"], [python, "-m", "ensurepip", "--upgrade"]
    if all(output_of(command) is None for command in commands):
        raise SetupError(f"The environment {VENV} has no pip. Remove that folder and try again.")


def find_torch(python: str) -> dict | None:
    """{"version", "folders"} of a PyTorch that is new enough and that `python` can import, or None."""
    found = output_of([python, "-c", TORCH_PROBE])
    if not found:
        return None
    torch = json.loads(found.splitlines()[-1])
    return torch if is_new_enough(torch["version"]) else None


def is_new_enough(torch_version: str) -> bool:
    version = re.match(r"(\d+)\.(\d+)", torch_version)
    return version is not None and tuple(map(int, version.groups())) >= OLDEST_TORCH


def announce(torch: dict | None) -> None:
    """Says how much is about to be downloaded."""
    print("About to download and install, once:")
    if torch:
        print(f"  PyTorch: nothing, version {torch['version']} is installed already, in {torch['folders'][0]}")
    else:
        print(f"  PyTorch {TORCH.split('==')[1]}: {torch_size()}")
    print("  other packages of the pack and its tests: at most about 60 MB, 250 MB on disk", flush=True)


def torch_size() -> str:
    """The size of the download in words. On Linux it depends on the package index: with or without CUDA."""
    if sys.platform == "win32":
        return "about 125 MB, 600 MB on disk"
    if sys.platform == "darwin":
        return "about 115 MB, 500 MB on disk"
    # pip cannot tell the size: its --dry-run downloads everything first.
    return (
        "about 2.5 GB with its CUDA libraries, 6 GB on disk;\n"
        "    about 210 MB and 1 GB on disk from an index of CPU builds.\n"
        "    To download less, press Ctrl-C, install a CPU build of PyTorch 2.4 or newer for the Python\n"
        "    that you start this with, and try again: it will be used."
    )


def install_extras(names: Sequence[str]) -> None:
    """Installs what a command needs beyond the requirements, into the environment that this runs in."""
    python = Path(sys.executable)
    for name in names:
        if importlib.util.find_spec(name) is not None:
            continue
        requirement, size = EXTRAS[name]
        print(f"About to download and install, once: {requirement}, {size}", flush=True)
        torch = find_torch(sys.executable)
        if run_pip([*pip(python), requirement, "-c", str(constraints_beside(torch))]) != 0:
            raise SetupError(
                f"{requirement} could not be installed; pip says why above. Without it, leave out --{name}."
            )


def pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]


def install(python: Path, torch: dict | None) -> None:
    """Installs what is missing. PyTorch is installed first and alone: a looser request could bring a larger build."""
    if torch is None and run_pip([*pip(python), TORCH]) != 0:
        raise SetupError(
            f"PyTorch could not be installed; pip says why above. This is Python {platform.python_version()} on\n"
            f"{platform.system()} {platform.machine()}; {TORCH} exists for Python 3.10 to 3.15 on Linux, Windows and\n"
            "Macs with Apple silicon. PyTorch 2.4 or newer works too: install one for the Python that you start this\n"
            "with, and try again. If the network failed, check your connection and try again."
        )
    wanted = [word for name in REQUIREMENTS for word in ("-r", str(ROOT / name))]
    if run_pip([*pip(python), *wanted, "-c", str(constraints_beside(torch))]) == 0:
        return
    # Without a network, other versions that are installed already may do.
    if output_of([*pip(python), "--no-index", *wanted]) is None:
        raise SetupError("The packages could not be installed; pip says why above. Fix that and try again.")
    print("The tested versions are not available; the installed versions are used instead.", flush=True)


def constraints_beside(torch: dict | None) -> Path:
    """The file of tested versions.

    If there is a PyTorch already, the file pins its version, or pip might replace it with the newest one, and leaves
    out the packages that it requires.
    """
    if torch is None:
        return ROOT / CONSTRAINTS
    lines = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split("==")[0].lower() not in TORCH_REQUIRES]
    path = VENV / CONSTRAINTS
    path.write_text("\n".join([*kept, f"torch==={torch['version']}"]) + "\n", encoding="utf-8")
    return path


def run_pip(command: list[str]) -> int:
    # With `user = true` in somebody's pip settings, every installation into an environment would fail.
    return subprocess.call(command, cwd=str(ROOT), env={**os.environ, "PIP_USER": "0"})


def output_of(command: list[str]) -> str | None:
    """What a command prints; None if it cannot be started or fails."""
    try:
        done = subprocess.run(
            command,
            cwd=str(ROOT),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8", "replace")


# --- What to do about an unsuitable Python ------------------------------------------------------------------------


def check_python() -> None:
    if sys.version_info[:2] < OLDEST_PYTHON:
        call = "py -3.12" if os.name == "nt" else "python3.12"
        raise SetupError(
            f"This is Python {platform.python_version()}; 3.10 or newer is needed.\n{python_remedy()}\n"
            f"Then use it to start this, for example: {call} quickstart.py demo"
        )


def python_remedy() -> str:
    remedies = {
        "windows": "Install one with: winget install Python.Python.3.12",
        "macos": "Install one with: brew install python@3.12 (or the installer from the Python website)",
        "debian": "Install one with: sudo apt install python3 python3-venv (on an old release: a newer release)",
        "fedora": "Install one with: sudo dnf install python3.12",
        "arch": "Install one with: sudo pacman -S python",
    }
    return remedies.get(system_family(), "Install one with your system's package manager.")


def venv_remedy() -> str:
    name = "python{}.{}".format(*sys.version_info[:2])
    remedies = {
        "windows": (
            "Install the full Python, for example with: winget install Python.Python.3.12\n"
            "(The embedded Python of portable programs lacks this module.)\n"
            "Then use it to start this, for example: py -3.12 quickstart.py demo"
        ),
        "macos": "Install a complete Python with: brew install python@3.12 (or the installer from the Python website)",
        "debian": f"Install it with: sudo apt install {name}-venv",
        "fedora": f"Install it with: sudo dnf install {name} {name}-pip",
        "arch": "Install it with: sudo pacman -S python",
    }
    return remedies.get(system_family(), f"Install venv and pip for {name} with your system's package manager.")


def system_family() -> str:
    """ "windows", "macos", "debian", "fedora", "arch", or "" for another system."""
    if os.name == "nt":
        return "windows"
    if sys.platform == "darwin":
        return "macos"
    try:
        release = Path("/etc/os-release").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
    names = set(re.findall(r"[\w.-]+", " ".join(re.findall(r"(?m)^ID(?:_LIKE)?=(.*)$", release))))
    families = {"debian": {"debian", "ubuntu"}, "fedora": {"fedora", "rhel", "centos"}, "arch": {"arch"}}
    return next((family for family, members in families.items() if names & members), "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
