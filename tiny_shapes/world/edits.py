"""Changes of a scene, one at a time: recolor, remove, add, move, background; and the region that each one touches.

An edit leaves all that it does not name exactly where it was, jitter included. What is added stands in the middle of
its cell; what is moved keeps its jitter: so a picture and an instruction have one right result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .degrade import degrade
from .drawing import draw, masks
from .scenes import BACKGROUNDS, CANVAS, COLORS, POSITIONS, Scene, Thing, random_thing, split_of

EDIT_KINDS = ("recolor", "remove", "add", "move", "background")

_DIMMED = 0.3  # brightness left to what is not to be edited: seen, and far from the region's white


@dataclass(frozen=True)
class Edit:
    """One change. `thing` is the one of the scene that changes, or the one to add; None for the background.

    `value` is the new colour, position or background; "" for remove and add.
    """

    kind: str
    thing: Thing | None = None
    value: str = ""

    def __post_init__(self):
        if self.kind not in EDIT_KINDS:
            raise ValueError(f"{self.kind!r} is no edit; choose one of: {', '.join(EDIT_KINDS)}")

    def apply(self, scene: Scene) -> Scene:
        """The scene afterwards. Raises ValueError when the scene does not have the thing or its new cell is taken."""
        if self.kind == "background":
            return replace(scene, background=self.value)
        if self.kind == "add":
            return replace(scene, things=(*scene.things, self.thing))
        if self.thing not in scene.things:
            raise ValueError(f"cannot {self.kind} {self.thing}: it is not in the scene")
        rest = tuple(thing for thing in scene.things if thing != self.thing)
        if self.kind == "remove":
            return replace(scene, things=rest)
        changed = {"recolor": "color", "move": "position"}[self.kind]
        return replace(scene, things=(*rest, replace(self.thing, **{changed: self.value})))


def random_edit(
    rng: np.random.Generator, scene: Scene, kind: str, things: tuple[int, int] = (1, 3), split: str | None = None
) -> Edit | None:
    """A random edit of the kind whose result has `things[0]` to `things[1]` things and belongs to `split` (None: any).

    None when the scene allows none, or, for an added thing, when a few dozen tries found none.
    """
    for edit in _candidates(rng, scene, kind):
        target = edit.apply(scene)
        if things[0] <= len(target.things) <= things[1] and split in (None, split_of(target)):
            return edit
    return None


def _candidates(rng: np.random.Generator, scene: Scene, kind: str) -> Iterator[Edit]:
    """All edits of the kind in random order; for "add", which has hundreds, a sample."""
    free = [position for position in POSITIONS if position not in {thing.position for thing in scene.things}]
    if kind == "add":
        for _ in range(48 if free else 0):
            thing = random_thing(rng, free[int(rng.integers(len(free)))])
            yield Edit("add", replace(thing, dx=0.0, dy=0.0))
        return
    if kind == "background":
        choices = [Edit(kind, None, name) for name in BACKGROUNDS if name != scene.background]
    elif kind == "recolor":
        choices = [Edit(kind, thing, color) for thing in scene.things for color in COLORS if color != thing.color]
    elif kind == "move":
        choices = [Edit(kind, thing, cell) for thing in scene.things for cell in free]
    else:
        choices = [Edit(kind, thing) for thing in scene.things]
    for index in rng.permutation(len(choices)):
        yield choices[index]


def edit_region(source: Scene, target: Scene, size: int = CANVAS) -> np.ndarray:
    """Where two scenes differ: float32 [size, size], 0..1, with anti-aliased edges.

    A recoloured, removed or added thing is its own region; a moved one is its old and its new place; a new background
    is everything but the things.
    """
    before, after = set(source.things), set(target.things)
    if source.background != target.background:
        kept = Scene(tuple(before & after), source.background)
        return 1.0 - masks(kept, size).sum(axis=0)
    # A recoloured thing is in both differences, at one place: the larger coverage counts it once.
    changed = [masks(Scene((thing,), source.background), size)[0] for thing in before ^ after]
    return np.maximum.reduce(changed) if changed else np.zeros((size, size), dtype=np.float32)


def region_picture(source: Scene, target: Scene, size: int = CANVAS) -> np.ndarray:
    """The picture that answers "identify the editing region": uint8 [size, size, 3].

    The source in dim grey, with the region that an edit to `target` touches painted plain white: easy to see, easy to
    draw, and read back by one threshold (`reading.read_region`).
    """
    region = edit_region(source, target, size)[..., None]
    dim = degrade(draw(source, size), "grey") * np.float32(_DIMMED)
    return np.rint(dim + region * (255.0 - dim)).astype(np.uint8)
