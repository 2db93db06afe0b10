"""The region node: from a drawn region to a mask for the next edit."""

from __future__ import annotations

import logging

import torch

from ..ming_core import Features
from ..ming_core.regions import MARKED, region_mask
from . import host
from .features import enlarge
from .translation import in_page_language
from .widgets import FEATURES, integer, number, socket

log = logging.getLogger(__name__)


class MingRegionMask:
    DESCRIPTION = "Reads a drawn region as a mask, from features alone, so that the next edit stays inside it."
    CATEGORY = FEATURES
    RETURN_TYPES, RETURN_NAMES = ("MASK",), ("mask",)
    OUTPUT_TOOLTIPS = ("White where the region is: connect it to the mask of Ming Edit.",)
    FUNCTION = "read"
    SEARCH_ALIASES = ("region to mask", "segmentation mask", "editing region")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "features": socket("MING_FEATURES", "Features of the picture before the edit."),
                "region": socket(
                    "MING_FEATURES",
                    "The region that the model drew for it: bright on dark, or marked in a copy of the picture.",
                ),
                "threshold": number(MARKED, 0.0, 1.0, 0.01, "Lower values take more into the region."),
                "grow": integer(1, 0, 16, "By how many tokens the region is widened on every side."),
            }
        }

    def read(self, features: Features, region: Features, threshold: float, grow: int) -> tuple[torch.Tensor]:
        mask = region_mask(features, region, threshold, grow)
        found = _found(mask)
        host.show_text(in_page_language(found))
        if not mask.any():  # also where no page shows it
            log.warning("%s", found)
        return (enlarge(mask[:, None])[:, 0].to(host.images_device()),)


def _found(mask: torch.Tensor) -> str:
    """How much of each picture the region takes, in words."""
    shares = [f"{round(100 * float(share))} %" for share in mask.mean((1, 2))]
    if not mask.any():
        return "No region was found. Lower the threshold, or look at the drawn region with MingTok Decode."
    return f"The region takes {', '.join(shares)} of the picture."
