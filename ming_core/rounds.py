"""The values of a round: what it is planned as, what it tells on its way, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from torch import Tensor

from .checks import check_tensor, whole_number
from .conversation import Conversation
from .features import Features
from .kv_cache import PrefillCache
from .options import ImageOptions, TextOptions


class NoPictureError(RuntimeError):
    """The model decided not to draw: the message quotes what it said, and says how to have it draw."""


@dataclass(frozen=True)
class Progress:
    """The state of a round after a token, or after a part of a long prompt.

    kind       "prompt" (after a part of a long one), "text" or "image"
    done       tokens of this kind so far, of at most `total`
    text       text: all that was written so far, in the first image's row
    latents    image: [B, done, C], normalised latents so far; views, not to be written to
    tokens     image: [B, done, D], semantic features so far; likewise
    """

    kind: str
    done: int
    total: int
    text: str = ""
    latents: Tensor | None = None
    tokens: Tensor | None = None


OnToken = Callable[[Progress], None] | None

Options = TypeVar("Options", TextOptions, ImageOptions)


@dataclass(frozen=True)
class RoundPlan(Generic[Options]):
    """A round that was found possible and of which nothing is computed yet.

    transcript      the conversation with the round's images and prompt
    working_memory  bytes that the round takes beside the weights, at most
    """

    transcript: Conversation
    options: Options
    working_memory: int


@dataclass(frozen=True)
class PrefilledRound:
    """A round whose prompt went through the language model.

    transcript  as planned: with the prompt, without the answer
    cache       keys and values of all of it
    hidden      [H], the hidden state of its last token
    prefilled   positions that had to be forwarded; the prefix cache had the others
    weights     identifies the weights that computed it (Engine.weights_key)
    """

    transcript: Conversation
    cache: PrefillCache
    hidden: Tensor
    prefilled: int
    weights: bytes


@dataclass(frozen=True)
class RoundResult:
    """What a round returns.

    text          the words, without special tokens
    token_ids     all that was emitted, end token included; an image counts as its `<image>`
    conversation  the conversation with this round
    prefilled     positions that were forwarded before the first token could be emitted
    logits        float32 [len(token_ids), vocabulary] in host memory, when asked for
    truncated     whether max_new_tokens ended the text before the model did
    """

    text: str
    token_ids: list[int]
    conversation: Conversation
    prefilled: int
    logits: Tensor | None
    truncated: bool


@dataclass(frozen=True)
class TextResult(RoundResult):
    """A round that answered in text."""

    features: ClassVar[None] = None


@dataclass(frozen=True)
class ImageResult(RoundResult):
    """A round that drew an image. features: the drawn image, batch 1."""

    features: Features


@dataclass(frozen=True, eq=False)  # tensors cannot be compared by ==
class DrawRequest:
    """One of many rounds that are drawn in one pass; defaults as in `Engine.generate_image`.

    noise: float32 [tokens, C] in place of the seeded one.
    """

    prompt: str
    seed: int = 0
    conversation: Conversation = field(default_factory=Conversation)
    features: Features | None = None
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole_number("seed", self.seed))
        if self.noise is not None:
            check_tensor("noise", self.noise)
