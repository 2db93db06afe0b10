"""What a caller chooses for a round: how text is sampled, how an image is drawn. All are frozen and checked at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_tensor, described, real_number, whole_number
from .solver import Solver

STARTS = ("draw now", "model decides")
WHITE = 0.5  # a mask above this may change: soft edges of a brush count half way


@dataclass(frozen=True)
class Sampling:
    """How text tokens are chosen: the most likely one at temperature 0, else sampled from the nucleus of mass top_p."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _set(self, temperature=real_number("sampling.temperature", self.temperature, 0))
        _set(self, top_p=real_number("sampling.top_p", self.top_p, 0, 1))
        if not self.top_p:
            raise ValueError("sampling.top_p is 0: it must be above 0 and at most 1")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: how far an image is pulled towards the prompt, and towards its images and past.

    1 is no guidance. With a row that saw everything (c), one that saw no text (t) and one that saw neither (u):
    v = g_t v_c + (g_i - g_t) v_t + (1 - g_i) v_u. With no picture in the prompt and nothing before it only c and u
    exist: v = g_t v_c + (1 - g_t) v_u.
    """

    text: float = 3.0
    image: float = 1.1

    def __post_init__(self) -> None:
        _set(self, text=real_number("guidance.text", self.text, 0))
        _set(self, image=real_number("guidance.image", self.image, 0))

    def weights(self, rows: int) -> tuple[float, ...]:
        """Weights of the velocities of the rows [c], [c, u] or [c, u, t]."""
        if rows == 1:
            return (1.0,)
        if rows == 2:
            return (self.text, 1 - self.text)
        return (self.text, 1 - self.image, self.image - self.text)


@dataclass(frozen=True)
class TextOptions:
    """A round that answers in text.

    max_new_tokens  the answer ends after this many tokens at the latest
    sampling        greedy by default
    seed            for a temperature above 0
    return_logits   keep a row of logits for every emitted token
    """

    max_new_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    return_logits: bool = False

    def __post_init__(self) -> None:
        _set(self, max_new_tokens=whole_number("max_new_tokens", self.max_new_tokens, 1))
        _set(self, seed=whole_number("seed", self.seed))
        _require("sampling", self.sampling, Sampling)


@dataclass(frozen=True, eq=False)  # tensors cannot be compared by ==
class ImageOptions:
    """A round that draws images, one for each seed, in one pass over the weights.

    guidance        text 3.0, image 1.1 by default, as published
    solver          Euler with the checkpoint's number of steps by default
    temperature     the noise is multiplied by it
    start           "draw now": begin the image at once; "model decides": write until the model itself begins it
    max_new_tokens  of text, before and after the image together
    noise           float32 [seeds, tokens, C] in place of the seeded one (one more token an image is ignored)
    return_logits   keep a row of logits for every emitted token
    mask            where the newest image in view may change (bool, or float above 0.5); the rest of it is kept as it
                    is. [h, w], or [seeds, h, w] for one each, on the token grid or in pixels of any size: a token is
                    open when any of its pixels is. None: everything may change
    """

    seeds: Sequence[int] = (0,)  # kept as a tuple
    guidance: Guidance = field(default_factory=Guidance)
    solver: Solver = field(default_factory=Solver)
    temperature: float = 1.0
    start: str = "draw now"
    max_new_tokens: int = 64
    noise: Tensor | None = None
    return_logits: bool = False
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        _set(self, seeds=_whole_seeds(self.seeds))
        _require("guidance", self.guidance, Guidance)
        _require("solver", self.solver, Solver)
        _set(self, temperature=real_number("temperature", self.temperature, 0))
        if not isinstance(self.start, str) or self.start not in STARTS:
            raise ValueError(f"start is {described(self.start)}: choose one of {STARTS}")
        _set(self, max_new_tokens=whole_number("max_new_tokens", self.max_new_tokens, 1))
        if self.noise is not None:
            check_tensor("noise", self.noise)
        if self.mask is not None:
            _check_mask(self.mask, len(self.seeds))

    def open_tokens(self, grid: tuple[int, int]) -> Tensor:
        """The tokens of each image that may change, bool [seeds, h * w]; all of them without a mask."""
        batch = len(self.seeds)
        if self.mask is None:
            return torch.ones(batch, grid[0] * grid[1], dtype=torch.bool, device="cpu")
        white = (self.mask.float().cpu() > WHITE).float()
        white = white.reshape(-1, 1, *white.shape[-2:])
        # the largest of each token's pixels; a mask coarser than the grid covers several tokens with a pixel
        return F.adaptive_max_pool2d(white, grid).bool().flatten(1).expand(batch, -1)


def _set(options: object, **values: Any) -> None:
    """Put checked values into a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(options, name, value)


def _require(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {described(value)}: it must be a {kind.__name__}")


def _whole_seeds(seeds: object) -> tuple[int, ...]:
    if not isinstance(seeds, Iterable):
        raise ValueError(f"seeds is {described(seeds)}: give a list of whole numbers, one for every image to draw")
    whole = tuple(whole_number("a seed", seed) for seed in seeds)
    if not whole:
        raise ValueError("seeds is empty: give one for every image to draw")
    return whole


def _check_mask(mask: object, seeds: int) -> None:
    mask = check_tensor("mask", mask, "from 0 to 1")
    if mask.ndim not in (2, 3) or 0 in mask.shape:
        raise ValueError(f"mask is {list(mask.shape)}: it must be [height, width], or [images, height, width]")
    if mask.ndim == 3 and len(mask) not in (1, seeds):
        raise ValueError(f"{len(mask)} masks for {seeds} images: give one for all of them, or one for each")
    if not mask.isfinite().all():
        raise ValueError("the mask contains NaN or infinite values: give values from 0 to 1")
    if not all((one > WHITE).any() for one in (mask if mask.ndim == 3 else mask[None])):
        raise ValueError(
            "the mask is black everywhere, so that nothing may change: white marks what may change; invert the mask if "
            "it was meant the other way round, or disconnect it to let everything change"
        )
