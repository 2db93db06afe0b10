"""The scorer: what a picture shows, read from its pixels alone.

Notable:
- Nothing of how the picture was made is known: it may be freshly drawn, a photograph of a print, or what a decoder
  made of a model's features. It is brought to 128x128 and judged by eye, so to say.
- Every pixel is unmixed into background and the thing colour that explains it best. An edge between white and red is
  half red there, not pink; what is more than half a thing belongs to one.
- Each connected region is compared with the anti-aliased shapes of just its own area and middle, sharp and softened;
  the best overlap names the shape. Blur hardly moves area and middle, so soft pictures read as well as sharp ones.
- A region that resembles nothing has the shape None and is never right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image

from .drawing import inside
from .scenes import BACKGROUNDS, CANVAS, COLORS, POSITIONS, SHAPES, SIZES, Scene, Thing

_SMALLEST = 50  # pixels; a small star has 170, so a third of one is a speck, not a thing
_LARGEST = 36.0  # radius, pixels of the canvas: what is twice a large thing is none
_LEAST_MATCH = 0.6  # overlap below which a region is no shape
_HALO = 3  # pixels around a region that still count as its soft edge
_FAINT = 0.12  # coverage that noise makes on the plain background
_SOFTNESS = (0.0, 1.0, 1.7, 2.4)  # standard deviations of blur that the ideal shapes are tried with, in pixels
_REGION_LEVEL = 0.5  # brightness above which a pixel of a region picture belongs to the region

_GROUND_NAMES, _COLOR_NAMES, _CELL_NAMES = tuple(BACKGROUNDS), tuple(COLORS), tuple(POSITIONS)
_GROUNDS = np.asarray(tuple(BACKGROUNDS.values()), dtype=np.float32)
_PAINTS = np.asarray(tuple(COLORS.values()), dtype=np.float32)
_CELLS = np.asarray(tuple(POSITIONS.values()), dtype=np.float32)


@dataclass(frozen=True)
class FoundThing:
    """A thing in a picture: `shape` is None if it resembles none; `center`, `radius` in pixels of the 128 canvas.

    `match` is its overlap with the ideal shape, 0..1.
    """

    shape: str | None
    color: str
    size: str
    position: str
    center: tuple[float, float]
    radius: float
    match: float


@dataclass(frozen=True)
class Reading:
    """What `read_scene` saw: things in reading order of their cells (two may share one), and the background."""

    things: tuple[FoundThing, ...]
    background: str

    def to_scene(self) -> Scene:
        """The scene that this describes, without jitter. Raises ValueError when it is none: two things in one cell, or
        something without a shape."""
        if any(thing.shape is None for thing in self.things):
            raise ValueError("something in the picture has no shape of this world")
        things = (Thing(thing.shape, thing.color, thing.size, thing.position) for thing in self.things)
        return Scene(tuple(things), self.background)


@dataclass(frozen=True)
class Comparison:
    """How a picture fits a scene, from `compare`. The tuples have one entry a wanted thing, in the scene's order.

    A wanted thing is *right* when a thing of its shape and colour stands in its cell; size is told apart. `shape`,
    `color`, `size` and `position` hold for each attribute alone, judged on the found thing that resembles it most.
    `extra` counts found things that no wanted thing claims.
    """

    right: tuple[bool, ...]
    shape: tuple[bool, ...]
    color: tuple[bool, ...]
    size: tuple[bool, ...]
    position: tuple[bool, ...]
    extra: int
    background: bool

    @property
    def things_right(self) -> bool:
        """Every wanted thing is right and nothing else is there."""
        return all(self.right) and self.extra == 0

    @property
    def all_right(self) -> bool:
        """Things and background are right; sizes are not asked for."""
        return self.things_right and self.background

    @property
    def exact(self) -> bool:
        """All right, sizes included."""
        return self.all_right and all(self.size)


def read_scene(pixels: np.ndarray) -> Reading:
    """Reads a picture of any side lengths: uint8 [H, W, 3], or float of the range 0..1. Takes a few milliseconds.

    Raises ValueError for another layout.
    """
    picture = _at_canvas_size(pixels)
    ground = np.median(picture.reshape(-1, 3), axis=0)
    background = _GROUND_NAMES[_nearest(ground, _GROUNDS)]
    cover, paint = _unmix(picture, ground)
    things = []
    solid = _without_dust(cover > 0.5)
    for region in _regions(solid):
        if np.count_nonzero(region) >= _SMALLEST:
            own = region | (_grown(region, _HALO) & ~_grown(solid & ~region))
            things.append(_identify(np.where(own & (cover > _FAINT), cover, 0.0), paint))
    things.sort(key=lambda thing: _CELL_NAMES.index(thing.position))
    return Reading(tuple(things), background)


def compare(found: Reading, wanted: Scene) -> Comparison:
    """Holds what was found against what was wanted; each found thing answers for one wanted thing at most.

    The likest are paired first; the cell counts most.
    """
    pairs = product(range(len(wanted.things)), range(len(found.things)))
    likely = sorted(pairs, key=lambda pair: -_likeness(found.things[pair[1]], wanted.things[pair[0]]))
    partner: dict[int, FoundThing] = {}
    free = set(range(len(found.things)))
    for i, j in likely:
        if i not in partner and j in free:
            partner[i] = found.things[j]
            free.discard(j)

    def agreement(attribute: str) -> tuple[bool, ...]:
        return tuple(
            i in partner and getattr(partner[i], attribute) == getattr(asked, attribute)
            for i, asked in enumerate(wanted.things)
        )

    shape, color, size, position = (agreement(name) for name in ("shape", "color", "size", "position"))
    right = tuple(all(of_thing) for of_thing in zip(shape, color, position, strict=True))
    return Comparison(right, shape, color, size, position, len(free), found.background == wanted.background)


def read_region(pixels: np.ndarray) -> np.ndarray:
    """The region that a picture of `region_picture` shows: bool [H, W]. Takes uint8 or 0..1 float [H, W, 3]."""
    return _as_float(pixels).min(axis=2) > 255.0 * _REGION_LEVEL


def _as_float(pixels: np.ndarray) -> np.ndarray:
    """float32 [H, W, 3], 0..255."""
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a picture is [H, W, 3], got {list(pixels.shape)}")
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32)
    if np.issubdtype(pixels.dtype, np.floating):
        return np.clip(pixels.astype(np.float32), 0.0, 1.0) * 255.0
    raise ValueError(f"a picture is uint8 or float from 0 to 1, got {pixels.dtype}")


def _at_canvas_size(pixels: np.ndarray) -> np.ndarray:
    picture = _as_float(pixels)
    if picture.shape[:2] == (CANVAS, CANVAS):
        return picture
    whole = Image.fromarray(np.rint(picture).astype(np.uint8))
    larger = min(whole.size) >= CANVAS
    method = Image.Resampling.BOX if larger else Image.Resampling.BICUBIC
    return np.asarray(whole.resize((CANVAS, CANVAS), method), dtype=np.float32)


def _nearest(color: np.ndarray, table: np.ndarray) -> int:
    return int(((table - color) ** 2).sum(axis=1).argmin())


def _unmix(picture: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel how much of it is a thing (0..1), and the index of the thing colour that explains it best.

    A pixel is ground + cover x (paint - ground); for every paint the best cover is a projection.
    """
    direction = _PAINTS - ground  # (P, 3)
    offset = picture - ground  # (H, W, 3)
    cover = np.clip(offset @ direction.T / (direction**2).sum(axis=1), 0.0, 1.0)  # (H, W, P)
    # |offset - cover * direction|^2, written out to stay small
    error = cover**2 * (direction**2).sum(axis=1) - 2.0 * cover * (offset @ direction.T)
    paint = error.argmin(axis=2)
    return np.take_along_axis(cover, paint[..., None], axis=2)[..., 0], paint


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """The connected regions (by edges) of a bool [H, W], each a bool [H, W].

    A region spreads from a seed by whole runs, along rows and along columns in turn: a few turns fill any shape.
    """
    along_rows, along_columns = _runs(mask), _runs(mask.T).T
    rest, regions = mask.copy(), []
    while rest.any():
        region = np.zeros_like(mask)
        region[np.unravel_index(rest.argmax(), rest.shape)] = True
        size = 0
        while size < (size := np.count_nonzero(region)):
            for runs in (along_rows, along_columns):
                touched = np.zeros(mask.size + 1, dtype=bool)
                touched[runs[region]] = True
                region = touched[runs] & mask
        rest &= ~region
        regions.append(region)
    return regions


