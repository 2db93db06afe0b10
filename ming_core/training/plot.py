"""A plot of a log, columns of a CSV file over one of them. Matplotlib is used where it is installed."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

log = logging.getLogger(__name__)


def plot_log(log_csv: Path, image: Path, over: str = "step") -> bool:
    """Plot every other column over the column `over` into a PNG. False without a log or without Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no plot of the losses in %s: Matplotlib is not installed (pip install matplotlib)", log_csv)
        return False
    if not log_csv.exists():
        return False
    with log_csv.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name != over] if rows else []
    if not names:
        return False
    figure = Figure(figsize=(4.0 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
        known = [row for row in rows if row[name]]
        axis.plot([float(row[over]) for row in known], [float(row[name]) for row in known], linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel(over, fontsize=9)
    figure.savefig(image, dpi=110)
    return True
