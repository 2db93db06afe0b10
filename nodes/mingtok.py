"""MingTok by itself: picture to latent, latent to features, features to picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from ..ming_core import Features, MingTok
from ..ming_core.images import FITS, check_images, to_images, to_pixels
from . import host
from .latents import from_latent, to_latent
from .widgets import CATEGORY, combo, socket

DETAILS = {"standard": 1, "high": 2}  # times the native side
AT_ONCE = 8  # pictures of a batch that are computed together

_Result = TypeVar("_Result")


def _few_at_a_time(pictures: int, compute: Callable[[slice], _Result]) -> list[_Result]:
    """What is computed of a batch, a few pictures after the other: the bar moves in between, and Interrupt stops."""
    report, results = host.progress(pictures), []
    with torch.no_grad():
        for first in range(0, pictures, AT_ONCE):
            results.append(compute(slice(first, first + AT_ONCE)))
            report(min(first + AT_ONCE, pictures))
    return results


class MingTokEncode:
    DESCRIPTION = "Turns a picture into MingTok's compact continuous latents."
    CATEGORY = CATEGORY
    RETURN_TYPES, RETURN_NAMES = ("LATENT",), ("latent",)
    OUTPUT_TOOLTIPS = ("Continuous latents; core's latent nodes (blend, batch, save) work on them.",)
    FUNCTION = "encode"
    SEARCH_ALIASES = ("ming encode", "image to latent", "tokenizer encode")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "mingtok": socket("MINGTOK", "The tokenizer, from a loader."),
                "image": socket("IMAGE", "The picture, or a batch of them. Alpha is dropped."),
                "fit": combo(
                    list(FITS),
                    "How a picture that is not square becomes square: keep its middle, ignore its aspect ratio, or put "
                    "mid grey around it.",
                ),
                "detail": combo(
                    list(DETAILS),
                    "standard: the size the model draws and edits in. high: twice the side, for questions about "
                    "photographs.",
                ),
            }
        }

    def encode(self, mingtok: host.Loaded, image: torch.Tensor, fit: str, detail: str) -> tuple:
        tokenizer: MingTok = mingtok.model
        if detail not in DETAILS:
            raise ValueError(f"detail is {detail!r}: give one of {tuple(DETAILS)}")
        side = DETAILS[detail] * tokenizer.native_side
        check_images(image, side, fit)
        patches = (side // tokenizer.patch_size) ** 2
        model = host.ready(mingtok, tokenizer.working_memory(min(len(image), AT_ONCE), patches))
        latents = _few_at_a_time(len(image), lambda few: model.encode(to_pixels(image[few], side, fit)))
        return (to_latent(torch.cat(latents)),)


class MingTokSemanticFeatures:
    DESCRIPTION = "Expands latents to the semantic features that Ming-UniVision sees, draws and edits in."
    CATEGORY = CATEGORY
    RETURN_TYPES, RETURN_NAMES = ("MING_FEATURES",), ("features",)
    OUTPUT_TOOLTIPS = ("Features of the picture, or of each picture of the batch.",)
    FUNCTION = "expand"
    SEARCH_ALIASES = ("semantic decoder", "latent to features")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "mingtok": socket("MINGTOK", "The tokenizer that made the latents."),
                "latent": socket("LATENT", "Latents from MingTok Encode, also after core's latent nodes."),
            }
        }

    def expand(self, mingtok: host.Loaded, latent: dict) -> tuple[Features]:
        samples, depth = from_latent(latent)
        mingtok.model.check_latents(samples)
        pictures, _, h, w = samples.shape
        model = host.ready(mingtok, mingtok.model.working_memory(min(pictures, AT_ONCE), h * w))
        expanded = _few_at_a_time(pictures, lambda few: model.semantic_features(samples[few]))
        tokens, latents = (torch.cat(parts) for parts in zip(*((f.tokens, f.latents) for f in expanded), strict=True))
        return (expanded[0]._replace(tokens=tokens, latents=latents, depth=depth),)


class MingTokDecode:
    DESCRIPTION = "Makes the picture, once, where it is wanted: features to pixels."
    CATEGORY = CATEGORY
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    OUTPUT_TOOLTIPS = ("The picture, or the batch of pictures.",)
    FUNCTION = "decode"
    SEARCH_ALIASES = ("pixel decoder", "features to image")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "mingtok": socket("MINGTOK", "The tokenizer of the model that made the features."),
                "features": socket("MING_FEATURES", "Features of seen or drawn pictures."),
            }
        }

    def decode(self, mingtok: host.Loaded, features: Features) -> tuple[torch.Tensor]:
        mingtok.model.check_features(features)
        h, w = features.grid
        model = host.ready(mingtok, mingtok.model.working_memory(min(features.batch, AT_ONCE), h * w))

        def images(few: slice) -> torch.Tensor:
            some = features._replace(tokens=features.tokens[few], latents=features.latents[few])
            return to_images(model.decode(some))

        return (torch.cat(_few_at_a_time(features.batch, images)).to(host.pictures_device()),)
