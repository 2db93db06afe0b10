"""The results of an evaluation: evaluation.md (a table), evaluation.json (the figures), chains.png (a plot)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from .chains import CHAIN_ROUNDS, ChainScores
from .scores import Score

log = logging.getLogger(__name__)

_CHAIN_TABLES = (
    ("right", "Rounds done right", "{:.0%}"),
    ("untouched", "PSNR of the untouched area, dB", "{:.1f}"),
)


def table(scores: Sequence[Score], chains: Sequence[ChainScores]) -> str:
    """All results as Markdown tables."""
    lines = ["| what | aim | found | 95 % interval | scenes |", "|---|---|---|---|---|", *(s.row() for s in scores)]
    for key, title, form in _CHAIN_TABLES if chains else ():
        lines += ["", f"| {title}, by round | " + " | ".join(str(k + 1) for k in range(CHAIN_ROUNDS)) + " |"]
        lines += ["|---" * (CHAIN_ROUNDS + 1) + "|"]
        for chain in chains:
            lines.append(f"| {chain.name} | " + " | ".join(form.format(x) for x in chain.table()[key]) + " |")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, scores: Sequence[Score], chains: Sequence[ChainScores]) -> None:
    """Write the results into a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.md").write_text(table(scores, chains), encoding="utf-8")
    figures = {"scores": [asdict(s) for s in scores], "chains": {c.name: c.table() for c in chains}}
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if chains:
        plot_chains(chains, folder / "chains.png")


def plot_chains(chains: Sequence[ChainScores], path: Path) -> None:
    """Plot the quality by round for each way; nothing is plotted without Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("no plot of the chains: Matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    titles = {"right": "rounds done right", "untouched": "PSNR where nothing changed, dB"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for chain in chains:
            axes.plot(range(1, CHAIN_ROUNDS + 1), chain.table()[key], marker="o", label=chain.name)
        axes.set(title=title, xlabel="round", xticks=range(1, CHAIN_ROUNDS + 1))
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
