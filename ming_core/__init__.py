"""MingTok and Ming-UniVision as a plain PyTorch library.

import ming_core

model = ming_core.load_univision("models/tiny-shapes")
turn = model.generate_image(ming_core.Conversation(), "a large red circle on a white background")
pixels = model.mingtok.decode(turn.features)
"""

from .checkpoint import CheckpointError, load_mingtok, load_univision, save_mingtok, save_univision
from .conversation import Conversation, load_conversation, save_conversation
from .decoding import Sampling, Turn
from .features import Features, load_features, save_features
from .files import FileError
from .flow_head import Guidance, Solver
from .mingtok import MingTok
from .rounds import Progress
from .univision import UniVision

__all__ = [
    "CheckpointError",
    "Conversation",
    "Features",
    "FileError",
    "Guidance",
    "MingTok",
    "Progress",
    "Sampling",
    "Solver",
    "Turn",
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