def _runs(mask: np.ndarray) -> np.ndarray:
    """A number for each run of equal pixels in each row: int [H, W], different for all runs."""
    begins = np.diff(mask, axis=1, prepend=~mask[:, :1])
    return np.cumsum(begins).reshape(mask.shape)


def _without_dust(mask: np.ndarray) -> np.ndarray:
    """Only pixels with at least two of their four neighbours: noise makes hundreds of lone ones."""
    padded = np.pad(mask, 1).astype(np.int8)
    neighbours = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
    return mask & (neighbours >= 2)


def _grown(mask: np.ndarray, pixels: int = 1) -> np.ndarray:
    """The mask and the pixels next to it in the four directions, so many times over."""
    for _ in range(pixels):
        wider = mask.copy()
        wider[1:] |= mask[:-1]
        wider[:-1] |= mask[1:]
        wider[:, 1:] |= mask[:, :-1]
        wider[:, :-1] |= mask[:, 1:]
        mask = wider
    return mask


def _identify(cover: np.ndarray, paint: np.ndarray) -> FoundThing:
    """Names the one thing whose coverage is given: float [H, W], 0 elsewhere; `paint` as `_unmix` found it."""
    # The colour is that of the inside; where a picture is so soft that hardly any is left, that of the best 20 pixels.
    solid = cover > min(0.85, float(np.sort(cover[cover > 0.0])[-20]))
    color = int(np.bincount(paint[solid], minlength=len(_COLOR_NAMES)).argmax())
    area = float(cover.sum())
    rows, columns = np.arange(CANVAS) + 0.5, np.arange(CANVAS) + 0.5
    middle = float(cover.sum(axis=0) @ columns) / area, float(cover.sum(axis=1) @ rows) / area
    fits = [_fit(shape, cover, area, middle) for shape in SHAPES]
    best = max(range(len(SHAPES)), key=lambda index: fits[index][0])
    match, radius, center = fits[best]
    size = min(SIZES, key=lambda name: abs(SIZES[name] - radius))
    cell = _CELL_NAMES[_nearest(np.asarray(center, dtype=np.float32), _CELLS)]
    shape = SHAPES[best] if match >= _LEAST_MATCH else None
    return FoundThing(shape, _COLOR_NAMES[color], size, cell, center, radius, match)


