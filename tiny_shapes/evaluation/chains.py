"""Chains of edits, five rounds long, in three ways: feature to feature, through pixels between the rounds, and with the
same noise in every round."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ming_core import DrawRequest, ImageResult
from ming_core.images import psnr

from ..world import Task, compare, read_scene
from ..world.tasks import require
from .evaluator import Evaluator

log = logging.getLogger(__name__)

CHAIN_ROUNDS = 5
MOST = 100.0  # dB, of equal pixels, so that a mean is finite


@dataclass
class ChainScores:
    """What came of the chains in one way, by round.

    right      whether each round is done right
    untouched  PSNR of the pixels that no edit of the chain changes: the same ones in every round
    """

    name: str
    right: list[list[bool]] = field(default_factory=lambda: [[] for _ in range(CHAIN_ROUNDS)])
    untouched: list[list[float]] = field(default_factory=lambda: [[] for _ in range(CHAIN_ROUNDS)])

    def table(self) -> dict[str, list[float]]:
        """The means by round."""
        return {
            "right": [statistics.fmean(values) for values in self.right],
            "untouched": [statistics.fmean(values) if values else math.nan for values in self.untouched],
        }


# Draws the next round of all chains: the evaluator, the tasks, and the results of the round before (None: none yet).
DrawRound = Callable[[Evaluator, list[Task], "list[ImageResult] | None"], list[ImageResult]]


def evaluate_chains(evaluator: Evaluator) -> list[ChainScores]:
    """Draw the same chains of edits in each of `WAYS`."""
    dialogues = evaluator.dialogues(["edit"], rounds=CHAIN_ROUNDS)
    untouched = [_untouched(dialogue.tasks) for dialogue in dialogues]
    ways = []
    for name, draw_round in WAYS.items():
        log.info("chains: %s", name)
        scores, results = ChainScores(name), None
        for k in range(CHAIN_ROUNDS):
            tasks = [dialogue.tasks[k] for dialogue in dialogues]
            results = draw_round(evaluator, tasks, results)
            for task, result, area in zip(tasks, results, untouched, strict=True):
                image = evaluator.pixels(result.features)
                scores.right[k].append(compare(read_scene(image), require(task.target_scene)).all_right)
                if area.any():  # a new background may leave nothing untouched
                    target = require(task.target) / 255.0
                    found = psnr(torch.from_numpy(image[area]), torch.from_numpy(target[area]))
                    scores.untouched[k].append(min(found, MOST))
        ways.append(scores)
    return ways


def _untouched(tasks: Sequence[Task]) -> np.ndarray:
    """The pixels that no edit of a chain changes, bool [H, W].

    One area for all rounds: what an edit has left alone so far differs from round to round, and with it how much of it
    is plain background, which costs no decibels.
    """
    source = require(tasks[0].attached)
    return np.logical_and.reduce([(require(task.target) == source).all(-1) for task in tasks])


def _by_features(evaluator: Evaluator, tasks: list[Task], previous: list[ImageResult] | None) -> list[ImageResult]:
    """Every round continues the conversation of the one before."""
    return evaluator.draw(tasks, previous)


def _through_pixels(evaluator: Evaluator, tasks: list[Task], previous: list[ImageResult] | None) -> list[ImageResult]:
    """Every round begins a new conversation, with the image of the one before decoded and encoded again."""
    if previous is None:
        return evaluator.draw(tasks)
    requests = []
    for seed, (task, result) in enumerate(zip(tasks, previous, strict=True)):
        pixels = np.rint(evaluator.pixels(result.features) * 255).astype(np.uint8)
        features = evaluator.features(pixels)._replace(depth=result.features.depth)
        requests.append(DrawRequest(task.prompt, seed, features=features))
    return evaluator.draw_requests(requests)


def _with_one_noise(evaluator: Evaluator, tasks: list[Task], previous: list[ImageResult] | None) -> list[ImageResult]:
    """Every round continues the conversation, and each chain draws all of its images from one noise."""
    config = evaluator.engine.config.llm_config
    shape = (config.num_image_tokens_for_gen, evaluator.engine.network.flow_head.net.channels)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(len(tasks))]
    return evaluator.draw(tasks, previous, noises)


WAYS: dict[str, DrawRound] = {
    "feature to feature": _by_features,
    "through pixels": _through_pixels,
    "one noise in every round": _with_one_noise,
}
