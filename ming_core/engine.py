"""The engine: one model that looks at, draws and edits images, round after round.

The way of a round is `_prefill`, then `write` or `draw`, then `_commit`:

    plan      is the round possible, and what memory does it take? Nothing is computed.
    prefill   forward what the prefix cache does not know of the transcript
    write     text tokens (text_decoder.py), or draw image tokens (image_decoder.py)
    commit    the grown conversation; keys and values of the round go into the prefix cache

Every call owns what it allocates, so stopping it half-way (`on_token` may raise) leaves engine and conversations as
they were; only keys and values of whole segments go into the prefix cache.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import UniVisionConfig
from .conversation import Conversation, Image, Part, Segment, Text, guidance_masks, segment_keys
from .features import Features, to_grid, to_tokens
from .image_decoder import DrawnImages, GuidanceRows, ImageDecoder, KeptTokens
from .kv_cache import DecodeCache, KeyValues
from .mingtok import MingTok
from .offload import nonfinite_error
from .options import ImageOptions, Sampling, TextOptions
from .prefix_cache import PrefixCache
from .prompts import ChatFormat
from .rounds import DrawRequest, ImageResult, OnToken, Options, PrefilledRound, Progress, RoundPlan, TextResult
from .text_decoder import TextDecoder, WrittenText
from .univision import UniVision
from .weights_state import WeightsState

log = logging.getLogger(__name__)

EMPTY_PROMPT = "the prompt is empty: write what the model is to do"
BATCH = 16  # images drawn in one pass by `generate_batch`: more cost memory and gain little


class Engine:
    """A Ming-UniVision ready to run.

    network       the weights (univision.UniVision)
    chat          text tokenizer and chat template; None for a network that is only trained or measured
    fingerprint   identifies the weights; the loader sets it
    prefix_cache  keys and values of past transcripts; `prefix_cache.clear()` frees them
    """

    def __init__(self, network: UniVision, chat: ChatFormat | None = None, fingerprint: str = "") -> None:
        self.network, self._chat, self.fingerprint = network, chat, fingerprint
        self.prefix_cache = PrefixCache()
        self._weights = WeightsState(network.language_model, network.linear_proj)  # what keys and values depend on

    @property
    def chat(self) -> ChatFormat:
        if self._chat is None:
            raise ValueError("this engine has no text tokenizer: load the model from its checkpoint folder")
        return self._chat

    @property
    def config(self) -> UniVisionConfig:
        return self.network.config

    @property
    def mingtok(self) -> MingTok:
        return self.network.mingtok

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def weights_key(self) -> bytes:
        """Identifies the weights as they are now; keys of the prefix cache begin with it."""
        return self.fingerprint.encode() + self._weights.key()

    @property
    def image_tokens(self) -> int:
        """Positions that a drawn image takes: `<image>` and the image tokens."""
        return 1 + self.config.llm_config.num_image_tokens_for_gen

    # --- Rounds in one call ---------------------------------------------------------------------------------------

    def understand(
        self,
        conversation: Conversation,
        prompt: str,
        *,
        features: Features | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        seed: int = 0,
        on_token: OnToken = None,
        return_logits: bool = False,
    ) -> TextResult:
        """One round that answers in text.

        conversation  what was said so far; `Conversation()` for the first round
        features      images that the round is about: attached to the prompt unless they are the newest in view
        on_token      called after every token and between parts of a long prompt; raise from it to stop, which loses
                      nothing but this round
        The others are those of `TextOptions`.

        Raises ValueError for a blank prompt, images or a conversation of another model, or a transcript that would
        exceed the model's positions; RuntimeError where fp16 is too narrow for the model.
        """
        options = TextOptions(max_new_tokens, sampling or Sampling(), seed, return_logits)
        return self.write(self.plan(conversation, prompt, options, features), on_token)

    def generate_image(
        self, conversation: Conversation, prompt: str, *, seed: int = 0, noise: Tensor | None = None, **options: Any
    ) -> ImageResult:
        """One round that draws one image: `generate_images` with one seed, and noise float32 [tokens, C]."""
        noises = None if noise is None else noise[None]
        return self.generate_images(conversation, prompt, seeds=[seed], noise=noises, **options)[0]

    def generate_images(
        self,
        conversation: Conversation,
        prompt: str,
        *,
        seeds: Sequence[int],
        features: Features | None = None,
        on_token: OnToken = None,
        **options: Any,
    ) -> list[ImageResult]:
        """One round that draws, an image a seed, all in one pass over the weights: one result a seed.

        On a conversation without an image in view this is text to image, else an edit. `options` are those of
        `ImageOptions`; None stands for a default. The others, and the errors, are as in `understand`; RuntimeError
        when the model decides not to draw.
        """
        given = {name: value for name, value in options.items() if value is not None}
        return self.draw(self.plan(conversation, prompt, ImageOptions(tuple(seeds), **given), features), on_token)

    # --- Plan -----------------------------------------------------------------------------------------------------

    def plan(
        self, conversation: Conversation, prompt: str, options: Options, features: Features | None = None
    ) -> RoundPlan[Options]:
        """Check a round, and count its memory, before anything is computed. Raises ValueError; see `understand`."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(EMPTY_PROMPT)
        if conversation.model not in ("", self.fingerprint):
            raise ValueError(
                f"this conversation belongs to another model ({conversation.model[:12]}) than this one "
                f"({self.fingerprint[:12]}): continue it with the model that began it"
            )
        limit, new = self.config.llm_config.max_position_embeddings, options.max_new_tokens
        if self.chat.exceeds(prompt, limit):
            raise ValueError(
                f"too long: the prompt of {len(prompt)} characters takes more than this model's {limit} positions; "
                "shorten the prompt"
            )
        attached = self._attached(conversation, features)
        part = self.chat.prompt([attached, prompt] if attached else [prompt])
        transcript = conversation.extended(part, self.fingerprint)
        if isinstance(options, ImageOptions):
            new += self.image_tokens
        if transcript.length + new > limit:
            raise ValueError(
                f"too long: {conversation.length} tokens of conversation, {part.length} of prompt and up to {new} to "
                f"come are {transcript.length + new}, and this model has {limit} positions; shorten the prompt, lower "
                "max_new_tokens, or begin a new conversation"
            )
        if isinstance(options, ImageOptions):
            self._kept_tokens(transcript, options)  # a mask that does not fit is refused now
        return RoundPlan(transcript, options, self._working_memory(transcript.length, options))

    def _attached(self, conversation: Conversation, features: Features | None) -> list[Image]:
        """The images to attach: what a round is given is what it is about, so it must be the newest in view.

        They are attached unless they are the newest already, in this order.
        """
        if features is None:
            return []
        self.mingtok.check_features(features)
        given = features.split()
        if conversation.ends_with(given):
            log.info("the picture is the newest in view already and not attached again")
            return []
        return [Image(image.copied(), drawn=False) for image in given]

    def _kept_tokens(self, transcript: Conversation, options: ImageOptions) -> KeptTokens | None:
        """The tokens of the newest image in view that the mask keeps; None without a mask. Raises ValueError."""
        if options.mask is None:
            return None
        if not transcript.images:
            raise ValueError(
                "a mask keeps parts of a picture, and no picture is in view: connect features or a conversation that "
                "shows one, or disconnect the mask"
            )
        source, grid = transcript.images[-1].features, self.config.drawing_grid
        if source.grid != grid:
            raise ValueError(
                f"the picture to keep parts of is {source.grid[0]}x{source.grid[1]} tokens, and the model draws "
                f"{grid[0]}x{grid[1]}: encode it with detail standard"
            )
        latents = to_tokens(source.latents.float()).expand(len(options.seeds), -1, -1)
        return KeptTokens(~options.open_tokens(grid), latents)

    def _working_memory(self, length: int, options: TextOptions | ImageOptions) -> int:
        """Bytes that a round on a transcript of this length takes beside the weights, at most."""
        language_model = self.network.language_model
        if isinstance(options, TextOptions):
            return language_model.working_memory(length, 1, options.max_new_tokens)
        # three guidance rows an image, and the row of those that goes on to the text after it
        images, new = len(options.seeds), 2 * options.max_new_tokens + self.image_tokens
        drawing = language_model.working_memory(length, 4 * images, new)
        return drawing + self.mingtok.working_memory(images, self.config.llm_config.num_image_tokens_for_gen)

    # --- Run ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, plan: RoundPlan[TextOptions], on_token: OnToken = None) -> TextResult:
        """Run a round that answers in text. on_token: see `understand`."""
        options = plan.options
        prefilled = self._prefill(plan.transcript, on_token)
        # a single row that continues the prompt; the prompt's keys and values are not copied
        cache = DecodeCache(prefilled.cache, capacity=options.max_new_tokens)
        generator = round_generator(options.seed, "text", plan.transcript)
        decoder = self._text_decoder(options, options.sampling, generator, on_token)
        written = decoder.write(cache, prefilled.hidden[None], stop={self._end}, forbidden=self.chat.image_open_id)[0]
        conversation = self._commit(prefilled, self._answer(written.ids, len(written.ids) - 1), cache, 0)
        text = self.chat.decode(written.ids)
        truncated = written.ids[-1] != self._end
        return TextResult(text, written.ids, conversation, prefilled.prefilled, written.stacked_logits(), truncated)

    @torch.no_grad()
    def draw(self, plan: RoundPlan[ImageOptions], on_token: OnToken = None) -> list[ImageResult]:
        """Run a round that draws, an image a seed. on_token: see `generate_images`."""
        options = plan.options
        noise = self._noise(options.seeds, options.noise, plan.transcript) * options.temperature
        prefilled = self._prefill(plan.transcript, on_token)
        decoder = self._text_decoder(options, Sampling(), None, on_token)
        start, before = self._begin_image(prefilled, options.start, decoder)

        # every image has the same guidance rows, all on the one prefilled prompt
        masks = guidance_masks(prefilled.transcript.parts)
        rows = GuidanceRows.of(options.guidance, len(masks), options.solver.renorm)
        images = len(options.seeds)
        cache = start.fork(images * rows.per_image, start.length + noise.shape[1], masks[rows.used].repeat(images, 1))
        kept = self._kept_tokens(plan.transcript, options)
        image_decoder = ImageDecoder(self.network, cache, rows, noise, options.solver, kept)
        return self._draw_rows([prefilled] * images, image_decoder, before, decoder, on_token)

    @torch.no_grad()
    def generate_batch(self, requests: Sequence[DrawRequest], options: ImageOptions | None = None) -> list[ImageResult]:
        """Many drawing rounds in few passes over the weights, each with a past of its own: one result a request.

        `options` hold for all; their `seeds`, `noise` and `start` do not count. What `generate_image` gives for each
        request alone, up to rounding, and the same errors.
        """
        options = options or ImageOptions()
        waiting: dict[int, tuple[PrefilledRound, Tensor]] = {}  # by number of the request, with its guidance masks
        results: dict[int, ImageResult] = {}

        def draw_alike(masks: int) -> None:
            """Draw the waiting rounds that have this number of guidance masks."""
            numbers = [i for i, (_, found) in waiting.items() if len(found) == masks]
            rounds = [waiting.pop(i) for i in numbers]
            drawn = self._draw_different([requests[i] for i in numbers], rounds, options)
            results.update(zip(numbers, drawn, strict=True))

        for i, request in enumerate(requests):
            plan = self.plan(request.conversation, request.prompt, options, request.features)
            masks = guidance_masks(plan.transcript.parts)
            waiting[i] = self._prefill(plan.transcript), masks
            if sum(len(found) == len(masks) for _, found in waiting.values()) == BATCH:
                draw_alike(len(masks))
        for masks_left in {len(found) for _, found in waiting.values()}:
            draw_alike(masks_left)
        return [results[i] for i in range(len(requests))]

    def _draw_different(
        self, requests: list[DrawRequest], rounds: list[tuple[PrefilledRound, Tensor]], options: ImageOptions
    ) -> list[ImageResult]:
        """Rounds with equally many guidance masks, all at once.

        Their pasts stand one behind the other in one prefix, of which each row sees its own, from position 0 on.
        """
        rows = GuidanceRows.of(options.guidance, len(rounds[0][1]), options.solver.renorm)
        noise = [
            self._noise((request.seed,), None if request.noise is None else request.noise[None], past.transcript)
            for request, (past, _) in zip(requests, rounds, strict=True)
        ]
        length = sum(past.cache.length for past, _ in rounds)
        prefix = self.network.language_model.new_cache(length)
        visible = torch.zeros(len(rounds) * rows.per_image, length, dtype=torch.bool)
        for k, (past, masks) in enumerate(rounds):
            own = slice(prefix.length, prefix.length + past.cache.length)
            # everything outside a row's own past stays hidden from it
            visible[k * rows.per_image : (k + 1) * rows.per_image, own] = masks[rows.used]
            prefix.extend(past.cache.slice(0, past.cache.length))
        cache = DecodeCache(prefix, noise[0].shape[1], len(visible), visible)
        image_decoder = ImageDecoder(self.network, cache, rows, torch.cat(noise) * options.temperature, options.solver)
        before = WrittenText([self.config.llm_config.image_start_token])
        decoder = self._text_decoder(options, Sampling(), None, None)
        return self._draw_rows([past for past, _ in rounds], image_decoder, before, decoder)

    # --- Steps of a round -----------------------------------------------------------------------------------------

    def _prefill(self, transcript: Conversation, on_token: OnToken = None) -> PrefilledRound:
        """Forward what the prefix cache does not know; the last segment always, since its hidden state is needed."""
        segments = transcript.segments
        weights = self.weights_key()
        keys = segment_keys(segments, weights)
        cache = self.network.language_model.new_cache(transcript.length)
        known = self.prefix_cache.lookup(keys[:-1])  # the longest run of leading segments that was computed before
        for entry in known:
            cache.extend(entry)
        new, begin = segments[len(known) :], cache.length
        embeddings, image_gate = self._embed(new)

        def on_chunk(done: int) -> None:
            if on_token:
                on_token(Progress("prompt", done, len(embeddings)))

        hidden = self.network.language_model.prefill(embeddings, cache, image_gate, on_chunk)
        if not hidden.isfinite().all():
            raise nonfinite_error(hidden.dtype)
        self._remember(keys, new, begin, cache.slice)
        return PrefilledRound(transcript, cache, hidden, len(embeddings), weights)

    def _embed(self, segments: Sequence[Segment]) -> tuple[Tensor, Tensor | None]:
        """Embeddings [T, H], and bool [T] of those for the image router; None: no such one."""
        embeddings = torch.cat(
            [
                self.network.project(segment.features.tokens[0])
                if isinstance(segment, Image)
                else self.network.language_model.embed(torch.tensor(segment.ids, device=self.device))
                for segment in segments
            ]
        )
        gate = [isinstance(s, Image) and not s.drawn for s in segments for _ in range(s.length)]
        return embeddings, torch.tensor(gate, device=embeddings.device) if any(gate) else None

    def _text_decoder(
        self,
        options: TextOptions | ImageOptions,
        sampling: Sampling,
        generator: torch.Generator | None,
        on_token: OnToken,
    ) -> TextDecoder:
        return TextDecoder(
            self.network.language_model,
            self.chat,
            options.max_new_tokens,
            sampling,
            generator,
            on_token,
            options.return_logits,
        )

    def _begin_image(
        self, prefilled: PrefilledRound, start: str, decoder: TextDecoder
    ) -> tuple[DecodeCache, WrittenText]:
        """A single row that stands before its `<image>`, and what it emitted, `<image>` included."""
        image = self.config.llm_config.image_start_token
        cache = DecodeCache(prefilled.cache, capacity=decoder.limit)
        if start == "draw now":
            logits = [self.network.language_model.logits(prefilled.hidden).cpu()] if decoder.keep_logits else []
            return cache, WrittenText([image], logits)
        before = decoder.write(cache, prefilled.hidden[None], stop={self._end, image})[0]
        if before.ids[-1] == image:
            return cache, before
        said = self.chat.decode(before.ids)
        if before.ids[-1] == self._end:
            raise RuntimeError(
                f'the model answered in words and drew no picture: "{said}". Set start to "draw now" to have it draw'
            )
        raise RuntimeError(
            f'the model has not begun a picture in {decoder.limit} tokens: "{said}". Raise max_new_tokens, or set '
            'start to "draw now" to have it draw'
        )

    def _draw_rows(
        self,
        rounds: list[PrefilledRound],
        images: ImageDecoder,
        before: WrittenText,
        decoder: TextDecoder,
        on_token: OnToken = None,
    ) -> list[ImageResult]:
        """Draw an image for each round (which may be one round several times), write what follows, and commit.

        before: what was emitted so far, `<image>` included, in every round alike.
        """
        drawn = images.draw(on_token)
        # the conditional rows alone write the text that follows
        conditional = list(range(0, images.cache.rows, images.rows.per_image))
        # what is pending goes through these rows only: nobody asks the others for anything any more
        room = images.cache.length + images.pending.shape[1] + decoder.limit
        cache = images.cache.select(conditional, room)
        hidden = self.network.language_model.decode(images.pending[conditional], cache)[:, -1]
        features = self._drawn_features(drawn, [past.transcript.depth for past in rounds])
        after = decoder.write(
            cache, hidden, stop={self._end}, forbidden=self.chat.image_open_id, written=len(before.ids) - 1
        )
        results = []
        for row, (past, image, said) in enumerate(zip(rounds, features, after, strict=True)):
            generated: list[Segment] = [
                *self._answer(before.ids, len(before.ids)),
                Image(image, drawn=True),
                *self._answer(said.ids, len(said.ids) - 1),
            ]
            conversation = self._commit(past, generated, cache, row)
            written = before + said
            text, logits = self.chat.decode(written.ids), written.stacked_logits()
            truncated = written.ids[-1] != self._end
            results.append(ImageResult(text, written.ids, conversation, past.prefilled, logits, truncated, image))
        return results

    def _drawn_features(self, drawn: DrawnImages, depths: Iterable[int]) -> list[Features]:
        """The drawn images, each with memory of its own; `depths`: those of what was in view of each."""
        grid = self.config.drawing_grid
        latents, tokens = to_grid(drawn.latents.cpu(), grid), drawn.tokens.float().cpu()
        if not (latents.isfinite().all() and tokens.isfinite().all()):
            raise nonfinite_error(self.dtype, "lower guidance and temperature if they are extreme; else ")
        return [
            Features(tokens[i : i + 1], latents[i : i + 1], grid, self.mingtok.fingerprint, depth + 1).copied()
            for i, depth in enumerate(depths)
        ]

    def _commit(
        self, prefilled: PrefilledRound, generated: Sequence[Segment], cache: DecodeCache, row: int
    ) -> Conversation:
        """The conversation with the generated part, whose keys and values `row` of the cache holds."""
        conversation = prefilled.transcript.extended(Part(True, tuple(generated)), self.fingerprint)
        keys = segment_keys(conversation.segments, prefilled.weights)
        self._remember(keys, generated, 0, lambda start, end: cache.slice(row, start, end))
        return conversation

    def _remember(
        self, keys: list[bytes], new: Sequence[Segment], begin: int, read: Callable[[int, int], KeyValues]
    ) -> None:
        """Put the keys and values of the last segments into the prefix cache."""
        if not self.prefix_cache.limit:
            return
        entries = []
        for segment in new:
            entries.append(read(begin, begin + segment.length))
            begin += segment.length
        self.prefix_cache.store(keys, entries)

    def _answer(self, emitted: list[int], forwarded: int) -> list[Text]:
        """The segment of emitted tokens, of which the first `forwarded` went through the language model; if any did."""
        return [self.chat.answer(emitted, forwarded)] if forwarded else []

    @property
    def _end(self) -> int:
        return self.config.llm_config.eos_token_id

    def _noise(self, seeds: Sequence[int], given: Tensor | None, transcript: Conversation) -> Tensor:
        """float32 [B, N, C] on the CPU: the given noise, checked, or that of (seed, round)."""
        tokens, channels = self.config.llm_config.num_image_tokens_for_gen, self.network.flow_head.net.channels
        if given is None:
            draws = [
                torch.randn(tokens, channels, generator=round_generator(seed, "image", transcript)) for seed in seeds
            ]
            return torch.stack(draws)
        if given.ndim != 3 or len(given) != len(seeds):
            raise ValueError(
                f"noise is {tuple(given.shape)}: give ({len(seeds)}, {tokens}, {channels}), an image a seed"
            )
        if given.shape[1] not in (tokens, tokens + 1) or given.shape[2] != channels:
            raise ValueError(f"noise is {tuple(given.shape[1:])} an image: give ({tokens}, {channels})")
        if not given.isfinite().all():
            raise ValueError("noise contains NaN or infinite values: give finite ones")
        return given[:, :tokens].float().cpu()


def round_generator(seed: int, purpose: str, transcript: Conversation) -> torch.Generator:
    """A private generator of a round: other seeds, purposes and rounds give unrelated streams.

    Along a conversation the prompts grow, along a line of drawings the depth, also where features travel without the
    conversation: so no two rounds of a chain have both in common.
    """
    content = f"{seed % 2**64}/{purpose}/{transcript.rounds}/{transcript.depth}".encode()
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
    return torch.Generator().manual_seed(number)
