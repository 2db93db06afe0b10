"""The command line: what each command takes, and what it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from ming_univision.ming_core.quantization import FORMATS
from ming_univision.nodes.models import PUBLISHED
from ming_univision.runner import cli, download, quantize, terminal, testing
from ming_univision.runner.table import command


@pytest.fixture
def calls(monkeypatch):
    """What the commands run, as (module, arguments, options), instead of running it. The exit code is 3."""
    made = []

    def replace(module, function):
        name = module.__name__.rsplit(".", 1)[-1]
        monkeypatch.setattr(module, function, lambda *args, **options: made.append((name, args, options)) or 3)

    for module in (command, download, quantize, terminal):
        replace(module, "main")
    replace(testing, "run_tests")
    replace(testing, "run_comfyui_checks")
    return made


def test_demo_and_run_take_a_picture_an_output_folder_and_settings(calls, tmp_path):
    for name in ("x.png", "x.json"):
        (tmp_path / name).write_text("")
    image, workflow = str(tmp_path / "x.png"), str(tmp_path / "x.json")
    assert cli.main(["demo", "--image", image, "--output", "there"]) == 3
    assert cli.main(["run", "--set", "1.a=1", "--set", "2.b=x y", workflow, "--set", "3.c=-1"]) == 3
    assert cli.main(["demo"]) == 3
    assert calls == [
        ("terminal", (cli.DEMO,), {"settings": [], "image": Path(image), "output": Path("there")}),
        ("terminal", (Path(workflow),), {"settings": ["1.a=1", "2.b=x y", "3.c=-1"], "image": None, "output": None}),
        ("terminal", (cli.DEMO,), {"settings": [], "image": None, "output": None}),
    ]
    assert cli.DEMO.is_file()


def test_map_takes_a_table_or_a_folder_of_pictures(
    calls,
    tmp_path,
):
    for name in ("x.json", "t.csv"):
        (tmp_path / name).write_text("")
    workflow, table = str(tmp_path / "x.json"), str(tmp_path / "t.csv")
    assert cli.main(["map", workflow, "--table", table, "--out", "there", "--set", "1.a=1"]) == 3
    assert cli.main(["map", workflow, "--images", str(tmp_path), "--out", "s3://bucket/there"]) == 3
    assert cli.main(["map", workflow, "--table", table, "--out", "x", "--ray", "--workers", "2", "--batch", "4"]) == 3
    assert cli.main(["map", workflow, "--table", table, "--out", "x", "--ray", "ray://head:10001"]) == 3
    plain = {"table": None, "images": None, "settings": [], "ray": None, "workers": None, "batch": 1}
    both = plain | {"table": Path(table), "out": "x"}
    assert calls == [
        ("command", (Path(workflow),), plain | {"table": Path(table), "out": "there", "settings": ["1.a=1"]}),
        ("command", (Path(workflow),), plain | {"images": tmp_path, "out": "s3://bucket/there"}),
        ("command", (Path(workflow),), both | {"ray": "", "workers": 2, "batch": 4}),
        ("command", (Path(workflow),), both | {"ray": "ray://head:10001"}),
    ]
    for rows in ([], ["--table", table, "--images", str(tmp_path)], ["--table", table, "--batch", "0"]):
        with pytest.raises(SystemExit):
            cli.main(["map", workflow, "--out", "there", *rows])


def test_ray_is_asked_for_only_with_its_option(tmp_path):
    for name in ("x.json", "t.csv"):
        (tmp_path / name).write_text("")
    words = ["map", str(tmp_path / "x.json"), "--table", str(tmp_path / "t.csv"), "--out", "there"]
    for options, extras in ((words, ()), ([*words, "--ray"], ("ray",)), (["demo"], ())):
        parsed = cli.parse(options)
        assert parsed.command.extras(parsed) == extras


def test_download_takes_a_published_name_and_a_folder(calls):
    assert cli.main(["download"]) == 3
    assert cli.main(["download", "MingTok-Vision", "--to", "there"]) == 3
    assert calls == [
        ("download", ("Ming-UniVision-16B-A3B",), {"to": None}),
        ("download", ("MingTok-Vision",), {"to": Path("there")}),
    ]
    assert {f"inclusionAI/{name}" for name in cli.MODELS} == {repository for repository, _ in PUBLISHED.values()}


def test_quantize_takes_two_folders_and_a_format(calls, tmp_path):
    assert cli.main(["quantize", str(tmp_path), "there"]) == 3
    assert cli.main(["quantize", str(tmp_path), "there", "--format", "int8"]) == 3
    assert calls == [
        ("quantize", (tmp_path, Path("there"), "int4"), {}),
        ("quantize", (tmp_path, Path("there"), "int8"), {}),
    ]
    assert set(cli.FORMATS) == set(FORMATS)


def test_the_help_of_quantize_has_the_line_for_comfyui_portable(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["quantize", "--help"])
    assert r"..\..\..\python_embeded\python.exe quickstart.py quantize" in capsys.readouterr().out


def test_everything_after_test_goes_to_pytest(calls):
    for arguments in ([], ["-k", "a or b", "--golden", "there", "-x"], ["-x", "-h"]):
        assert cli.main(["test", *arguments]) == 3
        assert calls.pop() == ("testing", (arguments,), {})


def test_comfyui_takes_a_checkout_a_python_and_a_browser(calls):
    cli.main(["comfyui"])
    cli.main(["comfyui", "--dir", "x", "--python", "p", "--browser", "b", "--keep", "--only", "page or memory"])
    nothing = {"checkout": None, "python": None, "browser": None, "only": None, "keep": False}
    everything = {"checkout": "x", "python": "p", "browser": "b", "only": "page or memory", "keep": True}
    assert calls == [("testing", (), nothing), ("testing", (), everything)]


def test_a_new_command_is_a_line(capsys, monkeypatch):
    def arguments(parser):
        parser.add_argument("--deep", action="store_true")

    command = cli.Command("inspect", "say what is wrong", arguments, lambda options: 5 if options.deep else 6)
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, command))
    assert cli.main(["inspect", "--deep"]) == 5 and cli.main(["inspect"]) == 6
    with pytest.raises(SystemExit):
        cli.parse(["--help"])
    assert "say what is wrong" in capsys.readouterr().out
