"""The evaluator: a model, the unseen scenes that it is evaluated on, and what it sees, says and draws."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ming_core import Conversation, DrawRequest, Engine, Features, ImageOptions, ImageResult, Solver
from ming_core.images import to_images, to_pixels

from ..world import Dialogue, Task, draw, parse_scene, random_dialogue, random_scene, split_of, terse_caption

log = logging.getLogger(__name__)

ATTEMPTS = 20  # dialogues to make for each one that is needed, at most
PROGRESS_EVERY = 48  # images between two lines of progress

_Sample = TypeVar("_Sample")


@dataclass
class Evaluator:
    """A model, and the scenes that it is evaluated on.

    scenes   number of scenes of each measurement
    objects  fewest and most objects in a scene
    """

    engine: Engine
    scenes: int
    objects: tuple[int, int] = (1, 3)
    seed: int = 20_260_101
    solver: Solver = field(default_factory=Solver)

    def dialogues(self, names: list[str], rounds: int = 1, objects: tuple[int, int] | None = None) -> list[Dialogue]:
        """Unseen dialogues of these tasks or families: the same at every call, no two alike."""

        def make(rng: np.random.Generator) -> tuple[Hashable, Dialogue]:
            dialogue = random_dialogue(rng, names, objects or self.objects, "eval", rounds)
            return _content(dialogue), dialogue

        return self._distinct("/".join(names), make)

    def tasks(self, names: list[str], objects: tuple[int, int] | None = None) -> list[Task]:
        """The tasks of unseen dialogues of one round."""
        return [dialogue.tasks[0] for dialogue in self.dialogues(names, objects=objects)]

    def terse_tasks(self) -> list[Task]:
        """Drawings with terse prompts, as people type them at first; each shows the defaults for what is left out."""

        def make(rng: np.random.Generator) -> tuple[Hashable, Task | None]:
            text = terse_caption(rng, random_scene(rng, self.objects))
            scene = parse_scene(text)
            unseen = split_of(scene) == "eval"
            return text, Task(text, None, None, draw(scene), "generate", scene) if unseen else None

        return self._distinct("few words", make)  # seeds the choice of scenes: those of the table in docs

    def _distinct(
        self, name: str, make: Callable[[np.random.Generator], tuple[Hashable, _Sample | None]]
    ) -> list[_Sample]:
        """Samples of different content, the same for each name. `make` returns a content, and its sample or None."""
        rng = np.random.default_rng([self.seed, *map(ord, name)])
        samples: dict[Hashable, _Sample] = {}
        for _ in range(ATTEMPTS * self.scenes):
            if len(samples) == self.scenes:
                break
            content, sample = make(rng)
            if sample is not None:
                samples.setdefault(content, sample)
        return list(samples.values())

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> Features:
        """Features of an image uint8 [H, W, 3], as MingTokEncode and MingTokSemanticFeatures make them."""
        mingtok = self.engine.mingtok
        images = torch.from_numpy(pixels).float().div(255)[None]
        return mingtok.semantic_features(mingtok.encode(to_pixels(images, mingtok.native_side)))

    @torch.no_grad()
    def pixels(self, features: Features) -> np.ndarray:
        """The decoded image, float32 [H, W, 3], 0..1, as MingTokDecode makes it."""
        return to_images(self.engine.mingtok.decode(features))[0].numpy()

    def answer(self, task: Task) -> str:
        """What the model answers to the prompt."""
        attached = None if task.attached is None else self.features(task.attached)
        result = self.engine.understand(Conversation(), task.prompt, features=attached, max_new_tokens=128)
        return result.text.strip()

    def draw(
        self,
        tasks: Sequence[Task],
        previous: Sequence[ImageResult] | None = None,
        noises: Sequence[Tensor] | None = None,
    ) -> list[ImageResult]:
        """Draw the image of every task, with its index as the seed. previous: the results whose conversations go on."""
        requests = [
            DrawRequest(
                task.prompt,
                seed,
                previous[seed].conversation if previous else Conversation(),
                None if task.attached is None else self.features(task.attached),
                noises[seed] if noises else None,
            )
            for seed, task in enumerate(tasks)
        ]
        return self.draw_requests(requests)

    def draw_requests(self, requests: Sequence[DrawRequest]) -> list[ImageResult]:
        """Draw the image of every request, and log the progress."""
        results: list[ImageResult] = []
        for start in range(0, len(requests), PROGRESS_EVERY):
            part = requests[start : start + PROGRESS_EVERY]
            results += self.engine.generate_batch(part, ImageOptions(solver=self.solver))
            log.info("  %d of %d drawn", len(results), len(requests))
        return results


def _content(dialogue: Dialogue) -> Hashable:
    """What a dialogue is about, without jitter and wording."""
    scenes = [(task.source_scene, task.target_scene) for task in dialogue.tasks]
    contents = tuple(tuple(scene and scene.content for scene in pair) for pair in scenes)
    return contents, tuple((task.name, task.answer) for task in dialogue.tasks)
