"""Scenes of the world: a few colored shapes on a plain background.

Notable:
- A scene is a set: `Scene` keeps its objects in reading order, so two scenes of equal content are equal, however they
  were made.
- Positions are the nine cells of a 3x3 grid on a canvas of 128x128; `dx` and `dy` move an object a little in its cell,
  so one content has many images.
- Training and evaluation never share a scene: `split_of` decides from a hash of the content, jitter left out.
- All randomness comes from the generator or the seed that the caller gives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")

# sRGB, 0..255. Every object color is at least 100 from every background in RGB and 15 in luminance, so that it shows in
# a grey image too; two object colors are at least 90 apart, two backgrounds at least 55.
COLORS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (214, 30, 40),
        "orange": (250, 132, 20),
        "yellow": (252, 224, 40),
        "green": (36, 160, 62),
        "cyan": (58, 216, 232),
        "blue": (44, 92, 226),
        "purple": (140, 40, 190),
        "pink": (246, 112, 184),
    }
)
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "white": (250, 250, 250),
        "black": (20, 20, 22),
        "gray": (128, 128, 130),
        "beige": (240, 226, 198),
        "navy": (22, 38, 100),
        "mint": (150, 214, 180),
    }
)

CANVAS = 128
JITTER = 1  # pixels of the canvas

# Radius of the circle around an object, in pixels of the canvas. A large one with its jitter just fits into its cell.
SIZES: Mapping[str, float] = MappingProxyType({"small": 11.5, "large": 15.0})

# Centre of each cell (x, y), in pixels of the canvas, in reading order. Cells are 32 pixels wide and aligned
# with the tokenizer's patches of 16, so every object is cut into four quarters, wherever it is.
POSITIONS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "top left": (16.0, 16.0),
        "top": (64.0, 16.0),
        "top right": (112.0, 16.0),
        "left": (16.0, 64.0),
        "centre": (64.0, 64.0),
        "right": (112.0, 64.0),
        "bottom left": (16.0, 112.0),
        "bottom": (64.0, 112.0),
        "bottom right": (112.0, 112.0),
    }
)

SPLITS = ("train", "eval")
EVAL_SHARE = 16  # one scene content in 16 is kept for evaluation

_READING_ORDER = {position: index for index, position in enumerate(POSITIONS)}
_POSITION_NAMES, _BACKGROUND_NAMES = tuple(POSITIONS), tuple(BACKGROUNDS)
_OBJECT_WORDS = (SHAPES, tuple(COLORS), tuple(SIZES), _POSITION_NAMES)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene. `dx` and `dy` move it from the middle of its cell, by up to `JITTER` pixels of the canvas.

    Raises ValueError for a word that the world does not have, or for too large a jitter.
    """

    shape: str
    color: str
    size: str
    position: str
    dx: float = 0.0
    dy: float = 0.0

    def __post_init__(self) -> None:
        for word, known in (
            (self.shape, SHAPES),
            (self.color, COLORS),
            (self.size, SIZES),
            (self.position, POSITIONS),
        ):
            if word not in known:
                raise ValueError(f"{word!r} is not a word of this world: use one of {', '.join(known)}")
        if abs(self.dx) > JITTER or abs(self.dy) > JITTER:
            raise ValueError(f"dx and dy are ({self.dx}, {self.dy}): they must be at most {JITTER} pixels either way")

    @property
    def center(self) -> tuple[float, float]:
        """The middle (x, y), in pixels of the 128 canvas."""
        x, y = POSITIONS[self.position]
        return x + self.dx, y + self.dy

    @property
    def content(self) -> tuple[str, str, str, str]:
        """All but the jitter: (shape, color, size, position)."""
        return self.shape, self.color, self.size, self.position


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background, at most one in a cell, kept in reading order whatever order they are given in.

    Raises ValueError when two objects share a cell or the background is unknown.
    """

    objects: tuple[SceneObject, ...]
    background: str

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"{self.background!r} is not a background: use one of {', '.join(BACKGROUNDS)}")
        ordered = tuple(sorted(self.objects, key=lambda obj: _READING_ORDER[obj.position]))
        object.__setattr__(self, "objects", ordered)
        for before, after in pairwise(ordered):
            if before.position == after.position:
                raise ValueError(
                    f"there are two objects at the {after.position}: a cell holds one, so move one of them"
                )

    @property
    def content(self) -> tuple:
        """What the scene shows, without the jitter: equal for all images of one description."""
        return self.background, tuple(obj.content for obj in self.objects)

    def without_jitter(self) -> Scene:
        """This scene with every object in the middle of its cell."""
        return Scene(tuple(replace(obj, dx=0.0, dy=0.0) for obj in self.objects), self.background)


def split_of(scene: Scene) -> str:
    """The split of a scene, "train" or "eval" (one in `EVAL_SHARE`), which depends on its content alone."""
    text = "|".join([scene.background, *("/".join(obj.content) for obj in scene.objects)])
    digest = hashlib.blake2b(text.encode(), digest_size=4, person=b"tiny-shapes").digest()
    return "eval" if int.from_bytes(digest, "little") % EVAL_SHARE == 0 else "train"


def random_object(rng: np.random.Generator, position: str | None = None) -> SceneObject:
    """An object of random shape, color, size and jitter (whole pixels), at `position` or in a random cell."""
    shape, color, size, cell = (names[int(rng.integers(len(names)))] for names in _OBJECT_WORDS)
    dx, dy = (float(rng.integers(-JITTER, JITTER + 1)) for _ in range(2))
    return SceneObject(shape, color, size, position or cell, dx, dy)


def random_scene(
    rng: np.random.Generator, objects: tuple[int, int] = (1, 3), split: str | None = None, alike: float = 0.0
) -> Scene:
    """A random scene of `objects[0]` to `objects[1]` objects, all words equally likely.

    split  "train" or "eval", from which alone scenes are taken; None: any. Raises ValueError for another one.
    alike  share of the scenes in which all objects but the first are like it in all but one of shape, color and size
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}, or None")
    fewest, most = objects
    if not 1 <= fewest <= most <= len(POSITIONS):
        raise ValueError(f"objects is {objects}: give (fewest, most) between 1 and {len(POSITIONS)}")
    while True:
        count = int(rng.integers(fewest, most + 1))
        cells = rng.permutation(len(POSITIONS))[:count]
        background = _BACKGROUND_NAMES[int(rng.integers(len(_BACKGROUND_NAMES)))]
        drawn = [random_object(rng, _POSITION_NAMES[cell]) for cell in cells]
        if alike and rng.random() < alike:
            drawn[1:] = [_like(rng, drawn[0], obj) for obj in drawn[1:]]
        scene = Scene(tuple(drawn), background)
        if split is None or split_of(scene) == split:
            return scene


def _like(rng: np.random.Generator, first: SceneObject, obj: SceneObject) -> SceneObject:
    """An object that is the first one but for its place and one attribute, which may be the same by chance."""
    own = ("shape", "color", "size")[int(rng.integers(3))]
    return replace(first, position=obj.position, dx=obj.dx, dy=obj.dy, **{own: getattr(obj, own)})


def scene_from_seed(seed: int, objects: tuple[int, int] = (1, 3), split: str | None = None) -> Scene:
    """The random scene of a seed (an integer of at least 0): the same on every machine."""
    return random_scene(np.random.default_rng(seed), objects, split)
