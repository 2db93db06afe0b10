"""Timing of several ways to do the same thing, taken alternately in one run, and a description of the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def clock() -> float:
    """Seconds of CPU time on one thread, which other processes hardly disturb, and of wall time on several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = clock()
    run()
    return clock() - started


def medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, measured alternately (A B A B ...) after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            times[name].append(seconds_of(run))
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def machine() -> str:
    """The processor, what is measured, and the torch version, for the head of a table."""
    threads = torch.get_num_threads()
    kind = "CPU time, 1 thread" if threads == 1 else f"wall time, {threads} threads"
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {kind}, torch {torch.__version__}"
