"""Feature nodes: preview, compare, convert to latents, save and load."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ming_core import Features, MingTok, load_features, save_features
from ..ming_core.features import CHANGED, change, joined, principal_colors
from ..ming_core.saved import FEATURES_FORMAT
from . import host
from .latents import to_latent
from .saved_files import LoadingNode, SavingNode, save_new_file, saved_path
from .widgets import FEATURES, file_name, number, socket

PATCH_SIZE = 32  # pixels of a token's side, as in the published MingTok
MAP_SIDE = 512  # pixels of the longer side of a map over few tokens, where it would be small otherwise


def enlarge(maps: torch.Tensor, patch_size: int | None = None) -> torch.Tensor:
    """Show every token of a map [B, C, h, w] as a square of `patch_size` pixels; None: that of the published model."""
    factor = patch_size or max(PATCH_SIZE, MAP_SIDE // max(maps.shape[2:]))
    return F.interpolate(maps, scale_factor=factor, mode="nearest-exact")


class MingFeaturesPreview:
    DESCRIPTION = "Shows features as colors: their three principal components (PCA)."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    OUTPUT_TOOLTIPS = ("Tokens with similar meaning get similar colors, across the whole batch.",)
    FUNCTION = "show"
    SEARCH_ALIASES = ("pca", "visualize features")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"features": socket("MING_FEATURES", "The features to show.")}}

    def show(self, features: Features) -> tuple[torch.Tensor]:
        image = enlarge(principal_colors(features)).permute(0, 2, 3, 1).contiguous()
        return (image.to(host.images_device()),)


class MingFeaturesCompare:
    DESCRIPTION = "Shows what changed between two pictures, measured in feature space."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "MASK", "FLOAT"), ("heatmap", "mask", "similarity")
    OUTPUT_TOOLTIPS = (
        "Bright where the pictures differ.",
        "White where they differ by more than the threshold.",
        "1 for identical pictures; lower the more they differ.",
    )
    FUNCTION = "compare"
    SEARCH_ALIASES = ("difference", "change mask")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "features_a": socket("MING_FEATURES", "Features before the change."),
                "features_b": socket("MING_FEATURES", "Features after the change: same grid, same number of pictures."),
                "threshold": number(CHANGED, 0.0, 2.0, 0.01, "Tokens that differ by more than this count as changed."),
            },
            "optional": {
                "mingtok": socket(
                    "MINGTOK",
                    "Gives the heatmap and the mask the size of the decoded pictures. "
                    "Only needed for models with other patches than the published one, such as the built-in model.",
                )
            },
        }

    def compare(
        self,
        features_a: Features,
        features_b: Features,
        threshold: float,
        mingtok: host.Loaded[MingTok] | None = None,
    ) -> tuple:
        difference = change(features_a, features_b)
        patch_size = None
        if mingtok is not None:
            mingtok.model.check_features(features_a)
            patch_size = mingtok.model.patch_size
        heatmap = enlarge(difference.clamp(0, 1), patch_size).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
        mask = enlarge((difference > threshold).float(), patch_size)[:, 0]
        device = host.images_device()
        return heatmap.to(device), mask.to(device), float(1 - difference.mean())


class MingFeaturesBatch:
    DESCRIPTION = "Joins features to a batch, to show the model several pictures in one message."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("MING_FEATURES",), ("features",)
    OUTPUT_TOOLTIPS = ("All pictures: those of features_a first.",)
    FUNCTION = "join"
    SEARCH_ALIASES = ("batch features", "two pictures", "several images", "multiple images")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "features_a": socket("MING_FEATURES", "The first picture, or several; the model is shown them first."),
                "features_b": socket("MING_FEATURES", "The next picture, encoded with the same MingTok and detail."),
            }
        }

    def join(self, features_a: Features, features_b: Features) -> tuple[Features]:
        return (joined(features_a, features_b),)


class MingFeaturesToLatent:
    DESCRIPTION = "Returns the latents behind features, for core latent nodes."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("LATENT",), ("latent",)
    OUTPUT_TOOLTIPS = ("Continuous latents, as from MingTok Encode.",)
    FUNCTION = "take"
    SEARCH_ALIASES = ("features to latent",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"features": socket("MING_FEATURES", "Features of encoded or drawn pictures.")}}

    def take(self, features: Features) -> tuple[dict]:
        return (to_latent(features.latents, features.depth),)


class MingSaveFeatures(SavingNode):
    DESCRIPTION = "Saves features to output/ming without loss, to use them later."
    CATEGORY = FEATURES
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "save"
    SEARCH_ALIASES = ("store features",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "features": socket("MING_FEATURES", "The features to save."),
                "filename_prefix": file_name("features"),
            }
        }

    def save(self, features: Features, filename_prefix: str) -> dict:
        return save_new_file(filename_prefix, lambda path: save_features(features, path))


class MingLoadFeatures(LoadingNode):
    DESCRIPTION = "Loads saved features."
    FILE_FORMAT = FEATURES_FORMAT
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("MING_FEATURES",), ("features",)
    OUTPUT_TOOLTIPS = ("The features as saved.",)
    FUNCTION = "load"
    SEARCH_ALIASES = ("restore features",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"file": cls.files("A file saved by Ming Save Features.")}}

    def load(self, file: str) -> tuple[Features]:
        return (load_features(saved_path(file)),)
