"""The nodes of ComfyUI's core that edits inside a mask and extended pictures need, for runs without ComfyUI.

Ids, sockets, widgets and results are those of ComfyUI 0.33, to the bit. Where core fails with an error of PyTorch,
there is a sentence here. An IMAGE is float32 [B, H, W, 3] in 0..1, a MASK is float32 [B, H, W] in 0..1, and what is 1
in it may change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nodes import host

MAX_SIDE = 16384
_CHANNELS = ("red", "green", "blue", "alpha")


def _pixels(default: int = 0, least: int = 0, step: int = 1) -> tuple[str, dict[str, int]]:
    return "INT", {"default": default, "min": least, "max": MAX_SIDE, "step": step}


def _share(default: float) -> tuple[str, dict[str, float]]:
    return "FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.01}


class GetImageSize:
    """The width, the height and the number of images in a batch."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"image": ("IMAGE",)}}

    RETURN_TYPES = ("INT", "INT", "INT")
    RETURN_NAMES = ("width", "height", "batch_size")
    FUNCTION = "get_size"
    CATEGORY = "image"

    def get_size(self, image: Tensor) -> tuple[int, int, int]:
        return image.shape[2], image.shape[1], image.shape[0]


class ImageCrop:
    """Cuts a rectangle out of images. Where it reaches beyond the image, the result is smaller."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        sizes = {"width": _pixels(512, 1), "height": _pixels(512, 1), "x": _pixels(), "y": _pixels()}
        return {"required": {"image": ("IMAGE",), **sizes}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "crop"
    CATEGORY = "image/transform"

    def crop(self, image: Tensor, width: int, height: int, x: int, y: int) -> tuple[Tensor]:
        x, y = min(x, image.shape[2] - 1), min(y, image.shape[1] - 1)
        return (image[:, y : y + height, x : x + width],)


class ImagePadForOutpaint:
    """Adds gray borders to images, and a mask that is 1 in them and fades out inside the image."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        sides = {side: _pixels(step=8) for side in ("left", "top", "right", "bottom")}
        return {"required": {"image": ("IMAGE",), **sides, "feathering": _pixels(40)}}

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "expand_image"
    CATEGORY = "image/transform"

    def expand_image(
        self, image: Tensor, left: int, top: int, right: int, bottom: int, feathering: int
    ) -> tuple[Tensor, Tensor]:
        batch, height, width, channels = image.shape
        size = (batch, height + top + bottom, width + left + right, channels)
        padded = torch.full(size, 0.5, device=image.device)
        padded[:, top : top + height, left : left + width] = image
        mask = torch.ones(1, *padded.shape[1:3], device=image.device)
        mask[:, top : top + height, left : left + width] = _feather(height, width, left, top, right, bottom, feathering)
        return padded, mask


def _feather(height: int, width: int, left: int, top: int, right: int, bottom: int, feathering: int) -> Tensor:
    """[height, width]: 1 at the edges that were extended, down to 0 at `feathering` pixels from them."""
    if not 0 < feathering < min(height, width) / 2:
        return torch.zeros(height, width, device="cpu")
    y, x = torch.arange(height, device="cpu")[:, None], torch.arange(width, device="cpu")
    distance = torch.full((height, width), min(height, width), dtype=torch.float64, device="cpu")
    for extended, along in ((top, y), (bottom, height - y), (left, x), (right, width - x)):
        if extended:
            distance = torch.minimum(distance, along)
    return (((feathering - distance).clamp(min=0) / feathering) ** 2).float()


