"""What makes an answer or an edit right, by what the scorer reads from pixels."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ..world import DetectedObject, Reading, SceneObject, Task, compare, parse_scene
from ..world.descriptions import NamedObject, named_objects
from ..world.tasks import require


class JudgedEdit(NamedTuple):
    """Whether an edit is done as asked, and whether all other objects are unchanged; None if there are none."""

    done: bool
    kept: bool | None


def judge_edit(task: Task, reading: Reading) -> JudgedEdit:
    """Compare what was read from an edited image with what the edit asked for."""
    source, target = require(task.source_scene), require(task.target_scene)
    comparison = compare(reading, target)
    untouched = [obj in source.objects for obj in target.objects]
    changed = [right for right, same in zip(comparison.right, untouched, strict=True) if not same]
    gone = {identity(obj) for obj in source.objects if obj not in target.objects}
    left = gone & {identity(obj) for obj in reading.objects}
    as_many = len(reading.objects) == len(target.objects)
    done = all(changed) and as_many and not left and comparison.background
    others = [right for right, same in zip(comparison.right, untouched, strict=True) if same]
    return JudgedEdit(done, all(others) if others else None)


def described_objects(description: str) -> set[tuple] | None:
    """What makes each described object the right one; None for words that describe no scene."""
    try:
        return {identity(obj) for obj in parse_scene(description).objects}
    except ValueError:
        return None


def identity(obj: SceneObject | DetectedObject) -> tuple:
    """What makes an object the right one, whatever its size."""
    return obj.shape, obj.color, obj.position


def shows_what_words_name(reading: Reading, words: str) -> bool:
    """Whether an image shows the objects that a description names, and no others.

    What the words leave open, a color or a place, may be anything. Sizes are not judged.
    """
    named = named_objects(words)

    def agrees(name: NamedObject, seen: DetectedObject) -> bool:
        return all(getattr(name, said) in ("", getattr(seen, said)) for said in ("shape", "color", "position"))

    return len(reading.objects) == len(named) and any(
        all(map(agrees, named, order)) for order in itertools.permutations(reading.objects)
    )
