"""quickstart.py: what it takes on the command line, what it decides about the environment, and what it says.

Nothing is installed here: pip and venv are stood in for.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / "quickstart.py"


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The module, with a project folder of its own that has requirement files and no `.venv`."""
    spec = importlib.util.spec_from_file_location("quickstart_under_test", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in (*module.REQUIREMENTS, module.CONSTRAINTS):
        (tmp_path / name).write_text((module.ROOT / name).read_text())
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "quickstart.json")
    return module


@pytest.fixture
def finished(quickstart, monkeypatch):
    """The stamp of a finished environment that was made here, with a Python 3.11 and one lent folder."""
    quickstart.VENV.mkdir()
    (quickstart.ROOT / "lent" / "torch").mkdir(parents=True)
    monkeypatch.setattr(quickstart, "python_version", lambda python: "3.11")
    stamp = {
        "made_here": True,
        "finished": True,
        "requirements": quickstart.requirements_digest(),
        "python": "3.11",
        "lent_folders": [str(quickstart.ROOT / "lent")],
    }
    quickstart.write_stamp(stamp)
    return stamp


# --- The file itself ----------------------------------------------------------------------------------------------


def test_it_parses_on_a_python_that_is_too_old_and_imports_the_standard_library_only():
    tree = ast.parse(FILE.read_text(encoding="utf-8"), feature_version=(3, 7))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= set(sys.stdlib_module_names)


def test_the_pack_asks_for_no_versions_and_the_pinned_ones_leave_pytorch_alone():
    def lines(name: str) -> list[str]:
        return [line for line in (FILE.parent / name).read_text().splitlines() if line and not line.startswith("#")]

    assert all(line.isidentifier() for line in lines("requirements.txt"))
    pinned = {line.split("==")[0].lower() for line in lines("constraints.txt")}
    assert all("==" in line for line in lines("constraints.txt"))
    wanted = {line.lower() for name in ("requirements.txt", "requirements-dev.txt") for line in lines(name)}
    assert wanted - pinned == {"torch"}


# --- The command line ---------------------------------------------------------------------------------------------


def test_demo_and_run_take_a_picture_an_output_folder_and_settings(quickstart, tmp_path):
    for name in ("x.png", "x.json"):
        (tmp_path / name).write_text("")
    picture, workflow = str(tmp_path / "x.png"), str(tmp_path / "x.json")
    demo = quickstart.parse(["demo", "--image", picture, "--output", "there"])
    assert (demo.workflow, demo.image, demo.output) == (quickstart.DEMO, Path(picture), Path("there"))
    run = quickstart.parse(["run", "--set", "1.a=1", "--set", "2.b=x y", workflow, "--set", "3.c=-1"])
    assert (run.workflow, run.image, run.output) == (Path(workflow), None, None)
    assert run.settings == ["1.a=1", "2.b=x y", "3.c=-1"]


def test_download_takes_a_published_name_and_a_folder(quickstart, monkeypatch):
    calls = []

    class Download:
        def main(self, name, **options):
            calls.append((name, options))
            return 4

    monkeypatch.setattr(quickstart, "load_pack", lambda: None)
    monkeypatch.setattr(quickstart.importlib, "import_module", {"ming_univision.runner.download": Download()}.get)
    for argv in (["download"], ["download", "MingTok-Vision", "--to", "there"]):
        options = quickstart.parse(argv)
        assert options.command(options) == 4
    assert calls == [("Ming-UniVision-16B-A3B", {"to": None}), ("MingTok-Vision", {"to": Path("there")})]
    from ming_univision.nodes.loaders import PUBLISHED

    assert {f"inclusionAI/{name}" for name in quickstart.MODELS} == {repository for repository, _ in PUBLISHED.values()}


