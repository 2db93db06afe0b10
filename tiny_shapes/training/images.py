"""The stream of pictures that MingTok learns from: scenes, and the other kinds of pictures that tasks show and draw.

Most are clean scenes of the training split; the rest are degraded scenes, pictures of regions, and scenes in colours
that the world does not name, so that what the tokenizer learns is shapes and colours rather than a table of them.
"""

from __future__ import annotations

import numpy as np

from ..world import (
    CANVAS,
    EDIT_KINDS,
    POSITIONS,
    Scene,
    degrade,
    draw,
    masks,
    patch_labels,
    random_edit,
    random_scene,
    region_picture,
    split_of,
)
from .sequences import IGNORE

_FAR = 120  # least distance of a thing's colour from the ground's, summed over the channels

LABELS = ("shape", "color", "part")

# Kind of picture and its share.
MIXTURE = {
    "scene": 0.70,
    "region": 0.10,
    "grey": 0.05,
    "pixelated": 0.04,
    "noisy": 0.04,
    "blurred": 0.02,
    "recoloured": 0.05,
}


def picture_batch(
    rng: np.random.Generator,
    size: int,
    things: tuple[int, int],
    split: str = "train",
    kind: str = "",
    patches: int = 8,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Pictures and what their patches show.

    Returns uint8 [size, H, W, 3] and a dict of int64 [size, patches * patches] for each of `LABELS`; IGNORE where the
    picture does not tell (a grey picture has no colour, a region no shape). `kind` fixes the kind of all; `patches`:
    along a side.
    """
    pixels, labels = [], []
    kinds = [kind] * size if kind else rng.choice(list(MIXTURE), size, p=list(MIXTURE.values()))
    for each in kinds:
        scene = random_scene(rng, things, split)
        pixels.append(_PICTURES.get(each, _degraded)(scene, rng, each))
        known = patch_labels(scene, patches)
        shown = {name: known[name].reshape(-1) for name in LABELS}
        if each == "region":
            shown = {name: np.full_like(values, IGNORE) for name, values in shown.items()}
        elif each in ("grey", "recoloured"):
            shown["color"] = np.full_like(shown["color"], IGNORE)
        labels.append(shown)
    return np.stack(pixels), {name: np.stack([shown[name] for shown in labels]) for name in LABELS}


def _scene(scene: Scene, rng: np.random.Generator, kind: str) -> np.ndarray:
    return draw(scene)


def _degraded(scene: Scene, rng: np.random.Generator, kind: str) -> np.ndarray:
    return degrade(draw(scene), kind, int(rng.integers(2**31)))


def _recoloured(scene: Scene, rng: np.random.Generator, kind: str) -> np.ndarray:
    """The scene in any colours: a random hue for each thing and the ground, far enough apart to show."""
    while True:
        colors = rng.integers(0, 256, (len(scene.things) + 1, 3)).astype(np.float32)
        if np.abs(colors[1:] - colors[0]).sum(1).min() > _FAR:
            return _paint(np.broadcast_to(colors[0], (CANVAS, CANVAS, 3)), masks(scene), colors[1:])


def _region(scene: Scene, rng: np.random.Generator, kind: str) -> np.ndarray:
    """The answer to "identify the editing region" for some edit of the scene; to a training scene in training."""
    # Only one edit in many leads from an evaluation scene to another one: there any will do.
    split = "train" if split_of(scene) == "train" else None
    while True:
        edit = random_edit(rng, scene, EDIT_KINDS[rng.integers(len(EDIT_KINDS))], (1, len(POSITIONS)), split)
        if edit is not None:
            return region_picture(scene, edit.apply(scene))


def _paint(ground: np.ndarray, planes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    picture = np.array(ground, dtype=np.float32)
    for plane, color in zip(planes, colors, strict=True):
        picture += plane[..., None] * (color - picture)
    return np.rint(picture).astype(np.uint8)


_PICTURES = {"scene": _scene, "region": _region, "recoloured": _recoloured}
