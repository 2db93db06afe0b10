"""Edits of a scene (recolor, remove, add, move, background), and the region that each of them changes.

An edit leaves everything else exactly as it was, jitter included. An added object is in the middle of its cell, a moved
one keeps its jitter: so an image and an instruction have one right result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .degrade import degrade
from .drawing import draw, masks
from .scenes import BACKGROUNDS, CANVAS, COLORS, POSITIONS, Scene, SceneObject, random_object, split_of

EDIT_KINDS = ("recolor", "remove", "add", "move", "background")

_DIMMED = 0.3  # brightness of the image outside the region: visible, and far from the region's white


@dataclass(frozen=True)
class Edit:
    """One change of a scene.

    kind     one of `EDIT_KINDS`
    subject  the object that changes, or the one to add; None for the background
    value    the new color, position or background; "" for remove and add
    """

    kind: str
    subject: SceneObject | None = None
    value: str = ""

    def __post_init__(self) -> None:
        if self.kind not in EDIT_KINDS:
            raise ValueError(f"{self.kind!r} is not an edit: use one of {', '.join(EDIT_KINDS)}")
        if (self.subject is None) != (self.kind == "background"):
            raise ValueError(
                f"subject is {self.subject} in an edit {self.kind!r}: give an object, but for a background"
            )

    def apply(self, scene: Scene) -> Scene:
        """The edited scene. Raises ValueError if the scene does not have the object, or if the new cell is occupied."""
        if self.subject is None:
            return replace(scene, background=self.value)
        if self.kind == "add":
            return replace(scene, objects=(*scene.objects, self.subject))
        if self.subject not in scene.objects:
            raise ValueError(f"cannot {self.kind} {self.subject}: it is not in the scene")
        rest = tuple(obj for obj in scene.objects if obj != self.subject)
        if self.kind == "remove":
            return replace(scene, objects=rest)
        if self.kind == "recolor":
            return replace(scene, objects=(*rest, replace(self.subject, color=self.value)))
        return replace(scene, objects=(*rest, replace(self.subject, position=self.value)))


def random_edit(
    rng: np.random.Generator, scene: Scene, kind: str, objects: tuple[int, int] = (1, 3), split: str | None = None
) -> Edit | None:
    """A random edit of a kind whose result has `objects[0]` to `objects[1]` objects and belongs to `split` (None: any).

    None if the scene allows no such edit or, for an added object, if a few dozen attempts found none.
    """
    for edit in _candidates(rng, scene, kind):
        target = edit.apply(scene)
        if objects[0] <= len(target.objects) <= objects[1] and split in (None, split_of(target)):
            return edit
    return None


def _candidates(rng: np.random.Generator, scene: Scene, kind: str) -> Iterator[Edit]:
    """All edits of a kind in random order; for "add", which has hundreds, a sample."""
    free = [position for position in POSITIONS if position not in {obj.position for obj in scene.objects}]
    if kind == "add":
        for _ in range(48 if free else 0):
            obj = random_object(rng, free[int(rng.integers(len(free)))])
            yield Edit("add", replace(obj, dx=0.0, dy=0.0))
        return
    if kind == "background":
        choices = [Edit(kind, None, name) for name in BACKGROUNDS if name != scene.background]
    elif kind == "recolor":
        choices = [Edit(kind, obj, color) for obj in scene.objects for color in COLORS if color != obj.color]
    elif kind == "move":
        choices = [Edit(kind, obj, cell) for obj in scene.objects for cell in free]
    else:
        choices = [Edit(kind, obj) for obj in scene.objects]
    for index in rng.permutation(len(choices)):
        yield choices[index]


def edit_region(source: Scene, target: Scene, size: int = CANVAS) -> np.ndarray:
    """The region in which two scenes differ: float32 [size, size], 0..1, with anti-aliased edges.

    It is the object that is recolored, removed or added; the old and the new place of a moved one; everything but the
    objects for a new background.
    """
    before, after = set(source.objects), set(target.objects)
    if source.background != target.background:
        kept = Scene(tuple(before & after), source.background)
        return 1.0 - masks(kept, size).sum(axis=0)
    # A recolored object is in both sets, at one place: the maximum counts it once.
    changed = [masks(Scene((obj,), source.background), size)[0] for obj in before ^ after]
    return np.maximum.reduce(changed) if changed else np.zeros((size, size), dtype=np.float32)


def region_image(source: Scene, target: Scene, size: int = CANVAS) -> np.ndarray:
    """The image that answers "identify the editing region": uint8 [size, size, 3].

    It is the source in dim grey, with the region that the edit to `target` changes in plain white: easy to see, easy to
    draw, and read back by one threshold (`scoring.read_region`).
    """
    region = edit_region(source, target, size)[..., None]
    dim = degrade(draw(source, size), "grey") * np.float32(_DIMMED)
    return np.rint(dim + region * (255.0 - dim)).astype(np.uint8)