def test_everything_after_test_goes_to_pytest(quickstart):
    options = quickstart.parse(["test", "-k", "a or b", "--golden", "there", "-x"])
    assert options.command is quickstart.run_tests
    assert options.pytest_arguments == ["-k", "a or b", "--golden", "there", "-x"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["download", "GPT"], "Ming-UniVision-16B-A3B"),
        (["demo", "--imgae", "x"], "--imgae"),
        (["run"], "WORKFLOW.json"),
        (["run", "absent.json"], "there is no file absent.json"),
        (["demo", "--image", "absent.png"], "there is no file absent.png"),
        (["comfyui", "--dri", "x"], "--dri"),
    ],
)
def test_a_bad_command_line_is_refused_before_anything_is_installed(quickstart, capsys, argv, said):
    with pytest.raises(SystemExit) as caught:
        quickstart.main(argv)
    assert caught.value.code == 2 and said in capsys.readouterr().err
    assert not quickstart.VENV.exists()


class Child:
    """Stands in for a process: notes how it was started, and gives these outcomes when it is waited for."""

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


def test_pytest_runs_in_the_project_with_what_follows_and_its_exit_code_is_kept(quickstart, monkeypatch):
    child = Child(5, 0)
    monkeypatch.setattr(quickstart.subprocess, "Popen", child)
    base = [sys.executable, "-m", "pytest"]
    assert quickstart.run_tests(quickstart.parse(["test", "-x"])) == 5
    assert quickstart.run_tests(quickstart.parse(["test", "--golden=mine"])) == 0
    assert [command for command, _ in child.started] == [[*base, "-x"], [*base, "--golden=mine"]]
    assert all(options == {"cwd": str(quickstart.ROOT)} for _, options in child.started)


def test_ctrl_c_lets_pytest_stop_what_it_has_started(quickstart, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    child = Child(KeyboardInterrupt(), KeyboardInterrupt(), 2)
    monkeypatch.setattr(quickstart.subprocess, "Popen", child)
    assert quickstart.run_tests(quickstart.parse(["test"])) == 2 and not child.outcomes
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def finding(quickstart, monkeypatch):
    """What looks for ComfyUI, on a machine that has one."""
    module = importlib.import_module("ming_univision.tests.comfyui.finding")
    monkeypatch.setattr(quickstart, "load_pack", lambda: None)
    monkeypatch.setattr(module, "find_checkout", lambda given: Path(given or "found"))
    monkeypatch.setattr(module, "find_python", lambda checkout, given: Path(given or checkout / "python"))
    monkeypatch.setattr(module, "find_browser", lambda given: Path(given))
    monkeypatch.setattr(module, "has_gpu", lambda python, checkout: False)
    return module


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], [f"--comfyui={Path('found')}", f"--comfyui-python={Path('found/python')}"]),
        (
            ["--dir", "x", "--python", "p", "--browser", "b", "--keep", "--only", "page or memory"],
            ["--comfyui=x", "--comfyui-python=p", "--comfyui-browser=b", "--comfyui-keep", "-k", "page or memory"],
        ),
    ],
)
def test_comfyui_runs_the_end_to_end_checks_on_what_was_named_or_found(quickstart, finding, monkeypatch, argv, said):
    child = Child(1)
    monkeypatch.setattr(quickstart.subprocess, "Popen", child)
    assert quickstart.run_comfyui(quickstart.parse(["comfyui", *argv])) == 1
    ((command, _),) = child.started
    assert command == [sys.executable, "-m", "pytest", "tests/comfyui", "-rN", *said]


def test_comfyui_without_a_checkout_or_with_a_broken_one_says_what_to_do(quickstart, finding, monkeypatch):
    def broken(*_):
        raise finding.NotFound("Install it with: that command")

    monkeypatch.setattr(finding, "find_checkout", lambda given: None)
    with pytest.raises(quickstart.SetupError, match="COMFYUI_DIR"):
        quickstart.run_comfyui(quickstart.parse(["comfyui"]))
    for name in ("has_gpu", "find_python", "find_checkout"):
        monkeypatch.setattr(finding, "find_checkout", lambda given: Path("found"))
        monkeypatch.setattr(finding, name, broken)
        with pytest.raises(quickstart.SetupError, match="that command"):
            quickstart.run_comfyui(quickstart.parse(["comfyui"]))


