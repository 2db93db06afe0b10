"""Features: pictures as Ming-UniVision sees, draws and hands them on.

A picture has two equivalent forms: compact latents, and the semantic tokens they expand to. `Features` carries both,
so that a round can follow a round without pixels and without expanding anything twice. What identifies a picture is
its latents, not its tokens: equality and hash go by them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .files import FileError, read_tensors, write_tensors

FILE_FORMAT = "ming features 1"
CHANGED = 0.15  # from which difference on a token counts as changed: docs/TRAINING.md says how it was chosen


def to_tokens(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w, C], row by row."""
    return latents.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h*w, C] -> [B, C, h, w]; the inverse of `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def digest_of(*parts: bytes) -> bytes:
    """32 bytes that identify these parts in this order."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def tensor_digest(tensor: Tensor) -> bytes:
    """32 bytes that identify shape and float32 values."""
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    return digest_of(str(tuple(values.shape)).encode(), values.numpy().tobytes())


class ByContent:
    """Equality and hash by content digest, for named tuples whose tensors cannot be compared by ==."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.digest() == other.digest()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return int.from_bytes(self.digest()[:8], "big", signed=True)


class _Features(NamedTuple):
    tokens: Tensor
    latents: Tensor
    grid: tuple[int, int]
    tokenizer: str
    depth: int = 0


class Features(ByContent, _Features):
    """A batch of B pictures of one grid, in host memory.

    tokens     float32 [B, h*w, D], semantic features, row by row
    latents    float32 [B, C, h, w], the normalised latents that `tokens` were expanded from
    grid       (h, w)
    tokenizer  fingerprint of the MingTok that both belong to
    depth      0 for a picture that was encoded, +1 for every drawing that lies behind it
    """

    __slots__ = ()

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    def pictures(self) -> list[Features]:
        """One Features of batch 1 for each picture."""
        return [
            self._replace(tokens=self.tokens[i : i + 1], latents=self.latents[i : i + 1]) for i in range(self.batch)
        ]

    def digest(self) -> bytes:
        return digest_of(tensor_digest(self.latents), f"{self.grid}|{self.tokenizer}|{self.depth}".encode())

    def __repr__(self) -> str:
        h, w = self.grid
        return f"Features({self.batch} x {h}x{w}, {self.tokens.shape[-1]} wide, depth {self.depth})"


def change(a: Features, b: Features) -> Tensor:
    """How much each token differs: 1 - cosine similarity of the semantic tokens, float32 [B, 1, h, w], 0 to 2.

    Raises ValueError unless both have one tokenizer, one grid and equally many pictures.
    """
    for what, of_a, of_b in (
        ("tokenizer", a.tokenizer[:12], b.tokenizer[:12]),
        ("grid", a.grid, b.grid),
        ("number of pictures", a.batch, b.batch),
    ):
        if of_a != of_b:
            raise ValueError(
                f"these features cannot be compared: their {what} differs ({of_a} and {of_b}); encode both with one "
                "MingTok and one detail, as many pictures of each"
            )
    difference = 1 - F.cosine_similarity(a.tokens, b.tokens, dim=-1)
    difference = difference.masked_fill((a.tokens == b.tokens).all(-1), 0)  # rounding would leave a little
    return to_grid(difference[..., None], a.grid).clamp(0, 2)


def principal_colours(features: Features) -> Tensor:
    """The three principal components of all tokens as red, green and blue: float32 [B, 3, h, w], 0..1."""
    tokens = features.tokens.flatten(0, 1).double()
    tokens = tokens - tokens.mean(0)
    _, axes = torch.linalg.eigh(tokens.T @ tokens)  # in rising order
    axes = axes[:, -3:].flip(1)
    # an axis has no sign of its own: point it to where its largest entry is positive
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    values = (tokens @ axes).float()
    low, high = values.amin(0), values.amax(0)
    colours = (values - low) / (high - low).clamp_min(1e-12)
    return to_grid(colours.unflatten(0, (features.batch, -1)), features.grid)


def save_features(features: Features, path: str | Path) -> None:
    """Write one safetensors file, whole or not at all. Tokens are kept too, so that no model is needed to read it."""
    write_tensors(
        path,
        {"tokens": features.tokens, "latents": features.latents},
        {"format": FILE_FORMAT, "tokenizer": features.tokenizer, "depth": features.depth},
    )


def load_features(path: str | Path) -> Features:
    """Read what `save_features` wrote. Raises FileError for a file that is damaged or of another kind."""
    tensors, about = read_tensors(path, FILE_FORMAT)
    try:
        tokens, latents = tensors["tokens"].float(), tensors["latents"].float()
        (b, n, _), (b2, _, h, w) = tokens.shape, latents.shape
        if (b, n) != (b2, h * w) or not (torch.isfinite(tokens).all() and torch.isfinite(latents).all()):
            raise ValueError(f"tokens {tuple(tokens.shape)} do not belong to latents {tuple(latents.shape)}")
        return Features(tokens, latents, (h, w), str(about["tokenizer"]), int(about["depth"]))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise FileError(f"{path}: not a whole features file ({error}); save the features again") from None
