"""The image loop: one latent a step, for every image of a drawing and all of its guidance rows.

Each image has up to three guidance rows that share a prefix and see different parts of it (`guidance_masks`). The flow
head turns their hidden states into one latent, the semantic decoder expands it, and all rows take the same
feature as their next token. Pixels appear nowhere here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda_graphs import TokenLoop
from .flow_head import Sampler
from .kv_cache import DecodeCache
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
        weights = guidance.weights(masks)
        used = [i for i, w in enumerate(weights) if i == 0 or w != 0]
        return cls(used, tuple(weights[i] for i in used if weights[i] != 0 or renorm))

    @property
    def per_image(self) -> int:
        return len(self.used)


@dataclass
class DrawnImages:
    """The images so far.

    latents  float32 [B, N, C], normalised; the first `length` tokens are drawn
    tokens   float32 [B, N, D], the semantic features that they expand to
    """

    latents: Tensor
    tokens: Tensor
    length: int = 0

    def progress(self) -> Progress:
        done, total = self.length, self.latents.shape[1]
        return Progress("image", done, total, latents=self.latents[:, :done], tokens=self.tokens[:, :done])


class ImageDecoder:
    """Draws a batch of images token by token.

    cache  a row for every guidance row of every image, image by image; they stand before `<image>`
    noise  float32 [B, N, C], multiplied by the temperature already
    """

    def __init__(
        self, network: UniVision, cache: DecodeCache, rows: GuidanceRows, noise: Tensor, solver: Solver
    ) -> None:
        self.network, self.cache, self.rows = network, cache, rows
        self.noise = noise.to(network.device)
        batch, tokens, _ = noise.shape
        steps = solver.steps or network.config.vishead_diffloss_config.steps
        self.sampler = Sampler(
            network.flow_head.net,
            rows.weights,
            steps,
            solver,
            device=network.device,
            dtype=network.language_model.dtype,
        )
        self.stream = network.mingtok.stream(batch, tokens)
        width = network.mingtok.config.semantic_decoder.embed_dim
        self.images = DrawnImages(torch.empty_like(self.noise), self.noise.new_empty(batch, tokens, width))
        start = torch.full(
            (batch * rows.per_image,), network.config.llm_config.image_start_token, device=network.device
        )
        self.next_embedding = network.language_model.embed(start)  # [B * rows, H], not forwarded yet

    def draw(self, on_token: OnToken = None) -> DrawnImages:
        """All tokens of the images. Afterwards `next_embedding` is that of the last one, which was not forwarded."""
        for span in self._spans():
            for _ in span:
                if on_token:
                    on_token(self.images.progress())
        return self.images

    def _spans(self) -> Iterable[Iterable[int]]:
        """The runs of tokens that an image is made of: one, all of it drawn token by token."""
        yield self._draw_span(self.noise.shape[1])

    def _draw_span(self, tokens: int) -> Iterable[int]:
        """Draw the next `tokens` tokens; yields after each."""
        network, images, rows = self.network, self.images, self.rows
        language_model, flow_head, batch = network.language_model, network.flow_head, len(self.noise)
        loop = TokenLoop(
            network.device, language_model, flow_head, network.mingtok.semantic_decoder, network.linear_proj
        )

        @loop.step(self.cache.layers, synchronizes=language_model.synchronizes(self.next_embedding))
        def condition(x: Tensor) -> tuple[Tensor]:
            z = flow_head.vis_head(language_model.decode(x[:, None], self.cache)[:, 0])
            return (z.unflatten(0, (batch, rows.per_image))[:, -len(rows.weights) :],)

        @loop.step()
        def flow(z: Tensor, noise: Tensor) -> tuple[Tensor]:
            return (self.sampler.draw(z, noise),)

        @loop.step(self.stream.caches)
        def expand(latent: Tensor) -> tuple[Tensor, Tensor]:
            token = self.stream.append(latent[:, None])[:, 0]
            return token, network.project(token).repeat_interleave(rows.per_image, dim=0)

        with loop:
            for i in range(images.length, images.length + tokens):
                (z,) = condition(self.next_embedding)
                (images.latents[:, i],) = flow(z, self.noise[:, i])
                images.tokens[:, i], self.next_embedding = expand(images.latents[:, i])
                loop.advance()
                images.length = i + 1
                yield i
