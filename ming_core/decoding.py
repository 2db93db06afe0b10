"""The two loops: text tokens and image tokens.

Both go over `Rows` that continue one prefilled prefix. For a picture, each seed has two or three guidance rows that
share the prefix and see different parts of it; the head turns their hidden states into one latent, the semantic
decoder expands it, and all rows take the same feature as their next token. Pixels appear nowhere here.

Every call owns what it allocates, so stopping it half-way (`on_token` may raise) leaves model and conversations as
they were; only keys and values that are whole go into the prefix cache.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .captured import Captured, recorder
from .config import UniVisionConfig
from .conversation import Conversation, Part, Picture, Text, guidance_views, segment_keys
from .features import Features, to_grid
from .flow_head import FlowHead, Guidance, Sampler, Solver
from .language_model import KeyValues, LanguageModel, Prefix, Rows
from .mingtok import MingTok
from .placement import out_of_range
from .prefix_cache import PrefixCache
from .prompts import ChatFormat, TextStream

log = logging.getLogger(__name__)

STARTS = ("draw now", "model decides")
EMPTY_PROMPT = "the prompt is empty: write what the model is to do"
COLDEST = 1e-30  # a temperature below is taken as this one: in float32 it would be 0
NO_TOKEN = -1  # chosen where the logits are no numbers


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
class Sampling:
    """How text tokens are chosen: the most likely one at temperature 0, else drawn from the nucleus of mass top_p."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"sampling.temperature is {self.temperature}: give a number of 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}: give a number above 0 and at most 1")


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


@dataclass(frozen=True)
class Turn:
    """What a round gave.

    text          the words, without special tokens
    token_ids     all that was emitted, end token included; a picture counts as its `<image>`
    features      the drawn picture (batch 1), None for a round of text
    conversation  the conversation with this round
    prefilled     positions that were forwarded before the first token could be emitted
    logits        float32 [len(token_ids), vocabulary] in host memory, when asked for
    """

    text: str
    token_ids: list[int]
    features: Features | None
    conversation: Conversation
    prefilled: int
    logits: Tensor | None = None


OnToken = Callable[[Progress], None] | None


def understand(
    model: Model,
    conversation: Conversation,
    prompt: str,
    features: Features | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    on_token: OnToken,
    return_logits: bool,
) -> Turn:
    """See UniVision.understand."""
    with torch.no_grad():
        grown = plan_round(model, conversation, prompt, features, max_new_tokens, max_new_tokens)
        opened = open_round(model, grown, on_token)
        rows = Rows(opened.prefix, capacity=max_new_tokens)
        generator = _generator(seed, "text", opened)
        writer = _Writer(model, max_new_tokens, sampling, generator, on_token, return_logits)
        written = writer.write(rows, opened.hidden[None], forbidden=model.chat.image_open_id)[0]
        segments = answer_segments(model, written.ids[:-1])
        grown = close_round(model, opened, segments, rows, 0)
        text = model.chat.decode(written.ids)
        return Turn(text, written.ids, None, grown, opened.prefilled, written.stacked_logits())


def draw(
    model: Model,
    conversation: Conversation,
    prompt: str,
    features: Features | None,
    seeds: list[int],
    guidance: Guidance,
    solver: Solver,
    temperature: float,
    start: str,
    max_new_tokens: int,
    noise: Tensor | None,
    on_token: OnToken,
    return_logits: bool,
) -> list[Turn]:
    """See UniVision.generate_images."""
    if start not in STARTS:
        raise ValueError(f"start is {start!r}: give one of {STARTS}")
    if not seeds:
        raise ValueError("no seed: give one for every picture that is to be drawn")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}: give a number of 0 or more")
    room = drawing_room(model, max_new_tokens)
    with torch.no_grad():
        opened = open_round(model, plan_round(model, conversation, prompt, features, room, max_new_tokens), on_token)
        noise = seeded_noise(model, seeds, noise, opened) * temperature
        writer = _Writer(model, max_new_tokens, Sampling(), None, on_token, return_logits)

        single, before = _begin_picture(model, opened, start, writer)
        pictures, rows, hidden = _draw_pictures(
            model, opened, single, noise, guidance, solver, on_token, max_new_tokens
        )
        after = writer.write(rows, hidden, forbidden=model.chat.image_open_id, written=len(before.ids) - 1)

        turns = []
        for row, (picture, said) in enumerate(zip(pictures, after, strict=True)):
            segments = [
                *answer_segments(model, before.ids),
                Picture(picture, drawn=True),
                *answer_segments(model, said.ids[:-1]),
            ]
            grown = close_round(model, opened, segments, rows, row)
            whole = _Written(before.ids + said.ids, before.logits + said.logits)
            text, logits = model.chat.decode(whole.ids), whole.stacked_logits()
            turns.append(Turn(text, whole.ids, picture, grown, opened.prefilled, logits))
        return turns


