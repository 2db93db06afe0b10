"""A plot of log.csv. Matplotlib is used where it is installed; training does not need it."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

log = logging.getLogger(__name__)

NOT_PLOTTED = ("stage", "step", "hours")
COLUMNS = 4


def plot_log(log_csv: Path, image: Path) -> bool:
    """Plot every column of the log over the hours into a PNG. Returns False without a log or without Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no plot of the log: Matplotlib is not installed (pip install matplotlib)")
        return False
    if not log_csv.exists():
        return False
    with log_csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in NOT_PLOTTED]
    lines = -(-len(names) // COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.2 * lines), layout="constrained")
    axes = iter(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for name in names:
        axis = next(axes)
        known = [row for row in rows if row[name]]
        axis.plot([float(row["hours"]) for row in known], [float(row[name]) for row in known], linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    for unused in axes:
        unused.set_axis_off()
    figure.supxlabel(f"hours of training: {rows[0]['stage']}", fontsize=9)
    figure.savefig(image, dpi=110)
    return True
