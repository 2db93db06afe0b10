"""MingTok and Ming-UniVision as a plain PyTorch library.

import ming_core

model = ming_core.load_univision("models/tiny-shapes")
result = model.generate_image(ming_core.Conversation(), "a large red circle on a white background")
pixels = model.mingtok.decode(result.features)
"""

from .checkpoint import CheckpointError, load_mingtok, load_univision, save_mingtok, save_univision
from .conversation import Conversation
from .engine import Engine
from .features import Features
from .files import FileError
from .mingtok import MingTok
from .options import Guidance, ImageOptions, Sampling, TextOptions
from .rounds import DrawRequest, ImageResult, NoPictureError, Progress, RoundPlan, RoundResult, TextResult
from .saved import load_conversation, load_features, save_conversation, save_features
from .solver import Solver
from .univision import UniVision

__all__ = [
    "CheckpointError",
    "Conversation",
    "DrawRequest",
    "Engine",
    "Features",
    "FileError",
    "Guidance",
    "ImageOptions",
    "ImageResult",
    "MingTok",
    "NoPictureError",
    "Progress",
    "RoundPlan",
    "RoundResult",
    "Sampling",
    "Solver",
    "TextOptions",
    "TextResult",
    "UniVision",
    "load_conversation",
    "load_features",
    "load_mingtok",
    "load_univision",
    "save_conversation",
    "save_features",
    "save_mingtok",
    "save_univision",
]
