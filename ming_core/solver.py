"""ODE solvers for the flow head, as tables: when the velocity is evaluated, and how much each evaluation counts.

Every rule here has the form x_{i+1} = x_i + sum_j w_ij v_{i-j} + m_i (x_i - x_{i-1}): the newest velocity and some
before it, weighted, and a part of the last change. So a rule is nothing but its `Schedule`, and one loop
(`flow_head.Sampler`) runs them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import real_number, whole_number

MAX_STEPS = 10_000  # the table of a schedule has a row for each; beyond it nothing is gained


class Rule(NamedTuple):
    """The coefficients of a solver, a row for each step.

    weights   of the velocities, the newest first: x grows by their weighted sum
    momentum  the part of x's last change by which it changes once more
    """

    weights: list[tuple[float, ...]]  # host numbers: using them transfers nothing to the device
    momentum: list[float]


class Schedule(NamedTuple):
    """A solver with its number of steps.

    times  float32 [steps], where the velocity is evaluated; from 1 (noise) down towards 0 (data)
    """

    # time 0 is not among them: the last velocity, at 1/steps for equal steps, leads there
    times: Tensor
    rule: Rule

    @property
    def order(self) -> int:
        """Velocities that are remembered, the newest among them."""
        return max(len(row) for row in self.rule.weights)


def euler(times: Tensor) -> Rule:
    """One velocity a step, as published."""
    # positive though time falls: the network's velocity points from noise to data
    lengths = (times[:-1] - times[1:]).tolist()
    return Rule([(h,) for h in lengths], [0.0] * len(lengths))


def adams_bashforth_2(times: Tensor) -> Rule:
    """The line through the last two velocities, integrated over a step that need not be as long as the one before.

    The first step is one of Euler. Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, III.5.
    """
    lengths = (times[:-1] - times[1:]).tolist()
    # the integral over s = 0..h of v + (v - v_before) * s / before; 3/2 h and -1/2 h for steps of one length
    later = [(h + h * h / (2 * before), -h * h / (2 * before)) for before, h in pairwise(lengths)]
    # one step with an error of second order, h squared, does not lower the order of the whole
    return Rule([(lengths[0],), *later], [0.0] * len(lengths))


def data_adams_bashforth_2(times: Tensor) -> Rule:
    """The line through the last two predictions of the data, integrated exactly.

    A velocity predicts the data at D = x + t v, where its straight path ends; with it the flow is d(x/t) / d(1/t) = D.
    Near the data velocities change fast and predictions hardly, so these allow longer steps. They are taken to be
    linear in t, for which the integral is

        x_end = end/t x + a D + b D_before,  a + b = 1 - end/t,  b = (end ln(t/end) - (t - end)) / (t_before - t)

    The first step has no prediction before it. The last one is of first order too: so short a step (see `data_times`)
    needs no more, and with few steps the line to t = 0 leads too far.

    Source: exponential Adams-Bashforth with polynomials in t (tAB-DEIS), Zhang and Chen, Fast Sampling of Diffusion
    Models with Exponential Integrator, 2023; here for data predictions, as in DPM-Solver++ (Lu et al., 2022). Its 2M
    has them linear in log((1 - t)/t), where few steps extrapolate much farther.
    """
    points = times.tolist()
    weights: list[tuple[float, ...]] = [(points[0] - points[1],)]
    momentum = [0.0]
    for before, t, end in zip(points, points[1:], points[2:], strict=False):
        b = (end * math.log(t / end) - (t - end)) / (before - t) if end else 0.0
        # with D = x + t v: the velocities' parts, and what is left of x and x_before is a part of their difference
        weights.append(((1 - end / t - b) * t, b * before))
        momentum.append(-b)
    return Rule(weights, momentum)


def equal_times(steps: int) -> Tensor:
    """How much of the way lies behind each of the steps + 1 points in time, float32, for steps of one length."""
    return torch.linspace(0, 1, steps + 1, device="cpu")


def data_times(steps: int) -> Tensor:
    """As `equal_times`, with steps that become shorter towards the data.

    What is left of the way is (1 - i/n)^p with p = 2 - 1/n: near 2, the quadratic times of Song et al., Denoising
    Diffusion Implicit Models, 2021, with which a last step of first order does not lower the order of the whole; less
    for few steps, the first of which would become too long.
    """
    return 1 - (1 - torch.linspace(0, 1, steps + 1, dtype=torch.float64, device="cpu")) ** (2 - 1 / steps)


class Method(NamedTuple):
    """A rule, and the points in time that suit it.

    rule   from the steps + 1 points in time, float32, to the coefficients
    times  from a number of steps to the share of the way behind these points
    """

    rule: Callable[[Tensor], Rule]
    times: Callable[[int], Tensor] = equal_times


# every velocity reads 1.81 GB of weights in bf16, so there are only rules that need a single new one a step
RULES = {
    "euler": Method(euler),
    "ab2": Method(adams_bashforth_2),
    "data_ab2": Method(data_adams_bashforth_2, data_times),
}
METHODS = tuple(RULES)


@dataclass(frozen=True)
class Solver:
    """The ODE solver of a drawing. `steps` None: the checkpoint's own number.

    `method`: "euler"; "ab2", the Adams-Bashforth rule of second order; or "data_ab2", the same for predictions of the
    data, with shorter steps near to it. All evaluate the network once a step.
    `renorm` (scale the guided velocity down to the length of the conditional one) and `time_shift` (spend the steps
    nearer to the noise, above 1, or to the data, below) exist in the published code and are off by default there.
    Raises ValueError for a method, number of steps or shift that is not possible.
    """

    steps: int | None = None  # published: 16, which no tensor's shape tells
    method: str = "euler"  # on the built-in model, 12 steps of ab2 or 8 of data_ab2 are as accurate as 16 of this
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
        u = RULES[self.method].times(steps)
        # in this order of operations: the network sees 1000 * t, so the last bit matters
        return (1 - u / (u + self.time_shift - self.time_shift * u)).float()

    def schedule(self, steps: int) -> Schedule:
        """The table of this rule. Raises ValueError where `time_shift` leaves steps of no length."""
        times = self.times(steps)
        # made from the rounded times, so that the steps end where the network is told they do
        # strong shifts round neighbouring times to one; Euler adds nothing then, but the others divide by that length
        if self.method != "euler" and not (times[:-1] > times[1:]).all():
            raise ValueError(f"solver time_shift {self.time_shift} leaves steps of no length: choose one nearer to 1")
        return Schedule(times[:-1], RULES[self.method].rule(times))