def test_a_workflow_runs_in_the_loaded_pack(quickstart, monkeypatch):
    calls = []

    class Cli:
        def main(self, workflow, **options):
            calls.append((workflow, options))
            return 3

    monkeypatch.setattr(quickstart, "load_pack", lambda: calls.append("loaded"))
    monkeypatch.setattr(quickstart.importlib, "import_module", lambda name: Cli())
    assert quickstart.run_workflow(quickstart.parse(["demo", "--set", "1.a=1", "--set", "2.b=2"])) == 3
    assert calls == ["loaded", (quickstart.DEMO, {"settings": ["1.a=1", "2.b=2"], "image": None, "output": None})]


# --- When the environment is ready --------------------------------------------------------------------------------


def test_a_finished_environment_is_known_by_its_stamp(quickstart, finished):
    assert quickstart.is_finished()
    quickstart.prepare_environment()  # would call pip if it did not stop at once


@pytest.mark.parametrize(
    "change", [{"finished": False}, {"python": "3.12"}, {"requirements": "other"}, {"lent_folders": ["/absent"]}]
)
def test_a_stamp_that_does_not_match_means_not_ready(quickstart, finished, change):
    quickstart.write_stamp({**finished, **change})
    assert not quickstart.is_finished()


def test_changed_requirements_a_broken_python_and_a_damaged_stamp_mean_not_ready(quickstart, finished, monkeypatch):
    with (quickstart.ROOT / "constraints.txt").open("a") as file:
        file.write("# newer\n")
    assert not quickstart.is_finished()
    quickstart.write_stamp({**finished, "requirements": quickstart.requirements_digest()})
    assert quickstart.is_finished()
    monkeypatch.setattr(quickstart, "python_version", lambda python: None)
    assert not quickstart.is_finished()
    quickstart.STAMP.write_text('{"finished": tr')
    assert quickstart.read_stamp() == {}


def test_a_python_that_does_not_start_has_no_version(quickstart, tmp_path):
    assert quickstart.python_version(tmp_path / "python") is None
    assert quickstart.python_version(Path(sys.executable)) == "{}.{}".format(*sys.version_info[:2])


@pytest.mark.parametrize("command", ["test", "comfyui"])
def test_a_copy_without_the_tests_says_where_they_are_before_it_prepares_anything(
    quickstart, monkeypatch, capsys, command
):
    monkeypatch.setattr(quickstart, "prepare_environment", None)
    (quickstart.ROOT / "tests").rmdir()
    project = (FILE.parent / "pyproject.toml").read_text(encoding="utf-8")
    (quickstart.ROOT / "pyproject.toml").write_text(project, encoding="utf-8")
    assert quickstart.main([command]) == 2
    said = capsys.readouterr().err
    assert "without its tests" in said and "/ComfyUI-Ming-UniVision\n" in said


def test_outside_the_environment_it_is_prepared_and_this_file_started_again_in_it(quickstart, monkeypatch):
    calls = []
    monkeypatch.setattr(quickstart, "prepare_environment", lambda: calls.append("prepared"))
    monkeypatch.setattr(quickstart, "run_again", lambda argv: calls.append(argv) or 7)
    assert quickstart.main(["test", "-x"]) == 7
    assert calls == ["prepared", ["test", "-x"]]


def test_inside_the_finished_environment_the_command_runs(quickstart, finished, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(quickstart.VENV))
    monkeypatch.setattr(quickstart, "run_tests", lambda options: 4)
    assert quickstart.main(["test"]) == 4


def test_the_second_start_uses_the_environments_python(quickstart, monkeypatch):
    if os.name == "nt":
        pytest.skip("Windows cannot replace a process")
    calls = []
    for name in ("QUICKSTART_CALLER", quickstart.RESTARTED):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setattr(quickstart.os, "execv", lambda file, command: calls.append((file, command)))
    monkeypatch.setattr(quickstart.subprocess, "Popen", None)
    with pytest.raises(TypeError):  # execv does not return in earnest; here the Windows branch is reached
        quickstart.run_again(["test", "-x"])
    python = str(quickstart.VENV / "bin" / "python")
    assert calls == [(python, [python, str(FILE), "test", "-x"])]
    assert os.environ["QUICKSTART_CALLER"] == sys.executable


