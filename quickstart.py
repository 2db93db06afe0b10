"""Sets up an environment for this pack, uses it without ComfyUI, and tests it, also in a real ComfyUI.

    python quickstart.py demo [--image FILE] [--output DIR]
    python quickstart.py run WORKFLOW.json [--set NODE.INPUT=VALUE ...] [--image FILE] [--output DIR]
    python quickstart.py download [NAME] [--to DIR]
    python quickstart.py test [what pytest takes]
    python quickstart.py comfyui [--dir CHECKOUT] [--python FILE] [--browser FILE]

The first call makes `.venv` beside this file; a stamp in it tells later calls that it is finished, so that they start
at once, and an interrupted installation is done anew. PyTorch is not downloaded where the calling Python can import
version 2.4 or newer: its packages are then lent to `.venv`. That goes through a .pth file, because a virtual
environment made from another one would inherit only the base installation's packages.

Until `.venv` exists this needs the standard library only, and it parses on Pythons too old to run it, to say so.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import locale
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "quickstart.json"
DEMO = ROOT / "workflows" / "api" / "multi_round_edit.json"

MODELS = ("Ming-UniVision-16B-A3B", "MingTok-Vision")

TORCH = "torch==2.13.0"
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
CONSTRAINTS = "constraints.txt"
RESTARTED = "QUICKSTART_RESTARTED"  # set for the run inside .venv, to that folder
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 4)

# What PyTorch itself requires: one that is there may want other versions than the tested ones.
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

# Prints the version of an importable PyTorch, and the package folders that it (first) and its requirements come from.
TORCH_PROBE = """
import json, os, sys
import torch
folders = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages") and os.path.isdir(p)]
home = os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))
folders = [home, *(folder for folder in folders if folder != home)]
print(json.dumps({"version": torch.__version__, "folders": folders}))
"""


class SetupError(Exception):
    """Something the user has to put right; the message says how."""


def main(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    options = parse(argv)
    try:
        check_python()
        if options.command in (run_tests, run_comfyui):
            check_tests()
        if not (in_environment() and is_finished()):
            prepare_environment()
            if os.environ.get(RESTARTED) == str(VENV) and not in_environment():
                raise SetupError(f"The Python in {VENV} belongs to another one. Remove that folder and start again.")
            return run_again(argv)
        return options.command(options)
    except SetupError as error:
        print(f"\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


# --- The commands, which run inside .venv -------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quickstart.py", description="Ming-UniVision nodes without ComfyUI.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--image", metavar="FILE", type=existing_file, help="start from this picture")
    common.add_argument(
        "--output", metavar="DIR", type=Path, help="where results go (default: output/ beside this file)"
    )
    common.add_argument(
        "--set",
        metavar="NODE.INPUT=VALUE",
        dest="settings",
        action="append",
        default=[],
        help='change an input, for example 5.seed=7, or "5.features=[3,0]" for a link; may be given more than once',
    )
    demo = commands.add_parser("demo", parents=[common], help="ask about a picture and edit it over several rounds")
    demo.set_defaults(command=run_workflow, workflow=DEMO)
    run = commands.add_parser("run", parents=[common], help="run a workflow in the API format")
    run.add_argument("workflow", metavar="WORKFLOW.json", type=existing_file)
    run.set_defaults(command=run_workflow)
    download = commands.add_parser("download", help="fetch a published model, or go on fetching it, and check it")
    names = " or ".join(MODELS)
    download.add_argument("name", metavar="NAME", nargs="?", choices=MODELS, default=MODELS[0], help=names)
    download.add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        help="the folder that the model's own folder goes into (default: ComfyUI/models/ming when this pack lies in "
        "custom_nodes, else models/ beside this file)",
    )
    download.set_defaults(command=download_model)
    test = commands.add_parser("test", add_help=False, help="run the tests; further arguments go to pytest")
    test.set_defaults(command=run_tests)
    comfyui = commands.add_parser("comfyui", help="check the pack in a real ComfyUI server and a real browser")
    comfyui.add_argument("--dir", metavar="CHECKOUT", help="the ComfyUI to use (default: the one that is found)")
    comfyui.add_argument("--python", metavar="FILE", help="the Python that has ComfyUI's requirements")
    comfyui.add_argument("--browser", metavar="FILE", help="a Chromium, Chrome or Edge")
    comfyui.add_argument("--only", metavar="WORDS", help="only the checks that these fit, as pytest -k takes them")
    comfyui.add_argument("--keep", action="store_true", help="keep the temporary folders, with the server's log")
    comfyui.set_defaults(command=run_comfyui)
    if argv[:1] == ["test"]:
        return argparse.Namespace(command=run_tests, pytest_arguments=argv[1:])
    return parser.parse_args(argv)


def existing_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path


def run_workflow(options: argparse.Namespace) -> int:
    load_pack()
    cli = importlib.import_module("ming_univision.runner.cli")
    return cli.main(options.workflow, settings=options.settings, image=options.image, output=options.output)


def download_model(options: argparse.Namespace) -> int:
    load_pack()
    return importlib.import_module("ming_univision.runner.download").main(options.name, to=options.to)


def check_tests() -> None:
    """Raises SetupError in a copy without the tests, such as the registry's."""
    if not (ROOT / "tests").is_dir():
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        (address,) = re.findall(r'(?m)^Repository = "(.+)"', project)
        raise SetupError(f"This copy of the pack comes without its tests. They are in the repository: {address}")


