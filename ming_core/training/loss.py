"""What a LoRA is trained to do: predict the next token of text, and the velocity from noise to the next latent.

As in the recipe of the built-in model: the images to draw are fed with noise on their latents, because the model's own
drawings have errors, which would otherwise add up; every token is drawn at several times. With gradient checkpointing
only the inputs of layers are kept for the way back, and a layer is computed again when its turn comes.

Of samples that are to stay as they are, the model without the LoRA is the teacher: the targets are its probabilities
and velocities, not the files' (distillation; "Learning without Forgetting", arXiv:1606.09282). At the start they teach
nothing at all, and later only what the LoRA has spoiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapters import branches
from ..attention import CausalAttention
from ..flow_head import VelocityNet
from ..language_model import Rope
from ..univision import UniVision
from .adapters import TrainedLayers
from .batches import Batch
from .sequences import IGNORE

FLOW_ROWS = 1024  # pairs of a token and a time that the flow head computes at once


class Weights(NamedTuple):
    """Sums of the loss weights of all text tokens and of all drawn tokens that one step learns from."""

    text: float
    flow: float


class Teacher(NamedTuple):
    """What the model does without the LoRA: logits of the tokens to predict [n, V]; velocities float32 [m, C].

    kept: bool [B], the sequences in which that is the target.
    """

    kept: Tensor
    logits: Tensor
    velocity: Tensor


class LoraLoss(nn.Module):
    """The loss of adapters in a network. Only the adapters are parameters of it: the network stays as it is."""

    def __init__(self, network: UniVision, adapters: TrainedLayers, *, checkpointing: bool = True) -> None:
        super().__init__()
        self.adapters, self.checkpointing = adapters, checkpointing
        network.requires_grad_(False)
        self._network = (network,)  # in a tuple, lest its weights be taken for what is trained

    @property
    def network(self) -> UniVision:
        return self._network[0]

    def forward(self, batch: Batch, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, text, flow): what this batch adds to the loss of a step and to its two terms.

        weights: of the whole step, of which this batch may be a part.

        `branches` must be in place until the way back is done, since layers are computed again on it.
        """
        places = batch.image_starts[:, None] + torch.arange(batch.latents.shape[1], device=batch.ids.device)  # (P, N)
        teacher = None if batch.kept is None else self.teacher(batch, places, batch.kept)
        hidden = self.hidden(batch, places)  # (B * T, H)
        text = self.text_loss(hidden, batch, teacher) / max(weights.text, 1.0)
        flow = self.flow_loss(hidden, batch, places, teacher) / max(weights.flow, 1.0)
        return text + flow + self.adapters.nothing().to(text), text.detach(), flow.detach()

    @torch.no_grad()
    def teacher(self, batch: Batch, places: Tensor, kept: Tensor) -> Teacher:
        """What the model does without the LoRA."""
        with branches(self.network, {}):
            hidden = self.hidden(batch, places)
            velocity = [part.float() for part in self.velocities(hidden, batch, places)]
            velocities = torch.cat(velocity) if velocity else hidden.new_zeros(0, 0)
            return Teacher(kept, self.logits(hidden, batch), velocities)

    def hidden(self, batch: Batch, places: Tensor) -> Tensor:
        """The language model's hidden states at all positions, [B * T, H]."""
        network, model = self.network, self.network.language_model.model
        x = network.language_model.embed(batch.ids).flatten(0, 1)  # (B * T, H)
        seen = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if len(batch.latents):
            x = x.index_copy(0, places.flatten(), network.project(self.features(batch)).flatten(0, 1))
            seen[places[~batch.drawn].flatten()] = True
        x, gate = x.unflatten(0, batch.ids.shape), seen.unflatten(0, batch.ids.shape)
        if not x.requires_grad:
            x.requires_grad_()  # without it the first layer would take the kernels of inference
        rope, attend = Rope.at(batch.positions, model.config, x.dtype), CausalAttention(batch.mask)
        for layer in model.layers:
            x = self._run(layer, x, rope, attend, gate)
        return model.norm(x).flatten(0, 1)

    @torch.no_grad()
    def features(self, batch: Batch) -> Tensor:
        """The features that the language model sees of the images, [P, N, D]."""
        tok = self.network.mingtok
        return tok.semantic_decoder(tok.denormalise(batch.latents + batch.fed_noise).to(tok.dtype))

    def logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Of the tokens to predict, [n, V]."""
        return self.network.language_model.logits(hidden[batch.targets.flatten() != IGNORE])

    def text_loss(self, hidden: Tensor, batch: Batch, teacher: Teacher | None) -> Tensor:
        """The weighted sum of the cross-entropy of the next tokens."""
        predicted = batch.targets.flatten() != IGNORE
        logits = self.logits(hidden, batch)
        losses = F.cross_entropy(logits, batch.targets.flatten()[predicted], reduction="none")
        if teacher is not None:
            kept = teacher.kept[:, None].expand_as(batch.targets).flatten()[predicted]
            losses = torch.where(kept, F.cross_entropy(logits, teacher.logits.softmax(-1), reduction="none"), losses)
        return (losses * batch.loss_weights.flatten()[predicted]).sum()

    def flow_loss(self, hidden: Tensor, batch: Batch, places: Tensor, teacher: Teacher | None) -> Tensor:
        """The weighted sum of the squared error of the velocity, of each token the mean over its times.

        Rectified flow: at a point between noise and latent, the head must predict the velocity towards the latent.
        """
        total = hidden.new_zeros((), dtype=torch.float32)
        if not len(batch.times):
            return total
        towards = batch.latents[batch.drawn][:, None] - batch.noise  # (D, times, N, C)
        if teacher is not None:
            kept = teacher.kept[batch.image_starts[batch.drawn] // batch.ids.shape[1], None, None, None]
            towards = torch.where(kept, teacher.velocity.view_as(towards), towards)
        weights = batch.flow_weights[:, None].expand(towards.shape[:-1])  # (D, times, N)
        parts = (tensor.split(FLOW_ROWS) for tensor in (towards.flatten(0, 2), weights.flatten()))
        for velocity, target, weight in zip(self.velocities(hidden, batch, places), *parts, strict=True):
            total = total + ((velocity.float() - target).square().mean(-1) * weight).sum()
        return total / batch.times.shape[1]

    def velocities(self, hidden: Tensor, batch: Batch, places: Tensor) -> Iterator[Tensor]:
        """The velocity of every drawn token at every time, in the order of (D, times, N): some rows [m, C] at once."""
        if not len(batch.times):
            return
        head = self.network.flow_head
        # each token is drawn from the hidden state of the one before it
        z = head.vis_head(hidden[places[batch.drawn] - 1])[:, None]  # (D, 1, N, w)
        x = torch.lerp(batch.latents[batch.drawn][:, None], batch.noise, batch.times[..., None])  # (D, times, N, C)
        parts = [tensor.split(FLOW_ROWS) for tensor in (x.flatten(0, 2), z.expand(*x.shape[:-1], -1).flatten(0, 2))]
        for x_part, z_part, t in zip(*parts, batch.times.flatten().split(FLOW_ROWS), strict=True):
            yield self.velocity(head.net, x_part.to(z_part.dtype), t, z_part)

    def velocity(self, net: VelocityNet, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """`VelocityNet.forward`, block by block, so that what is kept for the way back is the inputs of blocks."""
        y = F.silu(net.time_embed(t, z.dtype) + net.cond_embed(z))
        h = net.input_proj(x)
        for block in (*net.res_blocks, net.final_layer):
            h = self._run(_modulated, block, h, y)
        return h

    def _run(self, function: Any, *args: Any) -> Any:
        if not self.checkpointing:
            return function(*args)
        # nothing here is random, so no state of generators need be kept
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    def in_place(self) -> Any:
        """Within it the network computes with the adapters."""
        return branches(self.network, self.adapters.layers())


def _modulated(block: Any, h: Tensor, y: Tensor) -> Tensor:
    return block(h, block.modulation(y))
