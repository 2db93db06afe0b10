"""The images that MingTok is trained on: scenes, and the other kinds of images that tasks show and draw.

Most are scenes of the training split; the rest are degraded scenes, images of regions, and scenes in colors that the
world has no names for, so that the tokenizer learns shapes and colors rather than a table of them.
"""

from __future__ import annotations

from collections.abc import Callable

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
    region_image,
    split_of,
)
from .sequences import IGNORE

_DISTINCT = 120  # least distance of an object's color from the background's, summed over the channels

LABELS = ("shape", "color", "part")

# The kinds of images and their shares.
MIXTURE = {
    "scene": 0.70,
    "region": 0.10,
    "grey": 0.05,
    "pixelated": 0.04,
    "noisy": 0.04,
    "blurred": 0.02,
    "recolored": 0.05,
}


def image_batch(
    rng: np.random.Generator,
    size: int,
    objects: tuple[int, int],
    split: str = "train",
    kind: str = "",
    patches: int = 8,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Images, and what their patches show.

    objects  fewest and most objects in a scene
    kind     the kind of all images; "": the mixture
    patches  along a side

    Returns uint8 [size, H, W, 3], and int64 [size, patches * patches] for each of `LABELS`: IGNORE where the image does
    not tell (a grey image has no color, a region no shape).
    """
    pixels, labels = [], []
    kinds = [kind] * size if kind else rng.choice(list(MIXTURE), size, p=list(MIXTURE.values()))
    for each in kinds:
        scene = random_scene(rng, objects, split)
        pixels.append(_MAKERS.get(each, _degraded)(scene, rng, each))
        known = patch_labels(scene, patches)
        targets = {name: known[name].reshape(-1) for name in LABELS}
        if each == "region":
            targets = {name: np.full_like(values, IGNORE) for name, values in targets.items()}
        elif each in ("grey", "recolored"):
            targets["color"] = np.full_like(targets["color"], IGNORE)
        labels.append(targets)
    return np.stack(pixels), {name: np.stack([targets[name] for targets in labels]) for name in LABELS}


def _scene(scene: Scene, rng: np.random.Generator, kind: str) -> np.ndarray:
    return draw(scene)


def _degraded(scene: Scene, rng: np.random.Generator, kind: str) -> np.ndarray:
    return degrade(draw(scene), kind, int(rng.integers(2**31)))


def _recolored(scene: Scene, rng: np.random.Generator, kind: str) -> np.ndarray:
    """The scene in random colors, distinct enough for the objects to show."""
    while True:
        colors = rng.integers(0, 256, (len(scene.objects) + 1, 3)).astype(np.float32)
        if np.abs(colors[1:] - colors[0]).sum(1).min() > _DISTINCT:
            return _paint(np.broadcast_to(colors[0], (CANVAS, CANVAS, 3)), masks(scene), colors[1:])


def _region(scene: Scene, rng: np.random.Generator, kind: str) -> np.ndarray:
    """The answer to "identify the editing region" for a random edit; in training, one to a training scene."""
    # Only one edit in many leads from one evaluation scene to another, so there any will do.
    split = "train" if split_of(scene) == "train" else None
    while True:
        edit = random_edit(rng, scene, EDIT_KINDS[rng.integers(len(EDIT_KINDS))], (1, len(POSITIONS)), split)
        if edit is not None:
            return region_image(scene, edit.apply(scene))


def _paint(ground: np.ndarray, planes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    image = np.array(ground, dtype=np.float32)
    for plane, color in zip(planes, colors, strict=True):
        image += plane[..., None] * (color - image)
    return np.rint(image).astype(np.uint8)


_MAKERS: dict[str, Callable[[Scene, np.random.Generator, str], np.ndarray]] = {
    "scene": _scene,
    "region": _region,
    "recolored": _recolored,
}
