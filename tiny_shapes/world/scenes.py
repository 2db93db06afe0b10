"""What a picture of the small world shows: a few coloured shapes on a plain background.

Notable:
- A scene is a set: `Scene` keeps its things in reading order, so two scenes of one content are equal however made.
- Positions are the nine cells of a 3x3 grid on a canvas of 128x128; `dx` and `dy` move a thing a little in its cell, so
  that no two pictures of one content need be alike.
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

# sRGB, 0..255. Every thing is at least 100 from every background in RGB and 15 in luminance, so that it shows in a grey
# picture too; two colours of things are at least 90 apart, two backgrounds at least 55.
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

# Radius of the circle around the thing, in pixels of the canvas. With its jitter a large one just fits its cell.
SIZES: Mapping[str, float] = MappingProxyType({"small": 11.5, "large": 15.0})

# Centre of each cell (x, y), in pixels of the canvas, in reading order. Cells are 32 pixels wide and meet the grid of
# the tokenizer's patches of 16: every thing is seen as four quarters, wherever it stands.
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
EVAL_SHARE = 16  # one content in so many is kept for evaluation

_READING_ORDER = {position: index for index, position in enumerate(POSITIONS)}
_POSITION_NAMES, _BACKGROUND_NAMES = tuple(POSITIONS), tuple(BACKGROUNDS)
_THING_NAMES = (SHAPES, tuple(COLORS), tuple(SIZES), _POSITION_NAMES)


@dataclass(frozen=True)
class Thing:
    """One object. `dx`, `dy` move it from the middle of its cell: pixels of the 128 canvas, at most `JITTER` each way.

    Raises ValueError for a word that the world does not have or too large a move.
    """

    shape: str
    color: str
    size: str
    position: str
    dx: float = 0.0
    dy: float = 0.0

    def __post_init__(self):
        for word, known in (
            (self.shape, SHAPES),
            (self.color, COLORS),
            (self.size, SIZES),
            (self.position, POSITIONS),
        ):
            if word not in known:
                raise ValueError(f"{word!r} is not a word of this world; choose one of: {', '.join(known)}")
        if abs(self.dx) > JITTER or abs(self.dy) > JITTER:
            raise ValueError(f"dx and dy are at most {JITTER} pixels each way, got ({self.dx}, {self.dy})")

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the middle, in pixels of the 128 canvas."""
        x, y = POSITIONS[self.position]
        return x + self.dx, y + self.dy

    @property
    def content(self) -> tuple[str, str, str, str]:
        """(shape, color, size, position): all but the jitter."""
        return self.shape, self.color, self.size, self.position


@dataclass(frozen=True)
class Scene:
    """Things on a plain background, at most one a cell, kept in reading order whatever order they are given in.

    Raises ValueError when two things share a cell or the background is unknown.
    """

    things: tuple[Thing, ...]
    background: str

    def __post_init__(self):
        if self.background not in BACKGROUNDS:
            raise ValueError(f"no background is called {self.background!r}; choose one of: {', '.join(BACKGROUNDS)}")
        ordered = tuple(sorted(self.things, key=lambda thing: _READING_ORDER[thing.position]))
        object.__setattr__(self, "things", ordered)
        for before, after in pairwise(ordered):
            if before.position == after.position:
                raise ValueError(f"two things at the {after.position}: a cell holds one, so move one of them")

    @property
    def content(self) -> tuple:
        """What the scene shows, jitter left out: equal for two pictures of the same description."""
        return self.background, tuple(thing.content for thing in self.things)

    def without_jitter(self) -> Scene:
        """The same scene with every thing in the middle of its cell."""
        return Scene(tuple(replace(thing, dx=0.0, dy=0.0) for thing in self.things), self.background)


def split_of(scene: Scene) -> str:
    """ "train" or "eval" (one in `EVAL_SHARE`), from the content alone: the same on every machine, for every jitter."""
    text = "|".join([scene.background, *("/".join(thing.content) for thing in scene.things)])
    digest = hashlib.blake2b(text.encode(), digest_size=4, person=b"tiny-shapes").digest()
    return "eval" if int.from_bytes(digest, "little") % EVAL_SHARE == 0 else "train"


def random_thing(rng: np.random.Generator, position: str | None = None) -> Thing:
    """A thing of random shape, colour and size, whole pixels of jitter, at `position` or in a random cell."""
    shape, color, size, cell = (names[int(rng.integers(len(names)))] for names in _THING_NAMES)
    dx, dy = (float(rng.integers(-JITTER, JITTER + 1)) for _ in range(2))
    return Thing(shape, color, size, position or cell, dx, dy)


def random_scene(rng: np.random.Generator, things: tuple[int, int] = (1, 3), split: str | None = None) -> Scene:
    """A random scene of `things[0]` to `things[1]` things, all words equally likely.

    With `split` "train" or "eval" only scenes of that split come up (others are drawn again); None takes any.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)} or None, got {split!r}")
    fewest, most = things
    if not 1 <= fewest <= most <= len(POSITIONS):
        raise ValueError(f"things is (fewest, most) between 1 and {len(POSITIONS)}, got {things}")
    while True:
        count = int(rng.integers(fewest, most + 1))
        cells = rng.permutation(len(POSITIONS))[:count]
        background = _BACKGROUND_NAMES[int(rng.integers(len(_BACKGROUND_NAMES)))]
        scene = Scene(tuple(random_thing(rng, _POSITION_NAMES[cell]) for cell in cells), background)
        if split is None or split_of(scene) == split:
            return scene


def scene_from_seed(seed: int, things: tuple[int, int] = (1, 3), split: str | None = None) -> Scene:
    """The random scene of a seed (any integer from 0 up): the same on every machine."""
    return random_scene(np.random.default_rng(seed), things, split)
