"""Sequences packed into batches, with what the losses need: targets, their weights, and the auxiliary targets.

Auxiliary targets are read from the language model's hidden states by layers that are thrown away after training: what
the next image token shows (`PATCH_TARGETS`), and the objects that a prompt names (`ATTRIBUTES`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..world import (
    CANVAS,
    COLORS,
    LABEL_CLASSES,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    Task,
    draw,
    mentions,
    patch_labels,
    read_region,
)
from ..world.tasks import DRAWINGS, require
from .sequences import IGNORE, PlacedImage, Sequence

# Flow loss weights of image tokens; 1 on the plain background, which is most of a scene and soon learned.
# A model in doubt draws an object that much more readily than background: with 4 it learned faster and drew objects
# twice.
OBJECT_WEIGHT = 2.0
EDIT_WEIGHT = 4.0  # where an object is before or after an edit: what changes and what must not, alike
# Factor on the first token of each cell, whatever is there: which object comes is decided there, from the text and the
# images before, while the other quarters of the object follow the first one.
FIRST_WEIGHT = 4.0
EDITS = ("edit", "masked edit")  # the families that are weighed so
NAMING = (*DRAWINGS, "colorize", "color again")  # those of which the words say what every object is
PLAIN = 12  # levels of 255 by which a patch of plain background differs at most from the background color

# The attributes of an object, and the values of each.
ATTRIBUTES = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "position": tuple(POSITIONS)}

# What there is to tell of an image token, and the number of classes; "edited": an edit changes it, or its region
# covers it.
PATCH_TARGETS = {**LABEL_CLASSES, "edited": 2}
# Where what a cell of a drawn image shows comes from, as numbers: from nowhere; from the words, which name up to three
# objects, and in an edit the one that it is about; or from the same cell of the image that is edited.
EMPTY, FIRST_NAMED, FIRST_CELL = 0, 1, 4
ORIGINS = FIRST_CELL + len(POSITIONS)


class Batch(NamedTuple):
    """Sequences packed into R rows of L tokens; every sequence attends only to itself.

    ids, targets, positions  int64 [R, L]
    loss_weights             float32 [R, L], of the targets
    mask                     bool [R, L, L]
    images                   uint8 [P + E, H, W, 3], all images of all sequences; behind them those that are in no
                             sequence, but kept outside a mask
    drawn                    bool [P]
    image_starts             int64 [P], index of the first token of each image in the flattened rows
    flow_weights             float32 [P, N], of the flow loss of each token (0 for an image that is not drawn)
    sources                  int64 [P], the index of the image whose tokens are kept outside a mask, or -1
    opened                   bool [P, N], the tokens that are drawn: all but those that a mask keeps
    patch_targets            int64 [P, kinds, N], what each token shows (`PATCH_TARGETS`), or IGNORE
    origins                  int64 [P, cells], where what each cell shows comes from (of `ORIGINS`), or IGNORE
    object_positions         int64 [M], index in the flattened rows where a prompt has named an object
    object_targets           int64 [M, 4], that object (`ATTRIBUTES`)
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    loss_weights: Tensor
    mask: Tensor
    images: Tensor
    drawn: Tensor
    image_starts: Tensor
    flow_weights: Tensor
    sources: Tensor
    opened: Tensor
    patch_targets: Tensor
    origins: Tensor
    object_positions: Tensor
    object_targets: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def pack(sequences: list[Sequence], row_length: int, grid: tuple[int, int]) -> Batch:
    """Pack sequences, longest first, each into the first row that has room; all rows are as long as the longest."""
    length = max(row_length, *(len(s.ids) for s in sequences))
    rows = _first_fit(sequences, length)
    shape = (len(rows), length)
    ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    targets, loss_weights = np.full(shape, IGNORE, dtype=np.int64), np.ones(shape, dtype=np.float32)
    mask = np.zeros((*shape, length), dtype=bool)
    mask[:, range(length), range(length)] = True  # padding attends to itself: a softmax over nothing is NaN
    images: list[PlacedImage] = []
    starts: list[int] = []
    sources: list[int | np.ndarray | None] = []
    subjects: dict[int, SceneObject] = {}
    from_where: list[np.ndarray] = []
    for i, begin, sequence in _placed(rows):
        end = begin + len(sequence.ids)
        ids[i, begin:end], targets[i, begin:end] = sequence.ids, sequence.targets
        positions[i, begin:end], loss_weights[i, begin:end] = sequence.positions, sequence.loss_weights
        mask[i, begin:end, begin:end] = sequence.mask()
        offset = i * length + begin
        sources += [i.source + len(images) if isinstance(i.source, int) else i.source for i in sequence.images]
        images += sequence.images
        own_prompts = not sequence.masked.any()  # a guidance row has the prompt of another dialogue
        from_where += [origins(image.task if own_prompts else None, grid) for image in sequence.images]
        starts += [offset + image.start for image in sequence.images]
        subjects |= {offset + position: obj for position, obj in sequence.subjects.items()}
    source_indices, elsewhere = _resolved(sources)
    pixels, image_weights, opened, image_targets = _image_tensors(images, elsewhere, grid)
    objects = [_attributes(obj) for obj in subjects.values()]
    return Batch(
        ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        loss_weights=torch.from_numpy(loss_weights),
        mask=torch.from_numpy(mask),
        images=pixels,
        drawn=torch.tensor([image.drawn for image in images], dtype=torch.bool),
        image_starts=torch.tensor(starts, dtype=torch.long),
        flow_weights=image_weights,
        sources=torch.tensor(source_indices, dtype=torch.long),
        opened=opened,
        patch_targets=image_targets,
        origins=torch.from_numpy(np.array(from_where, dtype=np.int64).reshape(-1, len(POSITIONS))),
        object_positions=torch.tensor(list(subjects), dtype=torch.long),
        object_targets=torch.tensor(objects, dtype=torch.long).reshape(-1, len(ATTRIBUTES)),
    )


