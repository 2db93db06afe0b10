"""The batches of a stage. All randomness of a batch comes from (seed of the stage, its number), so that a run which was
interrupted continues with the same batches, and so that other processes can make batches ahead."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ming_core.prompts import ChatFormat

from ..world import Dialogue, cluttered, random_dialogue
from .images import image_batch
from .packing import Batch, pack
from .sequences import TEXT_UNCONDITIONAL, UNCONDITIONAL, Sequence, tokenize_dialogue

QUIZ = 6  # questions about one image, which is most of what a question costs

CHAIN = {"edit": 5.0, "masked edit": 1.0}  # the tasks of long chains, with their weights

REGION = {"identify region": 5.0, "masked edit": 1.0}  # the tasks of an edit inside its region

MakeBatch = Callable[[np.random.Generator], Any]  # picklable


@dataclass(frozen=True)
class ImageData:
    """Makes the batches of a MingTok stage: images uint8 [B, H, W, 3], and the labels of their patches."""

    batch: int
    objects: tuple[int, int]
    patches: int  # along a side

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = image_batch(rng, self.batch, self.objects, patches=self.patches)
        return torch.from_numpy(images), {name: torch.from_numpy(values) for name, values in labels.items()}


@dataclass(frozen=True)
class DialogueData:
    """Makes the batches of a joint stage.

    batch            dialogues
    objects          fewest and most objects in a scene
    tasks            weights of tasks or families; empty: the world's own mixture
    rounds           of a dialogue; 0: one to five
    quizzes          share of dialogues that are QUIZ questions about one image, or about two
    several          share of the others whose scenes have two objects or more
    chains           share of dialogues that are three to five edits, some of them with a mask
    regions          share of dialogues that are a region and then the edit inside it
    cluttered        share of the prompts with additions that mean nothing
    alike            share of the scenes whose objects are alike
    guidance_rows    share of dialogues that end with drawing, in the form of a guidance row
    """

    tokenizer_json: str
    grid: tuple[int, int]
    batch: int
    objects: tuple[int, int]
    tasks: dict[str, float]
    rounds: int
    quizzes: float = 0.0
    several: float = 0.0
    chains: float = 0.0
    regions: float = 0.0
    cluttered: float = 0.0
    alike: float = 0.0
    guidance_rows: float = 0.15
    row_length: int = 384
    split: str = "train"

    def __call__(self, rng: np.random.Generator) -> Batch:
        chat = ChatFormat.from_json(self.tokenizer_json)
        return pack([self.sequence(rng, chat) for _ in range(self.batch)], self.row_length, self.grid)

    def sequence(self, rng: np.random.Generator, chat: ChatFormat) -> Sequence:
        """A random dialogue as tokens, sometimes in the form of a guidance row."""
        dialogue = self.dialogue(rng)
        if dialogue.tasks[-1].target is None or rng.random() >= self.guidance_rows:
            return tokenize_dialogue(dialogue, chat, self.grid)
        row = int(rng.integers(UNCONDITIONAL, TEXT_UNCONDITIONAL + 1))
        return tokenize_dialogue(dialogue, chat, self.grid, row, self.dialogue(rng).tasks[0])

    def dialogue(self, rng: np.random.Generator) -> Dialogue:
        """A random dialogue."""
        dialogue = self._plain_dialogue(rng)
        if not self.cluttered:
            return dialogue
        tasks = (
            # with additions, a request from outside would still be one, but a made-up word may name a thing there
            replace(task, prompt=cluttered(rng, task.prompt))
            if task.family != "outside" and rng.random() < self.cluttered
            else task
            for task in dialogue.tasks
        )
        return Dialogue(tuple(tasks))

    def _plain_dialogue(self, rng: np.random.Generator) -> Dialogue:
        def random(
            tasks: Iterable[str] | Mapping[str, float] | None, rounds: int | None, fewest: int = self.objects[0]
        ) -> Dialogue:
            return random_dialogue(rng, tasks, (fewest, self.objects[1]), self.split, rounds, self.alike)

        if self.quizzes and rng.random() < self.quizzes:
            pairs = {name: weight for name, weight in self.tasks.items() if name.startswith("pair")}
            return random(pairs if pairs and rng.random() < 0.5 else ["question"], QUIZ)
        if self.chains and rng.random() < self.chains:
            return random(CHAIN, int(rng.integers(3, 6)))
        if self.regions and rng.random() < self.regions:
            while True:
                dialogue = random(REGION, 2, max(self.objects[0], 2))
                if dialogue.edits_its_region:
                    return dialogue
        several = self.several and rng.random() < self.several
        return random(self.tasks or None, self.rounds or None, max(self.objects[0], 2 if several else 0))


class StepDataset(Dataset):
    """The batches of a stage by number: each is a pure function of the data, the stage's seed and its number."""

    def __init__(self, make_batch: MakeBatch, seed: int) -> None:
        self.make_batch, self.seed = make_batch, seed

    def __getitem__(self, number: int) -> Any:
        return self.make_batch(np.random.default_rng([self.seed, number]))


def batches(make_batch: MakeBatch, seed: int, first: int = 0, workers: int = 0, every: int = 1) -> Iterator[Any]:
    """The batches from a number on, without end.

    workers  processes that make batches ahead, two each; 0 makes them in this process, when they are needed
    every    2 leaves out every second batch, 3 two of three
    """
    loader = DataLoader(
        StepDataset(make_batch, seed),
        batch_size=None,  # an item of the dataset is a batch
        sampler=range(first, sys.maxsize, every),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # otherwise the loader would draw a number from the global one
    )
    if not workers:
        return iter(loader)
    # A terminal sends Ctrl-C to every process, but the main one still needs the batch in progress to write a
    # checkpoint. Processes inherit that a signal is ignored; on Windows they do not, hence the worker_init_fn.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return iter(loader)  # starts the processes
    finally:
        signal.signal(signal.SIGINT, before)


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
