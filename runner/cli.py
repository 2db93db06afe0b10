"""The command line of quickstart.py: a line of COMMANDS for each command.

quickstart.py also loads this file by itself, with any Python, to check a command line before it installs anything. So
only the standard library is imported at the top, and each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "workflows" / "api" / "multi_round_edit.json"
MODELS = ("Ming-UniVision-16B-A3B", "MingTok-Vision")  # that `download` knows; the tests compare them with nodes/
FORMATS = ("int8", "int4")  # that `quantize` knows; the tests compare them with ming_core/


@dataclass(frozen=True)
class Command:
    """A command. `add_arguments` declares its arguments, `run` runs it and returns the exit code of the process."""

    name: str
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    extras: Callable[[Namespace], Sequence[str]] = lambda options: ()  # of EXTRAS in quickstart.py
    needs_tests: bool = False  # a published pack comes without them
    runs_in_comfyui: bool = False  # any Python with requirements.txt will do, and no environment is made for it


def parse(argv: Sequence[str]) -> Namespace:
    """The options of a command line, `options.command` among them. Exits with code 2 for a bad command line."""
    parser = ArgumentParser(
        prog="quickstart.py", description="Runs, tests and prepares the Ming-UniVision nodes without ComfyUI."
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            description=_as_sentence(command.help),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(command=command)
        command.add_arguments(subparser)
    if argv[:1] == ["test"] and argv[1:] not in (["-h"], ["--help"]):  # argparse would claim some of pytest's options
        (command,) = (command for command in COMMANDS if command.name == "test")
        return Namespace(command=command, pytest_arguments=list(argv[1:]))
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Runs a command line and returns the exit code of the process."""
    options = parse(argv)
    return options.command.run(options)


# --- Arguments ----------------------------------------------------------------------------------------------------


def _demo_arguments(parser: ArgumentParser) -> None:
    parser.set_defaults(workflow=DEMO)
    _workflow_arguments(parser)


def _run_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("workflow", metavar="WORKFLOW.json", type=_existing_file)
    _workflow_arguments(parser)


def _workflow_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--image", metavar="FILE", type=_existing_file, help="start from this picture")
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="the folder for results (default: output/ beside quickstart.py)"
    )
    _settings_argument(parser)


def _settings_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        metavar="NODE.INPUT=VALUE",
        dest="settings",
        action="append",
        default=[],
        help='change an input, for example 5.seed=7, or "5.features=[3,0]" for a link; can be given more than once',
    )


def _map_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("workflow", metavar="WORKFLOW.json", type=_existing_file)
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument(
        "--table",
        metavar="FILE",
        type=_existing_file,
        help="a row for each run: CSV, tab-separated, JSON lines or Parquet, with columns NODE.INPUT, image and id",
    )
    rows.add_argument("--images", metavar="FOLDER", type=_existing_folder, help="a run for each picture in a folder")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder for results, or an fsspec URL")
    _settings_argument(parser)
    parser.add_argument(
        "--batch", metavar="N", type=_positive, default=1, help="draw N rows in one pass (default: %(default)s)"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help="spread the rows over all GPUs with Ray, of this machine or of the cluster at ADDRESS",
    )
    parser.add_argument(
        "--workers", metavar="N", type=_positive, help="with --ray, the number of processes (default: one for each GPU)"
    )
    parser.epilog = (
        "Every row gets a folder in DIR/rows, and DIR/results.jsonl has a line for each. Run it again to go on with\n"
        "the rows that are not done: those that failed, were interrupted, or were changed since. Relative paths in a\n"
        "table begin in its folder. An empty cell leaves what the workflow has. A column that begins with # is a\n"
        "remark."
    )


def _download_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", choices=MODELS, default=MODELS[0], help=" or ".join(MODELS))
    parser.add_argument(
        "--to",
        metavar="DIR",
        type=Path,
        help="the folder that the model's own folder is put in (default: ComfyUI/models/ming if this pack is in "
        "custom_nodes, otherwise models/ beside quickstart.py)",
    )
    parser.epilog = "Run it again to resume an interrupted download. HF_ENDPOINT in the environment names a mirror."


