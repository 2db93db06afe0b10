"""The two loops: text tokens and image tokens.

Both go over `Rows` that continue one prefilled prefix. For a picture, each seed has two or three guidance rows that
share the prefix and see different parts of it; the head turns their hidden states into one latent, the semantic
decoder expands it, and all rows take the same feature as their next token. Pixels appear nowhere here.

Every call owns what it allocates, so stopping it half-way (`on_token` may raise) leaves model and conversations as
they were; only keys and values that are whole go into the prefix cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .captured import Loop
from .conversation import Conversation, Picture, guidance_views
from .features import Features, to_grid
from .flow_head import Guidance, Sampler, Solver
from .language_model import Rows
from .placement import out_of_range
from .prompts import TextStream
from .rounds import (
    Model,
    OnToken,
    OpenRound,
    Progress,
    answer_segments,
    close_round,
    open_round,
    plan_round,
    round_generator,
)

STARTS = ("draw now", "model decides")
COLDEST = 1e-30  # a temperature below is taken as this one: in float32 it would be 0
NO_TOKEN = -1  # chosen where the logits are no numbers


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


def understand(
    model: Model,
    conversation: Conversation,
    prompt: str,
    *,
    features: Features | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    on_token: OnToken,
    return_logits: bool,
) -> Turn:
    """See UniVision.understand."""
    with torch.no_grad():
        planned = plan_round(model, conversation, prompt, features, max_new_tokens)
        opened = open_round(model, planned, on_token)
        rows = Rows(opened.prefix, capacity=max_new_tokens)
        generator = round_generator(seed, "text", planned)
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
    *,
    seeds: list[int],
    features: Features | None,
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
    with torch.no_grad():
        planned = plan_round(model, conversation, prompt, features, max_new_tokens, drawing=True)
        noise = seeded_noise(model, seeds, noise, planned) * temperature
        opened = open_round(model, planned, on_token)
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


def _begin_picture(model: Model, opened: OpenRound, start: str, writer: _Writer) -> tuple[Rows, _Written]:
    """A single row that stands before its `<image>`, and what it emitted, `<image>` included."""
    image = model.config.llm_config.image_start_token
    single = Rows(opened.prefix, capacity=writer.limit)
    if start == "draw now":
        logits = [model.language_model.logits(opened.hidden).cpu()] if writer.keep_logits else []
        return single, _Written([image], logits)
    before = writer.write(single, opened.hidden[None], stop=image)[0]
    if before.ids[-1] != image:
        said = model.chat.decode(before.ids)
        if before.ids[-1] == model.config.llm_config.eos_token_id:
            raise RuntimeError(
                f'the model answered in words and drew no picture: "{said}". Set start to "draw now" to have it draw'
            )
        raise RuntimeError(
            f'the model has not begun a picture in {writer.limit} tokens: "{said}". Raise max_new_tokens, or set start '
            'to "draw now" to have it draw'
        )
    return single, before


def _draw_pictures(
    model: Model,
    opened: OpenRound,
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
    return drawn_features(model, latents, tokens, opened.conversation.depth), rows, hidden


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
    language_model, flow_head, mingtok = model.language_model, model.flow_head, model.mingtok
    llm, (batch, n, _) = model.config.llm_config, noise.shape
    stream = mingtok.stream(batch, n)
    steps = solver.steps or model.config.vishead_diffloss_config.steps
    sampler = Sampler(flow_head.net, guided.factors, steps, solver, device=model.device, dtype=language_model.dtype)
    noise = noise.to(model.device)
    latents = torch.empty_like(noise)
    tokens = noise.new_empty(batch, n, mingtok.config.semantic_decoder.embed_dim)
    x = language_model.embed(torch.full((batch * guided.rows,), llm.image_start_token, device=model.device))
    loop = Loop(model.device, language_model, flow_head, mingtok.semantic_decoder, model.linear_proj)

    @loop.step(rows.buffers, waits=language_model.waits(x))
    def condition(x: Tensor) -> tuple[Tensor]:
        z = flow_head.vis_head(language_model.step(x, rows))
        return (z.unflatten(0, (batch, guided.rows))[:, -len(guided.factors) :],)

    @loop.step()
    def flow(z: Tensor, noise: Tensor) -> tuple[Tensor]:
        return (sampler.draw(z, noise),)

    @loop.step(stream.buffers)
    def expand(latent: Tensor) -> tuple[Tensor, Tensor]:
        token = stream.append(latent[:, None])[:, 0]
        return token, model.project(token).repeat_interleave(guided.rows, dim=0)

    with loop:
        for i in range(n):
            (z,) = condition(x)
            (latents[:, i],) = flow(z, noise[:, i])
            tokens[:, i], x = expand(latents[:, i])
            loop.advance()
            if on_token:
                on_token(Progress("image", i + 1, n, latents=latents[:, : i + 1], tokens=tokens[:, : i + 1]))
    return latents, tokens, x


def drawn_features(model: Model, latents: Tensor, tokens: Tensor, depth: int) -> list[Features]:
    """What was drawn, [B, N, C] and [B, N, D], as pictures; `depth`: that of what was in view."""
    grid = model.config.drawing_grid
    latents, tokens = to_grid(latents.cpu(), grid).contiguous(), tokens.float().cpu()
    if not (latents.isfinite().all() and tokens.isfinite().all()):
        raise out_of_range(model.language_model.dtype, "lower guidance and temperature if they are extreme; else ")
    everything = Features(tokens, latents, grid, model.mingtok.fingerprint, depth + 1)
    return [_own(picture) for picture in everything.pictures()]


def _own(features: Features) -> Features:
    """With memory of its own: a picture must not keep its whole batch alive."""
    return features._replace(tokens=features.tokens.clone(), latents=features.latents.clone())


def seeded_noise(model: Model, seeds: list[int], given: Tensor | None, planned: Conversation) -> Tensor:
    """float32 [B, N, C] on the CPU: the given noise, checked, or that of (seed, round)."""
    n = model.config.llm_config.num_image_tokens_for_gen
    channels = model.flow_head.net.channels
    if given is None:
        draws = [torch.randn(n, channels, generator=round_generator(seed, "image", planned)) for seed in seeds]
        return torch.stack(draws)
    if given.ndim != 3 or len(given) != len(seeds):
        raise ValueError(f"noise is {tuple(given.shape)}: give ({len(seeds)}, {n}, {channels}), a picture a seed")
    if given.shape[1] not in (n, n + 1) or given.shape[2] != channels:
        raise ValueError(f"noise is {tuple(given.shape[1:])} a picture: give ({n}, {channels})")
    if not given.isfinite().all():
        raise ValueError("noise holds NaN or infinite values: give finite ones")
    return given[:, :n].float().cpu()
