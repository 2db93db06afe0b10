"""The scorer: what an image shows, read from its pixels alone, and how well that fits a scene.

Notable:
- The scorer knows nothing of how the image was made: it may be freshly drawn, a photograph of a print, or the output
  of a decoder. It is resized to 128x128.
- Every pixel is unmixed into background and the object color that explains it best: an edge between white and red is
  half red, not pink. A pixel belongs to an object if more than half of it does.
- Each connected region is compared with the anti-aliased shapes of its own area and middle, sharp and blurred; the best
  overlap names the shape. Blur hardly moves area and middle, so soft images are read as well as sharp ones.
- A region that resembles no shape has the shape None and is never right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image

from .drawing import inside
from .scenes import BACKGROUNDS, CANVAS, COLORS, POSITIONS, SHAPES, SIZES, Scene, SceneObject

_SMALLEST = 50  # pixels; a small star has 170, and less than a third of one is a speck
_LARGEST = 36.0  # radius in pixels of the canvas: what is more than twice as large as a large object is none
_LEAST_MATCH = 0.6  # overlap below which a region has no shape
_HALO = 3  # pixels around a region that still count as its soft edge
_FAINT = 0.12  # coverage up to which noise on the plain background counts
_BLURS = (0.0, 1.0, 1.7, 2.4)  # standard deviations, in pixels, of the blur of the ideal shapes
_REGION_LEVEL = 0.5  # brightness above which a pixel of a region image belongs to the region

_GROUND_NAMES, _COLOR_NAMES, _CELL_NAMES = tuple(BACKGROUNDS), tuple(COLORS), tuple(POSITIONS)
_GROUNDS = np.asarray(tuple(BACKGROUNDS.values()), dtype=np.float32)
_PAINTS = np.asarray(tuple(COLORS.values()), dtype=np.float32)
_CELLS = np.asarray(tuple(POSITIONS.values()), dtype=np.float32)


@dataclass(frozen=True)
class DetectedObject:
    """An object that the scorer found in an image.

    shape           None if it resembles none
    center, radius  in pixels of the 128 canvas
    match           overlap with the ideal shape, 0..1
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
    """What `read_scene` found: objects in reading order of their cells (two may share one), and the background."""

    objects: tuple[DetectedObject, ...]
    background: str

    def to_scene(self) -> Scene:
        """The scene that this describes, without jitter.

        Raises ValueError if there is none: two objects in one cell, or an object without a shape.
        """
        objects = []
        for obj in self.objects:
            if obj.shape is None:
                raise ValueError("an object in the image has no shape of this world")
            objects.append(SceneObject(obj.shape, obj.color, obj.size, obj.position))
        return Scene(tuple(objects), self.background)


@dataclass(frozen=True)
class Comparison:
    """How well an image fits a scene. The tuples have one entry for each object of the scene, in its order.

    right       an object of this shape and color is in this cell; size is judged apart
    shape, color, size, position   each attribute alone, of the detected object that resembles this one most
    extra       number of detected objects without a partner in the scene
    background  the background is right
    """

    right: tuple[bool, ...]
    shape: tuple[bool, ...]
    color: tuple[bool, ...]
    size: tuple[bool, ...]
    position: tuple[bool, ...]
    extra: int
    background: bool

    @property
    def objects_right(self) -> bool:
        """Whether every object of the scene is right and nothing else is there."""
        return all(self.right) and self.extra == 0

    @property
    def all_right(self) -> bool:
        """Whether objects and background are right, whatever the sizes."""
        return self.objects_right and self.background

    @property
    def exact(self) -> bool:
        """Whether everything is right, sizes included."""
        return self.all_right and all(self.size)


def read_scene(pixels: np.ndarray) -> Reading:
    """Read an image of any side lengths: uint8 [H, W, 3], or float from 0 to 1. Takes a few milliseconds.

    Raises ValueError for another layout.
    """
    image = _at_canvas_size(pixels)
    ground = np.median(image.reshape(-1, 3), axis=0)
    background = _GROUND_NAMES[_nearest(ground, _GROUNDS)]
    cover, paint = _unmix(image, ground)
    objects = []
    solid = _without_dust(cover > 0.5)
    for region in _regions(solid):
        if np.count_nonzero(region) >= _SMALLEST:
            own = region | (_grown(region, _HALO) & ~_grown(solid & ~region))
            objects.append(_identify(np.where(own & (cover > _FAINT), cover, 0.0), paint))
    objects.sort(key=lambda obj: _CELL_NAMES.index(obj.position))
    return Reading(tuple(objects), background)


