"""The storyboard of a conversation: one row a round, words of any script, pictures decoded once."""

import numpy as np
import pytest
import torch
from ming_univision.ming_core import Conversation
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host, storyboard
from ming_univision.nodes.typesetting import length, wrap
from ming_univision.runner.core_nodes import PreviewImage
from PIL import Image


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """Where previews go."""
    with host.folders(output=tmp_path, input=tmp_path):
        yield tmp_path


@pytest.fixture
def loaded(model):
    return host.managed(model.mingtok, "small")


def show(loaded, conversation):
    return NODE_CLASS_MAPPINGS["MingConversationStoryboard"]().show(loaded, conversation)["result"][0]


def answer(model, conversation, prompt, **more):
    return model.understand(conversation, prompt, max_new_tokens=2, **more).conversation


def test_every_round_adds_a_row_and_the_rows_above_stay_as_they_are(model, picture, loaded):
    one = answer(model, Conversation(), "What is this?", features=picture)
    two = answer(model, one, "And now?")
    above, whole = show(loaded, one)[0], show(loaded, two)[0]
    assert whole.shape[1:] == (1024, 3) and whole.shape[0] > above.shape[0]
    row = above.shape[0] - 2 * storyboard.GAP - storyboard.MARGIN
    assert torch.equal(whole[:row], above[:row])


def test_pictures_of_both_sides_are_shown_as_they_are_decoded(model, picture, loaded):
    drawn = model.generate_image(Conversation(), "Make it red.", features=picture)
    sheet = show(loaded, drawn.conversation)[0]
    for features, left in ((picture, 0), (drawn.features, storyboard.COLUMN + storyboard.GAP)):
        (decoded,) = NODE_CLASS_MAPPINGS["MingTokDecode"]().decode(loaded, features)
        expected = np.asarray(storyboard._scaled(decoded[0]))
        column = (sheet[:, storyboard.MARGIN + left :][:, : expected.shape[1]] * 255).round().byte().numpy()
        places = range(len(column) - len(expected) + 1)
        assert any(np.array_equal(column[top : top + len(expected)], expected) for top in places)


def test_without_comfyui_it_is_shown_as_a_preview(model, loaded, folder, monkeypatch):
    monkeypatch.setattr(host, "preview_node", PreviewImage)
    said = answer(model, Conversation(), "Hello.")
    (file,) = NODE_CLASS_MAPPINGS["MingConversationStoryboard"]().show(loaded, said)["ui"]["images"]
    with Image.open(folder / "temp" / file["filename"]) as shown:
        assert shown.width == 1024


def test_characters_that_no_font_has_are_drawn_as_boxes(model, loaded):
    sheet = show(loaded, answer(model, Conversation(), "\U0010fffe 𓀀"))
    assert (sheet < 0.5).any()


def test_an_empty_conversation_is_refused(loaded):
    with pytest.raises(ValueError, match="empty"):
        show(loaded, Conversation())


@pytest.mark.parametrize("text", ["move the red circle " * 9, "把红色的圆移到上面" * 12, "x" * 300, "a\n\nb"])
def test_lines_fit_their_width_and_lose_no_character(text):
    lines = wrap(text, 300, 22)
    assert all(length(line, 22) <= 300 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_a_long_text_is_cut_and_of_many_rounds_the_newest_are_shown(model, loaded, monkeypatch):
    monkeypatch.setattr(storyboard, "MOST_LINES", 3)
    monkeypatch.setattr(storyboard, "MOST_ROWS", 1)
    conversation = answer(model, answer(model, Conversation(), "first"), "word " * 60)
    rows = []
    monkeypatch.setattr(storyboard, "storyboard", lambda shown, first: rows.append((first, shown)) or blank())
    show(loaded, conversation)
    ((first, shown),) = rows
    assert first == 2 and len(shown) == 1 and len(shown[0][0].lines) == 3 and shown[0][0].lines[-1] == "..."


def blank():
    return Image.new("RGB", (8, 8))