def _first_fit(sequences: list[Sequence], length: int) -> list[list[Sequence]]:
    """The sequences of each row."""
    rows: list[list[Sequence]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        row = next((i for i, free in enumerate(room) if free >= len(sequence.ids)), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(sequence)
        room[row] -= len(sequence.ids)
    return rows


def _placed(rows: list[list[Sequence]]) -> Iterator[tuple[int, int, Sequence]]:
    """Every sequence with its row and its first column."""
    for i, row in enumerate(rows):
        begin = 0
        for sequence in row:
            yield i, begin, sequence
            begin += len(sequence.ids)


def _resolved(sources: list[int | np.ndarray | None]) -> tuple[list[int], list[np.ndarray]]:
    """The index of each source, and the images that are in no sequence; those come behind all others."""
    elsewhere: list[np.ndarray] = []
    indices: list[int] = []
    for source in sources:
        if isinstance(source, np.ndarray):
            indices.append(len(sources) + len(elsewhere))
            elsewhere.append(source)
        else:
            indices.append(-1 if source is None else source)
    return indices, elsewhere


def _image_tensors(
    images: list[PlacedImage], elsewhere: list[np.ndarray], grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pixels of all images; of the placed ones the flow loss weights of their tokens, which of them are drawn, and
    their patch targets."""
    tokens = grid[0] * grid[1]
    if not images:
        nothing = torch.empty(0, 1, 1, 3, dtype=torch.uint8), torch.empty(0, tokens), torch.empty(0, tokens).bool()
        return *nothing, torch.empty(0, len(PATCH_TARGETS), tokens, dtype=torch.long)
    return (
        torch.from_numpy(np.stack([*(image.pixels for image in images), *elsewhere])),
        torch.from_numpy(np.stack([flow_weights(image.task, grid) for image in images])),
        torch.from_numpy(np.stack([opened_tokens(image.task, grid) for image in images])),
        torch.from_numpy(np.stack([patch_targets(image.task, grid) for image in images])),
    )


def _attributes(obj: SceneObject) -> list[int]:
    """The index of each attribute of the object among the values of `ATTRIBUTES`."""
    return [values.index(getattr(obj, name)) for name, values in ATTRIBUTES.items()]


def patch_targets(task: Task | None, grid: tuple[int, int]) -> np.ndarray:
    """What the tokens of a task's target show: int64 [kinds, N].

    All is IGNORE for an image that is not drawn (None), and most for one that does not just show its scene (a region).
    """
    targets = np.full((len(PATCH_TARGETS), grid[0] * grid[1]), IGNORE, dtype=np.int64)
    if task is None:
        return targets
    image = require(task.target)
    if task.target_scene is not None and np.array_equal(image, draw(task.target_scene)):
        labels = patch_labels(task.target_scene, grid[0])
        targets[: len(labels)] = [labels[name].reshape(-1) for name in LABEL_CLASSES]
    if task.family in EDITS:
        targets[-1] = _differ(image, draw(require(task.source_scene)), grid)
    elif task.family == "identify region":
        targets[-1] = _cells(read_region(image), grid)
    return targets


def origins(task: Task | None, grid: tuple[int, int]) -> np.ndarray:
    """Where what each cell of a task's target shows comes from: int64 [cells], of `ORIGINS`.

    Colors come from the words alone, and so does an image that gets those of its description. IGNORE for cells that a
    mask keeps, and all of it for images that are neither edited nor described by the words, and for prompts that do not
    say which object is which.
    """
    found: dict[str, int] | None = None
    if task is not None and task.family in NAMING:
        found = _named(task.prompt, require(task.target_scene))
    elif task is not None and task.family in EDITS:
        found = _copied(require(task.source_scene), require(task.target_scene))
    if task is None or found is None:
        return np.full(len(POSITIONS), IGNORE, dtype=np.int64)
    numbers = np.array([found.get(position, EMPTY) for position in POSITIONS], dtype=np.int64)
    return np.where(opened_tokens(task, grid)[first_tokens(grid)], numbers, IGNORE)


def _named(prompt: str, scene: Scene) -> dict[str, int] | None:
    """The origin of every object in the order of the words, by its position; None if they do not name all of them."""
    objects = [obj for _, obj in mentions(prompt, scene)]
    if not len(objects) == len(scene.objects) <= FIRST_CELL - FIRST_NAMED:
        return None
    return {obj.position: number for number, obj in enumerate(objects, FIRST_NAMED)}


def _copied(source: Scene, target: Scene) -> dict[str, int]:
    """The origin of every object of an edited scene, by its position: its cell, or the words that the edit is about."""
    cells = {position: number for number, position in enumerate(POSITIONS, FIRST_CELL)}
    return {obj.position: cells[obj.position] if obj in source.objects else FIRST_NAMED for obj in target.objects}


def flow_weights(task: Task | None, grid: tuple[int, int]) -> np.ndarray:
    """The flow loss weights of the tokens of a task's target: float32 [N]; 0 for an image that is not drawn (None), and
    for tokens that are not."""
    if task is None:
        return np.zeros(grid[0] * grid[1], dtype=np.float32)
    image = require(task.target)
    background = np.median(image.reshape(-1, 3), axis=0)
    occupied = _differ(image, background, grid)
    weights = np.where(occupied, OBJECT_WEIGHT, 1.0)
    if task.family in EDITS:
        before = _differ(draw(require(task.source_scene)), background, grid)
        if not before.all():  # unless the background is new
            weights[occupied | before] = EDIT_WEIGHT
    elif task.family == "complete":
        weights[:] = OBJECT_WEIGHT  # what is not asked for must stay away as surely as what is asked for must come
    weights[first_tokens(grid)] *= FIRST_WEIGHT
    return (weights * opened_tokens(task, grid)).astype(np.float32)


def opened_tokens(task: Task | None, grid: tuple[int, int]) -> np.ndarray:
    """The tokens of a task's target that are drawn, bool [N]: those where the mask is white, or all."""
    if task is None or task.mask is None:
        return np.ones(grid[0] * grid[1], dtype=bool)
    return _cells(task.mask, grid)


def first_tokens(grid: tuple[int, int]) -> list[int]:
    """The first token of each cell of the world: the upper left quarter of an object.

    Four tokens meet in the middle of a cell, so the pixel above and to the left of it is in the first one.
    """
    rows, columns = grid
    return [int((y - 1) * rows / CANVAS) * columns + int((x - 1) * columns / CANVAS) for x, y in POSITIONS.values()]


def _differ(image: np.ndarray, other: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The tokens in which any pixel of an image, uint8 [H, W, 3], differs from another image, or from a color:
    bool [N]."""
    return _cells((np.abs(image.astype(np.int16) - other) > PLAIN).any(-1), grid)


def _cells(pixels: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The tokens in which any of the pixels, bool [H, W], is true: bool [N]."""
    height, width = (side // n for side, n in zip(pixels.shape, grid, strict=True))
    return pixels.reshape(grid[0], height, grid[1], width).any((1, 3)).reshape(-1)
