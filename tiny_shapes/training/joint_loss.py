"""What the language model, the flow head and the projection are trained to do, around a frozen MingTok.

They predict the next token of answers and, at image positions, the velocity from noise to the next latent (rectified
flow). The images to draw are fed with noise on their latents, or as the model itself draws them, because its own
drawings have errors, which would otherwise add up over the tokens and over the rounds. The flow loss alone teaches only
slowly what belongs where, so linear heads, which are thrown away afterwards, read auxiliary targets from the hidden
states:

- the patch head, what the next image token shows: the labels that MingTok's features were aligned with, and whether an
  edit changes it;
- the object heads, the objects of a prompt with all of their attributes: where the words for one end, so that its color
  does not go to another; and at the end of a prompt about one object, because for "what color is the star?" the star's
  size and place have to be found as well. Each reads one of the last three layers: what only the last one knows is
  hidden from the tokens that follow;
- the origin head, where what the next token shows comes from, for the first token of every cell: the words, and which
  of the objects that they name, or which cell of the image that is edited. It reads the last layer but one, where that
  is decided; the last layer then looks up what is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ming_core.attention import CausalAttention
from ming_core.experts import MixtureOfExperts
from ming_core.features import to_tokens
from ming_core.flow_head import FlowHead
from ming_core.images import from_uint8
from ming_core.univision import UniVision

from .packing import ATTRIBUTES, ORIGINS, PATCH_TARGETS, Batch, first_tokens
from .sequences import IGNORE

OBJECT_LAYERS = 3  # the last ones of the language model, or all of a smaller one
TERMS = ("text", "flow", "patches", "objects", "origins", "balance")

OWN_STEPS = 3  # of Euler's rule, in which the model's own drawings are made
OWN_ERROR = 0.5  # root mean square by which a token of its own may be wrong; with more it is one of another drawing


@dataclass(frozen=True)
class JointWeights:
    """Weights of the terms of the loss, and strengths of what is done to the latents.

    text, flow                 next tokens; velocities
    patches, objects, origins  auxiliary targets
    balance                    how unevenly experts are used
    noise                      on the normalised latents of drawn images; drawn from 0 to this for each image
    own                        share of the batches in which drawn images are fed as the model itself draws them
    times                      (time, noise) pairs for each token: each costs about as much as the language model does
    """

    text: float = 1.0
    flow: float = 1.0
    patches: float = 0.4
    objects: float = 1.0
    origins: float = 0.0
    balance: float = 0.01
    noise: float = 0.4
    own: float = 0.0
    times: int = 2


class JointLoss(nn.Module):
    """UniVision with its loss, and the heads that read auxiliary targets. Its MingTok is frozen."""

    def __init__(self, network: UniVision, weights: JointWeights | None = None) -> None:
        super().__init__()
        self.network, self.weights = network, weights or JointWeights()
        network.mingtok.requires_grad_(False)
        width = network.config.llm_config.hidden_size
        self.patch_head = nn.Linear(width, sum(PATCH_TARGETS.values()))
        layers = min(OBJECT_LAYERS, network.config.llm_config.num_hidden_layers)
        attributes = sum(map(len, ATTRIBUTES.values()))
        self.object_heads = nn.ModuleList(nn.Linear(width, attributes) for _ in range(layers))
        self.cells = first_tokens(network.config.drawing_grid)
        self.origin_head = nn.Linear(width, ORIGINS)
        for head in (self.patch_head, *self.object_heads, self.origin_head):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Returns "loss" and its `TERMS`; "balance" is 1 if all experts are used alike."""
        weights = self.weights
        latents, features = self.images(batch, generator)  # (P, N, C), (P, N, D)
        places = _places(batch)
        layers = self.network.language_model.model.layers[-len(self.object_heads) : -1]
        with recorded_routing(self.network) as balance, recorded_outputs(*layers) as middle:
            hidden = self.hidden(batch, features, places)  # (R * L, H)
        middle = [x.flatten(0, 1) for x in middle]
        # the tokens to learn: those that are drawn, not kept
        learned = batch.flow_weights > 0  # (P, N)
        # each token is drawn from the hidden state of the one before it
        before = hidden[places[learned] - 1]
        flow_weights = batch.flow_weights[learned]
        terms = {
            "text": self.text_loss(hidden, batch),
            "flow": flow_loss(self.network.flow_head, before, latents[learned], flow_weights, weights.times, generator),
            "patches": self.patch_loss(before, batch.patch_targets.transpose(1, 2)[learned], flow_weights),
            "objects": self.object_loss([x[batch.object_positions] for x in (*middle, hidden)], batch.object_targets),
            "origins": self.origin_loss(middle[-1][places[:, self.cells] - 1], batch.origins),
            "balance": torch.stack(balance).mean(),
        }
        terms["loss"] = sum((getattr(weights, name) * terms[name] for name in TERMS), start=hidden.new_zeros(()))
        return terms

    def hidden(self, batch: Batch, features: Tensor, places: Tensor) -> Tensor:
        """The language model's hidden states at all positions, [R * L, H].

        `UniVision.forward` would give the same for one sequence a row; these are packed, with positions of their own.
        """
        network, shape = self.network, batch.ids.shape
        x = network.language_model.embed(batch.ids).flatten(0, 1)  # (R * L, H)
        x = x.index_copy(0, places.flatten(), network.project(features).flatten(0, 1))
        seen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        seen[places[~batch.drawn].flatten()] = True
        attend = CausalAttention(batch.mask)
        hidden = network.language_model.model(x.unflatten(0, shape), batch.positions, attend, seen.unflatten(0, shape))
        return hidden.flatten(0, 1)

    def text_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        """The weighted mean of the cross-entropy of the next tokens."""
        predicted = batch.targets.flatten() != IGNORE
        logits = self.network.language_model.logits(hidden[predicted])
        losses = F.cross_entropy(logits, batch.targets.flatten()[predicted], reduction="none")
        return _weighted_mean(losses, batch.loss_weights.flatten()[predicted])

    def patch_loss(self, before: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The sum over the kinds of targets of the weighted mean of the cross-entropy of what the next tokens show.

        before [n, H]; targets [n, kinds]; weights [n].
        """
        loss = before.new_zeros(())
        kinds = self.patch_head(before).split(list(PATCH_TARGETS.values()), dim=-1)
        for logits, labels in zip(kinds, targets.unbind(1), strict=True):
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
            loss = loss + _weighted_mean(losses, weights * (labels != IGNORE))
        return loss

    def origin_loss(self, before: Tensor, origins: Tensor) -> Tensor:
        """The mean cross-entropy of where what comes is from. before [P, cells, H]; origins int64 [P, cells]."""
        known = origins != IGNORE
        logits = self.origin_head(F.rms_norm(before[known], before.shape[-1:]))
        return F.cross_entropy(logits, origins[known], reduction="sum") / known.sum().clamp_min(1)

    def object_loss(self, layers: Sequence[Tensor], targets: Tensor) -> Tensor:
        """The mean over layers and objects of the cross-entropy of all attributes.

        layers  [M, H] each; targets [M, 4]
        """
        loss = layers[0].new_zeros(())
        for head, hidden in zip(self.object_heads, layers, strict=True):
            logits = head(F.rms_norm(hidden, hidden.shape[-1:])).split(list(map(len, ATTRIBUTES.values())), dim=-1)
            for x, y in zip(logits, targets.unbind(1), strict=True):
                loss = loss + F.cross_entropy(x, y, reduction="sum")
        return loss / (len(layers) * max(len(targets), 1))

    @torch.no_grad()
    def images(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normalised latents [P, N, C] and the features to feed [P, N, D].

        Drawn images are fed with noise on their latents, or as the model itself draws them.
        """
        placed = len(batch.drawn)
        latents = self.latents(batch)  # (P + E, N, C)
        strength = torch.rand(placed, 1, 1, generator=generator) * self.weights.noise
        noise = strength * torch.randn(placed, *latents.shape[1:], generator=generator)
        fed = latents.clone()
        fed[:placed] += noise.to(latents) * batch.drawn[:, None, None]
        features = self.features(_kept(fed, batch), batch)
        if placed and self.weights.own and float(torch.rand((), generator=generator)) < self.weights.own:
            own = self.own_drawings(latents[:placed], features, batch, generator)
            near = (own - latents[:placed]).square().mean(-1, keepdim=True).sqrt() <= OWN_ERROR
            fed[:placed] = torch.where(near & batch.drawn[:, None, None], own, fed[:placed])
            features = self.features(_kept(fed, batch), batch)
        return latents[:placed], features

    def latents(self, batch: Batch) -> Tensor:
        """Normalised latents of all images of a batch, [P + E, N, C]."""
        tok = self.network.mingtok
        if not len(batch.images):
            return batch.flow_weights.new_empty(*batch.flow_weights.shape, tok.config.semantic_decoder.in_dim)
        with torch.autocast(batch.images.device.type, enabled=False):  # what is to be learned is exact
            return to_tokens(tok.encode(from_uint8(batch.images)))

    def features(self, latents: Tensor, batch: Batch) -> Tensor:
        """What is fed of the placed images: the features of their latents, [P, N, C] -> [P, N, D]."""
        tok = self.network.mingtok
        with torch.autocast(latents.device.type, enabled=False):
            return tok.semantic_decoder(tok.denormalise(latents))

    def own_drawings(self, latents: Tensor, features: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """What the model draws for each token after the true ones, with the noise that is fed: [P, N, C]."""
        head, places = self.network.flow_head, _places(batch)
        z = head.vis_head(self.hidden(batch, features, places)[places - 1])  # (P, N, H)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        drawn = head.sample(z.flatten(0, 1)[:, None], noise.flatten(0, 1), steps=OWN_STEPS)
        return drawn.view_as(latents)


def _kept(latents: Tensor, batch: Batch) -> Tensor:
    """The latents of the placed images, [P + E, N, C] -> [P, N, C], with those that a mask keeps from their source.

    They have the errors that their source was fed with: so it is when the model edits.
    """
    latents = latents.clone()
    for i in (batch.sources >= 0).nonzero().flatten().tolist():  # in order: a source may have one itself
        latents[i] = torch.where(batch.opened[i, :, None], latents[i], latents[batch.sources[i]])
    return latents[: len(batch.drawn)]


def _places(batch: Batch) -> Tensor:
    """The index of each image token in the flattened rows: [P, N]."""
    starts = batch.image_starts
    return starts[:, None] + torch.arange(batch.flow_weights.shape[1], device=starts.device)


def _weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """The mean of the losses by weight; 0 if there are none."""
    return (weights * losses).sum() / weights.sum().clamp_min(1.0)


@contextlib.contextmanager
def recorded_routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record, while it lasts, how unevenly the experts of each layer are used.

    1 means alike; the number of experts, that one takes all.
    """
    recorded: list[Tensor] = []

    def record(module: MixtureOfExperts, args: tuple, output: Tensor) -> None:
        x, gate = args
        scores = module.scores(x.flatten(0, -2), None if gate is None else gate.flatten())  # (T, E)
        chosen = F.one_hot(scores.topk(module.top_k).indices, scores.shape[1]).sum(1).float()
        recorded.append(scores.shape[1] * (chosen.mean(0) / module.top_k * scores.mean(0)).sum())

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, MixtureOfExperts)]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def recorded_outputs(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Record, while it lasts, what the modules return, in the order of their calls."""
    recorded: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda module, args, output: recorded.append(output)) for m in modules]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def flow_loss(
    head: FlowHead, hidden: Tensor, latents: Tensor, weights: Tensor, times: int, generator: torch.Generator
) -> Tensor:
    """Rectified flow: at a point between noise and latent, the head must predict the velocity towards the latent.

    hidden [n, H]; latents [n, C]; weights [n]. Every token is drawn at `times` random times, which are logit-normal.
    """
    if not len(hidden):
        return hidden.sum() * 0.0
    t = torch.randn(times, len(hidden), generator=generator).sigmoid().to(latents)  # 1: noise, 0: latent
    noise = torch.randn(times, *latents.shape, generator=generator).to(latents)
    x = torch.lerp(latents, noise, t[..., None])
    velocity = head.net(x, t, head.vis_head(hidden)[None])
    error = (velocity - (latents - noise)).square().mean(-1)  # (times, n)
    return (error * weights).sum() / (weights.sum() * times)
