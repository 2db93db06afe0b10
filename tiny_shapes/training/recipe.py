"""The recipe of the built-in model: its sizes, and the stages that train it, in order.

Every stage starts from weights alone (the model folder that the stage before it wrote), with fresh optimizers and a
warm-up, so that training can continue from the committed folder on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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

MINGTOK = MingTokConfig(
    low_level_encoder=LowLevelEncoderConfig(img_size=128, patch_size=16, depth=3, embed_dim=192, out_dim=16),
    semantic_decoder=SemanticDecoderConfig(in_dim=16, patch_size=16, embed_dim=256, decoder_depth=3),
    pixel_decoder=PixelDecoderConfig(patch_size=8, decoder_depth=3, embed_dim=128),
    scaling_factor=1.0,  # both are measured for every export
    mean=0.0,
)
VOCABULARY = 768  # 256 bytes, six special tokens, and the most common pieces of the texts of the world


def univision_config(mingtok: MingTokConfig, chat: ChatFormat, vocabulary: int) -> UniVisionConfig:
    """The config of the built-in Ming-UniVision, of some 9 million values, around a MingTok and a tokenizer."""
    language_model = LanguageModelConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=2,
        moe_intermediate_size=128,
        # A typed prompt of 20,000 characters fits even if every byte is a token of its own.
        max_position_embeddings=65536,
        eos_token_id=chat.end_id,
        image_patch_token=chat.patch_id,
        image_start_token=chat.image_open_id,
        num_image_tokens_for_gen=mingtok.low_level_encoder.grid**2,
    )
    return UniVisionConfig(language_model, FlowHeadConfig(diffloss_w=256, diffloss_d=3), mingtok)


@dataclass(frozen=True)
class Stage:
    """One stage of training. It ends after `steps` steps or `hours` hours, whichever is first; 0 is no limit.

    name            also names its folder
    trains          "mingtok"; "pixel decoder": that part of it alone; or "joint": the language model, flow head and
                    projection around a frozen MingTok
    batch           images or dialogues of a batch; a step takes one of each process, or several (`--passes`)
    lr              peak learning rate of Muon and AdamW alike
    warmup          steps until the peak
    decay_fraction  share of the stage, its last part, over which the learning rate decays to almost nothing
    average         decay of the moving average of the weights that is evaluated and written; 0: no average
    kept            share of the weights that the stage starts from in those that are evaluated and written: what they
                    could do is mostly kept (Wortsman et al., Robust fine-tuning of zero-shot models, 2022)
    objects         fewest and most objects in a scene
    tasks           weights of tasks or families of tasks (`world.TASKS`); empty: the world's own mixture
    rounds          rounds of a dialogue; 0: one to five
    quizzes         share of the dialogues that are several questions about one image
    several         share of the other dialogues whose scenes have two objects or more
    chains          share of the dialogues that are three to five edits
    regions         share of the dialogues that are a region and then the edit inside it
    cluttered       share of the prompts with additions that mean nothing
    alike           share of the scenes whose objects are like one another in all but one of shape, color and size
    origins         weight of the loss of where what a cell shows comes from: the words, or the image that is edited
    own             share of the batches in which drawn images are fed as the model itself draws them
    checkpoint_minutes, checkpoint_steps  between two checkpoints; the minutes count where the steps are 0
    """

    name: str
    trains: str
    batch: int
    lr: float
    steps: int = 0
    hours: float = 0.0
    warmup: int = 100
    decay_fraction: float = 0.7
    average: float = 0.0
    kept: float = 0.0
    objects: tuple[int, int] = (1, 3)
    tasks: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 0
    quizzes: float = 0.0
    several: float = 0.0
    chains: float = 0.0
    regions: float = 0.0
    cluttered: float = 0.0
    alike: float = 0.0
    origins: float = 0.0
    own: float = 0.0
    checkpoint_minutes: float = 20.0
    checkpoint_steps: int = 0
    seed: int = 0


@dataclass(frozen=True)
class SideBySide:
    """Stages that start from the same weights, at the same time on different machines if you like; their mean goes on.

    It is better than each of them (Wortsman et al., Model soups, 2022). name: that of the folder of the mean.
    """

    name: str
    stages: tuple[Stage, ...]


# What people type and do: any way to write, words that mean nothing, few words; masks, completion, long chains, two
# images at once, and things that are not of this world.
AS_USED = Stage(
    "as people use it",
    "joint",
    batch=24,
    lr=1.2e-3,
    hours=1.8,
    warmup=60,
    decay_fraction=0.57,
    average=0.995,
    tasks={
        "generate": 10.0,
        "question": 1.2,
        "describe": 1.2,
        "edit/recolor": 2.0,
        "edit/move": 1.8,
        "edit/remove": 1.0,
        "edit/add": 1.4,
        "edit/background": 0.4,
        "masked edit": 4.0,
        "complete": 4.5,
        "pair": 3.0,
        "outside": 0.7,
        "identify region": 2.5,
        "refine": 0.3,
        "super-resolution": 0.6,
        "denoise": 0.5,
        "colorize": 0.7,
        "chat": 0.2,
    },
    several=0.5,
    quizzes=0.25,
    chains=0.2,
    cluttered=0.2,
    seed=7,
)

# Single objects, of which the stages before it had lost a little, few words, and above all two images.
PAIRS = replace(
    AS_USED,
    name="pairs and single objects",
    hours=2.2,
    lr=1e-3,
    decay_fraction=0.75,
    tasks={
        "generate": 13.0,
        "question": 1.2,
        "describe": 1.5,
        "edit/recolor": 3.0,
        "edit/move": 1.8,
        "edit/remove": 0.8,
        "edit/add": 1.4,
        "edit/background": 0.4,
        "masked edit": 3.0,
        "complete": 6.0,
        "pair/which": 9.0,
        "pair/one": 1.5,
        "outside": 0.6,
        "identify region": 2.0,
        "refine": 0.2,
        "super-resolution": 0.5,
        "denoise": 0.4,
        "colorize": 0.6,
        "chat": 0.2,
    },
    several=0.3,
    quizzes=0.3,
    cluttered=0.25,
    seed=9,
)

# The tasks that the stages after it share. Giving colors by the words is forgotten first.
FURTHER = {
    **PAIRS.tasks,
    "question": 0.8,
    "pair/which": 4.0,
    "pair/one": 0.8,
    "super-resolution": 2.0,
    "denoise": 0.6,
    "colorize": 3.0,
    "color again": 3.0,
}

# With its own drawings fed, which is what a chain of edits copies: few words, regions, what is completed, and objects
# that are alike, which is where edits are about the wrong one.
ALL_AT_ONCE = replace(
    PAIRS,
    name="all at once with few words",
    hours=1.5,
    lr=8e-4,
    decay_fraction=0.9,
    kept=0.2,
    tasks={
        **FURTHER,
        "generate": 19.0,
        "describe": 1.4,
        "masked edit": 2.5,
        "edit/move": 3.0,
        "complete": 13.0,
        "identify region": 8.0,
    },
    several=0.6,
    quizzes=0.2,
    chains=0.22,
    alike=0.2,
    own=0.55,
    seed=21,
)
MORE_REGIONS = replace(
    ALL_AT_ONCE,
    name="all at once with regions",
    tasks={
        **FURTHER,
        "generate": 16.0,
        "edit/recolor": 3.4,
        "edit/move": 3.4,
        "masked edit": 2.8,
        "complete": 14.0,
        "identify region": 11.0,
    },
    chains=0.16,
    alike=0.33,
    own=0.5,
    seed=22,
)

# Words that leave colors and places open, and edits inside their region; what comes in every cell is told to be from
# there in the words, or in the image that is edited.
WORDS_AND_REGIONS = replace(
    ALL_AT_ONCE,
    name="open words and regions",
    hours=3.0,
    lr=9e-4,
    kept=0.3,
    tasks={
        **FURTHER,
        "generate": 19.0,
        "few words": 14.0,
        "describe": 1.4,
        "edit/recolor": 3.2,
        "edit/move": 5.0,
        "complete": 10.0,
        "identify region": 3.0,
    },
    quizzes=0.13,
    chains=0.13,
    regions=0.12,
    origins=1.0,
    own=0.2,
    seed=31,
)

# What was still below its aim: moves and recolors of one of several objects, and what is completed.
ONE_OF_SEVERAL = replace(
    WORDS_AND_REGIONS,
    name="one of several",
    hours=3.0,
    decay_fraction=0.95,
    tasks={
        **WORDS_AND_REGIONS.tasks,
        "generate": 17.0,
        "few words": 10.0,
        "edit/recolor": 6.0,
        "edit/move": 6.0,
        "complete": 15.0,
    },
    regions=0.16,
    alike=0.25,
    seed=61,
)


def _twice(stage: Stage) -> SideBySide:
    """The stage with two seeds, at the same time."""
    again = replace(stage, name=f"{stage.name} again", seed=stage.seed + 1)
    return SideBySide(f"{stage.name} twice", (stage, again))


# Hours are for two CPU cores; those of stages that stand side by side, for one core each.
RECIPE: tuple[Stage | SideBySide, ...] = (
    # More objects than in the scenes of the tasks: most of what there is to learn is in the patches of objects.
    Stage("mingtok", "mingtok", batch=16, lr=3e-3, hours=0.8, objects=(1, 6), checkpoint_minutes=4),
    Stage("pixels", "pixel decoder", batch=16, lr=1.5e-3, hours=0.4, average=0.998, checkpoint_minutes=4, seed=3),
    Stage(
        "one object",
        "joint",
        batch=24,
        lr=2e-3,
        hours=2.0,
        decay_fraction=0.3,
        average=0.995,
        objects=(1, 1),
        tasks={
            "generate": 5.0,
            "question": 2.0,
            "describe": 0.8,
            "edit": 2.0,
            "identify region": 0.4,
            "refine": 0.2,
            "super-resolution": 0.2,
            "denoise": 0.2,
            "colorize": 0.3,
            "chat": 0.2,
        },
        rounds=1,
    ),
    Stage(
        "two objects",
        "joint",
        batch=24,
        lr=2e-3,
        hours=0.85,
        warmup=40,
        decay_fraction=0.6,
        average=0.99,
        objects=(1, 2),
        tasks={
            "generate": 3.0,
            "question": 1.2,
            "describe": 1.2,
            "edit": 3.0,
            "identify region": 1.0,
            "refine": 0.5,
            "super-resolution": 0.3,
            "denoise": 0.3,
            "colorize": 0.5,
            "chat": 0.2,
        },
        seed=2,
    ),
    # With one object in view there is no question which one is meant, so that is learned separately.
    Stage(
        "several objects",
        "joint",
        batch=24,
        lr=2e-3,
        hours=1.0,
        decay_fraction=0.1,
        average=0.995,
        objects=(2, 3),
        quizzes=0.3,
        seed=4,
    ),
    Stage(
        "everything",
        "joint",
        batch=24,
        lr=2e-3,
        hours=4.0,
        decay_fraction=0.85,
        average=0.995,
        # Most of what is learned last: which words go with which of several objects, to draw or to edit.
        tasks={
            "generate": 10.0,
            "question": 1.6,
            "describe": 2.0,
            "edit/recolor": 2.5,
            "edit/move": 2.5,
            "edit/remove": 2.0,
            "edit/add": 0.8,
            "edit/background": 0.5,
            "identify region": 2.5,
            "refine": 0.3,
            "super-resolution": 0.3,
            "denoise": 0.3,
            "colorize": 0.8,
            "chat": 0.2,
        },
        several=0.6,
        quizzes=0.08,
        seed=1,
    ),
    # Which of several objects to recolor is learned last of all, and is wrong when nothing else is any more.
    Stage(
        "recolors",
        "joint",
        batch=24,
        lr=1.2e-3,
        hours=1.8,
        warmup=60,
        decay_fraction=0.9,
        average=0.995,
        tasks={
            "generate": 6.0,
            "question": 1.5,
            "describe": 1.5,
            "edit/recolor": 6.0,
            "edit/move": 1.5,
            "edit/remove": 1.5,
            "edit/add": 0.6,
            "edit/background": 0.5,
            "identify region": 2.0,
            "refine": 0.3,
            "super-resolution": 1.2,
            "denoise": 0.9,
            "colorize": 0.8,
            "chat": 0.2,
        },
        several=0.8,
        quizzes=0.05,
        seed=5,
    ),
    # Terse prompts and "it" were added to the world's language after all of this.
    Stage(
        "terse prompts",
        "joint",
        batch=24,
        lr=1.2e-3,
        hours=1.85,
        warmup=60,
        decay_fraction=0.9,
        average=0.995,
        tasks={
            "generate": 13.0,
            "question": 1.5,
            "describe": 1.5,
            "edit/recolor": 4.0,
            "edit/move": 1.5,
            "edit/remove": 1.5,
            "edit/add": 1.2,
            "edit/background": 0.6,
            "identify region": 1.5,
            "refine": 0.3,
            "super-resolution": 0.9,
            "denoise": 0.7,
            "colorize": 0.8,
            "chat": 0.2,
        },
        several=0.4,
        quizzes=0.05,
        seed=6,
    ),
    AS_USED,
    # What the stage before it had not learned yet: to invent nothing in what is completed, two images, and which of
    # several objects to recolor, of which it had lost a little.
    replace(
        AS_USED,
        name="as people use it further",
        hours=6.0,
        decay_fraction=0.85,
        tasks={**AS_USED.tasks, "complete": 6.0, "edit/recolor": 3.5},
        several=0.6,
        seed=8,
    ),
    PAIRS,
    # Several objects once more, which had given way to single ones, and what is still below its aim.
    replace(
        PAIRS,
        name="several and few words",
        hours=2.55,
        lr=8e-4,
        decay_fraction=0.85,
        tasks={
            **PAIRS.tasks,
            "generate": 15.0,
            "question": 0.8,
            "describe": 2.0,
            "edit/recolor": 2.5,
            "complete": 10.0,
            "pair/which": 7.0,
            "pair/one": 1.0,
            "identify region": 7.0,
            "super-resolution": 0.4,
            "denoise": 0.3,
        },
        several=0.6,
        quizzes=0.25,
        chains=0.08,
        seed=10,
    ),
    SideBySide("all at once", (ALL_AT_ONCE, MORE_REGIONS)),
    _twice(WORDS_AND_REGIONS),
    _twice(ONE_OF_SEVERAL),
)
STAGES = tuple(stage for entry in RECIPE for stage in (entry.stages if isinstance(entry, SideBySide) else (entry,)))
