"""Chains of edits, five rounds long: feature to feature, through pixels between the rounds, and with one noise."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ming_core import Turn

from ..world import Round, compare, read_scene
from .examiner import Examiner
from .many import Wish

log = logging.getLogger(__name__)

CHAIN_ROUNDS = 5


@dataclass
class Chain:
    """Five-round chains of edits, one way: by round the share done right, and the PSNR where nothing changed."""

    name: str
    right: list[list[bool]] = field(default_factory=lambda: [[] for _ in range(CHAIN_ROUNDS)])
    untouched: list[list[float]] = field(default_factory=lambda: [[] for _ in range(CHAIN_ROUNDS)])

    def table(self) -> dict[str, list[float]]:
        return {
            "right": [statistics.fmean(r) for r in self.right],
            "untouched": [statistics.fmean(r) if r else math.nan for r in self.untouched],
        }


Way = Callable[[Examiner, list[Round], "list[Turn] | None"], "list[Turn]"]


def chains(examiner: Examiner) -> list[Chain]:
    """The same chains feature to feature, through pixels between the rounds, and with one noise in every round."""
    dialogues = examiner.dialogues(["edit"], rounds=CHAIN_ROUNDS)
    results = []
    for name, step in WAYS.items():
        log.info("chains: %s", name)
        chain, turns = Chain(name), None
        for k in range(CHAIN_ROUNDS):
            asked = [dialogue.rounds[k] for dialogue in dialogues]
            turns = step(examiner, asked, turns)
            for dialogue, turn, result in zip(dialogues, asked, turns, strict=True):
                picture = examiner.pixels(result.features)
                chain.right[k].append(compare(read_scene(picture), turn.target_scene).all_right)
                same = (dialogue.rounds[0].attached == turn.target).all(-1)
                if same.any():  # a new background may leave nothing untouched
                    error = np.square(picture - turn.target / 255.0)[same].mean()
                    chain.untouched[k].append(-10 * math.log10(max(error, 1e-10)))
        results.append(chain)
    return results


def _by_features(examiner: Examiner, asked: list[Round], before: list[Turn] | None) -> list[Turn]:
    return examiner.draw_rounds(asked, before)


def _through_pixels(examiner: Examiner, asked: list[Round], before: list[Turn] | None) -> list[Turn]:
    """Every round begins a new conversation, with the picture of the one before decoded and encoded again."""
    if before is None:
        return examiner.draw_rounds(asked)
    wishes = []
    for seed, (turn, result) in enumerate(zip(asked, before, strict=True)):
        picture = np.rint(examiner.pixels(result.features) * 255).astype(np.uint8)
        features = examiner.features(picture)._replace(depth=result.features.depth)
        wishes.append(Wish(turn.prompt, seed, features=features))
    return examiner.draw_wishes(wishes)


def _with_one_noise(examiner: Examiner, asked: list[Round], before: list[Turn] | None) -> list[Turn]:
    shape = (examiner.model.config.llm_config.num_image_tokens_for_gen, examiner.model.flow_head.net.channels)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(len(asked))]
    return examiner.draw_rounds(asked, before, noises)


WAYS: dict[str, Way] = {
    "feature to feature": _by_features,
    "through pixels": _through_pixels,
    "one noise in every round": _with_one_noise,
}


def plot(results: list[Chain], path: Path) -> None:
    """Quality by round, all ways; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("matplotlib is not installed: no plot")
        return
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    titles = {"right": "rounds done right", "untouched": "PSNR where nothing changed, dB"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for chain in results:
            axes.plot(range(1, CHAIN_ROUNDS + 1), chain.table()[key], marker="o", label=chain.name)
        axes.set(title=title, xlabel="round", xticks=range(1, CHAIN_ROUNDS + 1))
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
