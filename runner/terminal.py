"""Runs a workflow in the terminal: one line for each node, a progress bar that moves with every token, text, files.

In a terminal the line of the running node is redrawn by tqdm. In a pipe or a log file every stage is a line of its own,
and progress is printed at most twice a second.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

from ..ming_core import NoPictureError
from ..ming_core.offload import NonfiniteError
from ..nodes import host
from ..nodes.filenames import absolute
from .core_nodes import shown_file
from .session import (
    Event,
    ExecutionError,
    NodeFinished,
    NodeProgress,
    NodeResult,
    NodeStarted,
    known_node_classes,
    run_workflow,
)
from .workflow import WorkflowError, read_workflow, with_image, with_settings

_INDENT = "      "
_FOR_THE_USER = (ValueError, OSError, NoPictureError, NonfiniteError)  # their messages say what to do
_SECONDS_BETWEEN_LINES = 0.5  # of progress, where a line cannot be redrawn

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(
    workflow: str | Path,
    *,
    settings: Iterable[str] = (),
    image: str | Path | None = None,
    output: str | Path | None = None,
) -> int:
    """Runs a workflow file and returns the exit code of the process.

    Args:
        settings: NODE.INPUT=VALUE, inputs to change.
        image: the image to start from, in place of the example scene.
        output: the output folder; None means the one of `host`.
    """
    try:
        return _run(workflow, settings, image, absolute(output or host.output_directory()))
    except BrokenPipeError:  # the reader is gone, as `head` is. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _run(workflow: str | Path, settings: Iterable[str], image: str | Path | None, folder: Path) -> int:
    heading = f"Running {Path(workflow).name}. Results go to {folder}"
    reporter = (BarReporter if sys.stdout.isatty() else LineReporter)(sys.stdout, heading)
    started = time.perf_counter()
    log = _ReporterLog(reporter)
    logging.getLogger().addHandler(log)
    try:
        graph = read_workflow(workflow)
        if image is not None:
            graph = with_image(graph, image)
        if settings := list(settings):
            graph = with_settings(graph, settings, known_node_classes())
        run_workflow(graph, output_dir=folder, on_event=reporter)
    except WorkflowError as error:
        reporter.stop(f"Refused: {error}")
        return EXIT_REFUSED
    except ExecutionError as error:
        reporter.stop(f"Failed: {error}")
        if not isinstance(error.__cause__, _FOR_THE_USER):  # show where it is from
            reporter.say("".join(traceback.format_exception(error.__cause__)).rstrip())
        return EXIT_FAILED
    except KeyboardInterrupt:
        reporter.stop("Interrupted. Files that were saved before stay.")
        return EXIT_INTERRUPTED
    finally:
        logging.getLogger().removeHandler(log)
    reporter.say(f"Done in {time.perf_counter() - started:.1f} s.")
    return EXIT_DONE


class LineReporter:
    """Prints the events of a run to a text stream that cannot redraw a line. Call it with each event."""

    def __init__(self, stream: TextIO, heading: str):
        self._stream = stream
        self._heading = heading
        self._title = ""  # such as "[3/9] Ming Edit (5)"
        self._printed_at = 0.0
        self._last_printed = ""  # the last progress line
        self._held_back = ""  # a progress line that came too soon after it

    def __call__(self, event: Event) -> None:
        if isinstance(event, NodeStarted):
            if event.number == 1:
                self.say(self._heading)
            self._title = f"[{event.number:{len(str(event.count))}}/{event.count}] {event.node}"
            self._start()
        elif isinstance(event, NodeProgress):
            self._progress(event.value, max(event.total, event.value, 1), event.text or "")
        else:
            self._finish(_duration(event))
            self._show(event.result)

    def say(self, text: str) -> None:
        """Prints `text` on lines of its own."""
        print(text, file=self._stream, flush=True)

    def stop(self, text: str) -> None:
        """Prints why the run ends before the running node is done."""
        self.say(text)

    def _start(self) -> None:
        self._printed_at, self._last_printed, self._held_back = 0.0, "", ""
        self.say(f"{self._title} ...")

    def _progress(self, value: int, total: int, text: str) -> None:
        now, line = time.perf_counter(), f"{value}/{total}"
        if line == self._last_printed:  # such as text that follows a finished image
            return
        if value == total or now - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self.say(_INDENT + line)
            self._printed_at, self._last_printed, self._held_back = now, line, ""
        else:
            self._held_back = line

    def _finish(self, duration: str) -> None:
        self.say(_INDENT + (f"{self._held_back}, " if self._held_back else "") + duration)

    def _show(self, result: NodeResult) -> None:
        """Prints what the node shows to the user: texts and the names of files."""
        for items in result.ui.values():
            for item in items:
                if isinstance(item, str):
                    self.say("\n".join(_INDENT + line for line in item.splitlines() or ["(no text)"]))
                elif isinstance(item, dict) and "filename" in item:
                    verb = "preview" if item.get("type") == "temp" else "saved"
                    self.say(f"{_INDENT}{verb} {shown_file(item)}")


class BarReporter(LineReporter):
    """Prints the events of a run to a terminal, with a progress bar while a node runs and one line when it is done."""

    _bar: tqdm | None = None

    def say(self, text: str) -> None:
        """Prints `text` on lines of its own, above the bar."""
        with tqdm.external_write_mode(file=self._stream):
            super().say(text)

    def stop(self, text: str) -> None:
        self._close_bar()
        self._stream.write(f"\r{' ' * (_columns() - 1)}\r")  # the terminal has put a ^C behind the bar
        super().stop(text)

    def _start(self) -> None:
        self._bar = tqdm(
            desc=disp_trim(self._title, _columns() // 2),
            bar_format="{desc} ...",  # until the node reports progress
            ascii="░█",
            file=self._stream,
            leave=False,
            ncols=_columns() - 1,  # a full line would wrap, and could not be redrawn
            nrows=shutil.get_terminal_size().lines,  # tqdm hides the bar in a terminal that does not tell its size
        )

    def _progress(self, value: int, total: int, text: str) -> None:
        if self._bar is None:
            return
        self._bar.bar_format = "{desc}  {bar:20}  {n_fmt}/{total_fmt}  {elapsed_s:.1f} s{postfix}"
        self._bar.n, self._bar.total, self._bar.ncols = value, total, _columns() - 1
        self._bar.set_postfix_str(_last_columns(text, _columns() // 3), refresh=False)
        self._bar.refresh()

    def _finish(self, duration: str) -> None:
        self._close_bar()
        self.say(f"{self._title}  {duration}")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


class _ReporterLog(logging.Handler):
    """Prints log records through a reporter."""

    def __init__(self, reporter: LineReporter):
        super().__init__(logging.WARNING)
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self._reporter.say(f"{_INDENT}{record.levelname.lower()}: {record.getMessage()}")


def _duration(event: NodeFinished) -> str:
    return "already computed" if event.cached else f"{event.result.seconds:.1f} s"


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _last_columns(text: str, columns: int) -> str:
    """The end of `text`, on one line of at most `columns` columns. Chinese and Japanese characters take two columns."""
    text = " ".join(text[-columns * 2 :].split()) if columns > 0 else ""
    while disp_len(text) > columns:
        text = text[1:]
    return text
