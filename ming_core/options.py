"""What a caller chooses for a round: how text is sampled, how an image is drawn. All are frozen and checked at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .solver import Solver

STARTS = ("draw now", "model decides")
WHITE = 0.5  # a mask above this may change: soft edges of a brush count half way


@dataclass(frozen=True)
class Sampling:
    """How text tokens are chosen: the most likely one at temperature 0, else sampled from the nucleus of mass top_p."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"sampling.temperature is {self.temperature}: it must be a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}: it must be above 0 and at most 1")


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
        for name in ("text", "image"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"guidance.{name} is {value}: it must be a number of at least 0")

    def weights(self, rows: int) -> tuple[float, ...]:
        """Weights of the velocities of the rows [c], [c, u] or [c, u, t]."""
        if rows == 1:
            return (1.0,)
        if rows == 2:
            return (self.text, 1 - self.text)
        return (self.text, 1 - self.image, self.image - self.text)


def _check_max_new_tokens(value: int) -> None:
    if value < 1:
        raise ValueError(f"max_new_tokens is {value}: it must be at least 1")


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
        _check_max_new_tokens(self.max_new_tokens)


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

    seeds: tuple[int, ...] = (0,)
    guidance: Guidance = field(default_factory=Guidance)
    solver: Solver = field(default_factory=Solver)
    temperature: float = 1.0
    start: str = "draw now"
    max_new_tokens: int = 64
    noise: Tensor | None = None
    return_logits: bool = False
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds is empty: give one for every image to draw")
        if self.start not in STARTS:
            raise ValueError(f"start is {self.start!r}: choose one of {STARTS}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}: it must be a number of at least 0")
        _check_max_new_tokens(self.max_new_tokens)
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


def _check_mask(mask: Tensor, seeds: int) -> None:
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
