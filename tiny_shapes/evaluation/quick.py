"""A quick look at a model in training, through the public API and the scorer: a few unseen scenes, the same each time.

It tells whether training goes the right way; what the model can do is measured by evaluation.py, on many scenes.
"""

from __future__ import annotations

import numpy as np

from ming_core.univision import UniVision

from ..world import Comparison, compare, read_scene
from .examiner import Examiner

QUESTIONS, DESCRIPTIONS, DRAWINGS, EDITS = 32, 8, 12, 6


def probe(model: UniVision, things: tuple[int, int]) -> dict[str, float]:
    """Shares, 0 to 1: answers given exactly, and pictures whose things are all right, with each attribute's own."""
    model.prefix_cache.clear()  # it may hold what other weights made
    figures = {
        "asked": _answered(Examiner(model, QUESTIONS, things), "question"),
        "described": _answered(Examiner(model, DESCRIPTIONS, things), "describe"),
    }
    drawn = _compared(Examiner(model, DRAWINGS, things), "generate")
    for name in ("shape", "color", "size", "position"):
        figures[f"drawn_{name}"] = float(np.mean([v for c in drawn for v in getattr(c, name)]))
    figures["drawn_background"] = float(np.mean([c.background for c in drawn]))
    figures["drawn"] = float(np.mean([c.things_right for c in drawn]))
    figures["edited"] = float(np.mean([c.all_right for c in _compared(Examiner(model, EDITS, things), "edit")]))
    model.prefix_cache.clear()
    return figures


def _answered(examiner: Examiner, task: str) -> float:
    return float(np.mean([examiner.answer(turn) == turn.answer for turn in examiner.rounds([task])]))


def _compared(examiner: Examiner, task: str) -> list[Comparison]:
    asked = examiner.rounds([task])
    pictures = [examiner.pixels(turn.features) for turn in examiner.draw_rounds(asked)]
    return [compare(read_scene(p), turn.target_scene) for p, turn in zip(pictures, asked, strict=True)]