class ImageCompositeMasked:
    """Lays `source` over `destination` at (x, y), where the mask is 1; without a mask, everywhere."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        required = {"destination": ("IMAGE",), "source": ("IMAGE",), "x": _pixels(), "y": _pixels()}
        resize = ("BOOLEAN", {"default": False})
        return {"required": {**required, "resize_source": resize}, "optional": {"mask": ("MASK",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "composite"
    CATEGORY = "image/compositing"

    def composite(
        self, destination: Tensor, source: Tensor, x: int, y: int, resize_source: bool, mask: Tensor | None = None
    ) -> tuple[Tensor]:
        result = destination.clone().movedim(-1, 1)
        source = _repeated(_same_channels(source, destination.shape[-1]).movedim(-1, 1), len(result))
        if resize_source:
            source = F.interpolate(source, size=result.shape[-2:], mode="bilinear")
        weight = torch.ones_like(source[:, :1]) if mask is None else _scaled_mask(mask, source)
        source, weight = (t[..., : result.shape[-2] - y, : result.shape[-1] - x] for t in (source, weight))
        if y < result.shape[-2] and x < result.shape[-1]:
            below = result[..., y : y + source.shape[-2], x : x + source.shape[-1]]
            below.copy_(weight * source + (torch.ones_like(weight) - weight) * below)
        return (result.movedim(1, -1),)


def _same_channels(image: Tensor, channels: int) -> Tensor:
    """The image without its alpha, or with an opaque one, as the other image has it."""
    if image.shape[-1] < channels:
        return F.pad(image, (0, 1), value=1.0)
    return image[..., :channels]


def _repeated(batch: Tensor, count: int) -> Tensor:
    """The batch again and again, cut to `count`."""
    return batch.repeat(-(-count // len(batch)), *[1] * (batch.ndim - 1))[:count]


def _scaled_mask(mask: Tensor, source: Tensor) -> Tensor:
    """[B, 1, h, w]: the mask at the size of `source` and for each of its images."""
    mask = _batched(mask)[:, None].to(source.device)
    return _repeated(F.interpolate(mask, size=source.shape[-2:], mode="bilinear"), len(source))


def _batched(mask: Tensor) -> Tensor:
    """[B, H, W]; some nodes give a single mask as [H, W]."""
    return mask.reshape(-1, *mask.shape[-2:])


class SolidMask:
    """A mask of one value."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": _share(1.0), "width": _pixels(512, 1), "height": _pixels(512, 1)}}

    RETURN_TYPES = ("MASK",)
    FUNCTION = "solid"
    CATEGORY = "image/mask"

    def solid(self, value: float, width: int, height: int) -> tuple[Tensor]:
        return (torch.full((1, height, width), value, dtype=torch.float32, device=host.images_device()),)


class _MaskNode:
    """A node that makes a mask of a mask."""

    RETURN_TYPES: tuple[str, ...] = ("MASK",)
    CATEGORY = "image/mask"
    WIDGETS: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"mask": ("MASK",), **cls.WIDGETS}}


class InvertMask(_MaskNode):
    """1 becomes 0, and 0 becomes 1."""

    FUNCTION = "invert"

    def invert(self, mask: Tensor) -> tuple[Tensor]:
        return (1.0 - mask,)


class ThresholdMask(_MaskNode):
    """1 where the mask is above `value`, otherwise 0."""

    FUNCTION = "threshold"
    WIDGETS: ClassVar = {"value": _share(0.5)}

    def threshold(self, mask: Tensor, value: float) -> tuple[Tensor]:
        return ((mask > value).float(),)


class GrowMask(_MaskNode):
    """Widens the white by `expand` pixels, or the black if it is negative."""

    FUNCTION = "expand_mask"
    WIDGETS: ClassVar = {
        "expand": ("INT", {"default": 0, "min": -MAX_SIDE, "max": MAX_SIDE, "step": 1}),
        "tapered_corners": ("BOOLEAN", {"default": True}),
    }

    def expand_mask(self, mask: Tensor, expand: int, tapered_corners: bool) -> tuple[Tensor]:
        sign = 1 if expand > 0 else -1
        grown = _batched(mask) * sign
        for _ in range(min(abs(expand), sum(grown.shape[-2:]))):  # after that many steps nothing is left to change
            grown = _grown_by_one(grown, tapered_corners)
        return (grown * sign,)


def _grown_by_one(mask: Tensor, tapered_corners: bool) -> Tensor:
    """The maximum of each pixel and its 4 or 8 neighbors."""
    if not tapered_corners:
        return F.max_pool2d(mask, 3, stride=1, padding=1)
    upright = F.max_pool2d(mask, (3, 1), stride=1, padding=(1, 0))
    return torch.maximum(upright, F.max_pool2d(mask, (1, 3), stride=1, padding=(0, 1)))


