"""The kinds of stages: MingTok alone, its pixel decoder alone, and everything else around a MingTok."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ming_core.checkpoint import (
    checkpoint_kind,
    load_mingtok,
    load_univision,
    save_mingtok,
    save_univision,
    tokenizer_files,
)
from ming_core.config import MingTokConfig
from ming_core.images import from_uint8, psnr, to_images
from ming_core.mingtok import MingTok
from ming_core.prompts import ChatFormat
from ming_core.univision import UniVision

from .objectives import JointLoss, TokenizerLoss, TokenizerWeights, initialise
from .pictures import picture_batch
from .probe import probe
from .recipe import MINGTOK, VOCABULARY, Stage, univision_config
from .sequences import Batch, DialogueData
from .tokenizer import make_tokenizer

UNSEEN = 96  # evaluation pictures of each kind
PIXEL_NOISE = 0.2  # on the latents while the pixel decoder is trained alone: about what drawn ones are wrong by
SAMPLE = 256  # pictures that mean and scaling factor of the latents are measured on


def objective(
    stage: Stage, start: Path | None, device: torch.device | str = "cpu"
) -> MingTokStage | PixelStage | JointStage:
    """What a stage trains, from the weights in the folder `start`; None: from nothing.

    A joint stage takes its MingTok from `start`, and the rest too where the folder has it. The other stages keep that
    rest beside what they train; after a new MingTok it must be taught again. Raises ValueError for a stage that needs a
    folder and has none.
    """
    if start is not None and checkpoint_kind(start) == "univision":
        tokenizer = tokenizer_files(start)
        model = load_univision(start)
        if stage.trains == "joint":
            return JointStage(stage, model, tokenizer, device)
        kind = PixelStage if stage.trains == "pixel decoder" else MingTokStage
        return kind(stage, model.mingtok, device, model, tokenizer)
    generator = torch.Generator().manual_seed(stage.seed)
    if stage.trains == "mingtok":
        mingtok = MingTok(MINGTOK) if start is None else load_mingtok(start)
        if start is None:
            initialise(mingtok, generator)
        return MingTokStage(stage, mingtok, device)
    if start is None:
        raise ValueError(f"stage {stage.name!r} needs a MingTok: train the first stage, or name a folder to start from")
    mingtok = load_mingtok(start)
    if stage.trains == "pixel decoder":
        return PixelStage(stage, mingtok, device)
    tokenizer = make_tokenizer(VOCABULARY)
    chat = ChatFormat(tokenizer["tokenizer.json"])
    model = UniVision(univision_config(mingtok.config, chat, VOCABULARY), chat)
    initialise(model, generator)
    model.mingtok = mingtok
    return JointStage(stage, model, tokenizer, device)


@dataclass(frozen=True)
class PictureData:
    """The stream of batches of a MingTok stage: pictures, and the labels of their patches."""

    batch: int
    things: tuple[int, int]
    patches: int  # along a side

    def __call__(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pictures, labels = picture_batch(rng, self.batch, self.things, patches=self.patches)
        return torch.from_numpy(pictures), {name: torch.from_numpy(values) for name, values in labels.items()}


class MingTokStage:
    """Trains a MingTok on pictures; `whole`: the model that it is part of, with its tokenizer files, if it is."""

    def __init__(
        self,
        stage: Stage,
        mingtok: MingTok,
        device: torch.device | str = "cpu",
        whole: UniVision | None = None,
        tokenizer: dict[str, str] | None = None,
    ) -> None:
        self.whole, self.tokenizer = whole, tokenizer
        self.grid = mingtok.config.low_level_encoder.grid
        self.data = PictureData(stage.batch, stage.things, self.grid)
        self.device = device
        # The stage works on raw latents; how they are normalised is measured when the weights are written.
        mingtok.config = replace(mingtok.config, mean=0.0, scaling_factor=1.0)
        module = TokenizerLoss(mingtok)
        initialise(module.reader, torch.Generator().manual_seed(stage.seed))
        self.module = module.to(device)

    def loss(self, batch: tuple[Tensor, dict[str, Tensor]], generator: torch.Generator) -> dict[str, Tensor]:
        pictures, labels = batch
        labels = {name: values.to(self.device) for name, values in labels.items()}
        return self.module(from_uint8(pictures.to(self.device)), labels, generator)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """PSNR on unseen scenes and on other kinds of pictures; how many labels are read right on patches of things."""
        tok, figures = self.module.mingtok, {}
        for kind in ("scene", "region", "grey", "pixelated"):
            pictures, labels = picture_batch(np.random.default_rng(1), UNSEEN, (1, 3), "eval", kind, self.grid)
            pixels = from_uint8(torch.from_numpy(pictures)).to(self.device)
            semantic = tok.semantic_decoder(tok.low_level_encoder(pixels)[:, :-1])
            drawn = tok.assemble(tok.patches(semantic), (self.grid, self.grid))
            figures[f"psnr_{kind}"] = fmean(map(psnr, to_images(drawn), to_images(pixels)))
            if kind == "scene":
                for name, logits in self.module.read(semantic).items():
                    known = torch.from_numpy(labels[name]).to(self.device)
                    figures[f"read_{name}"] = float((logits.argmax(-1) == known)[known > 0].float().mean())
        return figures

    def publish(self, folder: Path) -> None:
        """A MingTok alone in float32: stages to come train on it; a whole model in half of it, as it is committed."""
        tok = self.module.mingtok
        raw_config = tok.config
        try:
            tok.config = self.measured()
            if self.whole is None:
                save_mingtok(tok, folder)
            else:
                save_univision(self.whole, folder, self.tokenizer, dtype=torch.float16)
        finally:
            tok.config = raw_config

    @torch.no_grad()
    def measured(self) -> MingTokConfig:
        """The config with the mean and standard deviation of the latents of a sample of training scenes."""
        tok = self.module.mingtok
        pictures = torch.from_numpy(picture_batch(np.random.default_rng(2), SAMPLE, (1, 3), kind="scene")[0])
        raw = torch.cat([tok.low_level_encoder(from_uint8(p).to(self.device))[:, :-1] for p in pictures.split(32)])
        return replace(tok.config, mean=float(raw.mean()), scaling_factor=float(raw.std()))


class PixelStage(MingTokStage):
    """Trains the pixel decoder of a MingTok on the features that it is given, which stay as they are.

    So latents, features and a language model that was taught on them keep their meaning: pictures only become sharper.
    """

    def __init__(self, stage: Stage, mingtok: MingTok, *others: Any) -> None:
        config = mingtok.config
        super().__init__(stage, mingtok, *others)
        mingtok.config = config  # how latents are normalised stays as it is, too
        self.module.weights = TokenizerWeights(labels=0.0, size=0.0, noise=PIXEL_NOISE, masked=0.0)
        for frozen in (mingtok.low_level_encoder, mingtok.semantic_decoder, self.module.reader):
            frozen.requires_grad_(False)

    def measured(self) -> MingTokConfig:
        return self.module.mingtok.config


class JointStage:
    """Trains the language model, the flow head and the projection on dialogues; MingTok stays as it is."""

    def __init__(
        self, stage: Stage, model: UniVision, tokenizer: dict[str, str], device: torch.device | str = "cpu"
    ) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.data = DialogueData(
            tokenizer["tokenizer.json"],
            model.config.drawing_grid,
            stage.batch,
            stage.things,
            dict(stage.tasks),
            stage.rounds,
            stage.quizzes,
            stage.several,
        )
        self.things = stage.things
        self.module: nn.Module = JointLoss(model).to(device)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        return self.module(batch.to(self.device), generator)

    def evaluate(self) -> dict[str, float]:
        return probe(self.module.model, self.things)

    def publish(self, folder: Path) -> None:
        save_univision(self.module.model, folder, self.tokenizer, dtype=torch.float16)