def _quantize_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=_existing_folder, help="the folder of a Ming-UniVision model")
    parser.add_argument("target", metavar="TARGET", type=Path, help="the folder to make; it must not exist yet")
    parser.add_argument("--format", choices=FORMATS, default="int4", help="default: %(default)s")
    parser.epilog = (
        "The new folder loads faster and into less memory. Making it takes as much memory as the quantized model,\n"
        "and about 3 GB more. ComfyUI's own Python can run this; in ComfyUI portable for Windows, from this folder:\n\n"
        r"  ..\..\..\python_embeded\python.exe quickstart.py quantize SOURCE TARGET"
    )


def _doctor_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="narrow layers: results are checked, times mean nothing")
    parser.epilog = (
        "Paste what it prints into an issue. The exit code is 1 when something is wrong. ComfyUI's own Python can run\n"
        "this, from this folder."
    )


def _test_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pytest_arguments", metavar="ARGUMENT", nargs="*", help="passed to pytest, such as -k words")


def _comfyui_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--dir", metavar="CHECKOUT", help="the ComfyUI to use (default: the one that is found)")
    parser.add_argument("--python", metavar="FILE", help="the Python that has ComfyUI's requirements")
    parser.add_argument("--browser", metavar="FILE", help="a Chromium, Chrome or Edge")
    parser.add_argument("--only", metavar="WORDS", help="only the checks that match, as pytest's -k")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folders, with the server's log")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _existing_file(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path


def _existing_folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path}")
    return path


def _as_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


# --- What the commands run ----------------------------------------------------------------------------------------


def _run_workflow(options: Namespace) -> int:
    from . import terminal

    return terminal.main(options.workflow, settings=options.settings, image=options.image, output=options.output)


def _map(options: Namespace) -> int:
    from .table import command

    return command.main(
        options.workflow,
        table=options.table,
        images=options.images,
        out=options.out,
        settings=options.settings,
        ray=options.ray,
        workers=options.workers,
        batch=options.batch,
    )


def _map_extras(options: Namespace) -> Sequence[str]:
    return () if options.ray is None else ("ray",)


def _download(options: Namespace) -> int:
    from . import download

    return download.main(options.name, to=options.to)


def _quantize(options: Namespace) -> int:
    from . import quantize

    return quantize.main(options.source, options.target, options.format)


def _doctor(options: Namespace) -> int:
    from . import doctor

    return doctor.main(quick=options.quick)


def _test(options: Namespace) -> int:
    from . import testing

    return testing.run_tests(options.pytest_arguments)


def _comfyui(options: Namespace) -> int:
    from . import testing

    return testing.run_comfyui_checks(
        checkout=options.dir,
        python=options.python,
        browser=options.browser,
        only=options.only,
        keep=options.keep,
    )


COMMANDS = (
    Command("demo", "ask about a picture and edit it over several rounds", _demo_arguments, _run_workflow),
    Command("run", "run a workflow in the API format", _run_arguments, _run_workflow),
    Command(
        "map",
        "run a workflow for each row of a table, or for each picture in a folder",
        _map_arguments,
        _map,
        extras=_map_extras,
    ),
    Command(
        "download",
        "download a published model, or resume or verify a download",
        _download_arguments,
        _download,
        runs_in_comfyui=True,  # transformers, which is among the requirements, brings huggingface_hub
    ),
    Command(
        "quantize",
        "quantize a Ming-UniVision model into a new, smaller folder",
        _quantize_arguments,
        _quantize,
        runs_in_comfyui=True,
    ),
    Command(
        "doctor",
        "examine this machine: results, speed, and what to expect of the published size",
        _doctor_arguments,
        _doctor,
        runs_in_comfyui=True,
    ),
    Command("test", "run all tests; further arguments go to pytest", _test_arguments, _test, needs_tests=True),
    Command(
        "comfyui",
        "check the pack in a real ComfyUI server and a real browser",
        _comfyui_arguments,
        _comfyui,
        needs_tests=True,
    ),
)
