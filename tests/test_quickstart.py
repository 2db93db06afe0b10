"""quickstart.py: what it decides about the environment, what it hands over, and what it says.

Nothing is installed here: pip and venv are replaced by doubles.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
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
    for name in ("tests", "runner"):
        (tmp_path / name).mkdir()
    shutil.copy(module.ROOT / "runner" / "cli.py", tmp_path / "runner")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "quickstart.json")
    return module


@pytest.fixture
def finished(quickstart, monkeypatch):
    """The stamp of a finished environment that was made here, with a Python 3.11 and one borrowed folder."""
    quickstart.VENV.mkdir()
    (quickstart.ROOT / "borrowed" / "torch").mkdir(parents=True)
    monkeypatch.setattr(quickstart, "python_version", lambda python: "3.11")
    stamp = {
        "made_here": True,
        "finished": True,
        "requirements": quickstart.requirements_digest(),
        "python": "3.11",
        "borrowed_folders": [str(quickstart.ROOT / "borrowed")],
    }
    quickstart.write_stamp(stamp)
    return stamp


# --- The file itself ----------------------------------------------------------------------------------------------


def imported(nodes) -> set[str]:
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names}


def test_it_parses_on_a_python_that_is_too_old_and_imports_the_standard_library_only():
    tree = ast.parse(FILE.read_text(encoding="utf-8"), feature_version=(3, 7))
    assert imported(ast.walk(tree)) <= set(sys.stdlib_module_names)


def test_the_command_line_is_read_with_the_standard_library_only():
    tree = ast.parse((FILE.parent / "runner" / "cli.py").read_text(encoding="utf-8"), feature_version=(3, 10))
    assert imported(tree.body) <= set(sys.stdlib_module_names)  # inside its functions it imports more


def test_the_pack_asks_for_no_versions_and_the_pinned_ones_leave_pytorch_alone():
    def lines(name: str) -> list[str]:
        return [line for line in (FILE.parent / name).read_text().splitlines() if line and not line.startswith("#")]

    assert all(line.isidentifier() for line in lines("requirements.txt"))
    pinned = {line.split("==")[0].lower() for line in lines("constraints.txt")}
    assert all("==" in line for line in lines("constraints.txt"))
    wanted = {line.lower() for name in ("requirements.txt", "requirements-dev.txt") for line in lines(name)}
    assert wanted - pinned == {"torch"}


# --- Handing over -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["download", "GPT"], "Ming-UniVision-16B-A3B"),
        (["quantize", ".", "there", "--format", "int2"], "int4"),
        (["quantize", "absent", "there"], "there is no folder absent"),
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


@pytest.mark.parametrize("command", ["demo", "run", "map", "download", "quantize", "test", "comfyui"])
def test_every_command_has_help_without_an_environment(quickstart, capsys, command):
    with pytest.raises(SystemExit) as caught:
        quickstart.main([command, "--help"])
    assert caught.value.code == 0 and f"usage: quickstart.py {command}" in capsys.readouterr().out
    assert not quickstart.VENV.exists()


def test_a_command_is_run_by_the_command_line_of_the_pack_whose_nodes_are_not_imported_for_it():
    code = (
        "import sys, quickstart; quickstart.load_pack(); import ming_univision.runner.cli as cli; "
        "cli.COMMANDS = tuple(cli.replace(c, run=lambda o: print('ran', o.workflow.name) or 7) for c in cli.COMMANDS); "
        "code = quickstart.importlib.import_module('ming_univision.runner.cli').main(['demo']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    ).replace("cli.replace", "__import__('dataclasses').replace")
    done = subprocess.run([sys.executable, "-c", code], cwd=FILE.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "ran multi_round_edit.json\n"), done.stderr


@pytest.mark.parametrize("line", [["quantize", ".", "there"], ["download"]])
def test_models_are_prepared_by_any_python_that_has_the_requirements_without_an_environment(
    quickstart, monkeypatch, line
):
    def prepare():
        raise quickstart.SetupError("prepared")

    monkeypatch.setattr(quickstart, "prepare_environment", prepare)
    monkeypatch.setattr(quickstart, "hand_over", lambda argv: 4)
    monkeypatch.setattr(quickstart, "has_requirements", lambda: True)
    assert quickstart.main(line) == 4
    assert quickstart.main(["demo"]) == 2
    monkeypatch.setattr(quickstart, "has_requirements", lambda: False)
    assert quickstart.main(line) == 2


def test_a_python_has_the_requirements_if_it_has_every_package_and_a_torch_that_is_new_enough(quickstart, monkeypatch):
    versions = dict.fromkeys((quickstart.ROOT / "requirements.txt").read_text().split("\n"), "1.0") | {"torch": "2.4.1"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert quickstart.has_requirements()
    versions["torch"] = "2.3.1"
    assert not quickstart.has_requirements()
    versions["torch"] = "2.4.1"
    del versions["pillow"]
    assert not quickstart.has_requirements()


# --- When the environment is ready --------------------------------------------------------------------------------


def test_a_finished_environment_is_known_by_its_stamp(quickstart, finished):
    assert quickstart.is_finished()
    quickstart.prepare_environment()  # would call pip if it did not stop at once


@pytest.mark.parametrize(
    "change", [{"finished": False}, {"python": "3.12"}, {"requirements": "other"}, {"borrowed_folders": ["/absent"]}]
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
    assert "does not include the tests" in said and "/ComfyUI-Ming-UniVision\n" in said


def test_outside_the_environment_it_is_prepared_and_this_file_started_again_in_it(quickstart, monkeypatch):
    calls = []
    monkeypatch.setattr(quickstart, "prepare_environment", lambda: calls.append("prepared"))
    monkeypatch.setattr(quickstart, "run_again", lambda argv: calls.append(argv) or 7)
    assert quickstart.main(["test", "-x"]) == 7
    assert calls == ["prepared", ["test", "-x"]]


def test_inside_the_finished_environment_the_command_runs(quickstart, finished, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(quickstart.VENV))
    monkeypatch.setattr(quickstart, "hand_over", lambda argv: 4 if argv == ["test", "-x"] else None)
    assert quickstart.main(["test", "-x"]) == 4


def test_the_second_start_uses_the_environments_python(quickstart, monkeypatch):
    if os.name == "nt":
        pytest.skip("Windows cannot replace a process")
    calls = []
    for name in (quickstart.CALLER, quickstart.RESTARTED):
        monkeypatch.setenv(name, "")  # put back afterwards
    monkeypatch.setattr(quickstart.os, "execv", lambda file, command: calls.append((file, command)))
    monkeypatch.setattr(quickstart.subprocess, "Popen", None)
    with pytest.raises(TypeError):  # execv does not return in earnest; here the Windows branch is reached
        quickstart.run_again(["test", "-x"])
    python = str(quickstart.VENV / "bin" / "python")
    assert calls == [(python, [python, str(FILE), "test", "-x"])]
    assert os.environ[quickstart.CALLER] == sys.executable


def test_ctrl_c_gives_130_and_says_so(quickstart, monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "prepare_environment", stop)
    assert quickstart.main(["demo"]) == 130
    assert "Interrupted." in capsys.readouterr().err


# --- Making it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def preparing(quickstart, monkeypatch):
    """Stands in for what takes long; returns the list of what was done, in order."""
    done = []

    def make(stamp):
        done.append(("make", stamp["borrowed_folders"]))
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


def test_a_torch_of_the_calling_python_is_borrowed_and_not_installed(quickstart, preparing, tmp_path):
    torch = {"version": "2.5.1", "folders": [str(tmp_path)]}
    preparing.torch_of.update(caller=torch, environment=torch)
    quickstart.prepare_environment()
    assert ("make", [str(tmp_path)]) in preparing.done and ("install", torch) in preparing.done
    assert quickstart.read_stamp()["borrowed_folders"] == [str(tmp_path)]


def test_a_borrowed_torch_that_does_not_work_in_the_environment_is_installed(quickstart, preparing, tmp_path):
    preparing.torch_of.update(caller={"version": "2.5.1", "folders": [str(tmp_path)]})
    quickstart.prepare_environment()
    assert ("install", None) in preparing.done


@pytest.mark.parametrize("gone", ["borrowed", "borrowed/torch"])
def test_an_environment_whose_borrowed_torch_is_gone_gets_its_own_even_where_it_runs_this_script(
    quickstart, finished, preparing, monkeypatch, gone
):
    shutil.rmtree(quickstart.ROOT / gone)
    assert not quickstart.is_finished()
    monkeypatch.setattr(quickstart, "in_environment", lambda: True)
    quickstart.prepare_environment()
    assert ("install", None) in preparing.done and quickstart.is_finished()


def test_an_interrupted_installation_is_made_again(quickstart, preparing, monkeypatch):
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
    assert "belongs to another environment" in capsys.readouterr().err


def test_a_folder_that_is_no_environment_is_left_alone(quickstart):
    (quickstart.VENV / "letters").mkdir(parents=True)
    with pytest.raises(quickstart.SetupError, match="is not an environment"):
        quickstart.clear_environment()
    assert (quickstart.VENV / "letters").exists()


def test_borrowed_packages_come_behind_the_environments_own(quickstart, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(quickstart, "output_of", lambda command: asked.append(command) or f"{tmp_path}\n")
    quickstart.borrow(["/one", "/two"])
    assert (tmp_path / "borrowed_packages.pth").read_text() == "/one\n/two\n"
    assert asked[0][1:] == ["-m", "pip", "uninstall", "--yes", "setuptools"]


def test_an_environment_whose_python_does_not_run_is_named(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart, "output_of", lambda command: None)
    with pytest.raises(quickstart.SetupError, match="Remove the folder"):
        quickstart.borrow(["/one"])


def test_folders_that_a_pth_file_cannot_name_are_not_borrowed(quickstart, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(quickstart, "output_of", lambda command: asked.append(command) or f"{tmp_path}\n")
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    monkeypatch.setattr(quickstart.locale, "getpreferredencoding", lambda _: "cp1252")
    quickstart.borrow(["C:/\u041e\u043b\u044f/site-packages"])
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
    with pytest.raises(quickstart.SetupError, match="try again"):
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
    assert "PyTorch: nothing, version 2.5.1" in said and "/caller" in said and "60 MB" in said
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
