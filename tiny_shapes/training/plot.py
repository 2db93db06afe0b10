"""log.csv as a picture. Matplotlib is used where it is installed; training does not need it."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

log = logging.getLogger(__name__)

NOT_CURVES = ("stage", "step", "hours")
COLUMNS = 4


def plot(log_csv: Path, picture: Path) -> bool:
    """Draw every column of the log over the hours into a PNG; False (and a word in the log) without Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no plot: Matplotlib is not installed (pip install matplotlib)")
        return False
    if not log_csv.exists():
        return False
    with log_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in NOT_CURVES]
    lines = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.2 * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flat
    for name, axis in zip(names, axes, strict=False):
        known = [row for row in rows if row[name]]
        axis.plot([float(row["hours"]) for row in known], [float(row[name]) for row in known], linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    for axis in axes:  # those that are left
        axis.set_axis_off()
    figure.supxlabel(f"hours of training: {rows[0]['stage']}", fontsize=9)
    figure.savefig(picture, dpi=110)
    return True
