"""The table and the plot of the runs: by step and by minute, and how long *separate* takes to where *unified* is."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ming_core.files import write_whole

from .designs import DESIGNS

log = logging.getLogger(__name__)

SHARES = {"drawn": "drawings right", "edited": "edits right", "asked": "questions right"}
OWN = {"asked_own": "questions about its own drawings right"}
LOSSES = {"unseen_flow": "loss of drawing", "unseen_text": "loss of words"}
FIGURES = {**SHARES, **OWN, **LOSSES}
PARTS = {"a third": 1 / 3, "half": 1 / 2, "the end": 1.0}


class Curve(NamedTuple):
    """The runs of one kind, at the steps that all of them have reached.

    minutes  means over the seeds
    runs     name -> [seeds, steps]; NaN where a run could not measure it
    """

    steps: np.ndarray
    minutes: np.ndarray
    runs: dict[str, np.ndarray]

    @property
    def figures(self) -> dict[str, np.ndarray]:
        """The means of the runs by name; NaN where no run could measure it."""
        return {name: _mean(values) for name, values in self.runs.items()}


def write_report(runs: Path, out: Path) -> Path:
    """Write ablation.md and ablation.png; returns the path of the former. Raises ValueError where a run is missing."""
    joint = {design: read_curve(runs, design) for design in DESIGNS}
    alone = {design: read_curve(runs, f"{design}-drawing-alone") for design in DESIGNS}
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([_ends(joint, alone), _needs(joint, "step"), _needs(joint, "minute")]) + "\n"
    write_whole(out / "ablation.md", text.encode())
    _plot(joint, alone, out / "ablation.png")
    return out / "ablation.md"


def read_curve(runs: Path, name: str) -> Curve:
    """The curve of the runs of this name, whatever their seeds. Raises ValueError if there is none."""
    logs = []
    for path in sorted(runs.glob(f"{name}-[0-9]*/log.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            logs.append({int(row["step"]): row for row in csv.DictReader(file) if row.get("drawn")})
    if not logs:
        raise ValueError(f"{runs} has no log of {name}: train it first")
    steps = sorted(set.intersection(*(set(found) for found in logs)))

    def values(column: str) -> np.ndarray:
        return np.array([[float(log[step].get(column) or "nan") for step in steps] for log in logs])

    figures = {column: values(column) for column in FIGURES}
    return Curve(np.array(steps), 60 * _mean(values("hours")), figures)


def _mean(values: np.ndarray) -> np.ndarray:
    """The mean over the runs, [seeds, steps] -> [steps], of those that have a value; NaN where none has."""
    known = ~np.isnan(values)
    return np.where(known, values, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


def first_reached(times: np.ndarray, values: np.ndarray, level: float) -> float | None:
    """When a curve first comes to a level, between two points of it by their line; None if it never does."""
    for i, value in enumerate(values):
        if value >= level:
            if i == 0 or values[i - 1] >= level:
                return float(times[i])
            share = (level - values[i - 1]) / (value - values[i - 1])
            return float(times[i - 1] + share * (times[i] - times[i - 1]))
    return None


def _ends(joint: dict[str, Curve], alone: dict[str, Curve]) -> str:
    """What the runs can do at the end, and what joint training costs drawing."""
    lines = [
        f"| at the end | seeds | steps | minutes | {' | '.join(FIGURES.values())} |",
        "|---" * (len(FIGURES) + 4) + "|",
    ]
    for kind, curves in (("everything", joint), ("drawing alone", alone)):
        for design, curve in curves.items():
            seeds = len(curve.runs["drawn"])
            cells = [f"{design}, {kind}", f"{seeds}", f"{curve.steps[-1]}", f"{curve.minutes[-1]:.0f}"]
            for name in FIGURES:
                value = curve.figures[name][-1]
                taught = kind == "everything" or name not in ("asked", *OWN, "unseen_text")
                cells.append("" if np.isnan(value) or not taught else _with_range(name, curve.runs[name][:, -1]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _needs(joint: dict[str, Curve], unit: str) -> str:
    """When *separate* is where *unified* was at a third, half and the end of its budget."""
    unified, separate = joint["unified"], joint["separate"]
    lines = [
        f"| {unit}s to the level of *unified* at | {' | '.join(PARTS)} |",
        "|---" * (len(PARTS) + 1) + "|",
    ]
    for name, title in FIGURES.items():
        sign = -1 if name in LOSSES else 1  # of a loss, less is more
        cells = []
        for part in PARTS.values():
            own, other = (curve.steps if unit == "step" else curve.minutes for curve in (unified, separate))
            at = int(np.abs(unified.steps - part * unified.steps[-1]).argmin())
            level = sign * unified.figures[name][at]
            known = ~np.isnan(separate.figures[name])
            found = first_reached(other[known], sign * separate.figures[name][known], level)
            when = f"not by {other[-1]:.0f}" if found is None else f"{found:.0f} ({found / own[at]:.2f} times)"
            reached = not np.isnan(level) and level != 0  # where nothing was right there is no level to come to
            cells.append(f"{_shown(name, abs(level))}: {own[at]:.0f}, *separate* {when}" if reached else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_range(name: str, values: np.ndarray) -> str:
    """The mean of the runs, and the least and the most of several."""
    mean, least, most = (_shown(name, f(values)) for f in (np.nanmean, np.nanmin, np.nanmax))
    return mean if len(values) == 1 else f"{mean} ({least} to {most})"


def _shown(name: str, value: float) -> str:
    return f"{value:.4f}" if name in LOSSES else f"{100 * value:.0f} %"


def _plot(joint: dict[str, Curve], alone: dict[str, Curve], image: Path) -> None:
    """Every figure by step, in a panel of its own: the mean of the runs, each of them as a thin line; dashed, what was
    taught drawing alone."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no plot: Matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 3).flat, FIGURES.items(), strict=True):
        for design, color in zip(DESIGNS, ("tab:blue", "tab:orange"), strict=True):
            axis.plot(joint[design].steps, joint[design].figures[name], color=color, label=design)
            for run in joint[design].runs[name]:
                axis.plot(joint[design].steps, run, color=color, linewidth=0.5, alpha=0.5)
            if name in ("drawn", "edited", "unseen_flow"):
                label = f"{design}, drawing alone"
                axis.plot(alone[design].steps, alone[design].figures[name], "--", color=color, linewidth=1, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(image, dpi=110)
