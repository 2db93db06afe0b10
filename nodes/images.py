"""Image nodes: an example scene to start from, and metrics between two images."""

from __future__ import annotations

import torch

from ..ming_core.images import psnr, ssim
from ..tiny_shapes.world import DEGRADATIONS, Scene, describe, draw, parse_scene, scene_from_seed
from ..tiny_shapes.world import degrade as degrade_image
from . import host
from .widgets import TOOLS, combo, integer, seed, socket

DEGRADE = [kind for kind in DEGRADATIONS if kind != "blurred"]  # no task of Ming Instruction repairs a blur

MAX_SCENE = 2000  # characters; an error quotes them


def parse_words(scene: str) -> Scene:
    """The scene that the words describe. Raises ValueError."""
    if len(scene) > MAX_SCENE:
        raise ValueError(f"the scene has {len(scene)} characters: describe it in at most {MAX_SCENE}")
    return parse_scene(scene)


class MingExampleScene:
    DESCRIPTION = "Draws a scene of simple shapes, as the built-in model knows them, so that templates need no image."
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "STRING"), ("image", "caption")
    OUTPUT_TOOLTIPS = ("The scene.", "A description of the scene.")
    FUNCTION = "draw"
    SEARCH_ALIASES = ("ming test image", "shapes")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        tooltip = (
            'Describe the scene, for example "a large red circle at the top left and a small blue star at the centre '
            'on a white background". Leave empty for a random scene.'
        )
        return {
            "required": {
                "scene": ("STRING", {"default": "", "tooltip": tooltip}),
                "seed": seed("Random seed of the scene and the noise.", changes=True),
                "degrade": combo(DEGRADE, "Degrade the image, for the model to repair."),
                "size": integer(512, 64, 1024, "Side length of the image in pixels."),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, scene: str | None = None) -> bool | str:
        try:
            if isinstance(scene, str) and scene.strip():  # None: the scene is linked, and checked when the node runs
                parse_words(scene)
        except ValueError as error:
            return str(error)
        return True

    def draw(self, scene: str, seed: int, degrade: str, size: int) -> tuple[torch.Tensor, str]:
        parsed = parse_words(scene) if scene.strip() else scene_from_seed(seed)
        pixels = degrade_image(draw(parsed, size), degrade, seed)
        image = torch.from_numpy(pixels).float().div(255)[None]
        return image.to(host.images_device()), describe(parsed)


class MingImageMetrics:
    DESCRIPTION = "Measures how similar two images are."
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("FLOAT", "FLOAT", "STRING"), ("psnr", "ssim", "report")
    OUTPUT_TOOLTIPS = (
        "Peak signal-to-noise ratio in dB; higher is closer.",
        "Structural similarity; 1 for identical images.",
        "Both values as text.",
    )
    FUNCTION = "measure"
    SEARCH_ALIASES = ("psnr", "ssim", "image quality", "compare images")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "image_a": socket("IMAGE", "The first image or batch."),
                "image_b": socket("IMAGE", "The second image or batch, of the same size."),
            }
        }

    def measure(self, image_a: torch.Tensor, image_b: torch.Tensor) -> tuple[float, float, str]:
        image_a, image_b = image_a.cpu(), image_b.cpu()
        noise, structure = psnr(image_a, image_b), ssim(image_a, image_b)
        return noise, structure, f"PSNR {noise:.2f} dB, SSIM {structure:.4f}"
