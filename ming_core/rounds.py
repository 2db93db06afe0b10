"""A round as the language model has it: planned, its prompt prefilled, and what was generated remembered.

The prefix cache knows the keys and values of what was said before, by its content, so that a round forwards only what
is new; what it adds goes there when the round is whole.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .config import UniVisionConfig
from .conversation import Conversation, Part, Picture, Text, segment_keys
from .features import Features
from .flow_head import FlowHead
from .language_model import KeyValues, LanguageModel, Prefix, Rows
from .mingtok import MingTok
from .placement import out_of_range
from .prefix_cache import PrefixCache
from .prompts import ChatFormat

log = logging.getLogger(__name__)

EMPTY_PROMPT = "the prompt is empty: write what the model is to do"


class Model(Protocol):
    """What the loops need of a UniVision."""

    config: UniVisionConfig
    chat: ChatFormat
    mingtok: MingTok
    language_model: LanguageModel
    flow_head: FlowHead
    linear_proj: nn.Module
    prefix_cache: PrefixCache
    fingerprint: str

    @property
    def device(self) -> torch.device: ...

    def project(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Progress:
    """Where a round stands after a token, or a part of a long prompt.

    kind       "prompt" (after a part of a long one), "text" or "image"
    done       tokens of this kind so far, of at most `total`
    text       text: all that was written so far, in the first picture's row
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


@dataclass
class OpenRound:
    """A round whose prompt has been prefilled."""

    conversation: Conversation  # with the prompt, without the answer
    prefix: Prefix
    hidden: Tensor  # [H], of the prompt's last token
    prefilled: int  # positions that had to be forwarded


def plan_round(
    model: Model,
    conversation: Conversation,
    prompt: str,
    features: Features | None,
    max_new_tokens: int,
    *,
    drawing: bool = False,
) -> Conversation:
    """The conversation with the pictures and the prompt of a round, of which nothing is computed yet.

    Raises ValueError for all that a round refuses; see UniVision.understand.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(EMPTY_PROMPT)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    if conversation.model not in ("", model.fingerprint):
        raise ValueError(
            f"this conversation was held with another model ({conversation.model[:12]}) than this one "
            f"({model.fingerprint[:12]}): go on with the model that began it"
        )
    attached = _attached(model, conversation, features)
    part = model.chat.prompt([attached, prompt] if attached else [prompt])
    grown = conversation.extended(part, model.fingerprint)
    limit = model.config.llm_config.max_position_embeddings
    room = max_new_tokens + drawn_tokens(model) if drawing else max_new_tokens
    if grown.length + room > limit:
        raise ValueError(
            f"too long: {conversation.length} tokens of conversation, {part.length} of prompt and up to {room} to come "
            f"are {grown.length + room}, and this model has {limit} positions; shorten the prompt, lower "
            "max_new_tokens, or begin a new conversation"
        )
    return grown


def drawn_tokens(model: Model) -> int:
    """Tokens that a drawn picture takes: `<image>` and the image tokens."""
    return 1 + model.config.llm_config.num_image_tokens_for_gen


def _attached(model: Model, conversation: Conversation, features: Features | None) -> list[Picture]:
    """The pictures of `features` that are not in view yet."""
    if features is None:
        return []
    model.mingtok.check_features(features)
    new = [picture for picture in features.pictures() if not conversation.shows(picture)]
    if len(new) < features.batch:
        log.info(
            "%d of %d pictures are in view already and not attached again", features.batch - len(new), features.batch
        )
    return [Picture(picture, drawn=False) for picture in new]


def open_round(model: Model, planned: Conversation, on_token: OnToken = None) -> OpenRound:
    """Prefill what the prefix cache does not know of a planned round.

    The last segment is always forwarded, since its hidden state is needed.
    """
    segments = planned.segments
    keys = segment_keys(segments)
    prefix = model.language_model.prefix(planned.length)
    known = model.prefix_cache.lookup(keys[:-1])
    for entry in known:
        prefix.extend(entry)
    new, begin = segments[len(known) :], prefix.length
    embeddings, image_gate = embed(model, new)

    def tell(done: int) -> None:
        if on_token:
            on_token(Progress("prompt", done, len(embeddings)))

    hidden = model.language_model.prefill(embeddings, prefix, image_gate, tell)
    if not hidden.isfinite().all():
        raise out_of_range(hidden.dtype)
    _remember(model, keys, new, begin, prefix.slice)
    return OpenRound(planned, prefix, hidden, len(embeddings))


def close_round(model: Model, opened: OpenRound, segments: list, rows: Rows, row: int) -> Conversation:
    """The conversation with the generated part, whose keys and values one of the rows holds."""
    grown = opened.conversation.extended(Part(True, tuple(segments)), model.fingerprint)
    _remember(model, segment_keys(grown.segments), segments, 0, lambda a, b: rows.slice(row, a, b))
    return grown


def answer_segments(model: Model, ids: list[int]) -> list[Text]:
    return [model.chat.answer(ids)] if ids else []


def embed(model: Model, segments: Sequence[Text | Picture]) -> tuple[Tensor, Tensor | None]:
    """Embeddings [T, H], and bool [T] of those that the image gate routes; None: no such one."""
    embeddings = torch.cat(
        [
            model.project(segment.features.tokens[0])
            if isinstance(segment, Picture)
            else model.language_model.embed(torch.tensor(segment.ids, device=model.device))
            for segment in segments
        ]
    )
    gate = [isinstance(s, Picture) and not s.drawn for s in segments for _ in range(s.length)]
    return embeddings, torch.tensor(gate, device=embeddings.device) if any(gate) else None


def _remember(
    model: Model, keys: list[bytes], new: tuple | list, begin: int, read: Callable[[int, int], KeyValues]
) -> None:
    """Put the keys and values of the last segments into the prefix cache."""
    if not model.prefix_cache.limit:
        return
    entries = []
    for segment in new:
        entries.append(read(begin, begin + segment.length))
        begin += segment.length
    model.prefix_cache.store(keys, entries)


def round_generator(seed: int, purpose: str, planned: Conversation) -> torch.Generator:
    """A private generator of a round: other seeds, purposes and rounds give unrelated streams.

    Along a conversation the prompts grow, along a line of drawings the depth, also where features travel without the
    conversation: so no two rounds of a chain have both in common.
    """
    content = f"{seed % 2**64}/{purpose}/{planned.rounds}/{planned.depth}".encode()
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
    return torch.Generator().manual_seed(number)
