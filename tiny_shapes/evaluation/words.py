"""Prompts as people type them, requests from outside the world, and questions about two images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from ..world import OUTSIDE, Task, cluttered, compare, read_scene, retyped
from ..world.tasks import require
from .evaluator import Evaluator
from .scores import Score, share

Rewritten = Callable[[np.random.Generator, str], str]


def ways_to_type(evaluator: Evaluator) -> Iterator[Score]:
    """Drawings from prompts in capitals, in full width, with tabs or no-break spaces.

    Counted are those that are right in plain words. What are the same tokens to the model is not drawn twice.
    """
    tasks = evaluator.tasks(["generate"])
    right = _right(evaluator, tasks)
    typed = _rewritten(tasks, retyped)
    others = [i for i, task in enumerate(typed) if not evaluator.same_words(task.prompt, tasks[i].prompt)]
    drawn = dict(zip(others, _right(evaluator, [typed[i] for i in others], others), strict=True))
    again = [drawn.get(i, plain) for i, plain in enumerate(right)]
    yield share("drawings as right however the prompt is typed", _where(again, right), "100 %")


def additions(evaluator: Evaluator) -> Iterator[Score]:
    """Drawings from prompts with additions that mean nothing, in words that were kept from training: "(red:1.2)",
    "8k, masterpiece". Counted are those that are right in plain words."""
    tasks = evaluator.tasks(["generate"])
    right = _right(evaluator, tasks)
    again = _right(evaluator, _rewritten(tasks, lambda rng, prompt: cluttered(rng, prompt, unseen=True)))
    yield share("drawings as right with additions that mean nothing", _where(again, right), "85 %")


def requests(evaluator: Evaluator) -> Iterator[Score]:
    """Whether a model that may choose answers what lies outside its world in words, and draws what lies inside."""
    said = [evaluator.says(task) for task in evaluator.tasks(["outside"])]
    yield share("requests outside its world answered in words", [OUTSIDE in (text or "") for text in said], "90 %")
    said = [evaluator.says(task) for task in evaluator.tasks(["generate"])]
    yield share("drawings begun by itself", [text is None for text in said], "95 %")


def two_images(evaluator: Evaluator) -> Iterator[Score]:
    """Questions about two images in one message."""
    for name, kind in (("which of two scenes has a thing", "which"), ("what differs in two scenes", "difference")):
        tasks = evaluator.tasks([f"pair/{kind}"])
        yield share(f"{name}, answered exactly", [evaluator.answer(task) == task.answer for task in tasks], "90 %")


def _right(evaluator: Evaluator, tasks: Sequence[Task], seeds: Sequence[int] | None = None) -> list[bool]:
    """Whether all objects are right, of the drawing of every task."""
    results = evaluator.draw(tasks, seeds=seeds)
    return [
        compare(read_scene(evaluator.pixels(result.features)), require(task.target_scene)).objects_right
        for task, result in zip(tasks, results, strict=True)
    ]


def _rewritten(tasks: Sequence[Task], rewrite: Rewritten) -> list[Task]:
    """The tasks with their prompts rewritten, the same way at every call."""
    return [
        replace(task, prompt=rewrite(np.random.default_rng([7, number]), task.prompt))
        for number, task in enumerate(tasks)
    ]


def _where(hits: Sequence[bool], right: Sequence[bool]) -> list[bool]:
    """The hits where the plain prompt was right; all of them if it never was: a model gets no marks for that."""
    return [hit for hit, plain in zip(hits, right, strict=True) if plain] or list(hits)
