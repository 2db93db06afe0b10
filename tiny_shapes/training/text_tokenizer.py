"""The built-in model's text tokenizer: byte-level BPE, trained on the texts of the world.

All bytes are in the vocabulary, so any Unicode text can be encoded; texts of the world take few tokens. The special
tokens are the published ones that the chat template uses.

What a user types is normalized by the tokenizer itself (`normalized`), so it is the same to the model in capitals, with
tabs, in full width or with curly quotes, at the beginning of a prompt or within. What the model writes is for people to
read and keeps its capitals: its answers are encoded as they are written (`ChatFormat.encode_answer`), and decoding
never normalizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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


def _normalizer() -> normalizers.Normalizer:
    """What makes all ways to type the same words the same text."""
    replaced = [
        # before NFKC, which would take a lone accent for a space with an accent on it
        (Regex("[\u2018\u2019\u201a\u201b\u2032\u00b4`]"), "'"),
        (Regex("[\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb]"), '"'),
        (Regex("[\u2010-\u2015\u2212]"), "-"),
    ]
    return normalizers.Sequence(
        [
            *(normalizers.Replace(old, new) for old, new in replaced),
            normalizers.NFKC(),
            normalizers.Replace(Regex(r"\p{Cf}"), ""),  # signs that nobody sees, such as a zero-width space
            normalizers.Lowercase(),
            # a word behind a mark is the word behind a space: "(red:1.2)", "circle,star"
            *(normalizers.Replace(mark, f"{mark} ") for mark in '([{<",:;/|'),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),  # a word at the beginning is the same token as within a text
            # The template encodes the names of the roles by themselves. They stay the single tokens that they were.
            *(normalizers.Replace(Regex(rf"\A {role.lower()}\z"), role) for role in (HUMAN, ASSISTANT)),
        ]
    )


def normalized(files: Mapping[str, str]) -> dict[str, str]:
    """The files of a tokenizer with the normalizer added to tokenizer.json, or renewed; all ids stay as they are."""
    tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    tokenizer.normalizer = _normalizer()
    return {**files, "tokenizer.json": tokenizer.to_str(pretty=False)}


def _texts(seed: int, dialogues: int) -> Iterator[str]:
    """The texts of dialogues of the training split, and the role names as often as they occur there."""
    rng = np.random.default_rng(seed)
    for _ in range(dialogues):
        for task in random_dialogue(rng, split="train").tasks:
            yield from (HUMAN, task.prompt, ASSISTANT, task.answer or "")
