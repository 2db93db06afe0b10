"""Images of which a part is kept: edits inside a mask, the region of an edit found first, and completion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ming_core import ImageResult

from ..world import Task, compare, read_scene, to_mask
from ..world.tasks import require
from .evaluator import Evaluator
from .judging import judge_edit
from .scores import Score, share

OF_ONE_OBJECT = ("edit/recolor", "edit/remove", "edit/move")


def masked_edits(evaluator: Evaluator) -> Iterator[Score]:
    """Edits of an attached image inside a mask that someone might paint; removals once more by themselves."""
    for name, family in (("edits inside a mask", "masked edit"), ("removals inside a mask", "masked edit/remove")):
        tasks = evaluator.tasks([family])
        yield from _judged(name, evaluator, tasks, evaluator.draw(tasks), "95 %")


def completions(evaluator: Evaluator) -> Iterator[Score]:
    """Images of which a part is missing. A seam that shows would be read as an object, or as a part of one."""
    tasks = evaluator.tasks(["complete"])
    results = evaluator.draw(tasks)
    right = [
        compare(read_scene(evaluator.pixels(result.features)), require(task.target_scene)).all_right
        for task, result in zip(tasks, results, strict=True)
    ]
    yield share("images completed as asked, no seam seen by the scorer", right, "95 %")


def regions_then_edits(evaluator: Evaluator) -> Iterator[Score]:
    """The region of an edit, drawn by the model, read as a mask from features alone; then the edit inside it.

    One of several objects is edited. The image is attached again, since the newest one in view is that of the region.
    To compare, the same edits are drawn without a region, each in a new conversation.
    """
    pairs = _regions_and_edits(evaluator)
    regions = evaluator.draw([asked for asked, _ in pairs])
    without = [replace(edit, attached=asked.attached, mask=None) for asked, edit in pairs]
    edits = []
    for edit, region in zip(without, regions, strict=True):
        found = evaluator.region_mask(evaluator.features(require(edit.attached)), region.features)
        # with nothing found there is nothing to be limited: the edit is drawn as one without a mask
        edits.append(replace(edit, mask=to_mask(found) if found.any() else None))
    name = "edits inside the region that the model found"
    yield from _judged(name, evaluator, edits, evaluator.draw(edits, regions), "97 %")
    yield from _judged("the same edits without a region", evaluator, without, evaluator.draw(without), "report")


def _regions_and_edits(evaluator: Evaluator) -> list[tuple[Task, Task]]:
    """Unseen edits of one of several objects: the question for the region, and the edit itself."""
    several = (max(2, evaluator.objects[0]), max(3, evaluator.objects[1]))
    dialogues = evaluator.dialogues(
        ["identify region", *OF_ONE_OBJECT], 2, several, wanted=lambda dialogue: dialogue.edits_its_region
    )
    return [(first, second) for first, second in (dialogue.tasks for dialogue in dialogues)]


def _judged(
    name: str, evaluator: Evaluator, tasks: list[Task], results: list[ImageResult], aim: str
) -> Iterator[Score]:
    """How many of the edits are done, with this aim, and leave alone what they do not mention."""
    judged = [
        judge_edit(task, read_scene(evaluator.pixels(result.features)))
        for task, result in zip(tasks, results, strict=True)
    ]
    yield share(f"{name} done as asked", [edit.done for edit in judged], aim)
    kept = [edit.kept for edit in judged if edit.kept is not None]
    if kept:  # in a few scenes there may be no other object
        yield share(f"{name}: objects not mentioned unchanged", kept, aim if aim == "report" else "99.5 %")
