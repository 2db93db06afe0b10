"""The rectified-flow head: draws one image token's latent from the language model's hidden state.

A small network gives the velocity v(x, t, z) of a latent x at time t under the condition z; an ODE solver carries
noise (t = 1) to data (t = 0). v points from noise towards data, so a step adds v * dt. Nearly all of the cost of
drawing is here, so nothing is computed again that need not be: the embedded times are those of a whole drawing
(`Sampler`), and what depends on the condition but not on x (every block's modulation) is made once a token, for all
steps in one product. Usable on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformer import LAYER_NORM_EPS, SwiGLU

TIME_FREQUENCIES = 128
TIME_SCALE = 1000.0  # the network sees 1000 * t
METHODS = ("euler", "ab2")


@dataclass(frozen=True)
class Guidance:
    """How far the picture is pulled towards the prompt (`text`) and towards the prompt's pictures and past (`image`).

    1 is no guidance. With a row that saw everything (c), one that saw no text (t) and one that saw neither (u):
    v = g_t v_c + (g_i - g_t) v_t + (1 - g_i) v_u. With no picture in the prompt and nothing before it only c and u
    exist: v = g_t v_c + (1 - g_t) v_u.
    """

    text: float = 3.0
    image: float = 1.1

    def __post_init__(self) -> None:
        for name in ("text", "image"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"guidance.{name} is {value}: give a number of 0 or more")

    def factors(self, rows: int) -> tuple[float, ...]:
        """Factors of the velocities of the rows [c], [c, u] or [c, u, t]."""
        if rows == 1:
            return (1.0,)
        if rows == 2:
            return (self.text, 1 - self.text)
        return (self.text, 1 - self.image, self.image - self.text)


@dataclass(frozen=True)
class Solver:
    """The ODE solver. `steps` None: the checkpoint's own number.

    `method`: "euler", or "ab2", the Adams-Bashforth rule of second order, which goes by the velocity of the step before
    as well (its first step is one of Euler). Both ask the network for one velocity a step.
    `renorm` (scale the guided velocity down to the length of the conditional one) and `time_shift` (spend the steps
    nearer to the noise, above 1, or to the data, below) exist in the published code and are off by default there.
    """

    steps: int | None = None
    method: str = "euler"
    renorm: bool = False
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"solver method {self.method!r} is unknown: give one of {METHODS}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"solver steps {self.steps}: give 1 or more, or None for the checkpoint's number")
        if not 0 < self.time_shift < math.inf:
            raise ValueError(f"solver time_shift {self.time_shift}: give a number above 0")

    def times(self, steps: int) -> Tensor:
        """The steps + 1 points in time, float32, from 1 (noise) down to 0 (data)."""
        u = torch.linspace(0, 1, steps + 1)
        # in this order of operations: the network sees 1000 * t, so that a last bit is felt
        return 1 - u / (u + self.time_shift - self.time_shift * u)

    def coefficients(self, steps: int) -> list[tuple[float, float]]:
        """Each step adds a * (its velocity) + b * (the velocity of the step before): the (a, b) of all steps."""
        times = self.times(steps)
        lengths = (times[:-1] - times[1:]).tolist()
        if self.method == "euler":
            return [(h, 0.0) for h in lengths]
        if not all(lengths):
            raise ValueError(f"solver time_shift {self.time_shift} leaves steps of no length: give one nearer to 1")
        # the line through two velocities, integrated over a step that need not be as long as the one before
        later = [(h + h * h / (2 * before), -h * h / (2 * before)) for before, h in pairwise(lengths)]
        return [(lengths[0], 0.0), *later]


class Modulation(NamedTuple):
    """What a block scales in the stream and adds to it, [..., w] each; depends on time and condition, not on x."""

    shift: Tensor
    scale: Tensor  # 1 is added already
    gate: Tensor | None  # the final layer has none


Modulations = tuple[Modulation, ...]  # of the blocks in order, then of the final layer


class TimeEmbed(nn.Module):
    """t in [0, 1], any shape -> [..., w]."""

    def __init__(self, width: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        make = {"device": device, "dtype": dtype}
        self.mlp = nn.Sequential(
            operations.Linear(2 * TIME_FREQUENCIES, width, **make), nn.SiLU(), operations.Linear(width, width, **make)
        )

    def forward(self, t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        waves = self.waves(t)
        return self.mlp(waves.to(dtype or self.mlp[0].weight.dtype))

    @staticmethod
    def waves(t: Tensor) -> Tensor:
        """[..., 256] in float32: cosines first, then sines."""
        exponents = torch.arange(TIME_FREQUENCIES, dtype=torch.float32, device=t.device) / TIME_FREQUENCIES
        angles = TIME_SCALE * t.float()[..., None] * torch.exp(-math.log(10000) * exponents)
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
        self.in_ln = operations.LayerNorm(width, eps=LAYER_NORM_EPS, **make)
        self.mlp = SwiGLU(width, hidden, operations=operations, **make)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 3 * width, **make))

    def modulation(self, y: Tensor) -> Modulation:
        """y [..., w]: SiLU(time + condition)."""
        shift, scale, gate = self.adaLN_modulation[1](y).chunk(3, dim=-1)
        return Modulation(shift, 1 + scale, gate)

    def forward(self, h: Tensor, modulation: Modulation) -> Tensor:
        shift, scale, gate = modulation
        return torch.addcmul(h, gate, self.mlp(torch.addcmul(shift, self.in_ln(h), scale)))


class FinalLayer(nn.Module):
    """Linear(LN(h) * (1 + scale) + shift); this LN has no weights of its own."""

    def __init__(
        self, width: int, channels: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        make = {"device": device, "dtype": dtype}
        self.linear = operations.Linear(width, channels, **make)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 2 * width, **make))

    def modulation(self, y: Tensor) -> Modulation:
        """y [..., w]: SiLU(time + condition)."""
        shift, scale = self.adaLN_modulation[1](y).chunk(2, dim=-1)
        return Modulation(shift, 1 + scale, None)

    def forward(self, h: Tensor, modulation: Modulation) -> Tensor:
        h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
        return self.linear(torch.addcmul(modulation.shift, h, modulation.scale))


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
        self.channels = channels
        self.time_embed = TimeEmbed(width, **make)
        self.cond_embed = operations.Linear(width, width, device=device, dtype=dtype)
        self.input_proj = operations.Linear(channels, width, device=device, dtype=dtype)
        self.res_blocks = nn.ModuleList([ResBlock(width, hidden, **make) for _ in range(depth)])
        self.final_layer = FinalLayer(width, channels, **make)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return self.velocity(x, self.modulations(self.time_embed(t, z.dtype), z))

    def modulations(self, time: Tensor, z: Tensor) -> Modulations:
        """time: embedded times, which broadcast against z."""
        y = F.silu(time + self.cond_embed(z))
        return tuple(layer.modulation(y) for layer in (*self.res_blocks, self.final_layer))

    def velocity(self, x: Tensor, modulations: Modulations) -> Tensor:
        h = self.input_proj(x)
        for layer, modulation in zip((*self.res_blocks, self.final_layer), modulations, strict=True):
            h = layer(h, modulation)
        return h


class FlowHead(nn.Module):
    """The vision head, which turns hidden states into conditions, and the velocity network with its solver."""

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
        self.vis_head = nn.Sequential(
            operations.Linear(hidden_size, width, **make),
            operations.LayerNorm(width, eps=LAYER_NORM_EPS, **make),
        )
        self.net = VelocityNet(channels, width, depth, hidden, operations=operations, **make)

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        factors: tuple[float, ...] = (1.0,),
        *,
        steps: int = 16,
        solver: Solver | None = None,
    ) -> Tensor:
        """Draw one latent a picture; who draws several in a row makes one `Sampler` for all. See `Sampler`."""
        sampler = Sampler(self.net, factors, steps, solver or Solver(), device=z.device, dtype=z.dtype)
        return sampler.draw(z, noise)


class Sampler:
    """Draws latents, one after the other, with one solver and one guidance.

    What is the same for every token is made here, once: the embedded times, and `factors`, those of the guidance rows'
    velocities (`Guidance.factors`), on their device. It belongs to the weights as they are now, so it is made anew for
    every drawing. `draw` never waits for the device, and what it does depends on shapes alone.
    """

    def __init__(
        self,
        net: VelocityNet,
        factors: tuple[float, ...],
        steps: int,
        solver: Solver,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.net, self.renorm, self.coefficients = net, solver.renorm, solver.coefficients(steps)
        times = solver.times(steps)[:-1].to(device)  # no velocity is asked for at t = 0
        self.time = net.time_embed(times, dtype)[:, None, None]  # (steps, 1, 1, w)
        self.factors = torch.tensor(factors, device=device)[:, None]

    def draw(self, z: Tensor, noise: Tensor) -> Tensor:
        """Draw one latent a picture.

        z      [B, g, w], conditions of the g guidance rows of each picture, the conditional row first
        noise  float32 [B, C], the start, already multiplied by the temperature
        Returns float32 [B, C]. The latent and its updates stay float32 in every precision.
        """
        x, before = noise.float(), None
        for modulations, (a, b) in zip(self._modulations(z), self.coefficients, strict=True):
            v = self._guided(self.net.velocity(x[:, None].to(z.dtype), modulations).float())
            x = x + a * v
            if b:
                x = x + b * before
            before = v
        return x

    def _modulations(self, z: Tensor) -> list[Modulations]:
        """Of every step: made for all of them at once, (steps, B, g, ...), then taken apart."""
        layers = self.net.modulations(self.time, z)
        return list(zip(*(_by_step(layer) for layer in layers), strict=True))

    def _guided(self, v: Tensor) -> Tensor:
        """Velocities of the guidance rows [B, g, C] -> [B, C]."""
        guided = (self.factors * v).sum(1)
        if not self.renorm:
            return guided
        length = v[:, 0].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return guided * (length + 1e-8).clamp(0, 1)


def _by_step(modulation: Modulation) -> list[Modulation]:
    shift, scale, gate = (m if m is None else m.unbind() for m in modulation)
    return [Modulation(shift[i], scale[i], gate and gate[i]) for i in range(len(shift))]
