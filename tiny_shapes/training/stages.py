"""The kinds of stages: MingTok alone, its pixel decoder alone, and everything else around a MingTok.

A stage has the members of `loop.Objective`. `evaluate` and `export` take the module with the weights to use, which is
a copy of the trained one with averaged weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from ming_core import Engine, MingTok, UniVision, load_mingtok, load_univision, save_mingtok, save_univision
from ming_core.checkpoint import checkpoint_kind, tokenizer_files
from ming_core.config import MingTokConfig
from ming_core.images import from_uint8, psnr, to_images
from ming_core.prompts import ChatFormat

from ..evaluation.quick import quick_evaluation
from .data import DialogueData, ImageData
from .images import image_batch
from .initialization import initialize
from .joint_loss import JointLoss, JointWeights
from .mingtok_loss import MingTokLoss, MingTokWeights
from .packing import Batch
from .recipe import MINGTOK, VOCABULARY, Stage, univision_config
from .text_tokenizer import normalized, train_text_tokenizer

UNSEEN = 96  # evaluation images of each kind
PIXEL_NOISE = 0.2  # on the latents while the pixel decoder is trained alone: about the error of drawn ones
SAMPLE = 256  # images that the mean and the scaling factor of the latents are measured on

TokenizerFiles = dict[str, str]  # file name -> content


def make_objective(
    stage: Stage, start: Path | None, device: torch.device | str = "cpu"
) -> MingTokStage | PixelStage | JointStage:
    """What a stage trains, from the weights in the folder `start`; None: from nothing.

    A joint stage takes its MingTok from `start`, and the rest too if the folder has it. The other stages keep that rest
    beside what they train; with a new MingTok it must be trained again. Raises ValueError if a stage needs a folder.
    """
    if start is not None and checkpoint_kind(start) == "univision":
        tokenizer = tokenizer_files(start)
        engine = load_univision(start)
        if stage.trains == "joint":
            tokenizer = normalized(tokenizer)  # of a folder from before, it may have no normalizer yet
            chat = ChatFormat.from_json(tokenizer["tokenizer.json"])
            return JointStage(stage, Engine(engine.network, chat), tokenizer, device)
        kind = PixelStage if stage.trains == "pixel decoder" else MingTokStage
        return kind(stage, engine.mingtok, device, engine, tokenizer)
    generator = torch.Generator().manual_seed(stage.seed)
    if start is None:
        if stage.trains != "mingtok":
            raise ValueError(
                f"stage {stage.name!r} needs a MingTok: train the first stage, or name a folder with --start"
            )
        mingtok = MingTok(MINGTOK)
        initialize(mingtok, generator)
        return MingTokStage(stage, mingtok, device)
    mingtok = load_mingtok(start)
    if stage.trains == "mingtok":
        return MingTokStage(stage, mingtok, device)
    if stage.trains == "pixel decoder":
        return PixelStage(stage, mingtok, device)
    tokenizer = normalized(train_text_tokenizer(VOCABULARY))
    chat = ChatFormat.from_json(tokenizer["tokenizer.json"])
    network = UniVision(univision_config(mingtok.config, chat, VOCABULARY))
    initialize(network, generator)
    network.mingtok = mingtok
    return JointStage(stage, Engine(network, chat), tokenizer, device)


class MingTokStage:
    """Trains a MingTok on images. `whole`: the model that it is part of, if any, with its tokenizer files."""

    def __init__(
        self,
        stage: Stage,
        mingtok: MingTok,
        device: torch.device | str = "cpu",
        whole: Engine | None = None,
        tokenizer: TokenizerFiles | None = None,
    ) -> None:
        self.whole, self.tokenizer = whole, tokenizer or {}
        self.grid = mingtok.config.low_level_encoder.grid
        self.data = ImageData(stage.batch, stage.objects, self.grid)
        self.device = device
        # The stage works on raw latents; their mean and scaling factor are measured for every export.
        mingtok.config = replace(mingtok.config, mean=0.0, scaling_factor=1.0)
        module = MingTokLoss(mingtok)
        initialize(module.label_head, torch.Generator().manual_seed(stage.seed))
        self.module: MingTokLoss = module.to(device)
        self.parallel: nn.Module = self.module

    def loss(self, batch: tuple[Tensor, dict[str, Tensor]], generator: torch.Generator) -> dict[str, Tensor]:
        images, labels = batch
        labels = {name: values.to(self.device) for name, values in labels.items()}
        return self.parallel(from_uint8(images.to(self.device)), labels, generator)

    @torch.no_grad()
    def evaluate(self, module: MingTokLoss) -> dict[str, float]:
        """PSNR on unseen scenes and on other kinds of images, and the share of right labels on patches of objects."""
        tok, figures = module.mingtok, {}
        for kind in ("scene", "region", "grey", "pixelated"):
            images, labels = image_batch(np.random.default_rng(1), UNSEEN, (1, 3), "eval", kind, self.grid)
            pixels = from_uint8(torch.from_numpy(images)).to(self.device)
            semantic = tok.semantic_decoder(tok.low_level_encoder(pixels)[:, :-1])
            decoded = tok.assemble(tok.patches(semantic), (self.grid, self.grid))
            figures[f"psnr_{kind}"] = fmean(map(psnr, to_images(decoded), to_images(pixels)))
            if kind == "scene":
                for name, logits in module.label_logits(semantic).items():
                    known = torch.from_numpy(labels[name]).to(self.device)
                    figures[f"read_{name}"] = float((logits.argmax(-1) == known)[known > 0].float().mean())
        return figures

    def export(self, module: MingTokLoss, folder: Path) -> None:
        """Write a MingTok alone in float32, for the stages to come; a whole model in bfloat16, as it is committed."""
        mingtok = copy.deepcopy(module.mingtok)
        mingtok.config = self.measured_config(module.mingtok)
        if self.whole is None:
            save_mingtok(mingtok, folder)
        else:
            self.whole.network.mingtok = mingtok
            save_univision(self.whole, folder, self.tokenizer, dtype=torch.bfloat16)

    @torch.no_grad()
    def measured_config(self, mingtok: MingTok) -> MingTokConfig:
        """The config with the mean and standard deviation of the latents of a sample of training scenes."""
        images = torch.from_numpy(image_batch(np.random.default_rng(2), SAMPLE, (1, 3), kind="scene")[0])
        raw = torch.cat([mingtok.low_level_encoder(from_uint8(p).to(self.device))[:, :-1] for p in images.split(32)])
        return replace(mingtok.config, mean=float(raw.mean()), scaling_factor=float(raw.std()))


class PixelStage(MingTokStage):
    """Trains the pixel decoder of a MingTok on the features that it is given, which stay as they are.

    So latents, features and a language model that was trained on them keep their meaning; images only become sharper.
    """

    def __init__(
        self,
        stage: Stage,
        mingtok: MingTok,
        device: torch.device | str = "cpu",
        whole: Engine | None = None,
        tokenizer: TokenizerFiles | None = None,
    ) -> None:
        config = mingtok.config
        super().__init__(stage, mingtok, device, whole, tokenizer)
        mingtok.config = config  # mean and scaling factor of the latents stay as they are, too
        self.module.weights = MingTokWeights(labels=0.0, latents=0.0, noise=PIXEL_NOISE, masked_images=0.0)
        for frozen in (mingtok.low_level_encoder, mingtok.semantic_decoder, self.module.label_head):
            frozen.requires_grad_(False)

    def measured_config(self, mingtok: MingTok) -> MingTokConfig:
        return mingtok.config


class JointStage:
    """Trains the language model, the flow head and the projection on dialogues; MingTok stays as it is."""

    def __init__(
        self, stage: Stage, engine: Engine, tokenizer: TokenizerFiles, device: torch.device | str = "cpu"
    ) -> None:
        self.chat, self.tokenizer, self.objects, self.device = engine.chat, tokenizer, stage.objects, device
        self.data = DialogueData(
            tokenizer["tokenizer.json"],
            engine.config.drawing_grid,
            stage.batch,
            stage.objects,
            dict(stage.tasks),
            stage.rounds,
            stage.quizzes,
            stage.several,
            stage.chains,
            stage.regions,
            stage.cluttered,
            stage.alike,
        )
        weights = JointWeights(origins=stage.origins, own=stage.own)
        self.module: JointLoss = JointLoss(engine.network, weights).to(device)
        self.parallel: nn.Module = self.module

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        return self.parallel(batch.to(self.device), generator)

    def evaluate(self, module: JointLoss) -> dict[str, float]:
        """The quick evaluation."""
        return quick_evaluation(Engine(module.network, self.chat), self.objects)

    def export(self, module: JointLoss, folder: Path) -> None:
        """Write the whole model in bfloat16, as it is committed."""
        save_univision(Engine(module.network, self.chat), folder, self.tokenizer, dtype=torch.bfloat16)