def test_ctrl_c_gives_130_and_says_so(quickstart, monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "prepare_environment", stop)
    assert quickstart.main(["demo"]) == 130
    assert "Stopped." in capsys.readouterr().err


# --- Making it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def preparing(quickstart, monkeypatch):
    """Stands in for what takes long; returns the list of what was done, in order."""
    done = []

    def make(stamp):
        done.append(("make", stamp["lent_folders"]))
        quickstart.clear_environment()
        quickstart.VENV.mkdir()

    def find(python):
        done.append(("look for torch", "caller" if python == sys.executable else "environment"))
        return torch_of.get("caller" if python == sys.executable else "environment")

    torch_of = {}
    monkeypatch.setattr(quickstart, "make_environment", make)
    monkeypatch.setattr(quickstart, "ensure_pip", lambda python: None)
    monkeypatch.setattr(quickstart, "find_torch", find)
    monkeypatch.setattr(quickstart, "announce", lambda torch: done.append(("announce", torch)))
    monkeypatch.setattr(quickstart, "install", lambda python, torch: done.append(("install", torch)))
    monkeypatch.setattr(quickstart, "python_version", lambda python: "3.11")
    done_and_torch = type("Preparing", (), {"done": done, "torch_of": torch_of})
    return done_and_torch


def test_a_new_environment_is_announced_before_it_is_installed_and_stamped_after(quickstart, preparing):
    quickstart.prepare_environment()
    assert preparing.done == [
        ("look for torch", "caller"),
        ("make", []),
        ("look for torch", "environment"),
        ("announce", None),
        ("install", None),
    ]
    assert quickstart.is_finished() and quickstart.read_stamp()["made_here"]


def test_a_torch_of_the_calling_python_is_lent_and_not_installed(quickstart, preparing, tmp_path):
    torch = {"version": "2.5.1", "folders": [str(tmp_path)]}
    preparing.torch_of.update(caller=torch, environment=torch)
    quickstart.prepare_environment()
    assert ("make", [str(tmp_path)]) in preparing.done and ("install", torch) in preparing.done
    assert quickstart.read_stamp()["lent_folders"] == [str(tmp_path)]


def test_a_lent_torch_that_does_not_work_in_the_environment_is_installed(quickstart, preparing, tmp_path):
    preparing.torch_of.update(caller={"version": "2.5.1", "folders": [str(tmp_path)]})
    quickstart.prepare_environment()
    assert ("install", None) in preparing.done


@pytest.mark.parametrize("gone", ["lent", "lent/torch"])
def test_an_environment_whose_lent_torch_is_gone_gets_its_own_even_where_it_runs_this_script(
    quickstart, finished, preparing, monkeypatch, gone
):
    shutil.rmtree(quickstart.ROOT / gone)
    assert not quickstart.is_finished()
    monkeypatch.setattr(quickstart, "in_environment", lambda: True)
    quickstart.prepare_environment()
    assert ("install", None) in preparing.done and quickstart.is_finished()


def test_an_interrupted_installation_is_made_anew(quickstart, preparing, monkeypatch):
    def interrupted(python, torch):
        (quickstart.VENV / "half").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "install", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quickstart.prepare_environment()
    assert not quickstart.is_finished() and (quickstart.VENV / "half").exists()
    quickstart.prepare_environment()
    assert quickstart.is_finished() and not (quickstart.VENV / "half").exists()


def test_an_environment_that_somebody_else_made_is_installed_into_and_never_removed(quickstart, preparing):
    python = quickstart.environment_python()
    python.parent.mkdir(parents=True)
    python.write_text("")
    quickstart.prepare_environment()
    (quickstart.ROOT / "constraints.txt").write_text("# newer\n")
    quickstart.prepare_environment()
    assert [what for what, _ in preparing.done].count("install") == 2
    assert "make" not in [what for what, _ in preparing.done]
    assert python.exists() and quickstart.is_finished()


