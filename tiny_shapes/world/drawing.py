"""Drawing scenes: anti-aliased, at any side length, and thousands a second at the model's own 128.

Notable:
- A shape is a rule that says which points of the plane belong to it; its coverage of a pixel is that of a fine grid of
  points in the pixel. So a scene looks the same at 64 and at 1024 pixels.
- Objects never overlap, so the sprite of an object, already blended with the background, is cached and copied into
  place: an image at 128 costs a few small copies.
- `patch_labels` tells what each patch of the tokenizer shows, down to which part of which shape: the targets that its
  features are trained on.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .scenes import BACKGROUNDS, CANVAS, COLORS, JITTER, SHAPES, SIZES, Scene, SceneObject

PARTS = 9  # a shape seen as 3x3 parts, in reading order

# Number of classes of each array of `patch_labels`; class 0 of all but the background means "no object here".
LABEL_CLASSES = {
    "shape": 1 + len(SHAPES),
    "color": 1 + len(COLORS),
    "size": 1 + len(SIZES),
    "part": 1 + PARTS,
    "dx": 2 + 2 * JITTER,
    "dy": 2 + 2 * JITTER,
    "background": len(BACKGROUNDS),
}

_COLOR_INDEX = {color: index + 1 for index, color in enumerate(COLORS)}
_SHAPE_INDEX = {shape: index + 1 for index, shape in enumerate(SHAPES)}
_SIZE_INDEX = {size: index + 1 for index, size in enumerate(SIZES)}
_BACKGROUND_INDEX = {background: index for index, background in enumerate(BACKGROUNDS)}

# Sampling points along a pixel's side: 8 give 64 levels of coverage, finer than the eye sees on an edge.
_SAMPLES = 8
_VISIBLE = 1 / 16  # share of a patch that an object must cover to be what the patch shows


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points belong to a shape: bool, broadcast of u (to the right) and v (down), in radii from the centre.

    The shapes are scaled to look about equally large; none leaves the unit square.
    """
    if shape == "circle":
        return u * u + v * v <= 0.94**2
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.84
    if shape == "triangle":
        return (v <= 0.8) & (np.abs(u) <= (v + 0.95) * 0.57)
    if shape == "diamond":
        return np.abs(u) / 0.88 + np.abs(v) <= 1.0
    if shape == "cross":
        narrow, wide = np.minimum(np.abs(u), np.abs(v)), np.maximum(np.abs(u), np.abs(v))
        return (narrow <= 0.32) & (wide <= 0.94)
    if shape == "star":
        return _inside_star(u, v)
    raise ValueError(f"{shape!r} is not a shape: use one of {', '.join(SHAPES)}")


def _inside_star(u: np.ndarray, v: np.ndarray, inner: float = 0.44) -> np.ndarray:
    """A star of five points, one up: the plane is folded into half a point, whose edge divides inside from outside."""
    fold = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fold) % (2 * fold) - fold)  # 0 at a tip, pi/5 in a notch
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = inner * np.cos(fold), inner * np.sin(fold)
    return (x - 1.0) * notch_y + y * (1.0 - notch_x) <= 0.0


def _coverage(shape: str, radius: float, center_x: float, center_y: float) -> tuple[int, int, np.ndarray]:
    """The coverage of each pixel by a shape: (left, top, float32 [h, w] in 0..1), all in pixels of the image.

    Shapes of large images are not cached: they take a quarter of a megabyte each and are seldom needed twice.
    """
    small = radius <= max(SIZES.values())
    return (_cached_coverage if small else _cached_coverage.__wrapped__)(shape, radius, center_x, center_y)


@lru_cache(maxsize=256)
def _cached_coverage(shape: str, radius: float, center_x: float, center_y: float) -> tuple[int, int, np.ndarray]:
    left, top = int(np.floor(center_x - radius)), int(np.floor(center_y - radius))
    right, bottom = int(np.ceil(center_x + radius)), int(np.ceil(center_y + radius))
    fine = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    u = (np.arange(left, right)[:, None] + fine).reshape(1, -1)
    v = (np.arange(top, bottom)[:, None] + fine).reshape(-1, 1)
    points = inside(shape, (u - center_x) / radius, (v - center_y) / radius)
    pixels = points.reshape(bottom - top, _SAMPLES, right - left, _SAMPLES)
    alpha = pixels.mean(axis=(1, 3), dtype=np.float32)
    alpha.flags.writeable = False
    return left, top, alpha


def _anchor(obj: SceneObject, size: int) -> tuple[int, int, float, float, float]:
    """The place of an object in an image of side `size`: whole pixels x and y, radius, and the fractions of x and y.

    Sprites are cached by radius and fraction only: at 128 two dozen of them serve all scenes.
    """
    scale = size / CANVAS
    (x, y), radius = obj.center, SIZES[obj.size]
    x, y = x * scale, y * scale
    return int(x), int(y), radius * scale, x - int(x), y - int(y)