def run_tests(options: argparse.Namespace) -> int:
    return run_pytest(options.pytest_arguments)


def run_comfyui(options: argparse.Namespace) -> int:
    """The same checks are a part of `test` where a ComfyUI is found; here they must run."""
    load_pack()
    finding = importlib.import_module("ming_univision.tests.comfyui.finding")
    try:
        checkout = finding.find_checkout(options.dir)
        if checkout is None:
            raise SetupError(finding.NO_CHECKOUT)
        found = {"comfyui": checkout, "comfyui-python": finding.find_python(checkout, options.python)}
        finding.has_gpu(found["comfyui-python"], checkout)  # says so if there is no PyTorch at all
        if options.browser:
            found["comfyui-browser"] = finding.find_browser(options.browser)
    except finding.NotFound as error:
        raise SetupError(str(error)) from error
    arguments = [f"--{name}={path}" for name, path in found.items()]  # one word each: pytest takes a path for a test
    arguments += ["--comfyui-keep"] * options.keep + ["-k", options.only] * bool(options.only)
    return run_pytest(["tests/comfyui", "-rN", *arguments])  # the suite prints a summary of its own


def run_pytest(arguments: list[str]) -> int:
    """Its exit status. It is let finish in every case, so that it stops what it has started."""
    with subprocess.Popen([sys.executable, "-m", "pytest", *arguments], cwd=str(ROOT)) as child:
        before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            return outcome(child)
        finally:
            signal.signal(signal.SIGTERM, before)


