"""Text in any script, drawn with Pillow: a font for every character, lines that fit a width."""

from __future__ import annotations

import functools
import re
from itertools import groupby

from PIL import ImageDraw, ImageFont

Color = tuple[int, int, int]

# Pillow's own font covers ASCII. For other characters, fonts that the systems bring, found by their file names.
SYSTEM_FONTS = (
    "DejaVuSans.ttf",  # Linux
    "segoeui.ttf",  # Windows
    "Arial Unicode.ttf",  # macOS
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "NotoSans-Regular.ttf",
    "seguisym.ttf",
)
NO_CHARACTER = "\U0010ffff"  # no font has it, so it is drawn as the box for missing glyphs
# An ideograph may stand at the end of a line, anything else that is no space belongs to a word.
_WORDS = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]|[^\s\u2e80-\u9fff\uac00-\ud7af\uff00-\uffef]+|\s+")


def wrap(text: str, width: int, size: int) -> list[str]:
    """The lines of a text that are no wider than `width` pixels; words that are wider are cut."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in _WORDS.findall(paragraph):
            for piece in [word] if length(word.rstrip(), size) <= width else word:
                if line and length((line + piece).rstrip(), size) > width:
                    lines.append(line.rstrip())
                    line = piece.lstrip()
                else:
                    line += piece
        lines.append(line.rstrip())
    return lines


def length(text: str, size: int) -> float:
    """The width of a line in pixels."""
    return sum(font.getlength(run) for font, run in _runs(text, size))


def write(canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, color: Color) -> None:
    """Draw one line whose baseline begins at `place`. A character that no font has becomes a box."""
    x, y = place
    for font, run in _runs(text, size):
        canvas.text((x, y), run, fill=color, font=font, anchor="ls")
        x += font.getlength(run)


def _runs(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """The text in pieces of one font."""
    return [(font, "".join(run)) for font, run in groupby(text, lambda character: _font_for(character, size))]


@functools.lru_cache(maxsize=4096)
def _font_for(character: str, size: int) -> ImageFont.FreeTypeFont:
    """The first font that has the character; the first of all if none has it."""
    fonts = _fonts(size)
    return next((font for font in fonts if _has(font, character)), fonts[0])


@functools.lru_cache
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    fonts = [ImageFont.load_default(size)]
    for name in SYSTEM_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not on this system
            continue
    return tuple(font for font in fonts if isinstance(font, ImageFont.FreeTypeFont))


def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    return character.isspace() or bytes(font.getmask(character)) != bytes(font.getmask(NO_CHARACTER))
