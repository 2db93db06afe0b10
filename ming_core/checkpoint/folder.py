"""A checkpoint folder as one object, which reads config.json and the headers of the weights once, when first asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import MingTokConfig, UniVisionConfig
from ..mingtok import MingTok
from ..quantization import check_format, quantize
from ..univision import UniVision
from .config import CheckpointConfig, QuantizationOrigin, complete_config, mingtok_counts, require_counts
from .reader import REDOWNLOAD_FILE, CheckpointError, CheckpointReader


class Checkpoint:
    """A checkpoint folder: its config and headers, and what follows from them. Everything raises CheckpointError.

    The public functions of this package take one wherever they take a folder, so that who calls several of them has
    the files read once. It describes the folder as it was: open a new one when the files may have changed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def open(cls, folder: str | Path | Checkpoint) -> Checkpoint:
        """The checkpoint in a folder; nothing is read yet."""
        return folder if isinstance(folder, Checkpoint) else cls(folder)

    @cached_property
    def reader(self) -> CheckpointReader:
        return CheckpointReader(self.folder)

    @cached_property
    def config(self) -> CheckpointConfig:
        return CheckpointConfig(self.folder)

    @property
    def kind(self) -> str | None:
        """ "mingtok", "univision", or None for a folder that holds neither; reads config.json only."""
        try:
            return self.config.kind
        except CheckpointError:
            return None

    @cached_property
    def origin(self) -> QuantizationOrigin | None:
        """What a quantized folder was made from; None for another folder."""
        return self.config.origin

    @property
    def quantization(self) -> str | None:
        """The format of a quantized folder; None for another folder."""
        return self.origin.quantization if self.origin else None

    @cached_property
    def univision_config(self) -> tuple[UniVisionConfig, int | None]:
        """The config of a Ming-UniVision, and the inner width of its flow head where it is not the usual one."""
        return complete_config(self.config, self.reader)

    @cached_property
    def mingtok_config(self) -> MingTokConfig:
        """The config of the MingTok in a folder of either kind."""
        if self.config.kind == "univision":
            return self.univision_config[0].mingtok_config or MingTokConfig()
        return self.config.read(MingTokConfig)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights; a quantized folder has that of its original."""
        return self.origin.fingerprint if self.origin else self.reader.fingerprint()

    @cached_property
    def mingtok_fingerprint(self) -> str:
        """Identifies what latents and features depend on; the same for a MingTok alone and inside a Ming-UniVision."""
        if self.origin:
            return self.origin.mingtok_fingerprint
        return self.reader.mingtok_fingerprint(self.mingtok_config)

    # --- Its model, without memory --------------------------------------------------------------------------------

    def mingtok(self, dtype: torch.dtype, operations: Any = nn) -> MingTok:
        """The MingTok of a folder of either kind, on the meta device."""
        config = self.mingtok_config
        require_counts(self.config.path, mingtok_counts(config), self.reader.tensors)
        with self._sizes_that_can_be():
            return MingTok(config, operations=operations, device="meta", dtype=dtype)

    def univision(self, dtype: torch.dtype, operations: Any = nn) -> UniVision:
        """The network of a Ming-UniVision folder on the meta device; quantized if the folder is."""
        config, flow_hidden = self.univision_config
        with self._sizes_that_can_be():
            network = UniVision(config, flow_hidden=flow_hidden, operations=operations, device="meta", dtype=dtype)
        if self.quantization:
            quantize(network, self.quantization)
        return network

    @contextlib.contextmanager
    def _sizes_that_can_be(self) -> Iterator[None]:
        """Building a model on the meta device only fails where a product of sizes is beyond what torch can count."""
        try:
            yield
        except (RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{self.config.path}: its sizes are too large for any machine ({str(error).splitlines()[0][:200]}): "
                f"{REDOWNLOAD_FILE}"
            ) from None

    def check_quantization(self, wanted: str | None) -> str | None:
        """The format to quantize the weights to while they are loaded; None: they stay as they are stored.

        Raises ValueError for an unknown format, CheckpointError where the folder is quantized to another one.
        """
        if wanted is None:
            return None
        check_format(wanted)
        if self.quantization in (None, wanted):
            return None if self.quantization else wanted
        raise CheckpointError(
            f"{self.folder} is quantized to {self.quantization} already: load it without asking for {wanted}, or "
            "quantize the original checkpoint"
        )

    def bytes(self, kind: str, dtype: torch.dtype, quantization: str | None = None) -> int:
        """Memory that the weights take once loaded as a "mingtok" or "univision"."""
        if kind == "mingtok":
            return _bytes(self.mingtok(dtype))
        to = self.check_quantization(quantization)
        network = self.univision(dtype)
        if to:
            quantize(network, to)
        return _bytes(network)


def _bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
