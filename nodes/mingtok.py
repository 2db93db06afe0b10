"""MingTok nodes: image to latent, latent to features, features to image."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F

from ..ming_core import Features, MingTok
from ..ming_core.images import FITS, check_images, check_mask, enlarged, fit_mask, to_images, to_pixels
from ..ming_core.options import WHITE
from . import host
from .latents import from_latent, to_latent
from .widgets import CATEGORY, combo, integer, socket

DETAILS = {"standard": 1, "high": 2}  # multiples of the native side
AT_ONCE = 8  # images computed together

Result = TypeVar("Result")


def in_batches(images: int, compute: Callable[[slice], Result]) -> list[Result]:
    """Call `compute` for AT_ONCE images at a time; the bar moves and Interrupt works in between."""
    report, results = host.progress(images), []
    with torch.no_grad():
        for first in range(0, images, AT_ONCE):
            results.append(compute(slice(first, first + AT_ONCE)))
            report(min(first + AT_ONCE, images))
    return results


def mask_of_image(mask: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """A MASK of any size as one of the image's height and width: [B, H, W]. Raises ValueError."""
    masks = check_mask(mask[None] if mask.ndim == 2 else mask).float().cpu()
    if masks.shape[1:] == image.shape[1:3]:
        return masks
    return F.adaptive_max_pool2d(masks[:, None], tuple(image.shape[1:3]))[:, 0]


def _fitted(mask: torch.Tensor, image: torch.Tensor, side: int, fit: str) -> torch.Tensor:
    """The mask placed as the image is. Raises ValueError where nothing of what is white in it is left."""
    whole = mask_of_image(mask, image)
    fitted = fit_mask(whole, side, fit)
    if any((before > WHITE).any() and not (after > WHITE).any() for before, after in zip(whole, fitted, strict=True)):
        raise ValueError(
            "all that is white in the mask lies outside the center of the image, which alone is kept: set fit to pad "
            "or stretch, or crop the image around the mask first"
        )
    return fitted


class MingTokEncode:
    DESCRIPTION = "Encodes an image to MingTok's compact, continuous latents."
    CATEGORY = CATEGORY
    RETURN_TYPES, RETURN_NAMES = ("LATENT", "MASK"), ("latent", "mask")
    OUTPUT_TOOLTIPS = (
        "Continuous latents. Core latent nodes (blend, batch, save) work on them.",
        "The mask, cropped, stretched or padded like the image, for Ming Edit. All white if none is connected.",
    )
    FUNCTION = "encode"
    SEARCH_ALIASES = ("ming encode", "image to latent", "tokenizer encode")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "mingtok": socket("MINGTOK", "The tokenizer from a loader."),
                "image": socket("IMAGE", "The image, or a batch of images. Alpha is ignored."),
                "fit": combo(
                    list(FITS),
                    "How to make an image square: crop to its center, stretch it, or pad it with mid-gray.",
                ),
                "detail": combo(
                    list(DETAILS),
                    "standard: the size the model draws and edits at. high: twice the side length, for questions "
                    "about photos.",
                ),
            },
            "optional": {"mask": socket("MASK", "A mask painted on the image; it comes out fitted like the image.")},
        }

    def encode(
        self,
        mingtok: host.Loaded[MingTok],
        image: torch.Tensor,
        fit: str,
        detail: str,
        mask: torch.Tensor | None = None,
    ) -> tuple[dict, torch.Tensor]:
        tokenizer = mingtok.model
        side = DETAILS[detail] * tokenizer.native_side
        check_images(image, side, fit)
        fitted = torch.ones(1, side, side, device="cpu") if mask is None else _fitted(mask, image, side, fit)
        patches = (side // tokenizer.patch_size) ** 2
        host.load_to_gpu(mingtok, tokenizer.working_memory(min(len(image), AT_ONCE), patches))
        latents = in_batches(len(image), lambda few: tokenizer.encode(to_pixels(image[few], side, fit)))
        return to_latent(torch.cat(latents)), fitted.to(host.images_device())


class MingTokSemanticFeatures:
    DESCRIPTION = "Expands latents to semantic features, which Ming-UniVision understands, draws and edits."
    CATEGORY = CATEGORY
    RETURN_TYPES, RETURN_NAMES = ("MING_FEATURES",), ("features",)
    OUTPUT_TOOLTIPS = ("Features of the image, or of each image in the batch.",)
    FUNCTION = "expand"
    SEARCH_ALIASES = ("semantic decoder", "latent to features")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "mingtok": socket("MINGTOK", "The tokenizer that made the latents."),
                "latent": socket("LATENT", "Latents from MingTok Encode, directly or through core latent nodes."),
            }
        }

    def expand(self, mingtok: host.Loaded[MingTok], latent: dict) -> tuple[Features]:
        tokenizer = mingtok.model
        samples, depth = from_latent(latent)
        tokenizer.check_latents(samples)
        images, _, h, w = samples.shape
        host.load_to_gpu(mingtok, tokenizer.working_memory(min(images, AT_ONCE), h * w))
        expanded = in_batches(images, lambda few: tokenizer.semantic_features(samples[few]))
        tokens, latents = (torch.cat(parts) for parts in zip(*((f.tokens, f.latents) for f in expanded), strict=True))
        return (expanded[0]._replace(tokens=tokens, latents=latents, depth=depth),)


class MingTokDecode:
    DESCRIPTION = "Decodes features to an image."
    CATEGORY = CATEGORY
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    OUTPUT_TOOLTIPS = ("The image, or the batch of images.",)
    FUNCTION = "decode"
    SEARCH_ALIASES = ("pixel decoder", "features to image")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "mingtok": socket("MINGTOK", "The MingTok of the model that made the features."),
                "features": socket("MING_FEATURES", "Features of encoded or drawn pictures."),
            },
            "optional": {
                "enlarge_to": integer(
                    0,
                    0,
                    2048,
                    "Enlarge smaller pictures, such as the built-in model's, until their longer side has this many "
                    "pixels. 0: never.",
                )
            },
        }

    def decode(self, mingtok: host.Loaded[MingTok], features: Features, enlarge_to: int = 0) -> tuple[torch.Tensor]:
        tokenizer = mingtok.model
        tokenizer.check_features(features)
        h, w = features.grid
        host.load_to_gpu(mingtok, tokenizer.working_memory(min(features.batch, AT_ONCE), h * w))

        def decode_batch(few: slice) -> torch.Tensor:
            batch = features._replace(tokens=features.tokens[few], latents=features.latents[few])
            return enlarged(to_images(tokenizer.decode(batch)), enlarge_to)

        return (torch.cat(in_batches(features.batch, decode_batch)).to(host.images_device()),)
