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
from ming_core.regions import region_mask
from ming_core.rounds import Progress

from ..world import (
    Dialogue,
    NoSceneFoundError,
    Task,
    draw,
    parse_scene,
    random_dialogue,
    random_scene,
    split_of,
    terse_caption,
)

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

    def dialogues(
        self,
        names: list[str],
        rounds: int = 1,
        objects: tuple[int, int] | None = None,
        wanted: Callable[[Dialogue], bool] = lambda _: True,
    ) -> list[Dialogue]:
        """Unseen dialogues of these tasks or families, as far as they are wanted: the same at every call, no two
        alike."""

        def make(rng: np.random.Generator) -> tuple[Hashable, Dialogue | None]:
            try:
                dialogue = random_dialogue(rng, names, objects or self.objects, "eval", rounds)
            except NoSceneFoundError:  # a long chain through few objects: another one will do
                return None, None
            return _content(dialogue), dialogue if wanted(dialogue) else None

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
        """Features of an image uint8 [H, W, 3] or of several [B, H, W, 3], as MingTokEncode and MingTokSemanticFeatures
        make them."""
        mingtok = self.engine.mingtok
        images = torch.from_numpy(pixels).float().div(255)
        images = images[None] if images.ndim == 3 else images
        return mingtok.semantic_features(mingtok.encode(to_pixels(images, mingtok.native_side)))

    @torch.no_grad()
    def pixels(self, features: Features) -> np.ndarray:
        """The decoded image, float32 [H, W, 3], 0..1, as MingTokDecode makes it."""
        return to_images(self.engine.mingtok.decode(features))[0].numpy()

    def answer(self, task: Task) -> str:
        """What the model answers to the prompt."""
        images = [image for image in (task.attached, task.second) if image is not None]
        attached = self.features(np.stack(images)) if images else None
        result = self.engine.understand(Conversation(), task.prompt, features=attached, max_new_tokens=128)
        return result.text.strip()

    def draw(
        self,
        tasks: Sequence[Task],
        previous: Sequence[ImageResult] | None = None,
        noises: Sequence[Tensor] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[ImageResult]:
        """Draw the image of every task.

        previous  the results whose conversations go on
        seeds     None: the index of each task
        """
        requests = [
            DrawRequest(
                task.prompt,
                seeds[number] if seeds else number,
                previous[number].conversation if previous else Conversation(),
                None if task.attached is None else self.features(task.attached),
                noises[number] if noises else None,
            )
            for number, task in enumerate(tasks)
        ]
        return self.draw_requests(requests, [task.mask for task in tasks])

    def draw_requests(
        self, requests: Sequence[DrawRequest], masks: Sequence[np.ndarray | None] | None = None
    ) -> list[ImageResult]:
        """Draw the image of every request, those with equal masks at once, and log the progress."""
        groups: dict[bytes | None, list[int]] = {}
        for number, mask in enumerate(masks or [None] * len(requests)):
            groups.setdefault(None if mask is None else mask.tobytes(), []).append(number)
        results: dict[int, ImageResult] = {}
        for numbers in groups.values():
            mask = masks[numbers[0]] if masks else None
            options = ImageOptions(solver=self.solver, mask=None if mask is None else torch.from_numpy(mask))
            for start in range(0, len(numbers), PROGRESS_EVERY):
                part = numbers[start : start + PROGRESS_EVERY]
                drawn = self.engine.generate_batch([requests[number] for number in part], options)
                results.update(zip(part, drawn, strict=True))
                if len(results) // PROGRESS_EVERY > (len(results) - len(part)) // PROGRESS_EVERY:
                    log.info("  %d of %d drawn", len(results), len(requests))
        return [results[number] for number in range(len(requests))]

    def region_mask(self, before: Features, region: Features) -> np.ndarray:
        """The tokens that a drawn region marks in an image, bool [h, w], as MingRegionMask reads them."""
        return region_mask(before, region)[0].numpy() > 0.5

    def same_words(self, one: str, other: str) -> bool:
        """Whether two prompts are the same tokens to the model, so that it draws the same."""
        return self.engine.chat.encode(one) == self.engine.chat.encode(other)

    def says(self, task: Task) -> str | None:
        """What the model writes if it may choose to draw or to answer in words; None if it begins to draw."""
        plan = self.engine.plan(Conversation(), task.prompt, ImageOptions(start="model decides"))
        try:
            self.engine.draw(plan, _stop_at_images)
        except _DrawsError:
            return None
        except RuntimeError as error:  # it answered in words, which the error quotes
            return str(error)
        raise AssertionError("an image was drawn without any of its tokens")


class _DrawsError(Exception):
    """The model has begun to draw."""


def _stop_at_images(progress: Progress) -> None:
    if progress.kind == "image":
        raise _DrawsError


def _content(dialogue: Dialogue) -> Hashable:
    """What a dialogue is about, without jitter and wording."""
    scenes = [(task.source_scene, task.target_scene) for task in dialogue.tasks]
    contents = tuple(tuple(scene and scene.content for scene in pair) for pair in scenes)
    # requests from outside the world all have the same answer and show no scene
    said = tuple(task.prompt if task.name == "outside" else task.answer for task in dialogue.tasks)
    return contents, tuple(task.name for task in dialogue.tasks), said
