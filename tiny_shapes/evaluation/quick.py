"""The quick evaluation: a few figures on a few unseen scenes, the same each time, for a model in training.

It tells whether training goes the right way; `suite` measures on many scenes what a model can do.
"""

from __future__ import annotations

import numpy as np

from ming_core import Engine

from ..world import Comparison, compare, read_scene
from ..world.tasks import require
from .evaluator import Evaluator

QUESTIONS, DESCRIPTIONS, DRAWINGS, EDITS = 32, 8, 12, 6


def quick_evaluation(engine: Engine, objects: tuple[int, int]) -> dict[str, float]:
    """Shares, 0 to 1, of answers given exactly, and of images with all objects right, with those of each attribute.

    objects: fewest and most objects in a scene.
    """
    engine.prefix_cache.clear()  # it may hold keys and values of other weights
    figures = {
        "asked": _answered(Evaluator(engine, QUESTIONS, objects), "question"),
        "described": _answered(Evaluator(engine, DESCRIPTIONS, objects), "describe"),
        "paired": _answered(Evaluator(engine, QUESTIONS, objects), "pair"),
    }
    drawn = _compared(Evaluator(engine, DRAWINGS, objects), "generate")
    for name in ("shape", "color", "size", "position"):
        figures[f"drawn_{name}"] = float(np.mean([v for c in drawn for v in getattr(c, name)]))
    figures["drawn_background"] = float(np.mean([c.background for c in drawn]))
    figures["drawn"] = float(np.mean([c.objects_right for c in drawn]))
    for name, task in (("edited", "edit"), ("completed", "complete")):
        figures[name] = float(np.mean([c.all_right for c in _compared(Evaluator(engine, EDITS, objects), task)]))
    engine.prefix_cache.clear()
    return figures


def _answered(evaluator: Evaluator, name: str) -> float:
    """The share of these tasks that are answered exactly."""
    return float(np.mean([evaluator.answer(task) == task.answer for task in evaluator.tasks([name])]))


def _compared(evaluator: Evaluator, name: str) -> list[Comparison]:
    """How well the drawn image of each of these tasks fits its scene."""
    tasks = evaluator.tasks([name])
    images = [evaluator.pixels(result.features) for result in evaluator.draw(tasks)]
    return [compare(read_scene(image), require(task.target_scene)) for image, task in zip(images, tasks, strict=True)]
