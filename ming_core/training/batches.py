"""The stream of samples, and batches of them with their noise.

Sample i of the stream is a function of the seed and i alone, its noise included. So a training that was interrupted
goes on as if it had not been, and it makes no difference how samples are shared out among processes or passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..prompts import ChatFormat
from .cache import EncodedImage
from .data import Sample
from .sequences import IGNORE, TEXT_UNCONDITIONAL, UNCONDITIONAL, Round, Sequence, tokenize

QUIZ = 6  # most questions about one image in a sequence: the image is most of what a question costs


@dataclass(frozen=True)
class Noising:
    """What is done to latents.

    noise  on the latents of drawn images as the language model sees them; drawn from 0 to this for each image
    times  (time, noise) pairs for each token to draw
    """

    noise: float = 0.4
    times: int = 2


class Batch(NamedTuple):
    """B sequences, each followed by padding up to T tokens; P images in all, of which D are to be drawn.

    ids, targets, positions  int64 [B, T]
    loss_weights             float32 [B, T], of the targets
    mask                     bool [B, T, T]; None: causal
    latents                  float32 [P, N, C]
    fed_noise                float32 [P, N, C], added to the latents that the language model sees
    drawn                    bool [P]
    image_starts             int64 [P], index of the first token of each image in the flattened rows
    flow_weights             float32 [D, N]
    times                    float32 [D, times, N], 1: noise, 0: latent
    noise                    float32 [D, times, N, C]
    kept                     bool [B]: `Sequence.kept`; None: no sample of this training is such
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    loss_weights: Tensor
    mask: Tensor | None
    latents: Tensor
    fed_noise: Tensor
    drawn: Tensor
    image_starts: Tensor
    flow_weights: Tensor
    times: Tensor
    noise: Tensor
    kept: Tensor | None

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if x is None else x.to(device, non_blocking=True) for x in self))  # type: ignore[arg-type]


def collate(sequences: Items[Sequence], noising: Noising, channels: int) -> Batch:
    """Put sequences into a batch. channels: of latents, for a batch without images."""
    shape = len(sequences), max(len(s.ids) for s in sequences)
    ids, targets, positions = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE), torch.zeros(shape).long()
    loss_weights = torch.ones(shape)
    starts, drawn, latents, fed, weights, times, noises = [], [], [], [], [], [], []
    for row, s in enumerate(sequences):
        n, generator = len(s.ids), torch.Generator().manual_seed(s.seed)
        ids[row, :n], targets[row, :n] = torch.tensor(s.ids), torch.tensor(s.targets)
        positions[row, :n], loss_weights[row, :n] = torch.tensor(s.positions), torch.tensor(s.loss_weights)
        for image, start, image_weights in s.images:
            starts.append(row * shape[1] + start)
            latents.append(image.latents)
            drawn.append(image_weights is not None)
            if image_weights is None:
                fed.append(torch.zeros_like(image.latents))
                continue
            strength = torch.rand((), generator=generator) * noising.noise
            fed.append(strength * torch.randn(image.latents.shape, generator=generator))
            weights.append(image_weights)
            times.append(torch.randn(noising.times, len(image.latents), generator=generator).sigmoid())
            noises.append(torch.randn(noising.times, *image.latents.shape, generator=generator))
    nothing = torch.zeros(0, 0, channels)
    return Batch(
        ids,
        targets,
        positions,
        loss_weights,
        _mask(sequences, shape[1]),
        torch.stack(latents) if latents else nothing,
        torch.stack(fed) if fed else nothing,
        torch.tensor(drawn, dtype=torch.bool),
        torch.tensor(starts, dtype=torch.long),
        torch.stack(weights) if weights else torch.zeros(0, 0),
        torch.stack(times) if times else torch.zeros(0, noising.times, 0),
        torch.stack(noises) if noises else torch.zeros(0, noising.times, 0, channels),
        torch.tensor([bool(s.kept) for s in sequences]) if any(s.kept is not None for s in sequences) else None,
    )


def _mask(sequences: Items[Sequence], length: int) -> Tensor | None:
    """Where a position may attend, bool [B, T, T]; None: causal. Padding is behind everything and hidden by that."""
    if not any(s.masked.any() for s in sequences):
        return None
    mask = torch.ones(len(sequences), length, length, dtype=torch.bool).tril()
    for row, s in enumerate(sequences):
        n = len(s.masked)
        mask[row, n:, :n] &= ~s.masked
    return mask


class SampleStream:
    """Samples without end, in a new order in every pass over them.

    dropping   share of the drawing and editing samples that are in the form of a guidance row
    others     samples of what the model is to do as before, and their share of the stream
    """

    def __init__(
        self,
        samples: Items[Sample],
        images: Mapping[Path, EncodedImage],
        chat: ChatFormat,
        grid: tuple[int, int],
        *,
        seed: int = 0,
        dropping: float = 0.15,
        others: tuple[Items[Sample], float] = ((), 0.0),
    ) -> None:
        self.samples, self.images, self.chat, self.grid = list(samples), images, chat, grid
        self.seed, self.dropping = seed, dropping
        self.others, self.share = list(others[0]), others[1] if others[0] else 0.0

    def __getitem__(self, index: int) -> Sequence:
        rng = np.random.default_rng([self.seed, index, 0])
        sample, kept = self._sample(index)
        rounds = self._rounds(sample, rng)
        row, donor = 0, None
        if sample.target is not None and rng.random() < self.dropping:
            row = int(rng.integers(UNCONDITIONAL, TEXT_UNCONDITIONAL + 1))
            donor = self._donor(sample, rng)
        sequence = tokenize(rounds, self.chat, self.grid, row, donor)
        return replace(sequence, seed=int(rng.integers(1 << 62)), kept=kept if self.others else None)

    def _sample(self, index: int) -> tuple[Sample, bool]:
        """The sample with this number, and whether it is of the others: these come at even distances."""
        others_before, others_after = int(index * self.share), int((index + 1) * self.share)
        if others_after > others_before:
            return self._nth(self.others, others_before, 1), True
        return self._nth(self.samples, index - others_before, 2), False

    def _nth(self, samples: list[Sample], n: int, stream: int) -> Sample:
        """The n-th of an endless row of samples, each pass over them in an order of its own."""
        epoch, place = divmod(n, len(samples))
        order = np.random.default_rng([self.seed, epoch, stream]).permutation(len(samples))
        return samples[int(order[place])]

    def _donor(self, sample: Sample, rng: np.random.Generator) -> Round:
        """The round of another drawing sample, of this one if there is no other."""
        drawing = [s for s in (*self.samples, *self.others) if s.target is not None]
        # another prompt, not only another sample: many pictures may share one
        different = [s for s in drawing if s.prompt != sample.prompt] or drawing
        return self._rounds(different[int(rng.integers(len(different)))], rng)[0]

    def _rounds(self, sample: Sample, rng: np.random.Generator) -> list[Round]:
        source, target = (self.images[path] if path else None for path in (sample.source, sample.target))
        if target is not None:
            return [Round(sample.prompt, source, target)]
        chosen = rng.permutation(len(sample.questions))[:QUIZ]
        pairs = [sample.questions[int(i)] for i in chosen]
        return [Round(question, source if i == 0 else None, None, answer) for i, (question, answer) in enumerate(pairs)]
