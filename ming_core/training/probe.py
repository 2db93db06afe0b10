"""A quick look at a model in training, through the public API and the scorer: a few unseen scenes, the same each time.

It tells whether training goes the right way; what the model can do is measured elsewhere, on many scenes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..conversation import Conversation
from ..features import Features
from ..images import from_uint8, to_images, to_uint8
from ..shapes import Comparison, Dialogue, compare, random_dialogue, read_scene
from ..univision import UniVision

QUESTIONS, DESCRIPTIONS, DRAWINGS, EDITS = 32, 8, 12, 6
MAX_ANSWER = 96  # tokens


def probe(model: UniVision, things: tuple[int, int]) -> dict[str, float]:
    """Shares, 0 to 1: answers given exactly, and pictures whose things are all right, with each attribute's own."""
    model.prefix_cache.clear()  # it may hold what other weights made
    figures = {
        "asked": _answered(model, _dialogues("question", QUESTIONS, things)),
        "described": _answered(model, _dialogues("describe", DESCRIPTIONS, things)),
    }
    drawn = [_draw(model, dialogue, seed) for seed, dialogue in enumerate(_dialogues("generate", DRAWINGS, things))]
    for name in ("shape", "color", "size", "position"):
        figures[f"drawn_{name}"] = float(np.mean([v for c in drawn for v in getattr(c, name)]))
    figures["drawn_background"] = float(np.mean([c.background for c in drawn]))
    figures["drawn"] = float(np.mean([c.things_right for c in drawn]))
    edited = [_draw(model, dialogue, seed) for seed, dialogue in enumerate(_dialogues("edit", EDITS, things))]
    figures["edited"] = float(np.mean([c.all_right for c in edited]))
    model.prefix_cache.clear()
    return figures


def _dialogues(task: str, count: int, things: tuple[int, int]) -> list[Dialogue]:
    rng = np.random.default_rng(5)
    return [random_dialogue(rng, task, things, "eval", rounds=1) for _ in range(count)]


def _answered(model: UniVision, dialogues: list[Dialogue]) -> float:
    right = 0
    for dialogue in dialogues:
        (turn,) = dialogue.rounds
        features = _features(model, turn.attached)
        said = model.understand(Conversation(), turn.prompt, features=features, max_new_tokens=MAX_ANSWER).text
        right += said == turn.answer
    return right / len(dialogues)


def _draw(model: UniVision, dialogue: Dialogue, seed: int) -> Comparison:
    (turn,) = dialogue.rounds
    features = _features(model, turn.attached)
    drawing = model.generate_image(Conversation(), turn.prompt, features=features, seed=seed, max_new_tokens=1)
    return compare(read_scene(picture(model, drawing.features)), turn.target_scene)


def _features(model: UniVision, pixels: np.ndarray | None) -> Features | None:
    if pixels is None:
        return None
    with torch.no_grad():
        return model.mingtok.semantic_features(model.mingtok.encode(from_uint8(torch.from_numpy(pixels)[None])))


def picture(model: UniVision, features: Features) -> np.ndarray:
    """uint8 [H, W, 3]."""
    with torch.no_grad():
        decoded: Tensor = model.mingtok.decode(features)
    return to_uint8(to_images(decoded)[0])
