"""The built-in model's text tokenizer: byte-level BPE, trained on the world's own texts.

The whole alphabet of bytes is in the vocabulary, so any Unicode text goes in and comes back; the texts of the world
are short in it. The special tokens are the published ones that the chat template uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ming_core.prompts import ASSISTANT, END, HUMAN, IMAGE_CLOSE, IMAGE_OPEN, PATCH, ROLE_CLOSE, ROLE_OPEN

from ..world import random_dialogue

SPECIAL_TOKENS = (END, ROLE_OPEN, ROLE_CLOSE, PATCH, IMAGE_OPEN, IMAGE_CLOSE)
DIALOGUES = 6000  # whose texts are read


def make_tokenizer(vocabulary: int, seed: int = 0, dialogues: int = DIALOGUES) -> dict[str, str]:
    """Train a tokenizer; returns the contents of tokenizer.json and tokenizer_config.json by file name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
    )
    tokenizer.train_from_iterator(_texts(seed, dialogues), trainer)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(about, indent=1) + "\n",
    }


def _texts(seed: int, dialogues: int) -> Iterator[str]:
    """What is said in dialogues of the training split, and the role names as often as they stand there."""
    rng = np.random.default_rng(seed)
    for _ in range(dialogues):
        for turn in random_dialogue(rng, split="train").rounds:
            yield from (HUMAN, turn.prompt, ASSISTANT, turn.answer or "")