def _fit(
    shape: str, cover: np.ndarray, area: float, middle: tuple[float, float]
) -> tuple[float, float, tuple[float, float]]:
    """(overlap, radius, center) of the shape of the same area and centroid; overlap: intersection over union, 0..1."""
    unit_area, lift = _unit_moments(shape)
    radius = float(np.sqrt(area / unit_area))
    center = middle[0], middle[1] - lift * radius
    if radius > _LARGEST:
        return 0.0, radius, center
    x, y = (int(np.clip(value, 0, CANVAS - 1)) for value in center)
    # Halves and quarters of a pixel are near enough and let the ideal shapes be kept.
    place = round(2 * radius) / 2, round(4 * (center[0] - x)) / 4, round(4 * (center[1] - y)) / 4
    reach = _reach(place[0])
    window = np.pad(cover, reach)[y : y + 2 * reach, x : x + 2 * reach]
    overlap = 0.0
    for softness in _SOFTNESS:
        ideal = _ideal(shape, *place, softness)
        common = float(np.minimum(window, ideal).sum())
        overlap = max(overlap, common / (area + float(ideal.sum()) - common))
    return overlap, radius, center


def _reach(radius: float) -> int:
    """Half the side of the window that holds a shape and its soft edge."""
    return int(np.ceil(radius)) + _HALO + 1


@lru_cache(maxsize=8)
def _unit_moments(shape: str) -> tuple[float, float]:
    """Area of a shape of radius 1, and how far below its centre its centroid lies."""
    side = np.linspace(-1.0, 1.0, 801)
    points = inside(shape, side[None, :], side[:, None])
    return float(points.mean()) * 4.0, float((points * side[:, None]).sum() / points.sum())


@lru_cache(maxsize=8192)
def _ideal(shape: str, radius: float, x: float, y: float, softness: float) -> np.ndarray:
    """Coverage of a shape with its centre at (x, y) of the middle pixel, blurred: float32 [2 reach, 2 reach]."""
    reach, fine = _reach(radius), 4
    points = (np.arange(-reach * fine, reach * fine) + 0.5) / fine
    whole = inside(shape, (points[None, :] - x) / radius, (points[:, None] - y) / radius)
    cover = whole.reshape(2 * reach, fine, 2 * reach, fine).mean(axis=(1, 3), dtype=np.float32)
    if softness:
        steps = np.arange(2 * reach)
        blur = np.exp(-(((steps[:, None] - steps) / softness) ** 2) / 2).astype(np.float32)
        blur /= blur.sum(axis=1, keepdims=True)
        cover = blur @ cover @ blur.T
    return cover


def _likeness(seen: FoundThing, asked: Thing) -> int:
    return (
        4 * (seen.position == asked.position)
        + 2 * (seen.shape == asked.shape)
        + 2 * (seen.color == asked.color)
        + (seen.size == asked.size)
    )
