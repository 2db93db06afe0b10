"""Saved features and conversations that were damaged, or that somebody else wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ming_univision.ming_core import (
    Conversation,
    Engine,
    Features,
    Solver,
    load_conversation,
    load_features,
    save_conversation,
    save_features,
)
from ming_univision.nodes import NODE_CLASS_MAPPINGS
from ming_univision.tests.fuzz.hostile import (
    changed_header,
    changed_json,
    changed_tensors,
    examples,
    is_for_people,
    put_together,
    said_in_words,
    taken_apart,
)


class Saved:
    """A saved file, what it holds, and how it is loaded."""

    def __init__(self, path: Path, content: Any, load: Callable[[Path], Any]) -> None:
        self.path, self.content, self.load, self.data = path, content, load, path.read_bytes()


@pytest.fixture(scope="module")
def saved_features(folder: Path, features: Features) -> Saved:
    path = folder / "saved.features"
    save_features(features, path)
    return Saved(path, features, load_features)


@pytest.fixture(scope="module")
def saved_conversation(folder: Path, engine: Engine, features: Features) -> Saved:
    said = engine.understand(Conversation(), "What is it?", features=features, max_new_tokens=3).conversation
    drawn = engine.generate_image(said, "Make it blue.", max_new_tokens=3, solver=Solver(2)).conversation
    path = folder / "saved.conversation"
    save_conversation(drawn, path)
    return Saved(path, drawn, lambda path: load_conversation(path, engine))


@pytest.fixture(params=["features", "conversation"])
def saved(request: pytest.FixtureRequest) -> Saved:
    return request.getfixturevalue(f"saved_{request.param}")


def loads_the_same_or_says_why_not(saved: Saved, data: bytes) -> None:
    saved.path.write_bytes(data)
    with said_in_words(ValueError) as refused:
        loaded = saved.load(saved.path)
    if not refused:
        assert loaded == saved.content
        for found, meant in zip(tokens(loaded), tokens(saved.content), strict=True):
            torch.testing.assert_close(found, meant)


def tokens(content: Features | Conversation) -> list[torch.Tensor]:
    return [content.tokens] if isinstance(content, Features) else [image.features.tokens for image in content.images]


def changed_about(data: bytes) -> st.SearchStrategy[bytes]:
    """The file with a change in the JSON that says what its tensors are."""
    header, tensors = taken_apart(data)

    def with_about(about: bytes) -> bytes:
        header["__metadata__"]["ming"] = about.decode("utf-8", "replace")
        return put_together(json.dumps(header).encode(), tensors)

    return changed_json(json.loads(header["__metadata__"]["ming"])).map(with_about)


@examples(100)
@given(data=st.data())
def test_a_file_with_a_changed_header_loads_the_same_content_or_is_refused_in_words(saved, data):
    loads_the_same_or_says_why_not(saved, data.draw(changed_header(saved.data)))


@examples(100)
@given(data=st.data())
def test_a_file_with_a_changed_description_loads_the_same_content_or_is_refused_in_words(saved, data):
    loads_the_same_or_says_why_not(saved, data.draw(changed_about(saved.data)))


@examples(50)
@given(data=st.data())
def test_a_file_with_changed_numbers_loads_the_same_content_or_is_refused_in_words(saved, data):
    loads_the_same_or_says_why_not(saved, data.draw(changed_tensors(saved.data)))


@examples(50)
@given(data=st.data())
def test_a_damaged_file_breaks_no_list_and_is_validated_in_words(saved, folder, data):
    path = folder / "output" / "ming" / "x_00001_.safetensors"
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir()
    path.write_bytes(data.draw(st.one_of(changed_header(saved.data), changed_about(saved.data), st.binary())))
    for name in ("MingLoadFeatures", "MingLoadConversation"):
        node = NODE_CLASS_MAPPINGS[name]
        listed = node.INPUT_TYPES()["required"]["file"][0]
        assert set(listed) <= {"ming/x_00001_.safetensors [output]"}
        verdict = node.VALIDATE_INPUTS(file="ming/x_00001_.safetensors [output]")
        assert verdict is True or is_for_people(verdict)
        assert node.IS_CHANGED(file="ming/x_00001_.safetensors [output]")
