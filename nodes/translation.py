"""Messages in the language of the page that a prompt came from.

All code writes English. locales/<language>/messages.json has its messages with {} for what is filled in, and their
translations, where {0}, {1} stand in another order. What is filled in may be a message or a part of one, and is
translated as well; what is not known stays as it is.
"""

from __future__ import annotations

import functools
import json
import re
from typing import NamedTuple

from . import host

MAX_LENGTH = 4000  # characters; longer messages stay as they are
MAX_DEPTH = 6  # of messages in messages
FEW_LETTERS = 4  # a message with fewer, such as "{}: {}", only joins others
# What somebody wrote, as Python quotes it, with the name of an input before it: it may look like any part of a message.
QUOTED = re.compile(r"""(?:\w+ )?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")


class _Message(NamedTuple):
    """A known message.

    words        what it says itself: before, between and behind what is filled in
    translation  with {0}, {1} ... for what is filled in
    joins        whether it has no words of its own
    """

    words: list[str]
    translation: str
    joins: bool

    def parts(self, message: str) -> list[str] | None:
        """What is filled in, if this is that message."""
        if len(self.words) == 1:
            return [] if [message] == self.words else None
        first, *between, last = self.words
        if not (message.startswith(first) and message.endswith(last)):
            return None
        start, end = len(first), len(message) - len(last)
        parts = []
        for words in between:
            quoted = QUOTED.match(message, start)
            at = message.find(words, quoted.end() if quoted else start + 1, end)
            if at < 0:
                return None
            parts.append(message[start:at])
            start = at + len(words)
        return [*parts, message[start:end]] if start < end else None

    def filled(self, parts: list[str]) -> str:
        """The translation with these parts."""
        return re.sub(r"\{(\d+)\}", lambda place: parts[int(place[1])], self.translation)


def in_page_language(message: str) -> str:
    """The message in the language of the page whose prompt is checked or runs."""
    return translated(message, host.page_language())


def translate_error(error: Exception) -> None:
    """Put the error's message into the language of the page; the log has the English one beside it."""
    message = str(error)
    translation = in_page_language(message)
    if translation != message:
        error.args = (translation,)
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(message)


def translated(message: str, language: str, depth: int = 0) -> str:
    """The message in a language, as far as it is known there; without messages of that language as it is."""
    if len(message) > MAX_LENGTH or depth == MAX_DEPTH:
        return message
    for known in _messages(language):
        found = known.parts(message)
        if found is not None:
            parts = [
                part if before.endswith('"') or QUOTED.fullmatch(part) else translated(part, language, depth + 1)
                for before, part in zip(known.words, found, strict=False)  # what is in quotes, somebody wrote
            ]
            if not known.joins or parts != found:
                return known.filled(parts)
    return message


@functools.cache
def _messages(language: str) -> tuple[_Message, ...]:
    """All messages of a language, the most specific ones first."""
    path = host.PACK / "locales" / language / "messages.json"
    if not re.fullmatch("[a-z]{2}", language) or not path.is_file():
        return ()
    messages = json.loads(path.read_text(encoding="utf-8"))
    known = [_message(english, translation) for english, translation in messages.items()]
    return tuple(sorted(known, key=lambda message: 0 if message.joins else -_letters("".join(message.words))))


def _message(english: str, translation: str) -> _Message:
    words = english.split("{}")
    numbers = iter(range(len(words)))
    translation = re.sub(r"\{\}", lambda _: f"{{{next(numbers)}}}", translation)
    return _Message(words, translation, _letters(english) < FEW_LETTERS)


def _letters(english: str) -> int:
    """How many letters of its own a message has."""
    return sum(map(str.isalpha, english))
