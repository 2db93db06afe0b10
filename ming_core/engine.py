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

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapters, Lora, adapted
from .checks import check_tensor, described, whole_number
from .config import UniVisionConfig
from .conversation import Conversation, Image, Part, Segment, Text, guidance_masks, segment_keys
from .features import Features, to_grid, to_tokens
from .image_decoder import DrawnImages, GuidanceRows, ImageDecoder, KeptTokens
from .kv_cache import DecodeCache, KeyValues
from .locking import ModelLock, exclusive
from .mingtok import MingTok
from .offload import nonfinite_error
from .options import ImageOptions, Sampling, TextOptions
from .prefix_cache import PrefixCache
from .prompts import ChatFormat
from .rounds import (
    DrawRequest,
    ImageResult,
    NoPictureError,
    OnToken,
    Options,
    PrefilledRound,
    Progress,
    RoundPlan,
    TextResult,
)
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
    adapters      the LoRAs that it computes with; engines with other ones share everything else (`with_lora`)
    """

    def __init__(self, network: UniVision, chat: ChatFormat | None = None, fingerprint: str = "") -> None:
        self.network, self._chat, self.fingerprint = network, chat, fingerprint
        # in host memory, 57 KB a position in bf16: its 1 GiB holds some 18,000 positions
        self.prefix_cache = PrefixCache()
        self._weights = WeightsState(network.language_model, network.linear_proj)  # what keys and values depend on
        self.adapters = Adapters()

    def with_lora(self, file: str | Path | Lora, strength: float = 1.0) -> Engine:
        """This model with one more LoRA; this engine stays as it is, and both share weights and prefix cache.

        file      a safetensors file with the keys of this pack, of PEFT or of kohya's scripts (lora.py), or a Lora
        strength  1.0 as it was trained, 0.0 without effect; may be negative

        LoRAs add up, in any order. A conversation may go on with other LoRAs of the same model. Raises FileError for a
        file that does not fit this model.
        """
        from .lora import read_lora  # not at the top: it knows the keys of checkpoints, whose loader makes engines

        lora = file if isinstance(file, Lora) else read_lora(file, self.network)
        engine = copy.copy(self)
        engine.adapters = self.adapters.added(lora, strength)
        return engine

    @property
    def chat(self) -> ChatFormat:
        # training and benchmarks work without one, so it is missed only when it is used
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
    def lock(self) -> ModelLock:
        """Held by whatever computes with this model, its MingTok included: one thread at a time."""
        return self.mingtok.lock

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    def weights_key(self) -> bytes:
        """Identifies the weights as they are now, LoRAs included; keys of the prefix cache begin with it."""
        # the fingerprint is that of files: training or a patch changes weights without it
        return self.fingerprint.encode() + self._weights.key() + self.adapters.key

    @property
    def image_tokens(self) -> int:
        """Positions that a drawn image takes: `<image>` and the image tokens."""
        # `</image>` is not among them: where a model emits it, it is text like any other
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
        # in two steps, so that a host can make room for what the plan needs before anything runs
        options = TextOptions(max_new_tokens, Sampling() if sampling is None else sampling, seed, return_logits)
        return self.write(self.plan(conversation, prompt, options, features), on_token)

    def generate_image(
        self, conversation: Conversation, prompt: str, *, seed: int = 0, noise: Tensor | None = None, **options: Any
    ) -> ImageResult:
        """One round that draws one image: `generate_images` with one seed, and noise float32 [tokens, C]."""
        noises = None if noise is None else check_tensor("noise", noise)[None]  # (1, N, C)
        seeds = [whole_number("seed", seed)]
        return self.generate_images(conversation, prompt, seeds=seeds, noise=noises, **options)[0]

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
        `ImageOptions`; None stands for a default. The others, and the errors, are as in `understand`; NoPictureError
        when the model decides not to draw.
        """
        # what is not chosen is None: the defaults stand in ImageOptions alone
        given = {name: value for name, value in options.items() if value is not None}
        return self.draw(self.plan(conversation, prompt, ImageOptions(seeds, **given), features), on_token)

    # --- Plan -----------------------------------------------------------------------------------------------------

    def plan(
        self, conversation: Conversation, prompt: str, options: Options, features: Features | None = None
    ) -> RoundPlan[Options]:
        """Check a round, and count its memory, before anything is computed. Raises ValueError; see `understand`."""
        if not isinstance(conversation, Conversation):
            raise ValueError(
                f"conversation is {described(conversation)}: it must be a Conversation; give "
                "Conversation() to begin a new one"
            )
        if not isinstance(prompt, str):
            raise ValueError(f"prompt is {described(prompt)}: it must be text (str)")
        if not prompt.strip():
            raise ValueError(EMPTY_PROMPT)
        # its token ids and latents mean something else to another model; an empty one belongs to none
        if conversation.model not in ("", self.fingerprint):
            raise ValueError(
                f"this conversation belongs to another model ({conversation.model[:12]}) than this one "
                f"({self.fingerprint[:12]}): continue it with the model that began it"
            )
        limit, new = self.config.llm_config.max_position_embeddings, options.max_new_tokens
        # before all of it is tokenized: a whole book must fail fast and in bounded memory
        if self.chat.exceeds(prompt, limit):
            raise ValueError(
                f"too long: the prompt of {len(prompt)} characters takes more than this model's {limit} positions; "
                "shorten the prompt"
            )
        attached = self._attached(conversation, features)
        # images before the text, as in the published template
        part = self.chat.prompt([attached, prompt] if attached else [prompt])
        transcript = conversation.extended(part, self.fingerprint)
        if isinstance(options, ImageOptions):
            # max_new_tokens counts text alone
            new += self.image_tokens
        # the published code cuts such a prompt or crashes
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
        # features of another tokenizer have the right shape and would pass for an image
        self.mingtok.check_features(features)
        # a batch becomes as many images of one message
        given = features.split()
        # a second time they would cost 256 positions each, and a drawn one would be taken for a seen one
        if conversation.ends_with(given):
            log.info("the picture is the newest in view already and not attached again")
            return []
        # In every round: the published code ignores images after the first one. Copied, since a conversation must not
        # change when the caller writes to its tensors.
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
        # an edit is of the newest image, whether it was seen or drawn
        source, grid = transcript.images[-1].features, self.config.drawing_grid
        # tokens are taken over one for one
        if source.grid != grid:
            raise ValueError(
                f"the picture to keep parts of is {source.grid[0]}x{source.grid[1]} tokens, and the model draws "
                f"{grid[0]}x{grid[1]}: encode it with detail standard"
            )
        latents = to_tokens(source.latents.float()).expand(len(options.seeds), -1, -1)  # (B, N, C)
        # a mask says what may change, hence the negation
        return KeptTokens(~options.open_tokens(grid), latents)

    def _working_memory(self, length: int, options: TextOptions | ImageOptions) -> int:
        """Bytes that a round on a transcript of this length takes beside the weights, at most."""
        language_model, adapters = self.network.language_model, self.adapters.bytes(self.dtype)
        if isinstance(options, TextOptions):
            return adapters + language_model.working_memory(length, 1, options.max_new_tokens)
        # three guidance rows an image, and the row of those that goes on to the text after it
        images, new = len(options.seeds), 2 * options.max_new_tokens + self.image_tokens
        # two caches have room for all of the text: that before the image, and that after it
        drawing = language_model.working_memory(length, 4 * images, new, in_runs=options.mask is not None)
        decoding = self.mingtok.working_memory(images, self.config.llm_config.num_image_tokens_for_gen)
        return adapters + drawing + decoding

    # --- Run ------------------------------------------------------------------------------------------------------

    @exclusive
    @adapted
    @torch.no_grad()
    def write(self, plan: RoundPlan[TextOptions], on_token: OnToken = None) -> TextResult:
        """Run a round that answers in text. on_token: see `understand`."""
        options = plan.options
        prefilled = self._prefill(plan.transcript, on_token)
        # a single row that continues the prompt; the prompt's keys and values are not copied
        cache = DecodeCache(prefilled.cache, capacity=options.max_new_tokens)
        # apart from the generator of images: how much was said does not change what is drawn
        generator = round_generator(options.seed, "text", plan.transcript)
        decoder = self._text_decoder(options, options.sampling, generator, on_token)
        written = decoder.write(cache, prefilled.hidden[None], stop={self._end}, forbidden=self.chat.image_open_id)[0]
        # the last token was never forwarded, so it has no keys and values and is no part of the transcript
        conversation = self._commit(prefilled, self._answer(written.ids, len(written.ids) - 1), cache, 0)
        text = self.chat.decode(written.ids)
        truncated = written.ids[-1] != self._end
        return TextResult(text, written.ids, conversation, prefilled.prefilled, written.stacked_logits(), truncated)

    @exclusive
    @adapted
    @torch.no_grad()
    def draw(self, plan: RoundPlan[ImageOptions], on_token: OnToken = None) -> list[ImageResult]:
        """Run a round that draws, an image a seed. on_token: see `generate_images`."""
        options = plan.options
        # (B, N, C); before the prefill, so that unfit noise is refused at no cost
        noise = self._noise(options.seeds, options.noise, plan.transcript) * options.temperature
        prefilled = self._prefill(plan.transcript, on_token)
        # greedy, so that the images of one prompt differ by their noise alone
        decoder = self._text_decoder(options, Sampling(), None, on_token)
        start, before = self._begin_image(prefilled, options.start, decoder)

        # every image has the same guidance rows, all on the one prefilled prompt
        masks = guidance_masks(prefilled.transcript.parts)  # bool (g, P), g = 2 or 3
        rows = GuidanceRows.of(options.guidance, len(masks), options.solver.renorm)
        images = len(options.seeds)
        # As published, nothing is prefilled without the prompt: the unconditional row masks it, but sees keys and
        # values that were computed with it in view. The released guidance values were chosen so.
        cache = start.fork(images * rows.per_image, start.length + noise.shape[1], masks[rows.used].repeat(images, 1))
        kept = self._kept_tokens(plan.transcript, options)
        image_decoder = ImageDecoder(self.network, cache, rows, noise, options.solver, kept)
        return self._draw_rows([prefilled] * images, image_decoder, before, decoder, on_token)

    @exclusive
    @adapted
    @torch.no_grad()
    def generate_batch(self, requests: Sequence[DrawRequest], options: ImageOptions | None = None) -> list[ImageResult]:
        """Many drawing rounds in few passes over the weights, each with a past of its own: one result a request.

        `options` hold for all; their `seeds`, `noise` and `start` do not count. What `generate_image` gives for each
        request alone, up to rounding, and the same errors.
        """
        options = dataclasses.replace(options or ImageOptions(), seeds=(0,), noise=None)
        waiting: dict[int, tuple[PrefilledRound, Tensor]] = {}  # by number of the request, with its guidance masks
        results: dict[int, ImageResult] = {}

        def draw_alike(masks: int) -> None:
            """Draw the waiting rounds that have this number of guidance masks."""
            # a pass has the same rows for every image: two or three, depending on the past
            numbers = [i for i, (_, found) in waiting.items() if len(found) == masks]
            rounds = [waiting.pop(i) for i in numbers]
            drawn = self._draw_different([requests[i] for i in numbers], rounds, options)
            results.update(zip(numbers, drawn, strict=True))

        for i, request in enumerate(requests):
            plan = self.plan(request.conversation, request.prompt, options, request.features)
            masks = guidance_masks(plan.transcript.parts)
            waiting[i] = self._prefill(plan.transcript), masks
            # drawn as soon as a pass is full, so that few prefilled pasts take memory at once
            if sum(len(found) == len(masks) for _, found in waiting.values()) == BATCH:
                draw_alike(len(masks))
        # a set of its own, since drawing takes from `waiting`
        for masks_left in {len(found) for _, found in waiting.values()}:
            draw_alike(masks_left)
        return [results[i] for i in range(len(requests))]  # in the order of the requests, not of drawing

    def _draw_different(
        self, requests: list[DrawRequest], rounds: list[tuple[PrefilledRound, Tensor]], options: ImageOptions
    ) -> list[ImageResult]:
        """Rounds with equally many guidance masks, all at once.

        Their pasts stand one behind the other in one prefix, of which each row sees its own, from position 0 on.
        """
        rows = GuidanceRows.of(options.guidance, len(rounds[0][1]), options.solver.renorm)
        # by the seed and the round of each request: what it would be if it were drawn alone
        noise = [
            self._noise((request.seed,), None if request.noise is None else request.noise[None], past.transcript)
            for request, (past, _) in zip(requests, rounds, strict=True)
        ]
        length = sum(past.cache.length for past, _ in rounds)
        prefix = self.network.language_model.new_cache(length)
        visible = torch.zeros(
            len(rounds) * rows.per_image, length, dtype=torch.bool, device="cpu"
        )  # (B * rows, all pasts)
        for k, (past, masks) in enumerate(rounds):
            own = slice(prefix.length, prefix.length + past.cache.length)
            # everything outside a row's own past stays hidden from it
            visible[k * rows.per_image : (k + 1) * rows.per_image, own] = masks[rows.used]
            # by way of host memory, which is little beside 256 passes over the weights
            prefix.extend(past.cache.slice(0, past.cache.length))
        # positions count what a row sees, so each goes on from the length of its own past
        cache = DecodeCache(prefix, noise[0].shape[1], len(visible), visible)
        kept = None
        if options.mask is not None:  # one mask, over the newest image of each past
            each = [self._kept_tokens(past.transcript, options) for past, _ in rounds]
            kept = KeptTokens(*(torch.cat(parts) for parts in zip(*filter(None, each), strict=True)))
        starts = torch.cat(noise) * options.temperature
        image_decoder = ImageDecoder(self.network, cache, rows, starts, options.solver, kept)
        # never "model decides": the rows would not begin their images at the same step
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
        # keys are stored rotated; an equal beginning has equal positions, so they hold as they are
        for entry in known:
            cache.extend(entry)
        new, begin = segments[len(known) :], cache.length
        embeddings, image_gate = self._embed(new)  # (T, H), (T,)

        def on_chunk(done: int) -> None:
            # it may raise: the cache is of this round alone, and nothing is remembered yet
            if on_token:
                on_token(Progress("prompt", done, len(embeddings)))

        hidden = self.network.language_model.prefill(embeddings, cache, image_gate, on_chunk)
        # the last position has attended to all others, so it tells of them too; the prefix cache takes nothing broken
        if not hidden.isfinite().all():
            raise nonfinite_error(hidden.dtype)
        # before a token is emitted: a round that is stopped later need not be prefilled again
        self._remember(keys, new, begin, cache.slice)
        return PrefilledRound(transcript, cache, hidden, len(embeddings), weights)

    def _embed(self, segments: Sequence[Segment]) -> tuple[Tensor, Tensor | None]:
        """Embeddings [T, H], and bool [T] of those for the image router; None: no such one."""
        # an image enters as its features alone, seen or drawn: neither pixels nor the encoder are needed again
        embeddings = torch.cat(
            [
                self.network.project(segment.features.tokens[0])
                if isinstance(segment, Image)
                else self.network.language_model.embed(torch.tensor(segment.ids, dtype=torch.long, device=self.device))
                for segment in segments
            ]
        )
        # drawn images keep to the text router in later rounds too, as published
        gate = [isinstance(s, Image) and not s.drawn for s in segments for _ in range(s.length)]
        # without one the layers are spared the second router
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
        # a model that chooses for itself may answer in words
        if start == "draw now":
            logits = [self.network.language_model.logits(prefilled.hidden).cpu()] if decoder.keep_logits else []
            return cache, WrittenText([image], logits)
        # `<image>` ends this text, the only one in which it may be chosen
        before = decoder.write(cache, prefilled.hidden[None], stop={self._end, image})[0]
        if before.ids[-1] == image:
            return cache, before
        # quoted in the error: mostly it tells why there is no image
        said = self.chat.decode(before.ids)
        if before.ids[-1] == self._end:
            raise NoPictureError(
                f'the model answered in words and drew no picture: "{said}". Set start to "draw now" to have it draw'
            )
        raise NoPictureError(
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
        hidden = self.network.language_model.decode(images.pending[conditional], cache)[:, -1]  # (B, H)
        # ahead of the text, so that a broken drawing fails before more is computed
        features = self._drawn_features(drawn, [past.transcript.depth for past in rounds])
        # `<image>` is among the emitted tokens and does not count as text: hence one less
        after = decoder.write(
            cache, hidden, stop={self._end}, forbidden=self.chat.image_open_id, written=len(before.ids) - 1
        )
        results = []
        for row, (past, image, said) in enumerate(zip(rounds, features, after, strict=True)):
            generated: list[Segment] = [
                # all of them: `<image>` went through with the first image token
                *self._answer(before.ids, len(before.ids)),
                Image(image.copied(), drawn=True),  # as attached ones: the caller may write to the result's tensors
                # all but the last one, which was not forwarded
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
        latents, tokens = to_grid(drawn.latents.cpu(), grid), drawn.tokens.float().cpu()  # (B, C, h, w), (B, N, D)
        # strong guidance can drive latents beyond all bounds in any precision
        if not (latents.isfinite().all() and tokens.isfinite().all()):
            raise nonfinite_error(self.dtype, "lower guidance and temperature if they are extreme; else ")
        return [
            # copied, or one image would hold the memory of all; one drawing deeper, for the noise of the next round
            Features(tokens[i : i + 1], latents[i : i + 1], grid, self.mingtok.fingerprint, depth + 1).copied()
            for i, depth in enumerate(depths)
        ]

    def _commit(
        self, prefilled: PrefilledRound, generated: Sequence[Segment], cache: DecodeCache, row: int
    ) -> Conversation:
        """The conversation with the generated part, whose keys and values `row` of the cache holds."""
        conversation = prefilled.transcript.extended(Part(True, tuple(generated)), self.fingerprint)
        keys = segment_keys(conversation.segments, prefilled.weights)
        # a row counts from the end of the prompt on
        self._remember(keys, generated, 0, lambda start, end: cache.slice(row, start, end))
        return conversation

    def _remember(
        self, keys: list[bytes], new: Sequence[Segment], begin: int, read: Callable[[int, int], KeyValues]
    ) -> None:
        """Put the keys and values of the last segments into the prefix cache."""
        # reading keys and values copies them and waits for the device
        if not self.prefix_cache.limit:
            return
        entries = []
        for segment in new:
            # an entry for each segment: another branch finds as many as it has in common
            entries.append(read(begin, begin + segment.length))
            begin += segment.length
        self.prefix_cache.store(keys, entries)

    def _answer(self, emitted: list[int], forwarded: int) -> list[Text]:
        """The segment of emitted tokens, of which the first `forwarded` went through the language model.

        None where they say nothing; a text cut off after its first token is kept for people.
        """
        answer = self.chat.answer(emitted, forwarded)
        return [answer] if answer.ids or answer.text else []

    @property
    def _end(self) -> int:
        return self.config.llm_config.eos_token_id

    def _noise(self, seeds: Sequence[int], given: Tensor | None, transcript: Conversation) -> Tensor:
        """float32 [B, N, C] on the CPU: the given noise, checked, or that of (seed, round)."""
        tokens, channels = self.config.llm_config.num_image_tokens_for_gen, self.network.flow_head.net.channels
        if given is None:
            # a generator for each, so that an image is the same alone and in a batch
            draws = [
                torch.randn(tokens, channels, generator=round_generator(seed, "image", transcript), device="cpu")
                for seed in seeds
            ]
            return torch.stack(draws)  # (B, N, C)
        if given.ndim != 3 or len(given) != len(seeds):
            raise ValueError(
                f"noise is {tuple(given.shape)}: give ({len(seeds)}, {tokens}, {channels}), an image a seed"
            )
        # one row more is what the published code draws, for a latent that it throws away
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
    # seeds of a batch count up and may run past 64 bits, where they begin again
    content = f"{seed % 2**64}/{purpose}/{transcript.rounds}/{transcript.depth}".encode()
    # a digest, since Python's own hash of a text differs from process to process
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
    return torch.Generator().manual_seed(number)