def compare(reading: Reading, scene: Scene) -> Comparison:
    """Compare what was read from an image with the scene that it should show.

    Each detected object is the partner of at most one object of the scene. The most alike are paired first; the cell
    counts most.
    """
    pairs = product(range(len(scene.objects)), range(len(reading.objects)))
    most_alike = sorted(pairs, key=lambda pair: -_similarity(reading.objects[pair[1]], scene.objects[pair[0]]))
    partner: dict[int, DetectedObject] = {}
    free = set(range(len(reading.objects)))
    for i, j in most_alike:
        if i not in partner and j in free:
            partner[i] = reading.objects[j]
            free.discard(j)

    def agreement(attribute: str) -> tuple[bool, ...]:
        return tuple(
            i in partner and getattr(partner[i], attribute) == getattr(obj, attribute)
            for i, obj in enumerate(scene.objects)
        )

    shape, color, size, position = (agreement(name) for name in ("shape", "color", "size", "position"))
    right = tuple(all(of_object) for of_object in zip(shape, color, position, strict=True))
    return Comparison(right, shape, color, size, position, len(free), reading.background == scene.background)


def read_region(pixels: np.ndarray) -> np.ndarray:
    """The region in an image like those of `edits.region_image`: bool [H, W]. Takes uint8, or float from 0 to 1."""
    return _as_float(pixels).min(axis=2) > 255.0 * _REGION_LEVEL


def _as_float(pixels: np.ndarray) -> np.ndarray:
    """The image as float32 [H, W, 3], 0..255."""
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"the image is {list(pixels.shape)}: give [H, W, 3]")
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32)
    if np.issubdtype(pixels.dtype, np.floating):
        return np.clip(pixels.astype(np.float32), 0.0, 1.0) * 255.0
    raise ValueError(f"the image is {pixels.dtype}: give uint8 or float from 0 to 1")


def _at_canvas_size(pixels: np.ndarray) -> np.ndarray:
    image = _as_float(pixels)
    if image.shape[:2] == (CANVAS, CANVAS):
        return image
    whole = Image.fromarray(np.rint(image).astype(np.uint8))
    larger = min(whole.size) >= CANVAS
    method = Image.Resampling.BOX if larger else Image.Resampling.BICUBIC
    return np.asarray(whole.resize((CANVAS, CANVAS), method), dtype=np.float32)


def _nearest(color: np.ndarray, table: np.ndarray) -> int:
    return int(((table - color) ** 2).sum(axis=1).argmin())


