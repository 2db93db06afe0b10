"""The steps that every examination of a model is made of: unseen scenes, and what the model sees, says and draws."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ming_core import Conversation, Features, Solver, Turn, UniVision
from ming_core.images import to_images, to_pixels

from ..world import Dialogue, Round, draw, parse_scene, random_dialogue, random_scene, split_of
from ..world.language import brief
from .many import Wish, draw_many

log = logging.getLogger(__name__)

TRIES = 20  # dialogues made for each that is wanted, at most
PROGRESS_EVERY = 48  # pictures between two lines of progress


@dataclass
class Examiner:
    """A model, and the scenes that it is examined with."""

    model: UniVision
    scenes: int
    things: tuple[int, int] = (1, 3)
    seed: int = 20_260_101
    solver: Solver = field(default_factory=Solver)

    def dialogues(self, tasks: list[str], rounds: int = 1, things: tuple[int, int] | None = None) -> list[Dialogue]:
        """Unseen ones, the same at every call, no two alike."""

        def one(rng: np.random.Generator) -> tuple[tuple, Dialogue]:
            dialogue = random_dialogue(rng, tasks, things or self.things, "eval", rounds)
            return _asked(dialogue), dialogue

        return self._different("/".join(tasks), one)

    def rounds(self, tasks: list[str], things: tuple[int, int] | None = None) -> list[Round]:
        """The rounds of dialogues of one round."""
        return [dialogue.rounds[0] for dialogue in self.dialogues(tasks, things=things)]

    def in_few_words(self) -> list[Round]:
        """Drawings that are asked for as people do at first; each shows what is left open by default."""

        def one(rng: np.random.Generator) -> tuple[str, Round | None]:
            text = brief(rng, random_scene(rng, self.things))
            scene = parse_scene(text)
            seen = split_of(scene) != "eval"
            return text, None if seen else Round(text, None, None, draw(scene), "generate", scene)

        return self._different("few words", one)

    def _different(self, name: str, one: Callable[[np.random.Generator], tuple[Any, Any]]) -> list:
        """What `one` makes, with what tells it from others; the same at every call of one name. None is left out."""
        rng = np.random.default_rng([self.seed, *map(ord, name)])
        found: dict[Any, Any] = {}
        for _ in range(TRIES * self.scenes):
            if len(found) == self.scenes:
                break
            about, made = one(rng)
            if made is not None:
                found.setdefault(about, made)
        return list(found.values())

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> Features:
        """Of a picture uint8 [H, W, 3], as MingTokEncode and MingTokSemanticFeatures make them."""
        tok = self.model.mingtok
        images = torch.from_numpy(pixels).float().div(255)[None]
        return tok.semantic_features(tok.encode(to_pixels(images, tok.native_side)))

    @torch.no_grad()
    def pixels(self, features: Features) -> np.ndarray:
        """float32 [H, W, 3], 0..1, as MingTokDecode makes them."""
        return to_images(self.model.mingtok.decode(features))[0].numpy()

    def answer(self, turn: Round) -> str:
        attached = None if turn.attached is None else self.features(turn.attached)
        said = self.model.understand(Conversation(), turn.prompt, features=attached, max_new_tokens=128)
        return said.text.strip()

    def draw_rounds(
        self, turns: list[Round], before: list[Turn] | None = None, noises: list[Tensor] | None = None
    ) -> list[Turn]:
        """The rounds' pictures, each with its number as the seed; `before`: the turns that they follow."""
        wishes = [
            Wish(
                turn.prompt,
                seed,
                before[seed].conversation if before else Conversation(),
                None if turn.attached is None else self.features(turn.attached),
                noises[seed] if noises else None,
            )
            for seed, turn in enumerate(turns)
        ]
        return self.draw_wishes(wishes)

    def draw_wishes(self, wishes: list[Wish]) -> list[Turn]:
        done: list[Turn] = []
        while len(done) < len(wishes):
            done += draw_many(self.model, wishes[len(done) : len(done) + PROGRESS_EVERY], self.solver)
            log.info("  %d of %d drawn", len(done), len(wishes))
        return done


def _asked(dialogue: Dialogue) -> tuple:
    """What a dialogue is about, jitter and wording aside."""
    scenes = [(turn.source_scene, turn.target_scene) for turn in dialogue.rounds]
    contents = tuple(tuple(scene and scene.content for scene in pair) for pair in scenes)
    return contents, tuple((turn.task, turn.answer) for turn in dialogue.rounds)
