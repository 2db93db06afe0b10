"""The text tokenizer of the built-in model."""

import pytest
from tokenizers import Tokenizer

from tiny_shapes.training.text_tokenizer import SPECIAL_TOKENS, train_text_tokenizer


@pytest.mark.parametrize("text", ["a large red circle", "把它变成蓝色 🌊", "\x00\t\r\n é\u0301", "<image></role>", ""])
def test_any_text_is_encoded_and_comes_back(text, chat):
    ids = chat.encode(text)
    assert chat.decode(ids) == text
    assert not set(ids) & {chat.end_id, chat.role_open_id, chat.image_open_id, chat.patch_id}


def test_the_tokenizer_has_the_size_asked_for_and_knows_the_special_tokens(tokenizer):
    tokens = Tokenizer.from_str(tokenizer["tokenizer.json"])
    assert tokens.get_vocab_size() == 320
    assert all(len(tokens.encode(token).ids) == 1 for token in SPECIAL_TOKENS)
    assert train_text_tokenizer(320, dialogues=200) == tokenizer
