"""A plot of a log, columns of a CSV file over one of them. Matplotlib is used where it is installed."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

log = logging.getLogger(__name__)


COLUMNS = 4  # of panels


def plot_log(log_csv: Path, image: Path, over: str = "step", left_out: tuple[str, ...] = ()) -> bool:
    """Plot the columns of a log over the column `over` into a PNG, but those left out.

    Returns False without a log or without Matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no plot of the losses in %s: Matplotlib is not installed (pip install matplotlib)", log_csv)
        return False
    if not log_csv.exists():
        return False
    with log_csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name not in (over, *left_out)] if rows else []
    if not names:
        return False
    columns = min(COLUMNS, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * lines), layout="constrained")
    axes = iter(figure.subplots(lines, columns, squeeze=False).flat)
    for name in names:
        axis = next(axes)
        known = [row for row in rows if row[name]]
        axis.plot([float(row[over]) for row in known], [float(row[name]) for row in known], linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    for unused in axes:
        unused.set_axis_off()
    figure.supxlabel(over, fontsize=9)
    figure.savefig(image, dpi=110)
    return True
