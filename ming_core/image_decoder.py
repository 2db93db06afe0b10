"""The image loop: one latent a step, for every image of a drawing and all of its guidance rows.

Each image has up to three guidance rows that share a prefix and see different parts of it (`guidance_masks`). The flow
head turns their hidden states into one latent, the semantic decoder expands it, and all rows take the same
feature as their next token. Pixels appear nowhere here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_graphs import TokenLoop
from .few_rows import PackedWeights
from .flow_head import Sampler
from .kv_cache import DecodeCache
from .language_model import PREFILL_CHUNK
from .options import Guidance
from .rounds import OnToken, Progress
from .solver import Solver
from .univision import UniVision


class GuidanceRows(NamedTuple):
    """The guidance rows that a drawing runs: those of weight other than 0, and the conditional one, which writes on.

    used     indices into the rows [c], [c, u] or [c, u, t]
    weights  of the velocities of the last rows: only the conditional row's may be left out, being 0
    """

    used: list[int]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, guidance: Guidance, masks: int, renorm: bool = False) -> GuidanceRows:
        """Of `masks` possible rows. renorm: the solver needs the conditional velocity even where its weight is 0."""
        # three rows: v = g_t v_c + (1 - g_i) v_u + (g_i - g_t) v_t, so equal guidances leave the last row out
        weights = guidance.weights(masks)
        # a third row adds 6 % to the bytes of a token, since weights are shared, but half to its FLOPs
        used = [i for i, w in enumerate(weights) if i == 0 or w != 0]
        return cls(used, tuple(weights[i] for i in used if weights[i] != 0 or renorm))

    @property
    def per_image(self) -> int:
        return len(self.used)


class KeptTokens(NamedTuple):
    """Image tokens that are not drawn but taken over from an image: the rest of the image stays as it is.

    kept     bool [B, N]
    latents  float32 [B, N, C], the normalised latents of the images to keep
    """

    kept: Tensor
    latents: Tensor

    @classmethod
    def none(cls, batch: int, tokens: int, channels: int) -> KeptTokens:
        return cls(
            torch.zeros(batch, tokens, dtype=torch.bool, device="cpu"),
            torch.zeros(batch, tokens, channels, device="cpu"),
        )

    def spans(self) -> Iterator[tuple[int, int, bool]]:
        """(start, end, whether all images keep them) of consecutive tokens, in order."""
        start = 0
        # a token that only some images keep is drawn in all of them: the rows of a cache grow together
        for kept, run in itertools.groupby(self.kept.all(0).tolist()):
            end = start + len(list(run))
            yield start, end, kept
            start = end


@dataclass
class DrawnImages:
    """The images so far.

    latents  float32 [B, N, C], normalised; the first `length` tokens are there
    tokens   float32 [B, N, D], the semantic features that they expand to
    """

    latents: Tensor
    tokens: Tensor
    length: int = 0

    def progress(self) -> Progress:
        done, total = self.length, self.latents.shape[1]
        # views: copies for every token would cost memory and time that most listeners do not need
        return Progress("image", done, total, latents=self.latents[:, :done], tokens=self.tokens[:, :done])


class ImageDecoder:
    """Draws a batch of images token by token; runs of tokens that every image keeps are prefilled instead.

    cache  a row for every guidance row of every image, image by image; they stand before `<image>`
    noise  float32 [B, N, C], multiplied by the temperature already
    kept   tokens that are not drawn
    """

    def __init__(
        self,
        network: UniVision,
        cache: DecodeCache,
        rows: GuidanceRows,
        noise: Tensor,
        solver: Solver,
        kept: KeptTokens | None = None,
    ) -> None:
        self.network, self.cache, self.rows = network, cache, rows
        # drawn on the CPU, whatever the device: a seed means the same everywhere
        self.noise = noise.to(network.device)
        self.kept = kept or KeptTokens.none(*noise.shape)
        self.sources = self.kept.latents.to(network.device)  # (B, N, C)
        batch, tokens, _ = noise.shape
        llm = network.config.llm_config
        # made for this drawing: embedded times and guidance weights belong to the weights as they are now
        self.sampler = Sampler(
            network.flow_head.net,
            rows.weights,
            solver.steps or network.config.vishead_diffloss_config.steps,
            solver,
            device=network.device,
            dtype=network.language_model.dtype,
        )
        self.stream = network.mingtok.stream(batch, tokens)  # once an image: its guidance rows share the features
        width = network.mingtok.config.semantic_decoder.embed_dim
        # not initialized: nothing may read beyond `length`
        self.images = DrawnImages(torch.empty_like(self.noise), self.noise.new_empty(batch, tokens, width))
        # `<image>`, as if the model had emitted it: its hidden state is what token 0 is drawn from
        start = torch.full((batch * rows.per_image, 1), llm.image_start_token, device=network.device)
        self.pending = network.language_model.embed(start)  # [B * rows, T, H], embeddings that are not forwarded yet

    def draw(self, on_token: OnToken = None) -> DrawnImages:
        """Complete the images. Afterwards `pending` holds the embeddings of the last tokens, not forwarded yet."""
        network = self.network
        # all whose weights the steps read: a graph holds addresses, so none of them may be offloaded
        read = network.read_by_a_token
        graphs = network.language_model.cuda_graphs
        with PackedWeights(*read), TokenLoop(network.device, *read, graphs=graphs) as loop:
            # from here on the caches may be static, until the loop is left
            draw_token = self._token_steps(loop)
            for start, end, kept in self.kept.spans():
                # no flow head, and one pass for all of the run: a small part of what drawing it would cost
                if kept:
                    self._keep(start, end)
                    self._tell(end, on_token)
                    continue
                # the next token is drawn from the hidden state after everything before it
                self._forward_pending_run()
                for i in range(start, end):
                    draw_token(i)
                    loop.advance()
                    self._tell(i + 1, on_token)
        # The last feature is left to whoever writes on, since only the conditional rows need it. Nothing is drawn from
        # it: the published code draws one latent too many and throws it away.
        return self.images

    def _tell(self, length: int, on_token: OnToken) -> None:
        self.images.length = length
        # it may raise: all that is half done here belongs to this drawing alone
        if on_token:
            on_token(self.images.progress())

    def _keep(self, start: int, end: int) -> None:
        """Take tokens start..end over from the sources: expanded in one go, never through the flow head."""
        images = self.images
        images.latents[:, start:end] = self.sources[:, start:end]
        expanded = self.stream.append(images.latents[:, start:end])  # (B, n, D)
        # for a static cache; a dynamic one has counted them in `append`
        self.stream.caches.advance(end - start)
        images.tokens[:, start:end] = expanded
        # as if the model had drawn them: as features, through the text router, in every guidance row
        embeddings = self.network.project(expanded).repeat_interleave(self.rows.per_image, dim=0)  # (B * rows, n, H)
        self.pending = torch.cat([self.pending, embeddings], dim=1)

    def _forward_pending_run(self) -> None:
        """Prefill all pending embeddings but the last, whose hidden state the next token is drawn from."""
        # one embedding a row is left, the shape that a captured step takes
        run, self.pending = self.pending[:, :-1], self.pending[:, -1:]
        # in pieces of as many tokens as a prefill computes at once: bounded memory, and nothing at all if none was kept
        for piece in run.split(max(1, PREFILL_CHUNK // len(run)), dim=1) if run.shape[1] else ():
            self.network.language_model.decode(piece, self.cache)
            self.cache.layers.advance(piece.shape[1])

    def _token_steps(self, loop: TokenLoop) -> Callable[[int], None]:
        """The function that draws token i of every image, from its three steps."""
        network, images, rows = self.network, self.images, self.rows
        language_model, flow_head, batch = network.language_model, network.flow_head, len(self.noise)
        # a list on the host: asking a tensor on the device would wait for it at every token
        kept, kept_somewhere = self.kept.kept.to(network.device), self.kept.kept.any(0).tolist()

        # three steps rather than one: where the experts wait for the device, the other two can still be captured
        @loop.step(self.cache.layers, synchronizes=language_model.synchronizes(self.pending[:, 0]))
        def condition(x: Tensor) -> tuple[Tensor]:
            # (B * rows, w); lm_head stays idle while an image is drawn
            z = flow_head.vis_head(language_model.decode(x, self.cache)[:, 0])
            # (B, rows, w); a conditional row of weight 0 stands first and falls out here
            return (z.unflatten(0, (batch, rows.per_image))[:, -len(rows.weights) :],)

        @loop.step()
        def flow(z: Tensor, noise: Tensor) -> tuple[Tensor]:
            # guidance mixes the velocities of the rows at one common latent, not their results
            return (self.sampler.draw(z, noise),)

        @loop.step(self.stream.caches)
        def expand(latent: Tensor) -> tuple[Tensor, Tensor]:
            token = self.stream.append(latent[:, None])  # (B, 1, D)
            # the rows of an image go on with the same feature and differ only in the past that they see
            return token[:, 0], network.project(token).repeat_interleave(rows.per_image, dim=0)

        def draw_token(i: int) -> None:
            (z,) = condition(self.pending)  # (B, rows, w)
            (latent,) = flow(z, self.noise[:, i])  # (B, C)
            if kept_somewhere[i]:  # drawn for the other images of the batch
                latent = torch.where(kept[:, i, None], self.sources[:, i], latent)
            images.latents[:, i] = latent  # a copy: a replayed step overwrites its outputs
            images.tokens[:, i], self.pending = expand(images.latents[:, i])

        return draw_token
