"""Dialogues as token sequences, exactly as inference would lay them out.

A round is its prompt part from the chat template, then what the model emits: the answer, or `<image>` and the tokens
of an image. The end token is predicted after either, but is in no sequence, as in a `Conversation`.

Guidance rows are trained in the very form in which they are used: from `<image>` of the last round on, such a sequence
attends only to what `guidance_masks` leaves to that row, and its positions count only that. The keys of the ASSISTANT
tag still know the prompt, so the prompt is replaced by that of *another* dialogue, the donor: what leaks is of no use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ming_core.conversation import ANSWER, MARK, PROMPT, Conversation, Image, Part, Text, guidance_masks
from ming_core.features import Features
from ming_core.prompts import ChatFormat

from ..world import Dialogue, Scene, SceneObject, Task, mentions
from ..world.tasks import require
from .text_tokenizer import encode_as_written

IGNORE = -100  # the target of a position where nothing is to be predicted
SHORT_ANSWER = 8  # most tokens of the answer to a question; a description has more
SHORT_WEIGHT = 4.0  # loss weight of its tokens, which are few and hard beside those of descriptions; 1 elsewhere

UNCONDITIONAL, TEXT_UNCONDITIONAL = 1, 2  # rows of `guidance_masks`; row 0 attends to everything


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
    return layout.sequence()


class _Layout:
    """A sequence while its rounds are added."""

    def __init__(self, chat: ChatFormat, grid: tuple[int, int]) -> None:
        self.chat, self.grid = chat, grid
        self.conversation = Conversation()
        self.ids: list[int] = []
        self.targets: dict[int, int] = {}
        self.short: set[int] = set()  # positions that predict a short answer
        self.images: list[PlacedImage] = []
        self.subjects: dict[int, SceneObject] = {}
        self.masked = np.zeros(0, dtype=bool)

    def add_round(self, task: Task) -> None:
        """Add a round that is to be predicted."""
        start = len(self.ids)
        prompt = self._add_prompt(task)
        if task.target_scene is not None:
            self.subjects |= _mentioned(prompt, task.target_scene, start, self.chat)
        begin = len(self.ids)
        if task.subject is not None:
            self.subjects[begin - 1] = task.subject
        self._add_emitted(task)
        end = len(self.ids) if task.target is None else begin + 1  # of an image only `<image>` is predicted as a token
        self.targets |= {i - 1: self.ids[i] for i in range(begin, end)}
        self.targets[len(self.ids) - 1] = self.chat.end_id
        if task.answer is not None and len(self.ids) - begin <= SHORT_ANSWER:
            self.short |= set(range(begin - 1, len(self.ids)))

    def add_guidance_round(self, task: Task, donor: Task, row: int) -> None:
        """Add a drawing round in the form of a guidance row; no text is predicted in it."""
        newest = len(self.images) - 1  # the image that is kept outside a mask, if the task brings none
        own = task if row == TEXT_UNCONDITIONAL else donor
        self._add_prompt(replace(task, prompt=donor.prompt, attached=own.attached, second=own.second))
        masks = guidance_masks(self.conversation.parts)
        self.masked = ~masks[min(row, len(masks) - 1)].numpy()
        if row == TEXT_UNCONDITIONAL:
            self._add_emitted(task)
        else:
            self._add_emitted(task, newest if task.attached is None else task.attached)

    def sequence(self) -> Sequence:
        count, n, attended = len(self.ids), len(self.masked), int((~self.masked).sum())
        return Sequence(
            self.ids,
            [self.targets.get(i, IGNORE) for i in range(count)],
            [SHORT_WEIGHT if i in self.short else 1.0 for i in range(count)],
            [*range(n), *range(attended, attended + count - n)],
            tuple(self.images),
            self.subjects,
            self.masked,
        )

    def _add_prompt(self, task: Task) -> Part:
        attached = [image for image in (task.attached, task.second) if image is not None]
        contents: list[str | list[Image]] = [task.prompt]
        if attached:
            contents.insert(0, [_blank(self.grid, drawn=False) for _ in attached])
        part = self.chat.prompt(contents)
        self._add(part, attached)
        return part

    def _add_emitted(self, task: Task, source: int | np.ndarray | None = None) -> None:
        """source: the image that is kept outside a mask; None: the newest one."""
        if task.target is None:
            answer = encode_as_written(self.chat.tokenizer, require(task.answer))
            self._add(Part(True, (Text(answer, ANSWER),)), [])
            return
        part = Part(True, (Text((self.chat.image_open_id,), MARK), _blank(self.grid, drawn=True)))
        newest = len(self.images) - 1
        kept = None if task.mask is None else newest if source is None else source
        self._add(part, [task.target], task, kept)

    def _add(
        self, part: Part, pixels: list[np.ndarray], task: Task | None = None, source: int | np.ndarray | None = None
    ) -> None:
        """Add the tokens of a part, and its images."""
        self.conversation = self.conversation.extended(part, "")
        images = iter(pixels)
        for segment in part.segments:
            if isinstance(segment, Text):
                self.ids += segment.ids
            else:
                self.images.append(PlacedImage(next(images), len(self.ids), task, source))
                self.ids += [self.chat.patch_id] * segment.length


def _blank(grid: tuple[int, int], drawn: bool) -> Image:
    """An image of which only the number of tokens matters."""
    nothing = torch.empty(1, 0)
    return Image(Features(nothing, nothing, grid, ""), drawn)


def _mentioned(part: Part, scene: Scene, start: int, chat: ChatFormat) -> dict[int, SceneObject]:
    """The objects of the scene that a prompt names, by the position of the last token of the words for each."""
    found = {}
    for segment in part.segments:
        if isinstance(segment, Text) and segment.kind == PROMPT:
            for end, obj in mentions(segment.text, scene):
                found[start + len(chat.encode(segment.text[:end])) - 1] = obj
        start += segment.length
    return found
