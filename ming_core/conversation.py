"""The immutable conversation: exactly the sequence that went through the language model, and nothing else.

Per round there is a prompt part and a generated part, each made of text (token ids) and pictures. Which of the past
tokens a guidance row may see, and hence its positions, is a pure function of this structure (`guidance_views`).
Extending a conversation makes a new one; two continuations of one conversation never see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .config import UniVisionConfig
from .features import ByContent, Features, digest_of, tensor_digest
from .files import FileError, read_tensors, write_tensors
from .mingtok import MingTok

FILE_FORMAT = "ming conversation 1"

# Kinds of text, which decide who sees it: the role tags everybody, the marks around a picture of the newest prompt
# only rows that see its pictures, the prompt's words (and line breaks) only the conditional row.
ROLE, MARK, PROMPT, ANSWER = "role", "mark", "prompt", "answer"


class _Text(NamedTuple):
    ids: tuple[int, ...]
    kind: str
    text: str = ""


class Text(ByContent, _Text):
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


class _Picture(NamedTuple):
    features: Features
    drawn: bool


class Picture(ByContent, _Picture):
    """One picture, seen (attached by the user) or drawn (by the model): float32 latents, grid, and which of the two."""

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
        return f"Picture({'drawn' if self.drawn else 'seen'}, {self.features.grid[0]}x{self.features.grid[1]})"


Segment = Text | Picture


class _Part(NamedTuple):
    generated: bool
    segments: tuple[Segment, ...]


class Part(ByContent, _Part):
    """What the user said in a round (a prompt part), or what the model emitted (a generated part)."""

    __slots__ = ()

    @property
    def length(self) -> int:
        return sum(s.length for s in self.segments)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(s for s in self.segments if isinstance(s, Picture))

    def digest(self) -> bytes:
        return digest_of(b"generated" if self.generated else b"prompt", *(s.digest() for s in self.segments))

    def __repr__(self) -> str:
        return f"Part({'generated' if self.generated else 'prompt'}, {self.length} tokens)"


class _Conversation(NamedTuple):
    parts: tuple[Part, ...] = ()
    model: str = ""


class Conversation(ByContent, _Conversation):
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
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(s for p in self.parts for s in p.pictures)

    @property
    def depth(self) -> int:
        """The largest number of drawings behind a picture in view."""
        return max((p.features.depth for p in self.pictures), default=0)

    def extended(self, part: Part, model: str) -> Conversation:
        return Conversation((*self.parts, part), model)

    def shows(self, features: Features) -> bool:
        """Whether this one picture (batch 1) is in view already."""
        wanted = (features.grid, tensor_digest(features.latents))
        return any((p.features.grid, tensor_digest(p.features.latents)) == wanted for p in self.pictures)

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
        return f"Conversation({self.rounds} rounds, {len(self.pictures)} pictures, {self.length} tokens)"


def segment_keys(segments: tuple[Segment, ...]) -> list[bytes]:
    """For each segment a key of everything up to its end: equal keys, equal keys and values in the language model."""
    keys, key = [], b""
    for segment in segments:
        key = digest_of(key, segment.content())
        keys.append(key)
    return keys


def prompt_views(part: Part) -> tuple[list[bool], list[bool]]:
    """What of the newest prompt the unconditional and the text-unconditional row see."""
    unconditional, text_unconditional = [], []
    for segment in part.segments:
        role = isinstance(segment, Text) and segment.kind == ROLE
        picture = isinstance(segment, Picture) or segment.kind == MARK
        unconditional += [role] * segment.length
        text_unconditional += [role or picture] * segment.length
    return unconditional, text_unconditional


def guidance_views(parts: tuple[Part, ...]) -> Tensor:
    """Which positions of a transcript, whose last part is the newest prompt, each guidance row sees.

    bool [g, length]: the conditional row sees all, the unconditional row neither the newest prompt's words and
    pictures nor the newest generated part, the text-unconditional row everything but the newest prompt's words.
    Where the last two agree (no picture in the newest prompt, nothing generated before) there are two rows, else three.
    """
    *past, prompt = parts
    newest = max((i for i, p in enumerate(past) if p.generated), default=None)
    unconditional: list[bool] = []
    text_unconditional: list[bool] = []
    for i, part in enumerate(past):
        unconditional += [i != newest] * part.length
        text_unconditional += [True] * part.length
    for view, of_prompt in zip((unconditional, text_unconditional), prompt_views(prompt), strict=True):
        view += of_prompt
    views = [[True] * len(unconditional), unconditional]
    if text_unconditional != unconditional:
        views.append(text_unconditional)
    return torch.tensor(views)


def save_conversation(conversation: Conversation, path: str | Path) -> None:
    """Write one small safetensors file, whole or not at all: token ids and latents, never features."""
    pictures = conversation.pictures
    ids = [i for s in conversation.segments if isinstance(s, Text) for i in s.ids]
    tensors = {f"latents.{i}": p.features.latents[0] for i, p in enumerate(pictures)}
    tensors["ids"] = torch.tensor(ids, dtype=torch.int32)
    parts = [{"generated": p.generated, "segments": [_about(s) for s in p.segments]} for p in conversation.parts]
    write_tensors(path, tensors, {"format": FILE_FORMAT, "model": conversation.model, "parts": parts})


class ConversationModel(Protocol):
    """What is needed of a UniVision to read a conversation."""

    config: UniVisionConfig
    fingerprint: str
    mingtok: MingTok


def load_conversation(
    path: str | Path,
    model: ConversationModel,
    ready: Callable[[int], None] | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> Conversation:
    """Read what `save_conversation` wrote; the pictures' features are made anew, once a picture.

    `ready` is called with the tokens of the largest picture, if there is one, when the file is found to be of this
    model and MingTok is about to compute; `on_picture`, after every picture, with how many are done and how many there
    are, and it may raise to stop. Raises FileError for a damaged file, and ValueError for one of another model.
    """
    tensors, about = read_tensors(path, FILE_FORMAT)
    other = about.get("model", "")
    if other not in ("", model.fingerprint):
        raise ValueError(
            f"{path} was saved with another model ({str(other)[:12]}) than this one ({model.fingerprint[:12]}): "
            "load that model to go on with it"
        )
    try:
        bare = _parse(tensors, about, model)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise FileError(f"{path}: not a whole conversation file ({what}); save the conversation again") from None
    pictures = bare.pictures
    if ready and pictures:
        ready(max(picture.length for picture in pictures))
    expanded = []
    for picture in pictures:
        with torch.no_grad():
            features = model.mingtok.semantic_features(picture.features.latents)
        expanded.append(Picture(features._replace(depth=picture.features.depth), picture.drawn))
        if on_picture:
            on_picture(len(expanded), len(pictures))
    whole = iter(expanded)
    parts = [
        part._replace(segments=tuple(next(whole) if isinstance(s, Picture) else s for s in part.segments))
        for part in bare.parts
    ]
    return bare._replace(parts=tuple(parts))


def _parse(tensors: dict[str, Tensor], about: dict, model: ConversationModel) -> Conversation:
    """The conversation of a file, its pictures' features without tokens yet."""
    ids, vocabulary, done = tensors["ids"].tolist(), model.config.llm_config.vocab_size, 0
    for i in ids:
        if not (isinstance(i, int) and 0 <= i < vocabulary):
            raise ValueError(f"token {i} is not in the vocabulary of {vocabulary}")
    parts = []
    for part in about["parts"]:
        segments: list[Segment] = []
        for entry in part["segments"]:
            if "kind" in entry:
                n = entry["length"]
                known = entry["kind"] in (ROLE, MARK, PROMPT, ANSWER) and isinstance(entry["text"], str)
                if not (known and 0 < n <= len(ids)):
                    raise ValueError(f"{n} tokens of {entry['kind']!r}, where {len(ids)} are left")
                segments.append(Text(tuple(ids[:n]), entry["kind"], entry["text"]))
                del ids[:n]
            else:
                latents = tensors[f"latents.{done}"][None]
                model.mingtok.check_latents(latents)
                grid, depth = tuple(latents.shape[2:]), int(entry["depth"])
                features = Features(latents[:, 0, :0], latents, grid, model.mingtok.fingerprint, depth)
                segments.append(Picture(features, bool(entry["drawn"])))
                done += 1
        parts.append(Part(bool(part["generated"]), tuple(segments)))
    if ids or done < len(tensors) - 1:
        raise ValueError(f"{len(ids)} tokens and {len(tensors) - 1 - done} pictures are of no part")
    return Conversation(tuple(parts), about["model"])


def _about(segment: Segment) -> dict:
    if isinstance(segment, Text):
        return {"kind": segment.kind, "length": segment.length, "text": segment.text}
    return {"drawn": segment.drawn, "depth": segment.features.depth}


def _readable(segment: Segment) -> str:
    if isinstance(segment, Picture):
        h, w = segment.features.grid
        return f"[picture {'drawn' if segment.drawn else 'seen'}, {h}x{w} tokens]"
    return segment.text if segment.kind in (PROMPT, ANSWER) else ""
