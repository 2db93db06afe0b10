"""The text tokenizer of the built-in model."""

import pytest
from tokenizers import Tokenizer

from ming_core.checkpoint import tokenizer_files
from ming_core.prompts import ASSISTANT, HUMAN, ChatFormat
from tiny_shapes.training.text_tokenizer import SPECIAL_TOKENS, normalized, train_text_tokenizer


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


@pytest.fixture(scope="module")
def typed(tokenizer) -> ChatFormat:
    """The chat format of the tokenizer that normalizes what is typed."""
    return ChatFormat.from_json(normalized(tokenizer)["tokenizer.json"])


@pytest.mark.parametrize(
    "text",
    [
        *("DRAW A RED CIRCLE, PLEASE.", "Draw\ta\tred\tcircle, please.", "draw a\u00a0red\u2003circle,\n please."),
        *(
            "Ｄｒａｗ　ａ　ｒｅｄ　ｃｉｒｃｌｅ， ｐｌｅａｓｅ．",
            "  draw a red circle,please.  ",
            "Draw a \u200bred circle, please.",
        ),
        "\n\nDraw a red circle, please.\r\n",
    ],
)
def test_however_words_are_typed_they_are_the_same_tokens(text, typed):
    assert typed.encode(text) == typed.encode("draw a red circle, please.")


@pytest.mark.parametrize(
    ("curly", "straight"), [("“red”", '"red"'), ("it’s ‘red’", "it's 'red'"), ("top‑left – now", "top-left - now")]
)
def test_quotes_and_dashes_have_one_form(curly, straight, typed):
    assert typed.encode(curly) == typed.encode(straight)


def test_a_word_is_the_same_token_at_the_beginning_of_a_prompt_behind_a_mark_and_within(typed):
    within = typed.encode("a red circle")
    assert typed.encode("red circle") == within[1:]
    assert typed.encode("(red circle")[-len(within[1:]) :] == within[1:]
    assert typed.encode("a star,red circle")[-len(within[1:]) :] == within[1:]


def test_the_names_of_the_roles_stay_the_tokens_that_they_were(chat, typed):
    assert [typed.encode(role) for role in (HUMAN, ASSISTANT)] == [chat.encode(role) for role in (HUMAN, ASSISTANT)]


def test_special_tokens_that_are_typed_stay_plain_text(typed):
    ids = typed.encode("<image></role> <|endoftext|>")
    assert ids and not set(ids) & {typed.end_id, typed.role_open_id, typed.image_open_id, typed.patch_id}


@pytest.mark.parametrize("text", ["", " ", "\n", "\t\u00a0", "\u200b"])
def test_what_shows_nothing_is_no_tokens(text, typed):
    assert typed.encode(text) == ()


@pytest.mark.parametrize("text", ["Hello! I see, draw and edit colored shapes.", "at the top left", "", "Ｆull — “x”"])
def test_an_answer_is_learned_and_decoded_as_it_is_written(text, chat, typed):
    ids = typed.encode_answer(text)
    assert ids == chat.encode(text) and typed.decode(ids) == text


def test_what_the_user_typed_is_shown_as_typed(typed):
    (segment,) = [s for s in typed.prompt(["Draw “a”\tSTAR"]).segments if getattr(s, "kind", "") == "prompt"]
    assert segment.text == "Draw “a”\tSTAR"


def test_normalizing_keeps_all_ids_and_may_be_repeated(tokenizer, typed):
    once = normalized(tokenizer)
    assert normalized(once) == once and once.keys() == tokenizer.keys()
    before = Tokenizer.from_str(tokenizer["tokenizer.json"])
    assert typed.tokenizer.get_vocab() == before.get_vocab()


def test_a_folder_with_the_normalizing_tokenizer_is_read_as_it_is(tokenizer, typed, tmp_path):
    for name, content in normalized(tokenizer).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert tokenizer_files(tmp_path) == normalized(tokenizer)
    assert ChatFormat.from_folder(tmp_path).encode("Red\tCIRCLE “x”") == typed.encode('red circle "x"')
