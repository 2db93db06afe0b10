"""ComfyUI's IMAGE tensors to the model's pixels and back, with the published resize rules; how alike two pictures are.

IMAGE: float [B, H, W, C], 0..1. Model pixels: float32 [B, 3, S, S], -1..1, S the side the model wants. A picture is
resized once, in 8 bit, by Pillow's antialiased bicubic filter, as published; one that has the right size already is
not touched.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .checks import check_tensor, described

FITS = ("center crop", "stretch", "pad")
MAX_SIDE_RATIO = 16  # a centre crop of anything longer would show a sliver of the picture
MID_GREY = (128, 128, 128)


def to_pixels(images: Tensor, side: int, fit: str = "center crop") -> Tensor:
    """IMAGE [B, H, W, C] -> model pixels [B, 3, side, side].

    C is 3, 4 (alpha is dropped) or 1 (repeated); values outside 0..1 are clamped. fit: "center crop" keeps the middle
    square, "stretch" ignores the aspect ratio, "pad" puts mid grey around. Raises ValueError.
    """
    check_images(images, side, fit)
    images = images[..., :3].float().clamp(0, 1).expand(-1, -1, -1, 3)
    if images.shape[1:3] == (side, side):
        return images.permute(0, 3, 1, 2) * 2 - 1
    resized = [_resize(Image.fromarray(to_uint8(image)), side, fit) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)


def fit_mask(masks: Tensor, side: int, fit: str = "center crop") -> Tensor:
    """MASK [B, H, W], 0..1 -> [B, side, side], placed as `to_pixels` places an image of that height and width.

    Every value is the largest of the pixels that it stands for, so that a thin white stroke survives scaling down. What
    "pad" puts around is black. Raises ValueError.
    """
    check_mask(masks)
    height, width = masks.shape[1:]
    short, long = sorted((height, width))
    rows = columns = side
    if fit == "center crop":
        # the crop as `_resize` makes it, in the mask's own pixels
        extra = int(side * long / short) - side
        begin = round(extra / 2) * short / side
        span = slice(math.floor(begin), min(long, math.ceil(begin + short)))
        masks = masks[:, span] if height > width else masks[:, :, span]
    elif fit == "pad":
        other = max(1, round(side * short / long))
        rows, columns = (side, other) if width <= height else (other, side)
    scaled = F.adaptive_max_pool2d(masks.float()[:, None], (rows, columns))[:, 0]
    top, left = (-round((n - side) / 2) for n in (rows, columns))
    return F.pad(scaled, (left, side - columns - left, top, side - rows - top))


def check_images(images: Tensor, side: int, fit: str) -> None:
    """Raises ValueError for what `to_pixels` cannot take; makes no copy of the pictures."""
    if not isinstance(fit, str) or fit not in FITS:
        raise ValueError(f"fit is {described(fit)}: choose one of {FITS}")
    check_image(images)
    _check_finite("image", images[..., :3])
    height, width = images.shape[1:3]
    too_long = max(height, width) > MAX_SIDE_RATIO * min(height, width)
    if fit == "center crop" and too_long:
        raise ValueError(
            f"a picture of {width}x{height} is too long for a center crop (more than {MAX_SIDE_RATIO}:1): "
            'set fit to "stretch" or "pad", or crop it first'
        )


def check_image(images: object, name: str = "image") -> Tensor:
    """Raises ValueError for what is no IMAGE by type or shape; reads no pixel. 0..255 is not guessed at."""
    images = check_tensor(name, images, "from 0 to 1")
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{name} is {list(images.shape)}: connect an IMAGE, which is [batch, height, width, 1, 3 or 4 channels]"
        )
    if 0 in images.shape:
        raise ValueError(f"there is no picture in this batch ({name} is {list(images.shape)}): connect one or more")
    return images


def check_mask(masks: object, name: str = "mask") -> Tensor:
    """Raises ValueError for what is no MASK [batch, height, width]."""
    masks = check_tensor(name, masks, "from 0 to 1")
    if masks.ndim != 3 or 0 in masks.shape:
        raise ValueError(f"{name} is {list(masks.shape)}: connect a MASK, which is [batch, height, width]")
    _check_finite(name, masks)
    return masks


def _check_finite(name: str, images: Tensor) -> None:
    # one at a time: the answer for all pixels of a long batch would take as much memory as a picture each
    if not all(image.isfinite().all() for image in images):
        raise ValueError(f"the {name} contains NaN or infinite values: repair it before it goes on")


def to_images(pixels: Tensor) -> Tensor:
    """Model pixels [B, 3, H, W] in -1..1 -> IMAGE float32 [B, H, W, 3], 0..1, in host memory."""
    return (pixels.float().cpu() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


def enlarged(images: Tensor, side: int) -> Tensor:
    """IMAGE [B, H, W, 3], bicubically enlarged until the longer side has `side` pixels; as it is if it has them."""
    longer = max(images.shape[1:3])
    if longer >= side:
        return images
    size = [round(n * side / longer) for n in images.shape[1:3]]
    channels_first = F.interpolate(images.movedim(-1, 1), size, mode="bicubic")
    return channels_first.clamp(0, 1).movedim(1, -1).contiguous()


def to_uint8(image: Tensor) -> np.ndarray:
    """One picture, float [H, W, C] in 0..1 -> uint8, rounded to the nearest level."""
    return (image.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def from_uint8(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> model pixels, float32 [B, 3, H, W] in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of two pictures or IMAGEs, floats from 0 to 1; infinite for equal ones.

    Raises ValueError unless both have one shape and finite values.
    """
    _check_pair(a, b)
    error = (a.double() - b.double()).square().mean()
    return float("inf") if error == 0 else _measured(-10 * torch.log10(error))


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of two IMAGEs (Wang et al. 2004: Gaussian window of 11, sigma 1.5).

    Raises ValueError unless both have one shape and finite values.
    """
    _check_pair(check_image(a), check_image(b))
    pairs = zip(a.permute(0, 3, 1, 2).flatten(0, 1), b.permute(0, 3, 1, 2).flatten(0, 1), strict=True)
    return _measured(torch.stack([_plane_ssim(x.double(), y.double()) for x, y in pairs]).mean())


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"the images differ in shape ({list(a.shape)} and {list(b.shape)}): resize them to one size, for example "
            "with Upscale Image (ImageScale), and use equally many, both with or both without alpha"
        )
    for images in (a, b):
        _check_finite("image", check_tensor("image", images, "from 0 to 1"))
    if 0 in a.shape:
        raise ValueError(f"there is nothing to compare in images of {list(a.shape)}: connect pictures")


def _measured(value: Tensor) -> float:
    if not value.isfinite():
        raise ValueError("the values of the images are too large to be compared: they must be from 0 to 1")
    return float(value)


def _plane_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Of one channel [H, W] of one picture each: a large picture is worked on in parts."""
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b, cov = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2, _blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean()