@dataclass
class _Written:
    """Tokens that one row emitted, and their logits when they are kept."""

    ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def stacked_logits(self) -> Tensor | None:
        return torch.stack(self.logits) if self.logits else None


@dataclass
class Round:
    """A round whose prompt has been prefilled."""

    conversation: Conversation  # with the prompt, without the answer
    prefix: Prefix
    hidden: Tensor  # [H], of the prompt's last token
    prefilled: int

    @property
    def depth(self) -> int:
        """How many drawings lie behind what is in view."""
        return self.conversation.depth


def plan_round(
    model: Model, conversation: Conversation, prompt: str, features: Features | None, room: int, max_new_tokens: int
) -> Conversation:
    """The conversation with the pictures and the prompt of a round, of which nothing is computed yet.

    room: tokens that the round may add. Raises ValueError for all that a round refuses; see UniVision.understand.
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
    if grown.length + room > limit:
        raise ValueError(
            f"too long: {conversation.length} tokens of conversation, {part.length} of prompt and up to {room} to come "
            f"are {grown.length + room}, and this model has {limit} positions; shorten the prompt, lower "
            "max_new_tokens, or begin a new conversation"
        )
    return grown


def drawing_room(model: Model, max_new_tokens: int) -> int:
    """Tokens that a round with a picture may add: text, `<image>` and the image tokens."""
    return max_new_tokens + 1 + model.config.llm_config.num_image_tokens_for_gen


def open_round(model: Model, grown: Conversation, on_token: OnToken = None) -> Round:
    """Prefill what the prefix cache does not know of a planned round."""
    prefix, hidden, prefilled = _prefill(model, grown, on_token)
    return Round(grown, prefix, hidden, prefilled)


def _attached(model: Model, conversation: Conversation, features: Features | None) -> list[Picture]:
    """The pictures of `features` that are not in view yet."""
    if features is None:
        return []
    model.mingtok.check(features)
    new = [picture for picture in features.pictures() if not conversation.shows(picture)]
    if len(new) < features.batch:
        log.info(
            "%d of %d pictures are in view already and not attached again", features.batch - len(new), features.batch
        )
    return [Picture(picture, drawn=False) for picture in new]


def _prefill(model: Model, conversation: Conversation, on_token: OnToken = None) -> tuple[Prefix, Tensor, int]:
    """Keys and values of a whole transcript, the last hidden state, and how many positions had to be forwarded.

    The last segment is always forwarded, since its hidden state is needed.
    """
    segments = conversation.segments
    keys = segment_keys(segments)
    prefix = model.language_model.prefix(conversation.length)
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
    return prefix, hidden, len(embeddings)


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


def close_round(model: Model, opened: Round, segments: list, rows: Rows, row: int) -> Conversation:
    """The conversation with the generated part, whose keys and values one of the rows holds."""
    grown = opened.conversation.extended(Part(True, tuple(segments)), model.fingerprint)
    _remember(model, segment_keys(grown.segments), segments, 0, lambda a, b: rows.slice(row, a, b))
    return grown


def answer_segments(model: Model, ids: list[int]) -> list[Text]:
    return [model.chat.answer(ids)] if ids else []


class _Writer:
    """The text loop: one token a step for every row, until its end token or the limit."""

    def __init__(
        self,
        model: Model,
        limit: int,
        sampling: Sampling,
        generator: torch.Generator | None,
        on_token: OnToken,
        keep_logits: bool,
    ) -> None:
        self.model, self.limit, self.sampling, self.generator = model, limit, sampling, generator
        self.on_token, self.keep_logits = on_token, keep_logits
        self.stream = TextStream(model.chat)  # what the first row says before a picture and after it

    def write(
        self, rows: Rows, hidden: Tensor, *, forbidden: int | None = None, stop: int | None = None, written: int = 0
    ) -> list[_Written]:
        """Emit tokens in every row, from the hidden states [rows, H] of the tokens before.

        forbidden  a token that is never chosen
        stop       a token that ends a row like the end token does (both are emitted, neither is forwarded)
        written    tokens that count against the limit already
        """
        language_model, ends = self.model.language_model, {self.model.config.llm_config.eos_token_id, stop}
        out = [_Written() for _ in range(rows.rows)]
        open_rows = set(range(rows.rows))
        for count in range(written + 1, self.limit + 1):
            logits = language_model.logits(hidden)
            chosen = self._choose(logits, forbidden)
            for row in sorted(open_rows):
                out[row].ids.append(chosen[row])
                if self.keep_logits:
                    out[row].logits.append(logits[row].cpu())
                if chosen[row] in ends:
                    open_rows.discard(row)
            if self.on_token:
                text = self.stream.push(chosen[0]) if len(out[0].ids) == count - written else self.stream.text
                self.on_token(Progress("text", count, self.limit, text))
            if not open_rows or count == self.limit:
                break
            hidden = language_model.step(language_model.embed(torch.tensor(chosen, device=hidden.device)), rows)
        return out

    def _choose(self, logits: Tensor, forbidden: int | None) -> list[int]:
        if forbidden is not None:
            logits = logits.clone()
            logits[:, forbidden] = float("-inf")
        best = logits.amax(-1, keepdim=True)
        if self.sampling.temperature == 0:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            # drawn on the CPU, so that a seed means the same everywhere; rows of no numbers are drawn from too, for now
            best = best.cpu()
            warmth = max(self.sampling.temperature, COLDEST)
            shares = ((logits.cpu() - best) / warmth).softmax(-1).nan_to_num(1)
            shares, order = shares.sort(dim=-1, descending=True)
            shares[shares.cumsum(-1) - shares >= self.sampling.top_p] = 0
            chosen = order.gather(1, torch.multinomial(shares, 1, generator=self.generator))
        ids = chosen.where(best.isfinite(), NO_TOKEN)[:, 0].tolist()
        if NO_TOKEN in ids:
            raise out_of_range(self.model.language_model.dtype)
        return ids


def _begin_picture(model: Model, opened: Round, start: str, writer: _Writer) -> tuple[Rows, _Written]:
    """A single row that stands before its `<image>`, and what it emitted, `<image>` included."""
    image = model.config.llm_config.image_start_token
    single = Rows(opened.prefix, capacity=writer.limit)
    if start == "draw now":
        logits = [model.language_model.logits(opened.hidden).cpu()] if writer.keep_logits else []
        return single, _Written([image], logits)
    before = writer.write(single, opened.hidden[None], stop=image)[0]
    if before.ids[-1] != image:
        said = model.chat.decode(before.ids)
        raise RuntimeError(
            f'the model answered in words and drew no picture: "{said}". Set start to "draw now" to have it draw'
        )
    return single, before


def _draw_pictures(
    model: Model,
    opened: Round,
    single: Rows,
    noise: Tensor,
    guidance: Guidance,
    solver: Solver,
    on_token: OnToken,
    max_new_tokens: int,
) -> tuple[list[Features], Rows, Tensor]:
    """The pictures of one prompt. noise [B, N, C].

    Returns them, the rows that saw everything (one a picture, ready to go on), and their hidden states [B, H] after the
    last image token.
    """
    batch, n, _ = noise.shape
    views = guidance_views(opened.conversation.parts)
    guided = Guided.by(guidance, len(views), solver.renorm)
    rows = single.fork(batch * guided.rows, single.length + n, views[guided.used].repeat(batch, 1))
    latents, tokens, x = draw_latents(model, rows, guided, noise, solver, on_token)
    rows = rows.select([b * guided.rows for b in range(batch)], rows.length + 1 + max_new_tokens)
    hidden = model.language_model.step(x[:: guided.rows], rows)  # the conditional rows alone write the text to come
    return drawn_features(model, latents, tokens, opened.depth), rows, hidden


class Guided(NamedTuple):
    """Which guidance rows a drawing runs: those whose factor is not 0, and the first, which goes on to the text."""

    used: list[int]  # of [c], [c, u] or [c, u, t]
    factors: tuple[float, ...]  # of the last ones' velocities: only the first row's may be left out, being 0

    @classmethod
    def by(cls, guidance: Guidance, views: int, renorm: bool = False) -> Guided:
        """`renorm`: the solver needs the first row's velocity, even one that counts 0 times."""
        factors = guidance.factors(views)
        used = [i for i, f in enumerate(factors) if i == 0 or f != 0]
        return cls(used, tuple(factors[i] for i in used if factors[i] != 0 or renorm))

    @property
    def rows(self) -> int:
        return len(self.used)


