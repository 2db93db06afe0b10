"""Masks: where an image may change, as people paint them, and images to complete, as padding makes them.

Everything is told in pixels of the canvas. Masks are made of patches, as a mask opens whole tokens anyway.
"""

from __future__ import annotations

import numpy as np

from .drawing import draw
from .edits import edit_region
from .phrasing import pick
from .scenes import CANVAS, POSITIONS, Scene, SceneObject

PATCH = 16  # pixels
PATCHES = CANVAS // PATCH  # along a side
PADDING = 128  # the level of grey of what is added: that of core's Pad Image for Outpainting
CELL_RADIUS = 16  # pixels from the middle of a cell to its edges

_GROWN = (0.3, 0.45, 0.25)  # shares of masks with a margin of 0, 1, 2 patches
_EVERYTHING = 0.05  # share of masks that are white all over
_BOX = 0.5  # share of masks that are the box around what changes
_OTHER = 0.15  # share of masks that are open somewhere else as well


def to_patches(pixels: np.ndarray) -> np.ndarray:
    """The patches in which any pixel, bool [128, 128], is true: bool [8, 8]."""
    return np.asarray(pixels.reshape(PATCHES, PATCH, PATCHES, PATCH).any((1, 3)))


def to_mask(patches: np.ndarray) -> np.ndarray:
    """The pixels of patches, bool [8, 8] -> [128, 128]."""
    return np.kron(patches, np.ones((PATCH, PATCH), dtype=bool))


def grown(patches: np.ndarray, by: int) -> np.ndarray:
    """The patches and their neighbours at most `by` away in each direction: bool [8, 8]."""
    padded = np.pad(patches, by)
    shifts = range(2 * by + 1)
    return np.logical_or.reduce([padded[y : y + PATCHES, x : x + PATCHES] for y in shifts for x in shifts])


def changed_patches(source: Scene, target: Scene) -> np.ndarray:
    """The patches that an edit from source to target changes: bool [8, 8]."""
    return to_patches(edit_region(source, target) > 0)


def edit_mask(rng: np.random.Generator, source: Scene, target: Scene) -> np.ndarray:
    """A mask that someone might paint for this edit: bool [128, 128], true where the image may change.

    It covers what changes, with a margin of up to two patches, sometimes as a box, sometimes with more.
    """
    if rng.random() < _EVERYTHING:
        return np.ones((CANVAS, CANVAS), dtype=bool)
    patches = grown(changed_patches(source, target), int(rng.choice(len(_GROWN), p=_GROWN)))
    if rng.random() < _BOX:
        rows, columns = (np.flatnonzero(patches.any(axis)) for axis in (1, 0))
        patches[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    if rng.random() < _OTHER:
        patches |= _box(rng)
    return to_mask(patches)


def _box(rng: np.random.Generator) -> np.ndarray:
    """A random box of one to four patches a side."""
    patches = np.zeros((PATCHES, PATCHES), dtype=bool)
    height, width = (int(n) for n in rng.integers(1, 5, 2))
    top, left = int(rng.integers(PATCHES - height + 1)), int(rng.integers(PATCHES - width + 1))
    patches[top : top + height, left : left + width] = True
    return patches


# --- Completion -----------------------------------------------------------------------------------------------------

SIDES = ("left", "right", "top", "bottom")


def visible_part(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """The part of an image that is there, bool [128, 128], and the side to which it is to be extended.

    The edge is at a multiple of 8 pixels, the step of core's node; a quarter to three quarters are to be drawn. Now and
    then the sides above and beside are missing together, and the side is "".
    """
    side = pick(rng, SIDES)
    part = _without(rng, side)
    if rng.random() < 0.15:
        other = pick(rng, ("top", "bottom") if side in ("left", "right") else ("left", "right"))
        return part & _without(rng, other), ""
    return part, side


def _without(rng: np.random.Generator, side: str) -> np.ndarray:
    missing = 8 * int(rng.integers(4, 13))
    part = np.ones((CANVAS, CANVAS), dtype=bool)
    if side in ("left", "top"):
        part[:, :missing] = False
    else:
        part[:, -missing:] = False
    return part if side in ("left", "right") else part.T


def padded_image(scene: Scene, part: np.ndarray) -> np.ndarray:
    """The scene with grey where `part` is false: uint8 [128, 128, 3]."""
    image = draw(scene)
    image[~part] = PADDING
    return image


def completion_mask(rng: np.random.Generator, part: np.ndarray) -> np.ndarray:
    """A mask for the completion of an image: what is missing, and often a patch more, as feathering opens it."""
    return to_mask(grown(to_patches(~part), int(rng.integers(2))))


def wholly_visible(obj: SceneObject, part: np.ndarray) -> bool:
    """Whether all of an object's cell is in the part that is there."""
    x, y = (int(middle) for middle in POSITIONS[obj.position])
    return bool(part[y - CELL_RADIUS : y + CELL_RADIUS, x - CELL_RADIUS : x + CELL_RADIUS].all())
