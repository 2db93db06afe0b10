"""The rectified-flow head: draws one image token's latent from the language model's hidden state.

A small network gives the velocity v(x, t, z) of a latent x at time t under the condition z; an ODE solver carries
noise (t = 1) to data (t = 0). v points from noise towards data, so a step adds v * dt. Nearly all of the cost of
drawing is here, so nothing is computed again that need not be: the embedded times are those of a whole drawing
(`Sampler`), and what depends on the condition but not on x (every block's modulation) is made once a token, for all
steps in one product. Usable on its own.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .solver import Schedule, Solver
from .transformer import LAYER_NORM_EPS, SwiGLU

TIME_FREQUENCIES = 128  # as published: 128 cosines and 128 sines
TIME_SCALE = 1000.0  # the network sees 1000 * t


class Modulation(NamedTuple):
    """How the final layer scales and shifts the stream, [..., w] each; depends on time and condition, not on x."""

    shift: Tensor
    scale: Tensor  # 1 is added already


class GatedModulation(NamedTuple):
    """How a block scales and shifts the stream, and how much of its output is added to it, [..., w] each."""

    shift: Tensor
    scale: Tensor  # 1 is added already
    gate: Tensor


class Modulations(NamedTuple):
    """The modulations of all layers for one condition and one time, or for several stacked along the first axes."""

    blocks: tuple[GatedModulation, ...]
    final: Modulation

    def unbind(self) -> list[Modulations]:
        """Take the first axis apart."""
        # views of (steps, ..., w), so that no step copies its part
        final = [Modulation(*parts) for parts in zip(*(tensor.unbind() for tensor in self.final), strict=True)]
        blocks = [
            [GatedModulation(*parts) for parts in zip(*(tensor.unbind() for tensor in block), strict=True)]
            for block in self.blocks
        ]
        # from one list of steps per block to one list of blocks per step
        return [Modulations(tuple(block[i] for block in blocks), last) for i, last in enumerate(final)]


class TimeEmbed(nn.Module):
    """t in [0, 1], any shape -> [..., w]."""

    def __init__(self, width: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        make = {"device": device, "dtype": dtype}
        # positions in the Sequential give the published names, mlp.0 and mlp.2
        self.mlp = nn.Sequential(
            operations.Linear(2 * TIME_FREQUENCIES, width, **make), nn.SiLU(), operations.Linear(width, width, **make)
        )

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        waves = self.waves(t)  # computed in float32, cast only now: 1000 * t needs every bit
        return self.mlp(waves.to(dtype or next(self.parameters()).dtype))

    @staticmethod
    def waves(t: Tensor) -> Tensor:
        """[..., 256] in float32: cosines first, then sines."""
        # wave lengths from a thousandth of the time axis to all of it, as in sinusoidal position encodings
        exponents = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device) / TIME_FREQUENCIES
        angles = TIME_SCALE * t.float()[..., None] * torch.exp(-math.log(10000) * exponents)  # (..., 128)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """h + gate * SwiGLU(LN(h) * (1 + scale) + shift)."""

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        make = {"device": device, "dtype": dtype}
        self.in_ln = operations.LayerNorm(width, eps=LAYER_NORM_EPS, **make)  # with weights, unlike the final one
        # at the published width of 3072 it is 8192 wide inside: 75.5 M of the block's 103.8 M weights
        self.mlp = SwiGLU(width, hidden, operations=operations, **make)
        # a third of the head's weights: read once a token instead of once a step (see VelocityNet.modulations)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 3 * width, **make))

    def modulation(self, y: Tensor) -> GatedModulation:
        """y [..., w]: SiLU(time + condition)."""
        # index 1: the SiLU at index 0 is already in y, where it is applied once for all layers
        shift, scale, gate = self.adaLN_modulation[1](y).chunk(3, dim=-1)  # (..., w) each
        return GatedModulation(shift, 1 + scale, gate)  # 1 + here: once a token, not in every step

    def forward(self, h: Tensor, modulation: GatedModulation) -> Tensor:
        shift, scale, gate = modulation
        # addcmul(a, b, c) = a + b * c, one kernel instead of two
        return torch.addcmul(h, gate, self.mlp(torch.addcmul(shift, self.in_ln(h), scale)))


class FinalLayer(nn.Module):
    """Linear(LN(h) * (1 + scale) + shift); this LN has no weights of its own."""

    def __init__(
        self, width: int, channels: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        make = {"device": device, "dtype": dtype}
        self.linear = operations.Linear(width, channels, **make)
        # two parts, not three: what comes out is the velocity itself, so there is no stream for a gate to add it to
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 2 * width, **make))

    def modulation(self, y: Tensor) -> Modulation:
        """y [..., w]: SiLU(time + condition)."""
        shift, scale = self.adaLN_modulation[1](y).chunk(2, dim=-1)  # (..., w) each
        return Modulation(shift, 1 + scale)

    def forward(self, h: Tensor, modulation: Modulation) -> Tensor:
        h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)  # the modulation is all the affine part it has
        return self.linear(torch.addcmul(modulation.shift, h, modulation.scale))  # (..., C)


class VelocityNet(nn.Module):
    """v(x, t, z). x [..., C]; t broadcasts against z [..., w] without its last axis."""

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        hidden: int | None = None,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = {"operations": operations, "device": device, "dtype": dtype}
        # published: 32 channels, width 3072, depth 12. Evaluated anew in all 16 steps, its 1.28 B weights would be
        # 41.1 GB of reads a token in bf16; without what is made once a token, a step reads 1.81 GB of them
        self.channels = channels
        self.time_embed = TimeEmbed(width, **make)
        # times and conditions meet as a sum, so the times of a whole drawing can be embedded beforehand
        self.cond_embed = operations.Linear(width, width, device=device, dtype=dtype)
        self.input_proj = operations.Linear(channels, width, device=device, dtype=dtype)
        # the part that depends on x, and so the part that every step pays for
        self.res_blocks = nn.ModuleList([ResBlock(width, hidden, **make) for _ in range(depth)])
        self.final_layer = FinalLayer(width, channels, **make)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return self.velocity(x, self.modulations(self.time_embed(t, z.dtype), z))

    def modulations(self, time: Tensor, z: Tensor) -> Modulations:
        """time: embedded times, which broadcast against z."""
        y = F.silu(time + self.cond_embed(z))  # (..., w); x plays no part, so this runs once a token
        blocks = tuple(block.modulation(y) for block in self._blocks)
        return Modulations(blocks, self.final_layer.modulation(y))

    def velocity(self, x: Tensor, modulations: Modulations) -> Tensor:
        h = self.input_proj(x)  # (..., w)
        for block, modulation in zip(self._blocks, modulations.blocks, strict=True):
            h = block(h, modulation)
        return self.final_layer(h, modulations.final)  # (..., C)

    @property
    def _blocks(self) -> list[ResBlock]:
        return cast("list[ResBlock]", list(self.res_blocks))


class FlowHead(nn.Module):
    """The vision head, which turns hidden states into conditions, and the velocity network."""

    def __init__(
        self,
        hidden_size: int,
        channels: int,
        width: int,
        depth: int,
        hidden: int | None = None,
        *,
        operations: Any = nn,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        make = {"device": device, "dtype": dtype}
        # the norm gives every condition one length, whatever the scale of the hidden states
        self.vis_head = nn.Sequential(
            operations.Linear(hidden_size, width, **make),
            operations.LayerNorm(width, eps=LAYER_NORM_EPS, **make),
        )
        self.net = VelocityNet(channels, width, depth, hidden, operations=operations, **make)

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        guidance_weights: tuple[float, ...] = (1.0,),
        *,
        steps: int = 16,
        solver: Solver | None = None,
    ) -> Tensor:
        """Draw one latent an image; a caller that draws several in a row makes one `Sampler` for all. See `Sampler`."""
        sampler = Sampler(self.net, guidance_weights, steps, solver or Solver(), device=z.device, dtype=z.dtype)
        return sampler.draw(z, noise)


class Sampler:
    """Draws latents, one after the other, with one solver and one guidance.

    What is the same for every token is computed here, once: the embedded times, and the weights of the guidance rows'
    velocities (`Guidance.weights`). It belongs to the weights of the network as they are now, so every drawing makes
    its own. `draw` never synchronizes with the device, and what it does depends on shapes alone.
    """

    def __init__(
        self,
        net: VelocityNet,
        guidance_weights: tuple[float, ...],
        steps: int,
        solver: Solver,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.net, self.renorm = net, solver.renorm
        self.schedule: Schedule = solver.schedule(steps)
        # (steps, 1, 1, w), to broadcast over images and guidance rows
        # every token passes the same times, so these are constants of the drawing
        self.time = net.time_embed(self.schedule.times.to(device), dtype)[:, None, None]
        self.guidance_weights = torch.tensor(guidance_weights, device=device)[:, None]  # (g, 1), against [B, g, C]

    def draw(self, z: Tensor, noise: Tensor) -> Tensor:
        """Draw one latent an image.

        z      [B, g, w], conditions of the g guidance rows of each image, the conditional row first
        noise  float32 [B, C], the start, already multiplied by the temperature
        Returns float32 [B, C]. The latent and its updates stay float32 in every precision.
        """
        # in bf16, with its 8 bits, the small updates of many steps would round away; the deque drops what no rule needs
        x, velocities = noise.float(), deque[Tensor](maxlen=self.schedule.order)
        before = x  # where the last step began
        # the modulations of all steps in one product, (steps, B, g, ...), then taken apart
        for modulations, weights, momentum in zip(
            self.net.modulations(self.time, z).unbind(), *self.schedule.rule, strict=True
        ):
            # x[:, None] is (B, 1, C): all guidance rows of an image look at the same latent, as published
            velocities.appendleft(self._guided(self.net.velocity(x[:, None].to(z.dtype), modulations)))
            # x + momentum * (x - before), one kernel instead of three
            before, x = x, torch.lerp(before, x, 1 + momentum) if momentum else x
            for weight, velocity in zip(weights, velocities, strict=False):
                if weight:  # a multistep rule has no past in its first step
                    x = x + weight * velocity
        return x

    def _guided(self, v: Tensor) -> Tensor:
        """Velocities of the guidance rows [B, g, C] -> [B, C]."""
        # published as v_u + g * (v_c - v_u), here multiplied out
        guided = (self.guidance_weights * v).sum(1).float()  # (B, C); the weights are float32 and add up to 1
        if not self.renorm:
            return guided
        # long guided velocities overshoot: hold them to the length of the conditional one
        length = v[:, 0].float().norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        # the epsilon is added to the quotient, not to its divisor, as published
        return guided * (length + 1e-8).clamp(0, 1)
