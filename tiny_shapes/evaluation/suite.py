"""The evaluation suite: how well a model sees, draws and edits, each measured on unseen scenes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ming_core.features import CHANGED, change
from ming_core.images import psnr, to_images, to_pixels

from ..world import Task, compare, draw, read_region, read_scene
from ..world.tasks import require
from .evaluator import Evaluator
from .judging import described_objects, identity, judge_edit, shows_what_words_name
from .masked import completions, masked_edits, regions_then_edits
from .scores import Score, mean, share
from .words import additions, requests, two_images, ways_to_type

CELL_CHANGED = 0.25  # share of a token's pixels from which on the token counts as changed
PIXEL_CHANGED = 24  # levels of 255


def reconstruction(evaluator: Evaluator) -> Iterator[Score]:
    """Scenes, encoded and decoded."""
    values = []
    for task in evaluator.tasks(["describe"]):
        image = require(task.attached)
        decoded = evaluator.pixels(evaluator.features(image))
        values.append(psnr(torch.from_numpy(decoded), torch.from_numpy(image / 255.0)))
    yield mean("reconstruction, PSNR", values, "32 dB", "dB")


def photographs(evaluator: Evaluator, folder: Path) -> Score:
    """Reconstruction of images that are not of this world: the middle square of each, at the model's size."""
    values = []
    for path in images_in(folder):
        with Image.open(path) as file:
            image = torch.from_numpy(np.array(file.convert("RGB"))).float().div(255)[None]
        square = to_images(to_pixels(image, evaluator.engine.mingtok.native_side))[0].numpy()
        decoded = evaluator.pixels(evaluator.features(np.rint(square * 255).astype(np.uint8)))
        values.append(psnr(torch.from_numpy(decoded), torch.from_numpy(square)))
    return mean("reconstruction of photographs, PSNR", values, "report", "dB")


def images_in(folder: Path) -> list[Path]:
    """The files of a folder that Pillow can read, by their names."""
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)


def questions(evaluator: Evaluator) -> Iterator[Score]:
    """Questions about an image, answered exactly."""
    hits = [evaluator.answer(task) == task.answer for task in evaluator.tasks(["question"])]
    yield share("questions answered exactly", hits, "95 %")


def descriptions(evaluator: Evaluator) -> Iterator[Score]:
    """Descriptions of an image, compared object by object."""
    tasks = evaluator.tasks(["describe"])
    hits = [described_objects(evaluator.answer(task)) == described_objects(require(task.answer)) for task in tasks]
    yield share("descriptions with every object right", hits, "85 %")


def drawings(evaluator: Evaluator) -> Iterator[Score]:
    """Images from text; then the model's own description of each, asked for in the same conversation."""
    for name, objects, aim in (("drawings", evaluator.objects, "90 %"), ("drawings of one object", (1, 1), "95 %")):
        right, agreeing = [], []
        tasks = evaluator.tasks(["generate"], objects=objects)
        for task, result in zip(tasks, evaluator.draw(tasks), strict=True):
            reading = read_scene(evaluator.pixels(result.features))
            right.append(compare(reading, require(task.target_scene)).objects_right)
            if objects == evaluator.objects:
                description = evaluator.engine.understand(
                    result.conversation, "Please describe the picture in detail.", max_new_tokens=128
                )
                agreeing.append(described_objects(description.text) == {identity(obj) for obj in reading.objects})
        yield share(f"{name} with every asked object right", right, aim)
        if agreeing:
            yield share("own description of what was drawn agrees with the scorer", agreeing, "85 %")