def _blur(x: Tensor) -> Tensor:
    """[H, W], only where the Gaussian window fits; smaller pictures use the middle of the window."""
    window = torch.exp(-((torch.arange(11.0, dtype=torch.float64, device="cpu") - 5) ** 2) / (2 * 1.5**2))
    for axis in (0, 1):
        n = min(11, x.shape[axis])
        w = window[(11 - n) // 2 : (11 - n) // 2 + n]
        size = x.shape[axis] - n + 1
        x = sum(weight * x.narrow(axis, i, size) for i, weight in enumerate((w / w.sum()).tolist()))
    return x


def _resize(image: Image.Image, side: int, fit: str) -> np.ndarray:
    """To uint8 [side, side, 3]."""
    width, height = image.size
    short, long = sorted((width, height))
    if fit == "stretch":
        size = (side, side)
    elif fit == "center crop":
        other = int(side * long / short)
        size = (side, other) if width <= height else (other, side)
    else:
        other = max(1, round(side * short / long))
        size = (other, side) if width <= height else (side, other)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((n - side) / 2) for n in image.size)
    if fit == "pad":
        canvas = Image.new("RGB", (side, side), MID_GREY)
        canvas.paste(image, (-left, -top))
        return np.array(canvas)
    return np.array(image.crop((left, top, left + side, top + side)))
