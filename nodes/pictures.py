"""Pictures to begin with, and pictures measured."""

from __future__ import annotations

import torch

from ..ming_core.images import psnr, ssim
from ..tiny_shapes.world import DEGRADATIONS, describe, draw, parse_scene, scene_from_seed
from ..tiny_shapes.world import degrade as spoil
from . import host
from .widgets import TOOLS, combo, integer, seed, socket

DEGRADE = [kind for kind in DEGRADATIONS if kind != "blurred"]  # for which there is no instruction of its own


class MingExampleScene:
    DESCRIPTION = "Draws a scene of the built-in model's world, so that every template runs without a picture of yours."
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING"), ("image", "caption")
    OUTPUT_TOOLTIPS = ("The scene.", "What it shows, in words.")
    FUNCTION = "draw"
    SEARCH_ALIASES = ("ming test image", "shapes")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        tooltip = (
            'Empty: a scene from the seed. Else in words: "a large red circle at the top left and a small blue star at '
            'the centre on a white background".'
        )
        return {
            "required": {
                "scene": ("STRING", {"default": "", "tooltip": tooltip}),
                "seed": seed("Another seed, another scene (and other noise).", changes=True),
                "degrade": combo(DEGRADE, "Spoil the picture, for the model to repair."),
                "size": integer(512, 64, 1024, "Side of the picture in pixels."),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, scene: str | None = None) -> bool | str:
        try:
            if scene and scene.strip():  # None: the words are linked, and read when they are known
                parse_scene(scene)
        except ValueError as error:
            return str(error)
        return True

    def draw(self, scene: str, seed: int, degrade: str, size: int) -> tuple[torch.Tensor, str]:
        if degrade not in DEGRADE:
            raise ValueError(f"degrade is {degrade!r}: give one of {tuple(DEGRADE)}")
        seed %= 2**64  # a linked one is not held to the widget's range
        wanted = parse_scene(scene) if scene.strip() else scene_from_seed(seed)
        pixels = spoil(draw(wanted, size), degrade, seed)
        image = torch.from_numpy(pixels).float().div(255)[None]
        return image.to(host.pictures_device()), describe(wanted)


class MingImageMetrics:
    DESCRIPTION = "Measures how alike two pictures are."
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("FLOAT", "FLOAT", "STRING"), ("psnr", "ssim", "report")
    OUTPUT_TOOLTIPS = ("Peak signal to noise ratio in dB.", "Structural similarity, 1 for equal pictures.", "Both.")
    FUNCTION = "measure"
    SEARCH_ALIASES = ("psnr", "ssim", "image quality", "compare images")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "image_a": socket("IMAGE", "One picture, or a batch."),
                "image_b": socket("IMAGE", "The other, of the same size."),
            }
        }

    def measure(self, image_a: torch.Tensor, image_b: torch.Tensor) -> tuple[float, float, str]:
        if image_a.shape != image_b.shape:
            raise ValueError(
                f"the pictures differ in shape ({list(image_a.shape)} and {list(image_b.shape)}): bring them to one "
                "size, for example with ImageScale, and to as many pictures, both with or both without alpha"
            )
        image_a, image_b = image_a.cpu(), image_b.cpu()
        noise, structure = psnr(image_a, image_b), ssim(image_a, image_b)
        return noise, structure, f"PSNR {noise:.2f} dB, SSIM {structure:.4f}"
