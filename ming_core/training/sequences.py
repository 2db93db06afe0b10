"""Samples as token sequences, exactly as inference lays them out, with what is to be predicted.

A round is its prompt part from the chat template, then what the model emits: the answer, or `<image>` and the tokens of
an image. The end token is predicted after either, but is in no sequence, as in a `Conversation`.

Guidance rows are trained in the very form in which they are used: from `<image>` of the last round on, such a sequence
attends only to what `guidance_masks` leaves to that row, and its positions count only that. The keys of the ASSISTANT
tag still know the prompt, so the prompt is replaced by that of another sample, the donor: what leaks is of no use.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..conversation import ANSWER, MARK, Conversation, Image, Part, Text, guidance_masks
from ..features import Features
from ..prompts import ChatFormat
from .cache import EncodedImage

IGNORE = -100  # the target of a position where nothing is to be predicted
SHORT_ANSWER = 8  # most tokens of a short answer
SHORT_WEIGHT = 4.0  # loss weight of its tokens, which are few beside those of long answers; 1 elsewhere
# Flow loss weights of image tokens; 1 on plain background, which is soon learned.
OBJECT_WEIGHT = 2.0
EDIT_WEIGHT = 4.0  # where there is something before or after an edit: what changes and what must not, alike

UNCONDITIONAL, TEXT_UNCONDITIONAL = 1, 2  # rows of `guidance_masks`; row 0 attends to everything


@dataclass(frozen=True, eq=False)
class Round:
    """A prompt, perhaps with an image, and the image or the answer that is to come."""

    prompt: str
    source: EncodedImage | None = None
    target: EncodedImage | None = None
    answer: str = ""


class PlacedImage(NamedTuple):
    """An image in a sequence, which starts at a position; weights float32 [N] of the flow loss, None if not drawn."""

    image: EncodedImage
    start: int
    weights: Tensor | None


@dataclass(frozen=True, eq=False)
class Sequence:
    """One tokenized sample.

    ids           token ids; the patch token where an image's features go
    targets       the token that each position must predict, or IGNORE
    loss_weights  of the targets
    positions     as rotary embedding counts them
    images        in order
    masked        bool [n]: which of the first n tokens the others, from n on, do not attend to
    seed          of the noise for this sequence
    """

    ids: list[int]
    targets: list[int]
    loss_weights: list[float]
    positions: list[int]
    images: tuple[PlacedImage, ...]
    masked: Tensor
    seed: int = 0

    @property
    def text_weight(self) -> float:
        """The sum of the weights of the tokens to predict."""
        return sum(w for w, target in zip(self.loss_weights, self.targets, strict=True) if target != IGNORE)

    @property
    def flow_weight(self) -> float:
        """The sum of the weights of the image tokens to draw."""
        return sum(float(image.weights.sum()) for image in self.images if image.weights is not None)


def tokenize(
    rounds: list[Round], chat: ChatFormat, grid: tuple[int, int], row: int = 0, donor: Round | None = None
) -> Sequence:
    """Lay out rounds as tokens.

    grid   rows and columns of the tokens of an image
    row    of `guidance_masks`, for the last round, which must be a drawing one if this is not 0. A row that the
           transcript does not have is the unconditional one.
    donor  whose prompt replaces that of the last round if row is not 0: the text and, for the unconditional row, the
           image
    """
    layout = _Layout(chat, grid)
    *past, last = rounds
    for each in past:
        layout.add_round(each)
    if row:
        assert donor is not None
        layout.add_guidance_round(last, donor, row)
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
        self.masked = torch.zeros(0, dtype=torch.bool, device="cpu")

    def add_round(self, each: Round) -> None:
        """Add a round that is to be predicted."""
        self._add_prompt(each)
        begin = len(self.ids)
        self._add_emitted(each)
        end = len(self.ids) if each.target is None else begin + 1  # of an image only `<image>` is predicted as a token
        self.targets |= {i - 1: self.ids[i] for i in range(begin, end)}
        self.targets[len(self.ids) - 1] = self.chat.end_id
        if each.target is None and len(self.ids) - begin <= SHORT_ANSWER:
            self.short |= set(range(begin - 1, len(self.ids)))

    def add_guidance_round(self, each: Round, donor: Round, row: int) -> None:
        """Add a drawing round in the form of a guidance row; no text is predicted in it."""
        source = donor.source if row == UNCONDITIONAL else each.source
        self._add_prompt(replace(each, prompt=donor.prompt, source=source))
        masks = guidance_masks(self.conversation.parts)
        self.masked = ~masks[min(row, len(masks) - 1)]
        self._add_emitted(each)

    def sequence(self) -> Sequence:
        count, n, attended = len(self.ids), len(self.masked), int((~self.masked).sum())
        return Sequence(
            self.ids,
            [self.targets.get(i, IGNORE) for i in range(count)],
            [SHORT_WEIGHT if i in self.short else 1.0 for i in range(count)],
            [*range(n), *range(attended, attended + count - n)],
            tuple(self.images),
            self.masked,
        )

    def _add_prompt(self, each: Round) -> None:
        contents: list[str | list[Image]] = [each.prompt]
        if each.source is not None:
            contents.insert(0, [_blank(self.grid, drawn=False)])
        self._add(self.chat.prompt(contents), each.source, None)

    def _add_emitted(self, each: Round) -> None:
        if each.target is None:
            part = Part(True, (Text(self.chat.encode(each.answer), ANSWER),))
        else:
            part = Part(True, (Text((self.chat.image_open_id,), MARK), _blank(self.grid, drawn=True)))
        self._add(part, each.target, flow_weights(each))

    def _add(self, part: Part, image: EncodedImage | None, weights: Tensor | None) -> None:
        """Add the tokens of a part, and its image if it has one."""
        self.conversation = self.conversation.extended(part, "")
        for segment in part.segments:
            if isinstance(segment, Text):
                self.ids += segment.ids
            else:
                assert image is not None
                self.images.append(PlacedImage(image, len(self.ids), weights))
                self.ids += [self.chat.patch_id] * segment.length


def _blank(grid: tuple[int, int], drawn: bool) -> Image:
    """An image of which only the number of tokens matters."""
    nothing = torch.empty(1, 0)
    return Image(Features(nothing, nothing, grid, ""), drawn)


def flow_weights(each: Round) -> Tensor | None:
    """The flow loss weights of the tokens of the image to draw: float32 [N]; None if there is none."""
    if each.target is None:
        return None
    occupied = each.target.occupied
    weights = torch.where(occupied, OBJECT_WEIGHT, 1.0)
    if each.source is not None and not each.source.occupied.all():  # unless all of it counts alike
        weights[occupied | each.source.occupied] = EDIT_WEIGHT
    return weights
