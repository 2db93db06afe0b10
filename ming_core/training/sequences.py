"""Samples as token sequences, exactly as inference lays them out, with what is to be predicted.

A round is its prompt part from the chat template, then what the model emits: the answer, or `<image>` and the tokens of
an image. The end token is predicted after either, but is in no sequence, as in a `Conversation`.

Guidance rows are trained in the very form in which they are used: from `<image>` of the last round on, such a sequence
attends only to what `guidance_masks` leaves to that row, and its positions count only that. The keys of the ASSISTANT
tag still know the prompt, so the prompt is replaced by that of another sample, the donor: what leaks is of no use.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

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

Placed = TypeVar("Placed")  # an image in a sequence


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
    kept          whether the model must go on to do what it does without what is trained; None: no sample is such
    """

    ids: list[int]
    targets: list[int]
    loss_weights: list[float]
    positions: list[int]
    images: tuple[PlacedImage, ...]
    masked: Tensor
    seed: int = 0
    kept: bool | None = None

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
    layout: Layout[PlacedImage] = Layout(chat, grid)
    for each in rounds[:-1]:
        _add(layout, each, each)
    if row:
        assert donor is not None
        _add(layout, rounds[-1], donor, row)
    else:
        _add(layout, rounds[-1], rounds[-1])
    return Sequence(*layout.tokens(), tuple(layout.images), layout.masked)


def _add(layout: Layout[PlacedImage], each: Round, asked: Round, row: int = 0) -> None:
    """Add a round with the prompt of `asked`; in the form of a guidance row if this is not 0."""
    source = asked.source if row == UNCONDITIONAL else each.source
    layout.add_prompt(asked.prompt, [_place(source, None)] if source else [])
    if each.target is None:
        layout.add_answer(layout.chat.encode_answer(each.answer))
    else:
        layout.add_image(_place(each.target, flow_weights(each)), row)


def _place(image: EncodedImage, weights: Tensor | None) -> Callable[[int], PlacedImage]:
    return lambda start: PlacedImage(image, start, weights)


class Layout(Generic[Placed]):
    """A sequence while its rounds are added, each a prompt and then what the model emits.

    grid    rows and columns of the tokens of an image
    images  in order; each is made by what was given for it, from the position of its first token
    masked  bool [n]: which of the first n tokens the others, from n on, do not attend to
    """

    def __init__(self, chat: ChatFormat, grid: tuple[int, int]) -> None:
        self.chat, self.grid = chat, grid
        self.ids: list[int] = []
        self.images: list[Placed] = []
        self.masked = torch.zeros(0, dtype=torch.bool, device="cpu")
        self._conversation = Conversation()
        self._targets: dict[int, int] = {}
        self._short: set[int] = set()  # positions that predict a short answer

    def add_prompt(self, text: str, images: Items[Callable[[int], Placed]] = ()) -> Part:
        contents: list[str | list[Image]] = [text]
        if images:
            contents.insert(0, [_blank(self.grid, drawn=False) for _ in images])
        part = self.chat.prompt(contents)
        self._add(part, images)
        return part

    def add_answer(self, ids: tuple[int, ...]) -> None:
        """Add an answer, which is to be predicted."""
        begin = len(self.ids)
        self._add(Part(True, (Text(ids, ANSWER),)))
        self._predict(begin, len(self.ids))
        if len(ids) <= SHORT_ANSWER:
            self._short |= set(range(begin - 1, len(self.ids)))

    def add_image(self, image: Callable[[int], Placed], row: int = 0) -> None:
        """Add an image to draw. row: of `guidance_masks`, whose form the sequence takes from here on, with no text
        predicted; 0: none. A row that the transcript does not have is the unconditional one."""
        if row:
            masks = guidance_masks(self._conversation.parts)
            self.masked = ~masks[min(row, len(masks) - 1)]
        begin = len(self.ids)
        self._add(Part(True, (Text((self.chat.image_open_id,), MARK), _blank(self.grid, drawn=True))), [image])
        if not row:
            self._predict(begin, begin + 1)  # of an image only `<image>` is predicted as a token

    def tokens(self) -> tuple[list[int], list[int], list[float], list[int]]:
        """(ids, targets, loss weights, positions), each with a value for every token; see `Sequence`."""
        count, n, attended = len(self.ids), len(self.masked), int((~self.masked).sum())
        return (
            self.ids,
            [self._targets.get(i, IGNORE) for i in range(count)],
            [SHORT_WEIGHT if i in self._short else 1.0 for i in range(count)],
            [*range(n), *range(attended, attended + count - n)],
        )

    def _predict(self, begin: int, end: int) -> None:
        """Have these tokens predicted, and the end token after everything."""
        self._targets |= {i - 1: self.ids[i] for i in range(begin, end)}
        self._targets[len(self.ids) - 1] = self.chat.end_id

    def _add(self, part: Part, images: Items[Callable[[int], Placed]] = ()) -> None:
        """Add the tokens of a part, and its images."""
        self._conversation = self._conversation.extended(part, "")
        left = iter(images)
        for segment in part.segments:
            if isinstance(segment, Text):
                self.ids += segment.ids
            else:
                self.images.append(next(left)(len(self.ids)))
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
