"""The immutable conversation: exactly the sequence that went through the language model, and nothing else.

Per round there is a prompt part and a generated part, each made of text (token ids) and images. Which of the past
tokens a guidance row may see, and hence its positions, is a pure function of this structure (`guidance_masks`).
Extending a conversation makes a new one; two continuations of one conversation never see each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .features import ContentHashed, Features, digest_of, tensor_digest

# Kinds of text, which decide who sees it: the role tags everybody, the marks around an image of the newest prompt
# only rows that see its images, the prompt's words (and line breaks) only the conditional row.
ROLE, MARK, PROMPT, ANSWER = "role", "mark", "prompt", "answer"


class _Text(NamedTuple):
    ids: tuple[int, ...]
    kind: str
    text: str = ""


class Text(ContentHashed, _Text):
    """A run of tokens; `text` is what it says, for people (identity goes by the ids and the kind)."""

    __slots__ = ()

    @property
    def length(self) -> int:
        return len(self.ids)

    def content(self) -> bytes:
        """What the language model's keys and values at these positions depend on."""
        return b"text:" + ",".join(map(str, self.ids)).encode()

    def digest(self) -> bytes:
        return digest_of(self.content(), self.kind.encode())

    def __repr__(self) -> str:
        return f"Text({self.kind}, {self.length} tokens)"


class _Image(NamedTuple):
    features: Features
    drawn: bool


class Image(ContentHashed, _Image):
    """One image, seen (attached by the user) or drawn (by the model): float32 latents, grid, and which of the two."""

    __slots__ = ()

    @property
    def length(self) -> int:
        return self.features.grid[0] * self.features.grid[1]

    def content(self) -> bytes:
        kind = b"drawn:" if self.drawn else b"seen:"
        return kind + str(self.features.grid).encode() + tensor_digest(self.features.latents)

    def digest(self) -> bytes:
        return digest_of(self.content())

    def __repr__(self) -> str:
        return f"Image({'drawn' if self.drawn else 'seen'}, {self.features.grid[0]}x{self.features.grid[1]})"


Segment = Text | Image


class _Part(NamedTuple):
    generated: bool
    segments: tuple[Segment, ...]


class Part(ContentHashed, _Part):
    """What the user said in a round (a prompt part), or what the model emitted (a generated part)."""

    __slots__ = ()

    @property
    def length(self) -> int:
        return sum(s.length for s in self.segments)

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(s for s in self.segments if isinstance(s, Image))

    def digest(self) -> bytes:
        return digest_of(b"generated" if self.generated else b"prompt", *(s.digest() for s in self.segments))

    def __repr__(self) -> str:
        return f"Part({'generated' if self.generated else 'prompt'}, {self.length} tokens)"


class _Conversation(NamedTuple):
    parts: tuple[Part, ...] = ()
    model: str = ""


class Conversation(ContentHashed, _Conversation):
    """A transcript of rounds with one model (`model`: its fingerprint). `Conversation()` is the empty one."""

    __slots__ = ()

    @property
    def length(self) -> int:
        """Positions that it takes in the language model."""
        return sum(p.length for p in self.parts)

    @property
    def rounds(self) -> int:
        """Prompts so far."""
        return sum(not p.generated for p in self.parts)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return tuple(s for p in self.parts for s in p.segments)

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(s for p in self.parts for s in p.images)

    @property
    def depth(self) -> int:
        """The largest number of drawings behind an image in view."""
        return max((p.features.depth for p in self.images), default=0)

    def extended(self, part: Part, model: str) -> Conversation:
        return Conversation((*self.parts, part), model)

    def ends_with(self, images: list[Features]) -> bool:
        """Whether these (batch 1 each) are the newest images in view, in this order."""
        newest = self.images[-len(images) :]
        return [(i.features.grid, tensor_digest(i.features.latents)) for i in newest] == [
            (image.grid, tensor_digest(image.latents)) for image in images
        ]

    def transcript(self) -> str:
        """The rounds as plain text for people."""
        lines = []
        for part in self.parts:
            said = "".join(_readable(s) for s in part.segments).strip()
            lines.append(("Ming: " if part.generated else "You: ") + said)
        return "\n".join(lines)

    def digest(self) -> bytes:
        return digest_of(self.model.encode(), *(p.digest() for p in self.parts))

    def __repr__(self) -> str:
        return f"Conversation({self.rounds} rounds, {len(self.images)} images, {self.length} tokens)"


def segment_keys(segments: tuple[Segment, ...], weights: bytes = b"") -> list[bytes]:
    """For each segment a key of everything up to its end: equal keys, equal keys and values in the language model.

    weights: identifies the language model that computes them.
    """
    keys, key = [], weights
    for segment in segments:
        key = digest_of(key, segment.content())
        keys.append(key)
    return keys


def prompt_masks(part: Part) -> tuple[list[bool], list[bool]]:
    """What of the newest prompt the unconditional and the text-unconditional row see."""
    unconditional, text_unconditional = [], []
    for segment in part.segments:
        role = isinstance(segment, Text) and segment.kind == ROLE
        image = isinstance(segment, Image) or segment.kind == MARK
        unconditional += [role] * segment.length
        text_unconditional += [role or image] * segment.length
    return unconditional, text_unconditional


def guidance_masks(parts: tuple[Part, ...]) -> Tensor:
    """Which positions of a transcript, whose last part is the newest prompt, each guidance row sees.

    bool [g, length]: the conditional row sees all, the unconditional row neither the newest prompt's words and
    images nor the newest generated part, the text-unconditional row everything but the newest prompt's words.
    Where the last two agree (no image in the newest prompt, nothing generated before) there are two rows, else three.
    """
    *past, prompt = parts
    newest = max((i for i, p in enumerate(past) if p.generated), default=None)
    unconditional: list[bool] = []
    text_unconditional: list[bool] = []
    for i, part in enumerate(past):
        unconditional += [i != newest] * part.length
        text_unconditional += [True] * part.length
    for mask, of_prompt in zip((unconditional, text_unconditional), prompt_masks(prompt), strict=True):
        mask += of_prompt
    masks = [[True] * len(unconditional), unconditional]
    if text_unconditional != unconditional:
        masks.append(text_unconditional)
    return torch.tensor(masks, device="cpu")


def _readable(segment: Segment) -> str:
    if isinstance(segment, Image):
        h, w = segment.features.grid
        return f"[picture {'drawn' if segment.drawn else 'seen'}, {h}x{w} tokens]"
    return segment.text if segment.kind in (PROMPT, ANSWER) else ""