def draw_latents(
    model: Model, rows: Rows, guided: Guided, noise: Tensor, solver: Solver, on_token: OnToken = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The image loop. noise [B, N, C]; `rows` stand before `<image>`, guided.rows of them a picture.

    Returns normalised latents [B, N, C], semantic tokens [B, N, D], and the embedding of the last token in every row
    [B * guided.rows, H], which was not forwarded.
    """
    language_model, flow_head = model.language_model, model.flow_head
    llm, (batch, n, _) = model.config.llm_config, noise.shape
    stream = model.mingtok.stream(batch, n)
    steps = solver.steps or model.config.vishead_diffloss_config.steps
    make = {"device": model.device, "dtype": language_model.dtype}
    sampler = Sampler(flow_head.net, guided.factors, steps, solver, **make)

    noise = noise.to(model.device)
    latents = torch.empty_like(noise)
    tokens = noise.new_empty(batch, n, model.mingtok.config.semantic_decoder.embed_dim)
    x = language_model.embed(torch.full((batch * guided.rows,), llm.image_start_token, device=model.device))

    def condition(x: Tensor) -> tuple[Tensor]:
        z = flow_head.vis_head(language_model.step(x, rows))
        return (z.unflatten(0, (batch, guided.rows))[:, -len(guided.factors) :],)

    def flow(z: Tensor, noise: Tensor) -> tuple[Tensor]:
        return (sampler.draw(z, noise),)

    def expand(latent: Tensor) -> tuple[Tensor, Tensor]:
        token = stream.append(latent[:, None])[:, 0]
        return token, model.project(token).repeat_interleave(guided.rows, dim=0)

    record = recorder(model.device, language_model, flow_head, model.mingtok.semantic_decoder, model.linear_proj)
    language_record = record if record and not language_model.waits(x) else None
    if record:
        stream.buffers.fix()
    if language_record:
        rows.buffers.fix()
    conditioned = Captured(condition, language_record)
    drawn, expanded = Captured(flow, record), Captured(expand, record)
    for i in range(n):
        (z,) = conditioned(x)
        (latents[:, i],) = drawn(z, noise[:, i])
        tokens[:, i], x = expanded(latents[:, i])
        rows.buffers.advance()
        stream.buffers.advance()
        if record and latents.is_cuda:  # else the GPU would be given tokens far ahead of the one to stop at
            torch.cuda.current_stream(latents.device).synchronize()
        if on_token:
            on_token(Progress("image", i + 1, n, latents=latents[:, : i + 1], tokens=tokens[:, : i + 1]))
    rows.buffers.unfix()
    return latents, tokens, x


def drawn_features(model: Model, latents: Tensor, tokens: Tensor, depth: int) -> list[Features]:
    """What was drawn, [B, N, C] and [B, N, D], as pictures; `depth`: that of what was in view."""
    grid = model.config.drawing_grid
    latents, tokens = to_grid(latents.cpu(), grid).contiguous(), tokens.float().cpu()
    if not (latents.isfinite().all() and tokens.isfinite().all()):
        raise out_of_range(model.language_model.dtype)
    everything = Features(tokens, latents, grid, model.mingtok.fingerprint, depth + 1)
    return [_own(picture) for picture in everything.pictures()]


def _own(features: Features) -> Features:
    """With memory of its own: a picture must not keep its whole batch alive."""
    return features._replace(tokens=features.tokens.clone(), latents=features.latents.clone())


def seeded_noise(model: Model, seeds: list[int], given: Tensor | None, opened: Round) -> Tensor:
    """float32 [B, N, C] on the CPU: the given noise, checked, or that of (seed, round)."""
    n = model.config.llm_config.num_image_tokens_for_gen
    channels = model.flow_head.net.channels
    if given is None:
        draws = [torch.randn(n, channels, generator=_generator(seed, "image", opened)) for seed in seeds]
        return torch.stack(draws)
    if given.shape[0] != len(seeds):
        raise ValueError(f"noise is given for {given.shape[0]} pictures: give that of {len(seeds)}, one a seed")
    if given.ndim != 3 or given.shape[1] not in (n, n + 1) or given.shape[2] != channels:
        raise ValueError(f"noise is {tuple(given.shape[1:])} a picture: give ({n}, {channels})")
    return given[:, :n].float().cpu()


def _generator(seed: int, purpose: str, opened: Round) -> torch.Generator:
    """A private generator: other seeds, purposes and rounds give unrelated streams.

    Along a conversation the prompts grow, along a line of drawings the depth, also where features travel without the
    conversation: so no two rounds of a chain have both in common.
    """
    content = f"{seed % 2**64}/{purpose}/{opened.conversation.rounds}/{opened.depth}".encode()
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
    return torch.Generator().manual_seed(number)
