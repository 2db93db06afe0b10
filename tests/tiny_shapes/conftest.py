"""Small models of the shapes world. They come from `ming_core` by its own name, as tiny_shapes imports it; those of
tests/conftest.py belong to the copy inside the pack and must not be mixed with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ming_core import Engine, MingTok, UniVision
from ming_core.config import (
    FlowHeadConfig,
    LanguageModelConfig,
    LowLevelEncoderConfig,
    MingTokConfig,
    PixelDecoderConfig,
    SemanticDecoderConfig,
    UniVisionConfig,
)
from ming_core.prompts import ChatFormat
from tiny_shapes.training.initialization import initialize
from tiny_shapes.training.loop import Run
from tiny_shapes.training.recipe import Stage
from tiny_shapes.training.stages import JointStage, MingTokStage
from tiny_shapes.training.text_tokenizer import train_text_tokenizer

MINGTOK = MingTokConfig(
    LowLevelEncoderConfig(img_size=128, patch_size=32, depth=1, embed_dim=64, out_dim=8),
    SemanticDecoderConfig(in_dim=8, patch_size=32, embed_dim=64, decoder_depth=1),
    PixelDecoderConfig(patch_size=16, decoder_depth=1, embed_dim=64),
    scaling_factor=1.0,
    mean=0.0,
)


STAGES = {
    "mingtok": Stage("mingtok", "mingtok", batch=4, lr=3e-3, steps=8, warmup=2, average=0.5, objects=(1, 1)),
    "joint": Stage("joint", "joint", batch=4, lr=3e-3, steps=8, warmup=2, average=0.5, objects=(1, 2)),
}


@pytest.fixture(scope="session")
def tokenizer() -> dict[str, str]:
    """Files of a small text tokenizer."""
    return train_text_tokenizer(320, dialogues=200)


@pytest.fixture(scope="session")
def chat(tokenizer) -> ChatFormat:
    return ChatFormat.from_json(tokenizer["tokenizer.json"])


def make_mingtok() -> MingTok:
    model = MingTok(MINGTOK)
    initialize(model, torch.Generator().manual_seed(0))
    return model


def make_engine(chat: ChatFormat) -> Engine:
    config = LanguageModelConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        eos_token_id=chat.end_id,
        image_patch_token=chat.patch_id,
        image_start_token=chat.image_open_id,
        num_image_tokens_for_gen=16,
    )
    network = UniVision(UniVisionConfig(config, FlowHeadConfig(diffloss_w=32, diffloss_d=1), MINGTOK))
    initialize(network, torch.Generator().manual_seed(0))
    return Engine(network, chat)


@pytest.fixture
def mingtok() -> MingTok:
    """A MingTok of 4 by 4 tokens with random weights, always the same."""
    return make_mingtok()


@pytest.fixture
def engine(chat) -> Engine:
    """A small Ming-UniVision with random weights, always the same; its images have 4 by 4 tokens."""
    return make_engine(chat)


@pytest.fixture(scope="session")
def stages() -> dict[str, Stage]:
    """A short stage of MingTok ("mingtok"), and one of the rest ("joint")."""
    return STAGES


@pytest.fixture
def make_objective(tokenizer, chat):
    """make_objective("mingtok" or "joint"): a new objective of one of `stages`, always with the same weights."""

    def make(kind: str) -> MingTokStage | JointStage:
        if kind == "mingtok":
            return MingTokStage(STAGES[kind], make_mingtok())
        return JointStage(STAGES[kind], make_engine(chat), tokenizer)

    return make


@pytest.fixture
def make_run(make_objective, tmp_path):
    """make_run("mingtok" or "joint", folder name): a run of one of `stages`, with an evaluation that costs nothing."""

    def make(kind: str, name: str = "run", workers: int = 0, **changes) -> Run:
        objective = make_objective(kind)
        objective.evaluate = lambda module: {"figure": 0.5}
        return Run(dataclasses.replace(STAGES[kind], **changes), objective, tmp_path / name, workers)

    return make
