"""Scores: a share or a mean over scenes, with its 95 % confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.96  # standard deviations of a 95 % interval


@dataclass
class Score:
    """One row of the table.

    value      a share (0..1) if the unit is "%", else a mean
    low, high  its 95 % confidence interval
    count      scenes
    aim        what was aimed at, as text
    """

    name: str
    value: float
    low: float
    high: float
    count: int
    aim: str
    unit: str = "%"

    def figure(self) -> str:
        """The value with its unit."""
        return f"{self._format(self.value)} {self.unit}".strip()

    def row(self) -> str:
        """A row of a Markdown table."""
        interval = f"{self._format(self.low)} to {self._format(self.high)}"
        return f"| {self.name} | {self.aim} | {self.figure()} | {interval} | {self.count} |"

    def _format(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.unit == "%" else f"{value:.2f}"


def share(name: str, hits: Sequence[bool], aim: str) -> Score:
    """The share of hits, with Wilson's interval, which is right near 0 and 1 as well."""
    n = len(hits)
    p = sum(hits) / n
    middle = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z * math.sqrt(p * (1 - p) / n + _Z * _Z / (4 * n * n)) / (1 + _Z * _Z / n)
    low, high = min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))  # p must not be rounded out of it
    return Score(name, p, low, high, n, aim)


def mean(name: str, values: Sequence[float], aim: str, unit: str) -> Score:
    """The mean of the values, with the normal interval."""
    half = _Z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    middle = statistics.fmean(values)
    return Score(name, middle, middle - half, middle + half, len(values), aim, unit)
