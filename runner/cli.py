"""The terminal side of a run without ComfyUI: one line a node, a bar that moves with every token, answers, files.

On a terminal the running node's line is redrawn in place; elsewhere (a pipe, a log file) each stage is a line of its
own and progress is thinned out in time. The only control character is the carriage return, which every console knows.
Exit codes of `main`: 0 done, 1 a node failed, 2 refused before anything ran, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from ..nodes import host
from .core_nodes import shown_file
from .run import Event, NodeError, NodeFinished, NodeStarted, Progress, known_node_classes, run_workflow
from .workflow import WorkflowError, read_workflow, with_image, with_settings

_BAR_CELLS = 20
_INDENT = "      "
_SECONDS_BETWEEN_LINES = 0.5  # of progress, where lines cannot be redrawn


def main(
    workflow: str | Path,
    *,
    settings: Iterable[str] = (),
    image: str | Path | None = None,
    output: str | Path | None = None,
) -> int:
    """Runs a workflow file in the terminal and returns the process's exit code.

    `settings` are NODE.INPUT=VALUE, `image` takes the place of the example scene, `output` that of the output folder.
    """
    try:
        return _main(workflow, settings, image, Path(output or host.output_directory()).expanduser().resolve())
    except BrokenPipeError:  # whoever read has gone, as `head` does; Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(workflow: str | Path, settings: Iterable[str], image: str | Path | None, folder: Path) -> int:
    terminal = Terminal(sys.stdout, f"Running {Path(workflow).name}; results go to {folder}")
    started = time.perf_counter()
    log = _TerminalLog(terminal)
    logging.getLogger().addHandler(log)
    try:
        graph = read_workflow(workflow)
        if image is not None:
            graph = with_image(graph, image)
        graph = with_settings(graph, settings, known_node_classes())
        run_workflow(graph, output_dir=folder, on_event=terminal)
    except WorkflowError as error:
        terminal.close(f"Refused: {error}")
        return 2
    except NodeError as error:
        terminal.close(f"Failed: {error}")
        if not isinstance(error.__cause__, (ValueError, OSError)):  # not a message meant for the user: show where
            terminal.say("".join(traceback.format_exception(error.__cause__)).rstrip())
        return 1
    except KeyboardInterrupt:
        terminal.close("Stopped. What was saved before stays.")
        return 130
    finally:
        logging.getLogger().removeHandler(log)
    terminal.say(f"Done in {time.perf_counter() - started:.1f} s.")
    return 0


class Terminal:
    """Shows the events of one run on a text stream, under a heading; call it with each event."""

    def __init__(self, stream: TextIO, heading: str):
        self.stream = stream
        self.heading = heading
        self.redraws = stream.isatty()
        self.live = ""  # the line that is being redrawn
        self.head = ""  # "[3/9] Ming Edit (5)"
        self.started = 0.0
        self.printed = 0.0  # when the last progress line was printed
        self.said = ""  # the last progress line
        self.withheld = ""  # one that came too soon after it

    def __call__(self, event: Event) -> None:
        if isinstance(event, NodeStarted):
            self._start(event)
        elif isinstance(event, Progress):
            self._progress(event)
        else:
            self._finish(event)

    def say(self, text: str) -> None:
        """Prints `text` as lines of its own, above the line that is being redrawn."""
        live = self.live
        self._draw("")
        print(text, file=self.stream, flush=True)
        self._draw(live)

    def close(self, text: str) -> None:
        """Prints `text` in the place of the line that is being redrawn: the node that ran will not go on."""
        self._draw("")
        self.say(text)

    def _start(self, event: NodeStarted) -> None:
        if event.number == 1:
            self.say(self.heading)
        width = len(str(event.count))
        self.head = f"[{event.number:{width}}/{event.count}] {event.node}"
        self.started, self.printed, self.said, self.withheld = time.perf_counter(), 0.0, "", ""
        if self.redraws:
            self._draw(f"{self.head} ...")
        else:
            self.say(f"{self.head} ...")

    def _progress(self, event: Progress) -> None:
        now = time.perf_counter()
        total = max(event.total, event.value, 1)
        counted = f"{event.value}/{total}"
        if self.redraws:
            cells = _BAR_CELLS * event.value // total
            bar = "█" * cells + "░" * (_BAR_CELLS - cells)
            written = _last_columns(event.text or "", self._columns() // 3)
            self._draw(f"{self.head}  {bar}  {counted}  {now - self.started:.1f} s  {written}")
        elif counted == self.said:  # such as text that follows a finished picture
            pass
        elif event.value == total or now - self.printed >= _SECONDS_BETWEEN_LINES:
            self.say(_INDENT + counted)
            self.printed, self.said, self.withheld = now, counted, ""
        else:
            self.withheld = counted

    def _finish(self, event: NodeFinished) -> None:
        seconds = f"{event.result.seconds:.1f} s"
        if self.redraws:
            self._draw("")
            self.say(f"{self.head}  {seconds}")
        else:
            self.say(_INDENT + (f"{self.withheld}, " if self.withheld else "") + seconds)
        for items in event.result.ui.values():
            for item in items:
                if isinstance(item, str):
                    self.say("\n".join(_INDENT + line for line in item.splitlines() or ["(no text)"]))
                elif isinstance(item, dict) and "filename" in item:
                    verb = "preview" if item.get("type") == "temp" else "saved"
                    self.say(f"{_INDENT}{verb} {shown_file(item)}")

    def _draw(self, line: str) -> None:
        """Replaces the line that is being redrawn."""
        if not self.redraws or line == self.live:
            return
        line = _first_columns(line, self._columns() - 1)  # a full line would wrap, and could not be redrawn
        gap = " " * max(0, _columns_of(self.live) - _columns_of(line))
        self.stream.write(f"\r{line}{gap}" + ("" if line else "\r"))
        self.stream.flush()
        self.live = line

    def _columns(self) -> int:
        return shutil.get_terminal_size().columns


class _TerminalLog(logging.Handler):
    """Prints log records above the line that is being redrawn."""

    def __init__(self, terminal: Terminal):
        super().__init__(logging.WARNING)
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        self.terminal.say(f"{_INDENT}{record.levelname.lower()}: {record.getMessage()}")


def _columns_of(text: str) -> int:
    """Terminal columns that `text` takes: Chinese and Japanese characters take two, combining marks none."""
    return sum(_width(character) for character in text)


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _first_columns(text: str, columns: int) -> str:
    while _columns_of(text) > columns:
        text = text[:-1]
    return text


def _last_columns(text: str, columns: int) -> str:
    """The end of `text` in one line of at most `columns` columns."""
    text = " ".join(text[-columns * 2 :].split()) if columns > 0 else ""
    while _columns_of(text) > columns:
        text = text[1:]
    return text
