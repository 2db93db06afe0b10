"""What a design can do on unseen scenes; both designs get the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from ming_core import Engine, ImageResult, Solver

from ..evaluation.evaluator import Evaluator
from ..training.data import DialogueData
from ..training.joint_loss import JointLoss
from ..world import QUESTION_KINDS, Comparison, Task, compare, read_scene
from ..world.questions import question
from ..world.tasks import require

OBJECTS = (1, 2)
DRAWINGS, EDITS, QUESTIONS = 48, 32, 64
PER_DRAWING = 2  # questions about an image that the model drew
SOLVER = Solver(8, "data_ab2")
HELD_OUT = 4  # batches of unseen dialogues, for the losses
LOSSES = ("text", "flow")


def figures_of(engine: Engine, module: JointLoss, data: DialogueData, through_pixels: bool) -> dict[str, float]:
    """Shares, 0 to 1, and losses. What cannot be measured yet is left out.

    through_pixels: whether a drawing must be decoded, encoded and attached before it is seen.

    drawn      drawings with all objects right
    edited     edits with all objects right and the background kept, of images that are attached
    asked      questions about attached images that are answered exactly
    asked_own  questions about right drawings of the model's own
    unseen_*   losses on unseen dialogues
    """
    engine.prefix_cache.clear()  # it may hold keys and values of other weights
    drawings = _evaluator(engine, DRAWINGS)
    tasks = drawings.tasks(["generate"])
    drawn = drawings.draw(tasks)
    compared = _compared(drawings, tasks, drawn)
    figures = {"drawn": _share(c.objects_right for c in compared)}
    edits = _evaluator(engine, EDITS)
    tasks_of_edits = edits.tasks(["edit"])
    figures["edited"] = _share(c.all_right for c in _compared(edits, tasks_of_edits, edits.draw(tasks_of_edits)))
    questions = _evaluator(engine, QUESTIONS)
    figures["asked"] = _share(questions.answer(task) == task.answer for task in questions.tasks(["question"]))
    right = [(task, result) for task, result, c in zip(tasks, drawn, compared, strict=True) if c.all_right]
    if right:
        answers = [
            _answers(drawings, task, result, number, through_pixels) for number, (task, result) in enumerate(right)
        ]
        figures["asked_own"] = _share(answer for found in answers for answer in found)
    engine.prefix_cache.clear()
    return figures | unseen_losses(module, data)


@torch.no_grad()
def unseen_losses(module: JointLoss, data: DialogueData) -> dict[str, float]:
    """The mean losses on dialogues of unseen scenes, always the same ones."""
    unseen = replace(data, split="eval", guidance_rows=0.0)
    losses = []
    for number in range(HELD_OUT):
        batch = unseen(np.random.default_rng([number, 1]))
        losses.append(module(batch, torch.Generator().manual_seed(number)))
    return {f"unseen_{name}": float(np.mean([float(found[name]) for found in losses])) for name in LOSSES}


def _evaluator(engine: Engine, scenes: int) -> Evaluator:
    return Evaluator(engine, scenes, OBJECTS, solver=SOLVER)


def _pixels(evaluator: Evaluator, result: ImageResult) -> np.ndarray:
    """What was drawn, float32 [H, W, 3], 0..1, from its latents: only one of the designs has made features of them."""
    return evaluator.pixels(evaluator.engine.mingtok.semantic_features(result.features.latents))


def _compared(evaluator: Evaluator, tasks: list[Task], results: list[ImageResult]) -> list[Comparison]:
    return [
        compare(read_scene(_pixels(evaluator, result)), require(task.target_scene))
        for task, result in zip(tasks, results, strict=True)
    ]


def _answers(evaluator: Evaluator, task: Task, result: ImageResult, number: int, through_pixels: bool) -> list[bool]:
    """Whether questions about a drawing are answered right, in the conversation in which it was drawn."""
    rng = np.random.default_rng([number, 2])
    attached = None
    if through_pixels:
        pixels = np.clip(np.round(_pixels(evaluator, result) * 255), 0, 255).astype(np.uint8)
        attached = evaluator.features(pixels)
    found: list[bool] = []
    while len(found) < PER_DRAWING:
        asked = question(rng, require(task.target_scene), str(rng.choice(QUESTION_KINDS)))
        if asked is not None:
            said = evaluator.engine.understand(result.conversation, asked.text, features=attached, max_new_tokens=16)
            found.append(said.text.strip() == asked.answer)
    return found


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))
