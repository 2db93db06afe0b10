"""A run in the terminal: what is printed, and the exit codes."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from ming_univision.ming_core import NoPictureError
from ming_univision.nodes import host
from ming_univision.runner import session, terminal
from ming_univision.tests.runner.example_nodes import CLASSES, node
from tqdm import tqdm
from tqdm.utils import disp_len

# --- The terminal -------------------------------------------------------------------------------------------------


class Console(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def screen(self) -> list[str]:
        """The lines as a person sees them, after every carriage return has been obeyed."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(graph, is_terminal, ...) -> (exit code, console), through `main` and a file."""

    def call(graph, is_terminal=False, **more):
        console = Console(is_terminal)
        monkeypatch.setattr("sys.stdout", console)
        for module in (session, terminal):
            monkeypatch.setattr(module, "known_node_classes", lambda: CLASSES)
        (tmp_path / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
        return terminal.main(tmp_path / "graph.json", output=tmp_path / "output", **more), console

    return call


TICKING = {"1": node("Ticks", "Long Work", count=4), "2": node("Show", "Answer", source=["1", 0])}


def test_without_a_terminal_every_stage_is_a_line(command):
    code, console = command(TICKING)
    lines = console.getvalue().splitlines()
    assert code == 0 and "\r" not in console.getvalue()
    assert lines[1:4] == ["[1/2] Long Work (1) ...", "      1/4", "      4/4"]
    assert lines[4].endswith(" s")
    assert "      True" in lines  # the answer


def test_on_a_terminal_the_bar_moves_with_every_token_and_leaves_one_line_a_node(command):
    code, console = command(TICKING, is_terminal=True)
    raw, screen = console.getvalue(), console.screen()
    assert code == 0 and "\x1b" not in raw
    assert [f"{i}/4" in raw for i in range(1, 5)] == [True] * 4
    assert "字字" in raw and "█" in raw
    assert screen[1].startswith("[1/2] Long Work (1)  ") and "█" not in screen[1] and screen[1].endswith(" s")
    assert screen[2].startswith("[2/2] Answer (2)  ")
    assert screen[3] == "      True"


@pytest.mark.parametrize(("kind", "said"), [("Broken", "Failed: "), ("Interrupted", "Interrupted.")])
def test_what_stops_a_node_is_the_last_thing_on_the_screen(command, kind, said):
    _, console = command({"1": node(kind, "Long Work", source="x")}, is_terminal=True)
    lines = [line for line in console.screen() if line]
    assert any(line.startswith(said) for line in lines[1:])
    assert not any(line.startswith("[1/1]") for line in lines)


@pytest.mark.parametrize(
    ("error", "shows_where"),
    [(NoPictureError("it answered in words"), False), (ValueError("a bad value"), False), (KeyError("a bug"), True)],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_only_what_is_no_message_for_the_user_shows_where_it_was_raised(command, monkeypatch, error, shows_where):
    def run(self, source):
        raise error

    monkeypatch.setattr(CLASSES["Broken"], "run", run)
    code, console = command({"1": node("Broken", "Long Work", source="x")})
    assert code == terminal.EXIT_FAILED and str(error) in console.getvalue()
    assert ("Traceback" in console.getvalue()) == shows_where


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pseudo-terminals")
def test_a_terminal_that_does_not_tell_its_size_gets_a_bar(tmp_path):
    main, terminal_end = os.openpty()
    code = "import sys; from ming_univision.runner import terminal; "
    code += "reporter = terminal.BarReporter(sys.stdout, ''); reporter._start(); reporter._progress(1, 4, '')"
    command = [sys.executable, "-c", f"import quickstart; quickstart.load_pack(); {code}"]
    subprocess.run(command, cwd=host.PACK, stdout=terminal_end, check=True)
    os.close(terminal_end)
    assert "1/4" in os.read(main, 10_000).decode()
    os.close(main)


def test_a_log_warning_is_printed_above_the_line_that_is_redrawn():
    console = Console(True)
    with tqdm(bar_format="working", file=console, leave=False):
        record = logging.makeLogRecord({"msg": "careful", "levelname": "WARNING"})
        terminal._ReporterLog(terminal.BarReporter(console, "")).emit(record)
        assert console.screen() == ["      warning: careful", "working"]


def test_wide_characters_are_counted_as_two_columns():
    assert terminal._last_columns("一二三\n四", 5) == "三 四"
    assert terminal._last_columns("abc 一二三", 0) == ""


def test_a_line_that_is_redrawn_is_never_wider_than_the_terminal(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    graph = {"1": node("Ticks", "字" * 50, count=40), "2": node("Show", source=["1", 0])}
    _, console = command(graph, is_terminal=True)
    redrawn = [part for line in console.getvalue().split("\n") for part in line.split("\r") if "█" in part]
    assert redrawn and all(disp_len(part) < 40 for part in redrawn)


def test_exit_codes_tell_done_failed_refused_and_stopped(command):
    assert command({"1": node("Show", source="x")})[0] == 0
    code, console = command({"1": node("Broken", source="x")})
    assert code == 1 and "the cause" in console.getvalue()
    code, console = command({"1": node("Show")})
    assert code == 2 and "Refused" in console.getvalue() and '"source" is missing' in console.getvalue()
    code, console = command({"1": node("Interrupted", source="x")})
    assert code == 130 and "Interrupted" in console.getvalue()
    assert command({"1": node("Show", source="x")}, settings=["2.a=1"])[0] == 2
    assert command({"1": node("Show", source="x")}, image="absent.png")[0] == 2


@pytest.mark.parametrize(("workflow", "lines"), [("reconstruct", 1), ("reconstruct", -1), ("missing", 0)])
def test_a_reader_that_goes_away_ends_the_run_without_a_traceback(tmp_path, workflow, lines):
    """After the first line, before the last one ("Done in ..."), or before all that is said."""
    code = "import sys, time, quickstart; quickstart.load_pack(); from ming_univision.runner import terminal; "
    code += "say = terminal.LineReporter.say; terminal.LineReporter.say = lambda self, text: ("
    code += "time.sleep(1 if text.startswith(('Done', 'Refused')) else 0), say(self, text)); "
    code += f"sys.exit(terminal.main('workflows/api/{workflow}.json', output={str(tmp_path)!r}))"
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, cwd=host.PACK, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        if lines == 1:
            assert child.stdout.readline().startswith("Running reconstruct.json")
        while lines == -1 and "saved" not in child.stdout.readline():
            pass
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1
