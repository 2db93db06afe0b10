"""The storyboard of a conversation: its rounds as rows of words and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from ..ming_core import Conversation, Features, MingTok
from ..ming_core.conversation import ANSWER, PROMPT, Part, Text
from ..ming_core.features import joined
from . import host
from .mingtok import MingTokDecode
from .typesetting import wrap, write
from .widgets import TOOLS, socket

WIDTH = 1024  # pixels of the whole
MARGIN, GAP = 32, 16
COLUMN = (WIDTH - 2 * MARGIN - GAP) // 2  # what the user says is on the left, what the model says on the right
PICTURE = (COLUMN - GAP) // 2  # side of a picture; two fit beside each other
FONT, LINE = 22, 30
MOST_LINES = 40  # of a text; longer ones are cut
MOST_ROWS = 64  # the newest rounds; memory is bounded
PAPER, INK, FAINT, FRAME = (250, 249, 246), (32, 33, 36), (120, 122, 128), (205, 205, 205)
NAMES = ("You", "Ming")


@dataclass(frozen=True)
class Cell:
    """What one side says in a round: its lines, then its pictures."""

    lines: list[str]
    pictures: list[Image.Image]

    @property
    def height(self) -> int:
        rows = -(-len(self.pictures) // 2)
        return LINE * len(self.lines) + rows * (PICTURE + GAP)


Row = tuple[Cell, Cell]


class MingConversationStoryboard:
    DESCRIPTION = "Shows a conversation as one picture: every round with its words and pictures."
    CATEGORY = TOOLS
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("image",)
    OUTPUT_TOOLTIPS = ("The storyboard, 1024 pixels wide.",)
    OUTPUT_NODE = True
    FUNCTION = "show"
    SEARCH_ALIASES = ("chat history", "show conversation", "comic")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "mingtok": socket("MINGTOK", "The MingTok of the model; it decodes every picture."),
                "conversation": socket("MING_CONVERSATION", "The conversation to show."),
            }
        }

    def show(self, mingtok: host.Loaded[MingTok], conversation: Conversation) -> dict:
        if not conversation.parts:
            raise ValueError("this conversation is empty: connect the conversation of a round")
        rounds = list(_rounds(conversation))
        shown = rounds[-MOST_ROWS:]
        images = [image.features for sides in shown for part in sides for image in part.images]
        pictures = iter(_decoded(mingtok, images))
        rows = [(_cell(prompt, pictures), _cell(answer, pictures)) for prompt, answer in shown]
        sheet = storyboard(rows, first=len(rounds) - len(shown) + 1)
        image = torch.from_numpy(np.array(sheet)).float().div(255)[None].to(host.images_device())
        return {"ui": host.preview(image), "result": (image,)}


def storyboard(rows: list[Row], first: int = 1) -> Image.Image:
    """Draw rounds below each other; `first` is the number of the first one."""
    heights = [LINE + max(cell.height for cell in row) + 2 * GAP for row in rows]
    sheet = Image.new("RGB", (WIDTH, 2 * MARGIN + sum(heights)), PAPER)
    canvas = ImageDraw.Draw(sheet)
    top = MARGIN
    for number, (row, height) in enumerate(zip(rows, heights, strict=True), start=first):
        for side, cell in enumerate(row):
            left = MARGIN + side * (COLUMN + GAP)
            write(canvas, (left, top + FONT), f"{number}. {NAMES[side]}", FONT, FAINT)
            _draw_cell(sheet, canvas, (left, top + LINE), cell)
        top += height
        if number < first + len(rows) - 1:
            canvas.line([(MARGIN, top - GAP), (WIDTH - MARGIN, top - GAP)], fill=FRAME)
    return sheet


def _draw_cell(sheet: Image.Image, canvas: ImageDraw.ImageDraw, place: tuple[int, int], cell: Cell) -> None:
    left, top = place
    for line in cell.lines:
        write(canvas, (left, top + FONT), line, FONT, INK)
        top += LINE
    for i, picture in enumerate(cell.pictures):
        x, y = left + i % 2 * (PICTURE + GAP), top + GAP // 2 + i // 2 * (PICTURE + GAP)
        sheet.paste(picture, (x, y))
        canvas.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)


def _rounds(conversation: Conversation) -> Iterator[tuple[Part, Part]]:
    """Every prompt with what the model generated for it; nothing if it is not there."""
    nothing = Part(True, ())
    parts = list(conversation.parts)
    for i, part in enumerate(parts):
        if not part.generated:
            answered = i + 1 < len(parts) and parts[i + 1].generated
            yield part, parts[i + 1] if answered else nothing


def _cell(part: Part, pictures: Iterator[Image.Image]) -> Cell:
    """The words of a part, and as many of the next pictures as it has."""
    said = "".join(s.text for s in part.segments if isinstance(s, Text) and s.kind in (PROMPT, ANSWER)).strip()
    lines = wrap(said, COLUMN, FONT)
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], "..."]
    return Cell(lines, [next(pictures) for _ in part.images])


def _decoded(mingtok: host.Loaded[MingTok], images: list[Features]) -> list[Image.Image]:
    """The pictures in their order, as large as in the storyboard; those of one grid are decoded together."""
    pictures: dict[int, Image.Image] = {}
    for grid in dict.fromkeys(image.grid for image in images):
        numbers = [i for i, image in enumerate(images) if image.grid == grid]
        decoded = MingTokDecode().decode(mingtok, joined(*(images[i] for i in numbers)))[0].cpu()
        pictures.update(zip(numbers, map(_scaled, decoded), strict=True))
    return [pictures[i] for i in range(len(images))]


def _scaled(pixels: torch.Tensor) -> Image.Image:
    """An image [H, W, 3], 0..1, within the square of a picture."""
    picture = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
    return ImageOps.contain(picture, (PICTURE, PICTURE), Image.Resampling.LANCZOS)