def _unmix(image: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of each pixel that is an object (0..1), and the index of the object color that explains it best.

    A pixel is ground + cover x (paint - ground); for every paint the best cover is a projection.
    """
    direction = _PAINTS - ground  # (P, 3)
    offset = image - ground  # (H, W, 3)
    cover = np.clip(offset @ direction.T / (direction**2).sum(axis=1), 0.0, 1.0)  # (H, W, P)
    # |offset - cover * direction|^2, written out to stay small
    error = cover**2 * (direction**2).sum(axis=1) - 2.0 * cover * (offset @ direction.T)
    paint = error.argmin(axis=2)
    return np.take_along_axis(cover, paint[..., None], axis=2)[..., 0], paint


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """The regions of a bool [H, W] that are connected by edges, each a bool [H, W].

    A region grows from a seed by whole runs, along rows and columns alternately, so a few iterations fill any shape.
    """
    along_rows, along_columns = _runs(mask), _runs(mask.T).T
    rest, regions = mask.copy(), []
    while rest.any():
        region = np.zeros_like(mask)
        region[np.unravel_index(rest.argmax(), rest.shape)] = True
        size = 0
        while size < (size := int(np.count_nonzero(region))):
            for runs in (along_rows, along_columns):
                touched = np.zeros(mask.size + 1, dtype=bool)
                touched[runs[region]] = True
                region = touched[runs] & mask
        rest &= ~region
        regions.append(region)
    return regions


def _runs(mask: np.ndarray) -> np.ndarray:
    """A different number for each run of equal pixels in each row: int [H, W]."""
    begins = np.diff(mask, axis=1, prepend=~mask[:, :1])
    return np.cumsum(begins).reshape(mask.shape)


def _without_dust(mask: np.ndarray) -> np.ndarray:
    """The mask without pixels that have fewer than two of their four neighbours, of which noise makes hundreds."""
    padded = np.pad(mask, 1).astype(np.int8)
    neighbours = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
    return mask & (neighbours >= 2)


def _grown(mask: np.ndarray, pixels: int = 1) -> np.ndarray:
    """The mask grown by `pixels` pixels in the four directions."""
    for _ in range(pixels):
        wider = mask.copy()
        wider[1:] |= mask[:-1]
        wider[:-1] |= mask[1:]
        wider[:, 1:] |= mask[:, :-1]
        wider[:, :-1] |= mask[:, 1:]
        mask = wider
    return mask


def _identify(cover: np.ndarray, paint: np.ndarray) -> DetectedObject:
    """The object whose coverage is given: float [H, W], 0 elsewhere. `paint` is as from `_unmix`."""
    # The color is that of the inside or, if the image is so soft that hardly any is left, of the best 20 pixels.
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
    return DetectedObject(shape, _COLOR_NAMES[color], size, cell, center, radius, match)


def _fit(
    shape: str, cover: np.ndarray, area: float, middle: tuple[float, float]
) -> tuple[float, float, tuple[float, float]]:
    """Overlap (intersection over union, 0..1), radius and center of the shape of the same area and centroid."""
    unit_area, lift = _unit_moments(shape)
    radius = float(np.sqrt(area / unit_area))
    center = middle[0], middle[1] - lift * radius
    if radius > _LARGEST:
        return 0.0, radius, center
    x, y = (int(np.clip(value, 0, CANVAS - 1)) for value in center)
    # Halves and quarters of a pixel are near enough, and let the ideal shapes be cached.
    place = round(2 * radius) / 2, round(4 * (center[0] - x)) / 4, round(4 * (center[1] - y)) / 4
    reach = _reach(place[0])
    window = np.pad(cover, reach)[y : y + 2 * reach, x : x + 2 * reach]
    overlap = 0.0
    for blur in _BLURS:
        ideal = _ideal(shape, *place, blur)
        common = float(np.minimum(window, ideal).sum())
        overlap = max(overlap, common / (area + float(ideal.sum()) - common))
    return overlap, radius, center


def _reach(radius: float) -> int:
    """Half the side of a window that holds a shape and its soft edge."""
    return int(np.ceil(radius)) + _HALO + 1


@lru_cache(maxsize=8)
def _unit_moments(shape: str) -> tuple[float, float]:
    """The area of a shape of radius 1, and the distance of its centroid below its centre."""
    side = np.linspace(-1.0, 1.0, 801)
    points = inside(shape, side[None, :], side[:, None])
    return float(points.mean()) * 4.0, float((points * side[:, None]).sum() / points.sum())


@lru_cache(maxsize=8192)
def _ideal(shape: str, radius: float, x: float, y: float, blur: float) -> np.ndarray:
    """The blurred coverage of a shape with its centre at (x, y) of the middle pixel: float32 [2 reach, 2 reach]."""
    reach, fine = _reach(radius), 4
    points = (np.arange(-reach * fine, reach * fine) + 0.5) / fine
    whole = inside(shape, (points[None, :] - x) / radius, (points[:, None] - y) / radius)
    cover = whole.reshape(2 * reach, fine, 2 * reach, fine).mean(axis=(1, 3), dtype=np.float32)
    if blur:
        steps = np.arange(2 * reach)
        kernel = np.exp(-(((steps[:, None] - steps) / blur) ** 2) / 2).astype(np.float32)
        kernel /= kernel.sum(axis=1, keepdims=True)
        cover = kernel @ cover @ kernel.T
    return cover


def _similarity(detected: DetectedObject, obj: SceneObject) -> int:
    return (
        4 * (detected.position == obj.position)
        + 2 * (detected.shape == obj.shape)
        + 2 * (detected.color == obj.color)
        + (detected.size == obj.size)
    )