def test_an_environment_without_pip_gets_it_or_is_named(quickstart, monkeypatch):
    asked, works = [], {"ensurepip"}
    monkeypatch.setattr(quickstart, "output_of", lambda way: asked.append(way[2]) or ("" if way[2] in works else None))
    quickstart.ensure_pip("python")
    assert asked == ["pip", "ensurepip"]
    works.clear()
    with pytest.raises(quickstart.SetupError, match="has no pip"):
        quickstart.ensure_pip("python")


def test_a_python_that_does_not_belong_to_the_environment_is_named_and_not_started_for_ever(
    quickstart, preparing, monkeypatch, capsys
):
    monkeypatch.setenv(quickstart.RESTARTED, str(quickstart.VENV))
    monkeypatch.setattr(quickstart, "run_again", lambda argv: pytest.fail("started once more"))
    assert quickstart.main(["demo"]) == 2
    assert "belongs to another one" in capsys.readouterr().err


def test_a_folder_that_is_no_environment_is_left_alone(quickstart):
    (quickstart.VENV / "letters").mkdir(parents=True)
    with pytest.raises(quickstart.SetupError, match="is no environment"):
        quickstart.clear_environment()
    assert (quickstart.VENV / "letters").exists()


def test_lent_packages_come_behind_the_environments_own(quickstart, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(quickstart, "output_of", lambda command: asked.append(command) or f"{tmp_path}\n")
    quickstart.lend(["/one", "/two"])
    assert (tmp_path / "lent_packages.pth").read_text() == "/one\n/two\n"
    assert asked[0][1:] == ["-m", "pip", "uninstall", "--yes", "setuptools"]


def test_an_environment_whose_python_does_not_run_is_said_to_be_broken(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart, "output_of", lambda command: None)
    with pytest.raises(quickstart.SetupError, match="Remove the folder"):
        quickstart.lend(["/one"])


def test_folders_that_a_pth_file_cannot_name_are_not_lent(quickstart, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(quickstart, "output_of", lambda command: asked.append(command) or f"{tmp_path}\n")
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    monkeypatch.setattr(quickstart.locale, "getpreferredencoding", lambda _: "cp1252")
    quickstart.lend(["C:/\u041e\u043b\u044f/site-packages"])
    assert not asked


def test_only_a_torch_that_imports_and_is_new_enough_is_found(quickstart, monkeypatch, tmp_path):
    package = tmp_path / "site-packages" / "torch"
    package.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    for source, found in {
        "__version__ = '2.4.0+cpu'": True,
        "__version__ = '2.13.0'": True,
        "__version__ = '2.3.1'": False,
        "raise OSError('a broken library')": False,
    }.items():
        (package / "__init__.py").write_text(source)
        torch = quickstart.find_torch(sys.executable)
        assert (torch is not None) == found
        if torch:
            assert torch["folders"][0] == str(package.parent)


# --- pip ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pips(quickstart, monkeypatch):
    """Records the arguments of every pip call after `install`; `fails` are the numbers of the calls that fail."""
    calls, fails = [], set()

    def call(command):
        arguments = command[command.index("install") + 1 :]
        calls.append([word for word in arguments if word not in ("--disable-pip-version-check", "--no-input")])
        return len(calls) in fails

    monkeypatch.setattr(quickstart, "run_pip", call)
    monkeypatch.setattr(quickstart, "output_of", lambda command: None if call(command) else "")
    return type("Pips", (), {"calls": calls, "fails": fails})


def test_torch_is_installed_first_and_by_itself_then_the_rest_in_tested_versions(quickstart, pips):
    quickstart.install(Path("python"), None)
    root = quickstart.ROOT
    wanted = ["-r", str(root / "requirements.txt"), "-r", str(root / "requirements-dev.txt")]
    assert pips.calls == [["torch==2.13.0"], [*wanted, "-c", str(root / "constraints.txt")]]


def test_a_torch_that_is_there_is_not_asked_for(quickstart, pips):
    quickstart.VENV.mkdir()
    quickstart.install(Path("python"), {"version": "2.6.0+cpu", "folders": ["x"]})
    assert len(pips.calls) == 1 and "torch==2.13.0" not in pips.calls[0]
    beside = Path(pips.calls[0][-1]).read_text().splitlines()
    assert "torch===2.6.0+cpu" in beside and "einops==0.8.2" in beside
    # versions that PyTorch decides: pip would exchange one that wants others
    assert not any(line.startswith(("sympy", "setuptools", "filelock", "typing_extensions")) for line in beside)


def test_without_a_network_packages_that_are_there_will_do(quickstart, pips, capsys):
    pips.fails.add(1)
    quickstart.VENV.mkdir()
    quickstart.install(Path("python"), {"version": "2.5.1", "folders": ["x"]})
    assert "--no-index" in pips.calls[1] and "-c" not in pips.calls[1]
    assert "are used instead" in capsys.readouterr().out


def test_what_cannot_be_installed_is_an_error_with_a_remedy(quickstart, pips):
    pips.fails |= {1, 2}
    with pytest.raises(quickstart.SetupError, match="install one for the Python"):
        quickstart.install(Path("python"), None)
    pips.calls.clear()
    quickstart.VENV.mkdir()
    with pytest.raises(quickstart.SetupError, match="start again"):
        quickstart.install(Path("python"), {"version": "2.5.1", "folders": ["x"]})


def test_settings_that_send_pip_elsewhere_are_overruled(quickstart, monkeypatch):
    seen = {}
    monkeypatch.setattr(quickstart.subprocess, "call", lambda command, cwd, env: seen.update(env) or 0)
    monkeypatch.setenv("PIP_USER", "1")
    quickstart.run_pip(["pip"])
    assert seen["PIP_USER"] == "0" and "PATH" in seen


# --- What is said -------------------------------------------------------------------------------------------------


def test_the_announcement_tells_the_size_of_what_is_fetched(quickstart, monkeypatch, capsys):
    quickstart.announce({"version": "2.5.1", "folders": ["/caller"]})
    said = capsys.readouterr().out
    assert "PyTorch: nothing, version 2.5.1" in said and "/caller" in said and "50 MB" in said
    monkeypatch.setattr(sys, "platform", "win32")
    quickstart.announce(None)
    assert "PyTorch 2.13.0: about 125 MB" in capsys.readouterr().out


def test_on_linux_both_sizes_are_told_and_nothing_is_downloaded_to_tell_them(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "output_of", lambda command: pytest.fail(f"ran {command}"))
    monkeypatch.setattr(sys, "platform", "linux")
    quickstart.announce(None)
    said = capsys.readouterr().out
    assert "about 2.5 GB" in said and "about 210 MB" in said and "Ctrl-C" in said


@pytest.mark.parametrize(
    ("family", "remedy"),
    [
        ("debian", "sudo apt install python{}.{}-venv".format(*sys.version_info[:2])),
        ("fedora", "sudo dnf install"),
        ("arch", "sudo pacman -S python"),
        ("macos", "brew install python"),
        ("windows", "winget install"),
        ("", "your system's package manager"),
    ],
)
@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_python_without_venv_or_pip_gets_its_systems_remedy(quickstart, monkeypatch, capsys, family, remedy, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(quickstart, "system_family", lambda: family)
    monkeypatch.setattr(quickstart, "find_torch", lambda python: None)
    monkeypatch.setattr(
        quickstart.importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    assert quickstart.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert f"no module {missing}" in said and remedy in said
    assert not quickstart.VENV.exists()


@pytest.mark.parametrize("family", ["debian", "fedora", "arch", "macos", "windows", ""])
def test_a_python_that_is_too_old_is_refused_with_how_to_get_another(quickstart, monkeypatch, capsys, family):
    monkeypatch.setattr(quickstart, "system_family", lambda: family)
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert quickstart.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert "3.10 or newer is needed" in said and "nstall one with" in said and "quickstart.py demo" in said