class FeatherMask(_MaskNode):
    """Fades the mask out towards its edges, over the given numbers of pixels."""

    FUNCTION = "feather"
    WIDGETS: ClassVar = {side: _pixels() for side in ("left", "top", "right", "bottom")}

    def feather(self, mask: Tensor, left: int, top: int, right: int, bottom: int) -> tuple[Tensor]:
        feathered = _batched(mask).clone()
        _fade(feathered, left, right)
        _fade(feathered.mT, top, bottom)
        return (feathered,)


def _fade(mask: Tensor, left: int, right: int) -> None:
    left, right = min(left, mask.shape[-1]), min(right, mask.shape[-1])
    for x in range(left):
        mask[..., x] *= (x + 1) / left
    for x in range(right):
        mask[..., -(x + 1)] *= (x + 1) / right


class CropMask(_MaskNode):
    """Cuts a rectangle out of a mask. Where it reaches beyond the mask, the result is smaller."""

    FUNCTION = "crop"
    WIDGETS: ClassVar = {"x": _pixels(), "y": _pixels(), "width": _pixels(512, 1), "height": _pixels(512, 1)}

    def crop(self, mask: Tensor, x: int, y: int, width: int, height: int) -> tuple[Tensor]:
        cut = _batched(mask)[:, y : y + height, x : x + width]
        if not cut.numel():
            raise ValueError(f"the rectangle at ({x}, {y}) is outside the mask of {_size(mask)}: use smaller x and y")
        return (cut,)


class MaskToImage(_MaskNode):
    """The mask as a gray image."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "mask_to_image"

    def mask_to_image(self, mask: Tensor) -> tuple[Tensor]:
        return (_batched(mask)[..., None].expand(-1, -1, -1, 3),)


class ImageToMask:
    """One channel of an image as a mask."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"image": ("IMAGE",), "channel": (list(_CHANNELS),)}}

    RETURN_TYPES = ("MASK",)
    FUNCTION = "image_to_mask"
    CATEGORY = "image/mask"

    def image_to_mask(self, image: Tensor, channel: str) -> tuple[Tensor]:
        index = _CHANNELS.index(channel)
        if index >= image.shape[-1]:
            raise ValueError("the image has no alpha channel: choose red, green or blue, or take LoadImage's mask")
        return (image[..., index],)


class MaskComposite:
    """Combines two masks, where `source`, laid over `destination` at (x, y), covers it."""

    OPERATIONS: ClassVar[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "multiply": torch.mul,
        "add": torch.add,
        "subtract": torch.sub,
        "and": lambda a, b: (a.round().bool() & b.round().bool()).float(),
        "or": lambda a, b: (a.round().bool() | b.round().bool()).float(),
        "xor": lambda a, b: (a.round().bool() ^ b.round().bool()).float(),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        masks = {"destination": ("MASK",), "source": ("MASK",)}
        return {"required": {**masks, "x": _pixels(), "y": _pixels(), "operation": (list(cls.OPERATIONS),)}}

    RETURN_TYPES = ("MASK",)
    FUNCTION = "combine"
    CATEGORY = "image/mask"

    def combine(self, destination: Tensor, source: Tensor, x: int, y: int, operation: str) -> tuple[Tensor]:
        result = _batched(destination).clone()
        source = _batched(source).to(result.device)
        if len(source) not in (1, len(result)):
            raise ValueError(f"{len(source)} masks cannot be laid over {len(result)}: use one, or as many")
        below = result[:, y : y + source.shape[-2], x : x + source.shape[-1]]
        below.copy_(self.OPERATIONS[operation](below, source[:, : below.shape[-2], : below.shape[-1]]))
        return (result.clamp(0.0, 1.0),)


def _size(mask: Tensor) -> str:
    return f"{mask.shape[-1]}x{mask.shape[-2]} pixels"


NODE_CLASS_MAPPINGS = {
    node.__name__: node
    for node in (
        GetImageSize,
        ImageCrop,
        ImagePadForOutpaint,
        ImageCompositeMasked,
        SolidMask,
        InvertMask,
        ThresholdMask,
        GrowMask,
        FeatherMask,
        CropMask,
        MaskToImage,
        ImageToMask,
        MaskComposite,
    )
}