@lru_cache(maxsize=2048)
def _sprite(shape: str, color: str, background: str, radius: float, x: float, y: float) -> tuple[int, int, np.ndarray]:
    """A colored shape on its background: (left, top, uint8 [h, w, 3])."""
    left, top, alpha = _coverage(shape, radius, x, y)
    ground, paint = (np.asarray(rgb, dtype=np.float32) for rgb in (BACKGROUNDS[background], COLORS[color]))
    sprite = np.rint(ground + alpha[..., None] * (paint - ground)).astype(np.uint8)
    sprite.flags.writeable = False
    return left, top, sprite


@lru_cache(maxsize=len(BACKGROUNDS))
def _plain(background: str, size: int) -> np.ndarray:
    """An empty image, uint8 [size, size, 3]: copying it is much faster than filling a new one."""
    image = np.full((size, size, 3), BACKGROUNDS[background], dtype=np.uint8)
    image.flags.writeable = False
    return image


def draw(scene: Scene, size: int = CANVAS) -> np.ndarray:
    """The image of a scene: uint8 [size, size, 3], sRGB. The same scene always gives the same pixels."""
    _check_size(size)
    image = _plain(scene.background, size).copy()
    sprite_of = _sprite if size <= CANVAS else _sprite.__wrapped__
    for obj in scene.objects:
        x, y, *where = _anchor(obj, size)
        left, top, sprite = sprite_of(obj.shape, obj.color, scene.background, *where)
        height, width, _ = sprite.shape
        image[y + top : y + top + height, x + left : x + left + width] = sprite
    return image


def masks(scene: Scene, size: int = CANVAS) -> np.ndarray:
    """The coverage of each pixel by every object of the scene, in order: float32 [objects, size, size], 0..1."""
    _check_size(size)
    planes = np.zeros((len(scene.objects), size, size), dtype=np.float32)
    for plane, obj in zip(planes, scene.objects, strict=True):
        x, y, *where = _anchor(obj, size)
        left, top, alpha = _coverage(obj.shape, *where)
        height, width = alpha.shape
        plane[y + top : y + top + height, x + left : x + left + width] = alpha
    return planes


def patch_labels(scene: Scene, patches: int = 8) -> dict[str, np.ndarray]:
    """The content of each patch of a `patches` x `patches` grid: a dict of int64 [patches, patches].

    "shape", "color" and "size" are 0 where no object covers a sixteenth of the patch, else 1 + the index in `SHAPES`,
    `COLORS`, `SIZES`. "part" is 0 there too, else 1..9: the third of the object's width and of its height that the
    middle of the patch lies in, in reading order. So are "dx" and "dy", else 1 + the object's jitter in whole pixels,
    counted from the least. "background" is the index in `BACKGROUNDS`, in every patch. `LABEL_CLASSES` has the number
    of classes of each.
    """
    labels = {name: np.zeros((patches, patches), dtype=np.int64) for name in LABEL_CLASSES}
    most = np.full((patches, patches), _VISIBLE, dtype=np.float32)
    for obj in scene.objects:
        covered, part = _patch_coverage(obj.shape, obj.size, obj.center, patches)
        here = covered >= most
        most = np.where(here, covered, most)
        labels["shape"][here] = _SHAPE_INDEX[obj.shape]
        labels["color"][here] = _COLOR_INDEX[obj.color]
        labels["size"][here] = _SIZE_INDEX[obj.size]
        labels["part"][here] = part[here]
        labels["dx"][here], labels["dy"][here] = (1 + JITTER + round(shift) for shift in (obj.dx, obj.dy))
    labels["background"][:] = _BACKGROUND_INDEX[scene.background]
    return labels


@lru_cache(maxsize=4096)
def _patch_coverage(shape: str, size: str, center: tuple[float, float], patches: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of each patch that a shape covers (float32), and which of its 3x3 parts lies there (int64, 1..9)."""
    fine = 16  # points along a patch's side
    points = (np.arange(patches * fine) + 0.5) * CANVAS / (patches * fine)
    u, v = ((points - middle) / SIZES[size] for middle in center)
    covered = inside(shape, u[None, :], v[:, None]).reshape(patches, fine, patches, fine)
    covered = covered.mean(axis=(1, 3), dtype=np.float32)
    middles = (np.arange(patches) + 0.5) * CANVAS / patches
    column, row = (np.digitize((middles - middle) / SIZES[size], (-1 / 3, 1 / 3)) for middle in center)
    part = 1 + 3 * row[:, None] + column[None, :]
    covered.flags.writeable = part.flags.writeable = False
    return covered, part


def _check_size(size: int) -> None:
    if size < 16:
        raise ValueError(f"the side of the image is {size} pixels: it must be at least 16")
