"""ODE solvers for the flow head, as tables: when the velocity is evaluated, and how much each evaluation counts.

Every rule here has the form x_{i+1} = x_i + sum_j w_ij v_{i-j}: the newest velocity and some before it, weighted. So a
rule is nothing but its `Schedule`, and one loop (`flow_head.Sampler`) runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import real_number, whole_number

MAX_STEPS = 10_000  # the table of a schedule has a row for each; beyond it nothing is gained


class Schedule(NamedTuple):
    """A solver with its number of steps.

    times    float32 [steps], where the velocity is evaluated; from 1 (noise) down towards 0 (data)
    weights  for each step the weights of the velocities, the newest first: x grows by their weighted sum
    """

    # time 0 is not among them: the last velocity, at 1/steps if nothing is shifted, leads there
    times: Tensor
    weights: list[tuple[float, ...]]  # host numbers: using them transfers nothing to the device

    @property
    def order(self) -> int:
        """Velocities that are remembered, the newest among them."""
        return max(len(row) for row in self.weights)


def euler(lengths: list[float]) -> list[tuple[float, ...]]:
    """One velocity a step, as published."""
    # positive though time falls: the network's velocity points from noise to data
    return [(h,) for h in lengths]


def adams_bashforth_2(lengths: list[float]) -> list[tuple[float, ...]]:
    """The line through the last two velocities, integrated over a step that need not be as long as the one before.

    The first step is one of Euler. Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, III.5.
    """
    # the integral over s = 0..h of v + (v - v_before) * s / before; 3/2 h and -1/2 h for steps of one length
    later = [(h + h * h / (2 * before), -h * h / (2 * before)) for before, h in pairwise(lengths)]
    # one step with an error of second order, h squared, does not lower the order of the whole
    return [(lengths[0],), *later]


# every velocity reads 1.81 GB of weights in bf16, so there are only rules that need a single new one a step
RULES: dict[str, Callable[[list[float]], list[tuple[float, ...]]]] = {"euler": euler, "ab2": adams_bashforth_2}
METHODS = tuple(RULES)


@dataclass(frozen=True)
class Solver:
    """The ODE solver of a drawing. `steps` None: the checkpoint's own number.

    `method`: "euler", or "ab2", the Adams-Bashforth rule of second order. Both evaluate the network once a step.
    `renorm` (scale the guided velocity down to the length of the conditional one) and `time_shift` (spend the steps
    nearer to the noise, above 1, or to the data, below) exist in the published code and are off by default there.
    Raises ValueError for a method, number of steps or shift that is not possible.
    """

    steps: int | None = None  # published: 16, which no tensor's shape tells
    method: str = "euler"  # on the built-in model, 12 steps of ab2 are as accurate as 16 of this
    renorm: bool = False  # published as cfg_renorm "channel"
    time_shift: float = 1.0  # published as time_shifting_factor

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"solver method {self.method!r} is unknown: choose one of {METHODS}")
        if self.steps is not None:  # else the checkpoint's number
            object.__setattr__(self, "steps", whole_number("solver steps", self.steps, 1, MAX_STEPS))
        object.__setattr__(self, "time_shift", real_number("solver time_shift", self.time_shift, 0))
        if not self.time_shift:
            raise ValueError("solver time_shift is 0: it must be above 0")

    def times(self, steps: int) -> Tensor:
        """The steps + 1 points in time, float32, from 1 (noise) down to 0 (data)."""
        u = torch.linspace(0, 1, steps + 1, device="cpu")
        # in this order of operations: the network sees 1000 * t, so the last bit matters
        return 1 - u / (u + self.time_shift - self.time_shift * u)

    def schedule(self, steps: int) -> Schedule:
        """The table of this rule. Raises ValueError where `time_shift` leaves steps of no length."""
        times = self.times(steps)
        # differences of the rounded times, so that the steps end where the network is told they do
        lengths = (times[:-1] - times[1:]).tolist()
        # strong shifts round neighbouring times to one; Euler adds nothing then, but ab2 divides by the step before
        if self.method != "euler" and not all(lengths):
            raise ValueError(f"solver time_shift {self.time_shift} leaves steps of no length: choose one nearer to 1")
        return Schedule(times[:-1], RULES[self.method](lengths))
