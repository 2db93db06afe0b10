"""The built-in model's text tokenizer: byte-level BPE, trained on the texts of the world.

All bytes are in the vocabulary, so any Unicode text can be encoded and comes back unchanged; texts of the world take
few tokens. The special tokens are the published ones that the chat template uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from ming_core.prompts import ASSISTANT, END, HUMAN, IMAGE_CLOSE, IMAGE_OPEN, PATCH, ROLE_CLOSE, ROLE_OPEN

from ..world import random_dialogue

SPECIAL_TOKENS = (END, ROLE_OPEN, ROLE_CLOSE, PATCH, IMAGE_OPEN, IMAGE_CLOSE)
DIALOGUES = 6000  # whose texts the tokenizer is trained on


def train_text_tokenizer(vocabulary: int, seed: int = 0, dialogues: int = DIALOGUES) -> dict[str, str]:
    """Train a tokenizer. Returns the contents of tokenizer.json and tokenizer_config.json by file name."""
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
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, indent=1) + "\n",
    }


def _texts(seed: int, dialogues: int) -> Iterator[str]:
    """The texts of dialogues of the training split, and the role names as often as they occur there."""
    rng = np.random.default_rng(seed)
    for _ in range(dialogues):
        for task in random_dialogue(rng, split="train").tasks:
            yield from (HUMAN, task.prompt, ASSISTANT, task.answer or "")
