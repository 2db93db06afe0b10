"""Dialogues as token sequences, exactly as inference would lay them out.

A round is its prompt part from the chat template, then what the model emits: the answer, or `<image>` and the tokens
of an image. The end token is predicted after either, but is in no sequence, as in a `Conversation`.

Guidance rows are trained in the very form in which they are used: from `<image>` of the last round on, such a sequence
attends only to what `guidance_masks` leaves to that row, and its positions count only that. The keys of the ASSISTANT
tag still know the prompt, so the prompt is replaced by that of *another* dialogue, the donor: what leaks is of no use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ming_core.conversation import PROMPT, Part, Text
from ming_core.prompts import ChatFormat
from ming_core.training.sequences import IGNORE, SHORT_WEIGHT, TEXT_UNCONDITIONAL, UNCONDITIONAL, Layout

from ..world import Dialogue, Scene, SceneObject, Task, mentions
from ..world.tasks import require

__all__ = [
    "IGNORE",
    "SHORT_WEIGHT",
    "TEXT_UNCONDITIONAL",
    "UNCONDITIONAL",
    "PlacedImage",
    "Sequence",
    "tokenize_dialogue",
]


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """An image in a sequence.

    pixels  uint8 [H, W, 3]
    start   position of its first token
    task    the task whose target it is; None for an image that comes with a prompt
    source  the image that is kept outside the task's mask: one of those before it in the sequence, by its index, or
            pixels, uint8 [H, W, 3], of one that is not there; None without a mask
    """

    pixels: np.ndarray
    start: int
    task: Task | None = None
    source: int | np.ndarray | None = None

    @property
    def drawn(self) -> bool:
        """Whether the model is to draw it."""
        return self.task is not None


@dataclass(frozen=True, eq=False)
class Sequence:
    """One tokenized dialogue.

    ids           token ids; the patch token where an image's features go
    targets       the token that each position must predict, or IGNORE
    loss_weights  of the targets
    positions     as rotary embedding counts them
    images        in order
    subjects      objects, by the position where a prompt has named them: the last token of the words for each object of
                  a caption, and the last token of a prompt that is about one object
    masked        bool [n]: which of the first n tokens the others, from n on, do not attend to
    """

    ids: list[int]
    targets: list[int]
    loss_weights: list[float]
    positions: list[int]
    images: tuple[PlacedImage, ...]
    subjects: dict[int, SceneObject]
    masked: np.ndarray

    def mask(self) -> np.ndarray:
        """Which token (row) attends to which (column): bool [T, T]."""
        mask = np.tril(np.ones((len(self.ids), len(self.ids)), dtype=bool))
        n = len(self.masked)
        mask[n:, :n] &= ~self.masked
        return mask


def tokenize_dialogue(
    dialogue: Dialogue, chat: ChatFormat, grid: tuple[int, int], row: int = 0, donor: Task | None = None
) -> Sequence:
    """Lay out a dialogue as tokens.

    grid   rows and columns of the tokens of an image
    row    of `guidance_masks`, for the last round, which must be a drawing one if this is not 0. A row that the
           transcript does not have (no image, nothing before) is the unconditional one.
    donor  the task whose prompt replaces that of the last round if row is not 0: the text and, for the unconditional
           row, the image
    """
    layout = _Layout(chat, grid)
    for task in dialogue.tasks[:-1]:
        layout.add_round(task)
    last = dialogue.tasks[-1]
    if row:
        layout.add_guidance_round(last, require(donor), row)
    else:
        layout.add_round(last)
    return Sequence(*layout.tokens(), tuple(layout.images), layout.subjects, layout.masked.numpy())


class _Layout(Layout[PlacedImage]):
    """A sequence while rounds of the world's dialogues are added."""

    def __init__(self, chat: ChatFormat, grid: tuple[int, int]) -> None:
        super().__init__(chat, grid)
        self.subjects: dict[int, SceneObject] = {}

    def add_round(self, task: Task) -> None:
        """Add a round that is to be predicted."""
        start = len(self.ids)
        prompt = self._add_task(task)
        if task.target_scene is not None:
            self.subjects |= _mentioned(prompt, task.target_scene, start, self.chat)
        if task.subject is not None:
            self.subjects[len(self.ids) - 1] = task.subject
        if task.target is None:
            self.add_answer(self.chat.encode_answer(require(task.answer)))
        else:
            self.add_image(_place(task.target, task, None if task.mask is None else len(self.images) - 1))

    def add_guidance_round(self, task: Task, donor: Task, row: int) -> None:
        """Add a drawing round in the form of a guidance row; no text is predicted in it."""
        newest = len(self.images) - 1  # the image that is kept outside a mask, if the task brings none
        own = task if row == TEXT_UNCONDITIONAL else donor
        self._add_task(replace(task, prompt=donor.prompt, attached=own.attached, second=own.second))
        kept: int | np.ndarray = len(self.images) - 1
        if row != TEXT_UNCONDITIONAL:
            kept = newest if task.attached is None else task.attached
        self.add_image(_place(require(task.target), task, None if task.mask is None else kept), row)

    def _add_task(self, task: Task) -> Part:
        return self.add_prompt(task.prompt, [_place(i) for i in (task.attached, task.second) if i is not None])


def _place(
    pixels: np.ndarray, task: Task | None = None, source: int | np.ndarray | None = None
) -> Callable[[int], PlacedImage]:
    return lambda start: PlacedImage(pixels, start, task, source)


def _mentioned(part: Part, scene: Scene, start: int, chat: ChatFormat) -> dict[int, SceneObject]:
    """The objects of the scene that a prompt names, by the position of the last token of the words for each."""
    found = {}
    for segment in part.segments:
        if isinstance(segment, Text) and segment.kind == PROMPT:
            for end, obj in mentions(segment.text, scene):
                found[start + len(chat.encode(segment.text[:end])) - 1] = obj
        start += segment.length
    return found
