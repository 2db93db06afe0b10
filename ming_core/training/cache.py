"""Pictures encoded once: their latents are kept in files, and in memory while a training runs.

A file is found by the content of the picture's own file, by the tokenizer, and by how the picture is made square, so
nothing stale is ever used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..features import digest_of, to_tokens
from ..files import FileError, read_tensors, write_tensors
from ..images import to_pixels
from ..mingtok import MingTok
from .data import read_image

FORMAT = "ming training image"
PLAIN = 12 / 255  # by which a patch of plain background differs at most from the background color


class EncodedImage(NamedTuple):
    """A picture as training needs it.

    latents   float32 [N, C], normalized, row by row
    occupied  bool [N]: tokens that show more than a plain background; all of them in most photographs
    """

    latents: Tensor
    occupied: Tensor


class ImageCache:
    """Encoded pictures of one tokenizer. folder: None keeps them in memory only."""

    def __init__(self, mingtok: MingTok, fit: str, folder: Path | None) -> None:
        self.mingtok, self.fit, self.folder = mingtok, fit, folder

    def load(
        self, paths: Iterable[Path], *, write: bool = True, on_image: Callable[[], None] | None = None
    ) -> dict[Path, EncodedImage]:
        """The encoded pictures of these files. write: store what is new."""
        encoded = {}
        for path in paths:
            encoded[path] = self._stored(path) or self._encode(path, write)
            if on_image:
                on_image()
        return encoded

    def file_of(self, path: Path) -> Path | None:
        """Where the encoded picture of a file is stored."""
        if self.folder is None:
            return None
        about = f"{self.mingtok.fingerprint}|{self.mingtok.native_side}|{self.fit}|{self.mingtok.dtype}"
        return self.folder / f"{digest_of(path.read_bytes(), about.encode()).hex()[:32]}.safetensors"

    def _stored(self, path: Path) -> EncodedImage | None:
        file = self.file_of(path)
        if file is None or not file.is_file():
            return None
        try:
            tensors, _ = read_tensors(file, FORMAT)
            return EncodedImage(tensors["latents"], tensors["occupied"].bool())
        except (FileError, KeyError):
            return None  # damaged: encoded again

    @torch.no_grad()
    def _encode(self, path: Path, write: bool) -> EncodedImage:
        pixels = to_pixels(read_image(path), self.mingtok.native_side, self.fit)
        latents = to_tokens(self.mingtok.encode(pixels))[0].cpu().contiguous()
        image = EncodedImage(latents, occupied(pixels, self.mingtok.patch_size))
        if write and (file := self.file_of(path)):
            write_tensors(file, {"latents": latents, "occupied": image.occupied.to(torch.uint8)}, {"format": FORMAT})
        return image


def occupied(pixels: Tensor, patch: int) -> Tensor:
    """Which patches of pixels [1, 3, S, S] differ from the most common color: bool [N], row by row."""
    image = pixels[0].float() / 2 + 0.5
    background = image.flatten(1).median(1).values[:, None, None]
    differs = ((image - background).abs() > PLAIN).any(0)
    return differs.unflatten(1, (-1, patch)).unflatten(0, (-1, patch)).any(3).any(1).flatten()
