"""The two designs, which differ in one thing: as what an image that is drawn enters the language model.

*unified*   as semantic features, like one that is seen. What was drawn can be seen at once.
*separate*  as its latents, through a projection of its own. To be seen, an image that was drawn must be decoded to
            pixels, encoded and attached: that is how dialogues go on here, in training and in use.

Sizes, data, seeds and losses are the same. The projection of latents is as deep as that of features.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ming_core import Engine, MingTok, UniVision, load_mingtok
from ming_core.checkpoint import tokenizer_files
from ming_core.config import UniVisionConfig
from ming_core.kv_cache import LayerCaches
from ming_core.mingtok import SemanticStream
from ming_core.prompts import ChatFormat

from ..training.data import DialogueData
from ..training.initialization import initialize
from ..training.joint_loss import JointLoss
from ..training.packing import Batch
from ..training.recipe import VOCABULARY, Stage, univision_config
from ..training.stages import JointStage
from ..training.text_tokenizer import normalized
from ..world import Dialogue
from .figures import figures_of

DESIGNS = ("unified", "separate")

# Stands in the last channel of tokens that are latents; exact in every float type, and far from any feature.
TAG = 32768.0


def tagged(latents: Tensor, width: int) -> Tensor:
    """Normalised latents [..., C] as tokens [..., D] that say what they are."""
    tokens = F.pad(latents, (0, width - latents.shape[-1]))
    tokens[..., -1] = TAG
    return tokens


class LatentStream(SemanticStream):
    """Hands on the latents of drawn tokens, where a SemanticStream expands them to features."""

    def __init__(self, mingtok: MingTok) -> None:
        self.mingtok, self.caches = mingtok, LayerCaches(())

    def append(self, latents: Tensor) -> Tensor:
        return tagged(latents.float(), self.mingtok.config.semantic_decoder.embed_dim)


class SeparateMingTok(MingTok):
    """A MingTok whose semantic decoder serves images that are seen alone."""

    def stream(self, rows: int, capacity: int) -> SemanticStream:
        return LatentStream(self)


class SeparateUniVision(UniVision):
    """A UniVision with a projection of its own for the latents of drawn images."""

    def __init__(self, config: UniVisionConfig) -> None:
        super().__init__(config)
        self.mingtok = SeparateMingTok(config.mingtok_config)
        self.channels = self.mingtok.config.semantic_decoder.in_dim
        hidden = config.llm_config.hidden_size
        layers: list[nn.Module] = [nn.Linear(self.channels, hidden)]
        for _ in range(config.mlp_depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden, hidden)]
        self.latent_proj = nn.Sequential(*layers)

    def project(self, tokens: Tensor) -> Tensor:
        """Semantic features and tagged latents [..., D] -> the language model's embeddings [..., H]."""
        tokens = tokens.to(self.device, self.dtype)
        drawn = tokens[..., -1:] == TAG
        seen = torch.where(drawn, torch.zeros_like(tokens), tokens)
        return torch.where(drawn, self.latent_proj(tokens[..., : self.channels]), self.linear_proj(seen))


class SeparateLoss(JointLoss):
    """The loss with drawn images fed as latents: those, errors included, that become features in the unified design."""

    def features(self, latents: Tensor, batch: Batch) -> Tensor:
        features = super().features(latents, batch)
        return torch.where(batch.drawn[:, None, None], tagged(latents, features.shape[-1]), features)


class SeenAgain(DialogueData):
    """Dialogues in which an image that was drawn is attached, as it is seen, when a later round is about it."""

    def dialogue(self, rng: np.random.Generator) -> Dialogue:
        return seen_again(super().dialogue(rng))


def seen_again(dialogue: Dialogue) -> Dialogue:
    """The dialogue with every drawn image attached where a round first is about it."""
    tasks = list(dialogue.tasks)
    drawn: np.ndarray | None = None  # the newest image, while it has not been seen
    for i, task in enumerate(tasks):
        if task.attached is not None:
            drawn = None
        elif drawn is not None and task.source_scene is not None:
            tasks[i], drawn = replace(task, attached=drawn), None
        if task.target is not None:
            drawn = task.target
    return Dialogue(tuple(tasks))


class AblationStage(JointStage):
    """Trains one design; MingTok stays as it is."""

    def __init__(self, stage: Stage, design: str, engine: Engine, tokenizer: dict[str, str], device: str) -> None:
        super().__init__(stage, engine, tokenizer, device)
        if design == "separate":
            self.data = SeenAgain(**{field.name: getattr(self.data, field.name) for field in fields(self.data)})
            self.module = SeparateLoss(engine.network, self.module.weights).to(device)
            self.parallel = self.module

    def evaluate(self, module: JointLoss) -> dict[str, float]:
        return figures_of(Engine(module.network, self.chat), module, self.data, isinstance(self.data, SeenAgain))

    def export(self, module: JointLoss, folder: Path) -> None:
        """Write nothing: figures are all that is wanted of these models."""


def ablation_stage(stage: Stage, design: str, start: Path, device: str = "cpu") -> AblationStage:
    """A design with random weights around the MingTok, and with the tokenizer, of the model in the folder `start`."""
    mingtok, tokenizer = load_mingtok(start), normalized(tokenizer_files(start))
    chat = ChatFormat.from_json(tokenizer["tokenizer.json"])
    config = univision_config(mingtok.config, chat, VOCABULARY)
    network = cast(UniVision, (SeparateUniVision if design == "separate" else UniVision)(config))
    # a generator for each part, so that what both designs have begins alike
    for part in network.children():
        initialize(part, torch.Generator().manual_seed(stage.seed))
    network.mingtok.load_state_dict(mingtok.state_dict())
    return AblationStage(stage, design, Engine(network, chat), tokenizer, device)
