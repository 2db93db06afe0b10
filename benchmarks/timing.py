"""Times of several ways to do one thing, measured in turn in one run, and the words for the machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def clock() -> float:
    """Seconds: this process's own on one thread, which other processes hardly disturb; else those on the wall."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def medians(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each way: A B A B ..., after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, run in ways.items():
            started = clock()
            run()
            times[name].append(clock() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def machine() -> str:
    threads = torch.get_num_threads()
    kind = "CPU time, 1 thread" if threads == 1 else f"wall time, {threads} threads"
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {kind}, torch {torch.__version__}"
