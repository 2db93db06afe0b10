"""Look at features, compare them, save and load them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..ming_core import Features
from ..ming_core import load_features as read_features
from ..ming_core import save_features as write_features
from ..ming_core.features import CHANGED, change, principal_colours
from ..ming_core.saved import FEATURES_FORMAT
from . import host
from .latents import to_latent
from .saved_files import LoadingNode, SavingNode, saved_as, saved_path
from .widgets import FEATURES, file_name, number, socket

MAP_SIDE = 512  # pixels of the longer side of a map over tokens


def enlarge(maps: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] over tokens -> the same with every token a square of pixels."""
    factor = max(1, MAP_SIDE // max(maps.shape[2:]))
    return F.interpolate(maps, scale_factor=factor, mode="nearest-exact")


class MingFeaturesPreview:
    DESCRIPTION = "Shows features as colours: their three principal components over the picture."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    OUTPUT_TOOLTIPS = ("Tokens alike in meaning have like colours, across the whole batch.",)
    FUNCTION = "show"
    SEARCH_ALIASES = ("pca", "visualize features")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"features": socket("MING_FEATURES", "Features to look at.")}}

    def show(self, features: Features) -> tuple[torch.Tensor]:
        image = enlarge(principal_colours(features)).permute(0, 2, 3, 1).contiguous()
        return (image.to(host.pictures_device()),)


class MingFeaturesCompare:
    DESCRIPTION = "Reads in feature space what changed between two pictures."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "MASK", "FLOAT"), ("heatmap", "mask", "similarity")
    OUTPUT_TOOLTIPS = (
        "Bright where the pictures differ.",
        "White where they differ by more than the threshold.",
        "1 for equal pictures, lower the more they differ.",
    )
    FUNCTION = "compare"
    SEARCH_ALIASES = ("difference", "change mask")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "features_a": socket("MING_FEATURES", "Features before."),
                "features_b": socket("MING_FEATURES", "Features after: as many pictures, of the same grid."),
                "threshold": number(CHANGED, 0.0, 2.0, 0.01, "Above which difference a token counts as changed."),
            }
        }

    def compare(self, features_a: Features, features_b: Features, threshold: float) -> tuple:
        difference = change(features_a, features_b)
        heatmap = enlarge(difference.clamp(0, 1)).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
        mask = enlarge((difference > threshold).float())[:, 0]
        where = host.pictures_device()
        return heatmap.to(where), mask.to(where), float(1 - difference.mean())


class MingFeaturesToLatent:
    DESCRIPTION = "The latents that features were expanded from, for core's latent nodes."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("LATENT",), ("latent",)
    OUTPUT_TOOLTIPS = ("Continuous latents, as MingTok Encode gives them.",)
    FUNCTION = "take"
    SEARCH_ALIASES = ("features to latent",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"features": socket("MING_FEATURES", "Features of seen or drawn pictures.")}}

    def take(self, features: Features) -> tuple[dict]:
        return (to_latent(features.latents, features.depth),)


class MingSaveFeatures(SavingNode):
    DESCRIPTION = "Saves features to output/ming, without a loss, to go on with them another day."
    CATEGORY = FEATURES
    RETURN_TYPES: tuple = ()
    OUTPUT_NODE = True
    FUNCTION = "save"
    SEARCH_ALIASES = ("store features",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "features": socket("MING_FEATURES", "The features to keep."),
                "filename_prefix": file_name("features"),
            }
        }

    def save(self, features: Features, filename_prefix: str) -> dict:
        return saved_as(filename_prefix, lambda path: write_features(features, path))


class MingLoadFeatures(LoadingNode):
    DESCRIPTION = "Loads saved features."
    FILE_FORMAT = FEATURES_FORMAT
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("MING_FEATURES",), ("features",)
    OUTPUT_TOOLTIPS = ("The features, as they were saved.",)
    FUNCTION = "load"
    SEARCH_ALIASES = ("restore features",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"file": cls.files("A file of Ming Save Features.")}}

    def load(self, file: str) -> tuple[Features]:
        return (read_features(saved_path(file)),)
