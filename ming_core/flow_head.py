"""The rectified-flow head: draws one image token's latent from the language model's hidden state.

A small network gives the velocity v(x, t, z) of a latent x at time t under the condition z; an ODE solver carries
noise (t = 1) to data (t = 0). v points from noise towards data, so a step adds v * dt. Nearly all of the cost of
drawing is here, and what does not depend on x (time embeddings, condition, every block's modulation) is computed
once a token, for all steps in one product. Usable on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .transformer import LAYER_NORM_EPS, SwiGLU

TIME_FREQUENCIES = 128
TIME_SCALE = 1000.0  # the network sees 1000 * t


@dataclass(frozen=True)
class Guidance:
    """How far the picture is pulled towards the prompt (`text`) and the pictures before it (`image`).

    1 is no guidance. With a row that saw everything (c), one that saw no text (t) and one that saw neither (u):
    v = g_t v_c + (g_i - g_t) v_t + (1 - g_i) v_u. Without pictures in view only c and u exist:
    v = g_t v_c + (1 - g_t) v_u.
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

    `renorm` (scale the guided velocity down to the length of the conditional one) and `time_shift` (spend the steps
    nearer to the noise, above 1, or to the data, below) exist in the published code and are off by default there.
    """

    steps: int | None = None
    method: str = "euler"
    renorm: bool = False
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        if self.method != "euler":
            raise ValueError(f'solver method {self.method!r} is unknown: only "euler" is')
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"solver steps {self.steps}: give 1 or more, or None for the checkpoint's number")
        if not self.time_shift > 0:
            raise ValueError(f"solver time_shift {self.time_shift}: give a number above 0")

    def times(self, steps: int) -> Tensor:
        """The steps + 1 points in time, float32, from 1 (noise) down to 0 (data)."""
        u = torch.linspace(0, 1, steps + 1)
        # in this order of operations: the network sees 1000 * t, so that a last bit is felt
        return 1 - u / (u + self.time_shift - self.time_shift * u)


class Modulations(NamedTuple):
    """What all blocks add to and scale in the stream; depends on time and condition, not on x."""

    blocks: list[Tensor]  # of each block [..., 3w]: shift, scale, gate
    final: Tensor  # [..., 2w]: shift, scale

    def at(self, step: int) -> Modulations:
        return Modulations([m[step] for m in self.blocks], self.final[step])


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

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return h + gate * self.mlp(self.in_ln(h) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    """Linear(LN(h) * (1 + scale) + shift); this LN has no weights of its own."""

    def __init__(
        self, width: int, channels: int, *, operations: Any = nn, device: Any = None, dtype: torch.dtype | None = None
    ):
        super().__init__()
        make = {"device": device, "dtype": dtype}
        self.linear = operations.Linear(width, channels, **make)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(width, 2 * width, **make))

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.chunk(2, dim=-1)
        h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
        return self.linear(h * (1 + scale) + shift)


class VelocityNet(nn.Module):
    """v(x, t, z). x [..., C]; t broadcasts against z [..., w] without its last axis."""

    def __init__(
        self,
        channels: int,
        width: int = 3072,
        depth: int = 12,
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
        return self.velocity(x, self.modulations(t, z))

    def modulations(self, t: Tensor, z: Tensor) -> Modulations:
        y = self.time_embed(t, z.dtype) + self.cond_embed(z)
        return Modulations([b.adaLN_modulation(y) for b in self.res_blocks], self.final_layer.adaLN_modulation(y))

    def velocity(self, x: Tensor, modulations: Modulations) -> Tensor:
        h = self.input_proj(x)
        for block, modulation in zip(self.res_blocks, modulations.blocks, strict=True):
            h = block(h, modulation)
        return self.final_layer(h, modulations.final)


class FlowHead(nn.Module):
    """The vision head, which turns hidden states into conditions, and the velocity network with its solver."""

    def __init__(
        self,
        hidden_size: int,
        channels: int,
        width: int = 3072,
        depth: int = 12,
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
        """Draw one latent a picture.

        z        [B, g, w], conditions of the g guidance rows of each picture, the conditional row first
        noise    float32 [B, C], the start, already multiplied by the temperature
        factors  of the g rows' velocities (`Guidance.factors`)
        Returns float32 [B, C]. The latent and its updates stay float32 in every precision.
        """
        solver = solver or Solver()
        times = solver.times(steps).to(z.device)
        # (steps, B, g, ...): everything that does not depend on x, for all steps at once
        modulations = self.net.modulations(times[:-1, None, None], z[None])
        weights = torch.tensor(factors, device=z.device)[:, None]
        x = noise.float()
        for i in range(steps):
            v = self.net.velocity(x[:, None].to(z.dtype), modulations.at(i)).float()  # (B, g, C)
            guided = (weights * v).sum(1)
            if solver.renorm:
                guided = guided * (v[:, 0].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True) + 1e-8).clamp(
                    0, 1
                )
            x = x + guided * (times[i] - times[i + 1])
        return x