def terse_prompts(evaluator: Evaluator) -> Iterator[Score]:
    """Images from prompts that leave most open, such as "a red circle and a star": with the world's own choice of what
    the words leave open, which is what the model was taught; and as far as the words go."""
    tasks = evaluator.terse_tasks()
    readings = [read_scene(evaluator.pixels(result.features)) for result in evaluator.draw(tasks)]
    right = [
        compare(reading, require(task.target_scene)).objects_right
        for reading, task in zip(readings, tasks, strict=True)
    ]
    yield share("drawings from terse prompts", right, "90 %")
    asked = [shows_what_words_name(reading, task.prompt) for reading, task in zip(readings, tasks, strict=True)]
    yield share("drawings from terse prompts, as far as their words go", asked, "report")


def edits(evaluator: Evaluator) -> Iterator[Score]:
    """Edits of an attached image, and the mask that MingFeaturesCompare makes of them."""
    done, kept, masks = [], [], []
    tasks = evaluator.tasks(["edit"])
    for task, result in zip(tasks, evaluator.draw(tasks), strict=True):
        judged = judge_edit(task, read_scene(evaluator.pixels(result.features)))
        done.append(judged.done)
        if judged.kept is not None:
            kept.append(judged.kept)
        features = evaluator.features(require(task.attached))
        mask = change(features, result.features)[0, 0].numpy() > CHANGED
        masks.append(_overlap(mask, _changed_cells(task, features.grid)))
    yield share("edits done as asked", done, "88 %")
    if kept:  # in a few scenes there may be no other object
        yield share("objects not mentioned unchanged", kept, "95 %")
    yield mean("MingFeaturesCompare mask, intersection over union", masks, "0.7", "")


def regions(evaluator: Evaluator) -> Iterator[Score]:
    """Images of the region that an edit would change."""
    tasks = evaluator.tasks(["identify region"])
    values = [
        _overlap(read_region(evaluator.pixels(result.features)), read_region(require(task.target)))
        for task, result in zip(tasks, evaluator.draw(tasks), strict=True)
    ]
    yield mean("drawn region, intersection over union", values, "0.7", "")


def enhancements(evaluator: Evaluator) -> Iterator[Score]:
    """Degraded images, restored."""
    for name in ("super-resolution", "denoise", "colorize"):
        gains, right = [], []
        tasks = evaluator.tasks([name])
        for task, result in zip(tasks, evaluator.draw(tasks), strict=True):
            target = torch.from_numpy(require(task.target) / 255.0)
            before = psnr(torch.from_numpy(require(task.attached) / 255.0), target)
            pixels = evaluator.pixels(result.features)
            gains.append(psnr(torch.from_numpy(pixels), target) - before)
            right.append(compare(read_scene(pixels), require(task.target_scene)).objects_right)
        yield mean(f"{name}, PSNR gained over the input", gains, "3 dB", "dB")
        yield share(f"{name} with every object right", right, "report")


def _overlap(found: np.ndarray, expected: np.ndarray) -> float:
    """Intersection over union; 1 for two empty regions."""
    union = (found | expected).sum()
    return float((found & expected).sum() / union) if union else 1.0


def _changed_cells(task: Task, grid: tuple[int, int]) -> np.ndarray:
    """The tokens of which the edit changes at least a share CELL_CHANGED of the pixels: bool [h, w]."""
    before, after = (draw(require(scene)).astype(int) for scene in (task.source_scene, task.target_scene))
    changed = np.abs(before - after).max(-1) > PIXEL_CHANGED
    cells = changed.reshape(grid[0], changed.shape[0] // grid[0], grid[1], changed.shape[1] // grid[1])
    return cells.mean((1, 3)) >= CELL_CHANGED


SUITE: dict[str, Callable[[Evaluator], Iterator[Score]]] = {
    "reconstruction": reconstruction,
    "questions": questions,
    "descriptions": descriptions,
    "drawings": drawings,
    "terse prompts": terse_prompts,
    "edits": edits,
    "regions": regions,
    "enhancements": enhancements,
    "ways to type": ways_to_type,
    "additions": additions,
    "requests": requests,
    "two images": two_images,
    "masked edits": masked_edits,
    "regions then edits": regions_then_edits,
    "completions": completions,
}
