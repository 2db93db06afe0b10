"""Degraded images, for the tasks that restore them: pixelated, grey, noisy, blurred.

The size of a defect follows the side of the image, so that a large example and the model's own 128 look alike after
resizing: 32 blocks across, 128 grains of noise across.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from .scenes import CANVAS

DEGRADATIONS = ("none", "pixelated", "grey", "noisy", "blurred")

_BLOCKS = 32  # blocks along a side of a pixelated image: 4 pixels each at 128
_GRAINS = 128  # grains of noise along a side
_NOISE = (24.0, 44.0)  # standard deviation of the noise, of 255: the seed chooses
_BLUR = (1.2, 2.0)  # standard deviation of the blur, in pixels at 128: the seed chooses


def degrade(pixels: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """A degraded copy of an image, uint8 [H, W, 3] in and out; the same seed gives the same pixels.

    `kind`: "none" (a plain copy), "pixelated", "grey" (luminance in all three channels), "noisy", "blurred".
    Raises ValueError for another kind, or for another layout of the image.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"the image is {pixels.dtype} {list(pixels.shape)}: give uint8 [H, W, 3]")
    height, width, _ = pixels.shape
    image, rng = Image.fromarray(pixels), np.random.default_rng(seed)
    if kind == "none":
        return pixels.copy()
    if kind == "pixelated":
        blocks = image.resize((_BLOCKS, _BLOCKS), Image.Resampling.BOX)
        return np.array(blocks.resize((width, height), Image.Resampling.NEAREST))
    if kind == "grey":
        return np.array(image.convert("L").convert("RGB"))
    if kind == "blurred":
        radius = rng.uniform(*_BLUR) * min(height, width) / CANVAS
        return np.array(image.filter(ImageFilter.GaussianBlur(radius)))
    if kind == "noisy":
        grains = rng.normal(0.0, rng.uniform(*_NOISE), (_GRAINS, _GRAINS, 3))
        rows, columns = (np.arange(side) * _GRAINS // side for side in (height, width))
        return np.clip(np.rint(pixels + grains[rows][:, columns]), 0, 255).astype(np.uint8)
    raise ValueError(f"{kind!r} is not a degradation: use one of {', '.join(DEGRADATIONS)}")