def load_pack() -> None:
    """Imports this folder as the package `ming_univision`, whatever the folder is called."""
    spec = importlib.util.spec_from_file_location(
        "ming_univision", str(ROOT / "__init__.py"), submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def run_again(argv: list[str]) -> int:
    """Runs this file with the environment's Python, in the place of this process where the system can do that."""
    command = [str(environment_python()), str(Path(__file__).resolve()), *argv]
    os.environ[RESTARTED] = str(VENV)
    os.environ["QUICKSTART_CALLER"] = sys.executable  # it may be the one that has ComfyUI's requirements
    sys.stdout.flush()
    if os.name != "nt":
        os.execv(command[0], command)
    with subprocess.Popen(command) as child:
        return outcome(child)


def outcome(child: subprocess.Popen) -> int:
    """Its exit status, when it has come to its end. Ctrl-C tells the child as well, and it stops by itself."""
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


# --- The environment ----------------------------------------------------------------------------------------------


def environment_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def in_environment() -> bool:
    return Path(sys.prefix).resolve() == VENV.resolve()


def is_finished() -> bool:
    """Whether `.venv` was installed to the end, from the requirement files as they are now."""
    stamp = read_stamp()
    return (
        stamp.get("finished") is True
        and stamp.get("requirements") == requirements_digest()
        and stamp.get("python") == python_version(environment_python())
        and lent_is_there(stamp)
    )


def lent_is_there(stamp: dict) -> bool:
    """Whether the package folders that the environment borrows are still there, with PyTorch in the first one."""
    folders = stamp.get("lent_folders", [])
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
    """Such as "3.11"; None when there is no such Python, or it does not start any more."""
    found = output_of([str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
    return found.strip() if found else None


def prepare_environment() -> None:
    """Finds or makes a finished `.venv`.

    One that this script began to make is made anew; one that somebody else made, or that is running this very script,
    is installed into and never removed.
    """
    if is_finished():
        return
    stamp = read_stamp()
    if in_environment() or (environment_python().exists() and not stamp.get("made_here")):
        print(f"Using the environment {VENV}", flush=True)
        if not lent_is_there(stamp):
            stamp = {**stamp, "lent_folders": []}  # PyTorch is installed instead
    else:
        lent = find_torch(sys.executable)
        stamp = {"made_here": True, "lent_folders": lent["folders"] if lent else []}
        make_environment(stamp)
    python = environment_python()
    version = python_version(python)
    if version is None or tuple(map(int, version.split("."))) < OLDEST_PYTHON:
        raise SetupError(f"The Python in {VENV} is broken or too old. Remove that folder and start again.")
    try:
        write_stamp({**stamp, "finished": False})
    except OSError as error:
        raise SetupError(f"The folder {VENV} cannot be written to: {error}. Remove it and start again.") from error
    ensure_pip(str(python))
    torch = find_torch(str(python))
    announce(torch)
    install(python, torch)
    write_stamp({**stamp, "finished": True, "requirements": requirements_digest(), "python": version})
    print(f"The environment {VENV} is ready.\n", flush=True)


def make_environment(stamp: dict) -> None:
    """Makes `.venv` from the calling Python, with the lent folders behind its own packages on the import path."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(f"This Python has no module {module}, which making an environment takes.\n{venv_remedy()}")
    print(f"Making the environment {VENV} for Python {platform.python_version()} ...", flush=True)
    try:
        clear_environment()
        VENV.mkdir()
        write_stamp(stamp)  # from here on the folder is known as ours, however this ends
    except OSError as error:
        raise SetupError(f"The folder {VENV} cannot be made anew: {error}") from error
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(VENV)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if made.returncode != 0:
        said = made.stdout.decode("utf-8", "replace").strip()
        raise SetupError(f"The environment could not be made:\n{said}\n\n{venv_remedy()}")
    lend(stamp["lent_folders"])


def clear_environment() -> None:
    if read_stamp().get("made_here"):
        old = VENV.with_name(f"{VENV.name}.quickstart-old")  # removed half-way it would look like somebody else's
        shutil.rmtree(str(old), ignore_errors=True)
        VENV.rename(old)
        shutil.rmtree(str(old))
    elif VENV.exists() and not os.listdir(str(VENV)):
        VENV.rmdir()
    elif VENV.exists():
        raise SetupError(f"{VENV} is there, but is no environment. Move or remove it and start again.")


def lend(folders: list[str]) -> None:
    """Puts package folders of the calling Python on the environment's import path, behind its own."""
    if not folders:
        return
    encoding = "utf-8" if sys.version_info >= (3, 13) else locale.getpreferredencoding(False)  # as site reads it
    try:
        lines = ("\n".join(folders) + "\n").encode(encoding)
    except UnicodeEncodeError:
        return  # site could not read them either: PyTorch is installed instead
    python = str(environment_python())
    # A new environment may have an old setuptools of its own, which would hide a lent one that PyTorch asks for.
    output_of([python, "-m", "pip", "uninstall", "--yes", "setuptools"])
    found = output_of([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    if not found:
        raise SetupError(f"{python} does not run. Remove the folder {VENV} and start again.")
    Path(found.strip(), "lent_packages.pth").write_bytes(lines)


def ensure_pip(python: str) -> None:
    """Some tools make environments without it."""
    ways = [python, "-m", "pip", "--version"], [python, "-m", "ensurepip", "--upgrade"]
    if all(output_of(way) is None for way in ways):
        raise SetupError(f"The environment {VENV} has no pip. Remove that folder and start again.")


def find_torch(python: str) -> dict | None:
    """{"version", "folders"} of a PyTorch that is new enough and that `python` can import."""
    found = output_of([python, "-c", TORCH_PROBE])
    if not found:
        return None
    torch = json.loads(found.splitlines()[-1])
    version = re.match(r"(\d+)\.(\d+)", torch["version"])
    return torch if version and tuple(map(int, version.groups())) >= OLDEST_TORCH else None


def announce(torch: dict | None) -> None:
    """Says what is about to be downloaded, and how much of it."""
    print("About to download and install into it, once:")
    if torch:
        print(f"  PyTorch: nothing, version {torch['version']} is there already, in {torch['folders'][0]}")
    else:
        print(f"  PyTorch {TORCH.split('==')[1]}: {torch_size()}")
    print("  what else the pack and its tests need, at most: about 50 MB, 200 MB on disk", flush=True)


def torch_size() -> str:
    """The download's size in words. Only on Linux does it depend on the package index: with or without CUDA."""
    if sys.platform == "win32":
        return "about 125 MB, 600 MB on disk"
    if sys.platform == "darwin":
        return "about 115 MB, 500 MB on disk"
    # Not asked of pip: its --dry-run downloads all of it to tell.
    return (
        "about 2.5 GB with its CUDA libraries, 6 GB on disk;\n"
        "    from an index of CPU builds about 210 MB, 1 GB on disk.\n"
        "    To do with less: press Ctrl-C, install a CPU build of PyTorch 2.4 or newer for the Python\n"
        "    that you start this with, and start again; it is used as it is."
    )


def pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]


def install(python: Path, torch: dict | None) -> None:
    """Installs what is missing. PyTorch comes first and alone: a looser request could bring a much larger build."""
    if torch is None and run_pip([*pip(python), TORCH]) != 0:
        raise SetupError(
            f"PyTorch could not be installed; pip says why above. This is Python {platform.python_version()} on\n"
            f"{platform.system()} {platform.machine()}; {TORCH} exists for Python 3.10 to 3.15 on Linux, Windows and\n"
            "Macs with Apple silicon. Any PyTorch from 2.4 on will do: install one for the Python that you start this\n"
            "with, and start again. If the network failed, just start again."
        )
    wanted = [word for name in REQUIREMENTS for word in ("-r", str(ROOT / name))]
    if run_pip([*pip(python), *wanted, "-c", str(constraints_beside(torch))]) == 0:
        return
    # Without a network, packages that are there in other versions may still do.
    if output_of([*pip(python), "--no-index", *wanted]) is None:
        raise SetupError("The packages could not be installed; pip says why above. Mend that and start again.")
    print("The tested versions cannot be had; the versions that are there already are used instead.", flush=True)


def constraints_beside(torch: dict | None) -> Path:
    """The tested versions; where a PyTorch is there already, without those that it decides itself, and with its own:
    else pip might exchange it for the newest."""
    if torch is None:
        return ROOT / CONSTRAINTS
    lines = (ROOT / CONSTRAINTS).read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.split("==")[0].lower() not in TORCH_REQUIRES]
    path = VENV / CONSTRAINTS
    path.write_text("\n".join([*kept, f"torch==={torch['version']}"]) + "\n", encoding="utf-8")
    return path


def run_pip(command: list[str]) -> int:
    # A `user = true` in somebody's pip settings would make every installation into an environment fail.
    return subprocess.call(command, cwd=str(ROOT), env={**os.environ, "PIP_USER": "0"})


def output_of(command: list[str]) -> str | None:
    """What a command prints; None when it cannot be started or fails."""
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


# --- What a user can do about a Python that will not do -----------------------------------------------------------


def check_python() -> None:
    if sys.version_info[:2] < OLDEST_PYTHON:
        call = "py -3.12" if os.name == "nt" else "python3.12"
        raise SetupError(
            f"This is Python {platform.python_version()}; version 3.10 or newer is needed.\n{python_remedy()}\n"
            f"Then start this with it, for example: {call} quickstart.py demo"
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
            "(The embedded Python that comes with portable programs has no such module.)\n"
            "Then start this with it, for example: py -3.12 quickstart.py demo"
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
