"""Saved features and conversations: a changed byte is noticed, older files load, what cannot be meant is refused."""

import json

import pytest
import torch
from ming_univision.ming_core import (
    Conversation,
    FileError,
    Sampling,
    load_conversation,
    load_features,
    save_conversation,
)
from ming_univision.ming_core.checks import MAX_DEPTH
from ming_univision.ming_core.features import Features
from ming_univision.ming_core.files import DIGEST, HEADER, read_header, read_tensors, write_tensors
from ming_univision.ming_core.saved import CONVERSATION_FORMAT, FEATURES_FORMAT, MAX_VALUE, save_features
from safetensors.torch import load_file, save_file

DEPTH = 3


def small_features(grid=(2, 2)) -> Features:
    make = torch.Generator().manual_seed(1)
    n = grid[0] * grid[1]
    return Features(
        torch.randn(1, n, 8, generator=make), torch.randn(1, 4, *grid, generator=make), grid, "t" * 64, DEPTH
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


@pytest.fixture
def talk(model, picture):
    return model.understand(Conversation(), "What is it?", features=picture, max_new_tokens=4).conversation


def metadata_of(path) -> dict[str, str]:
    return read_header(path)[1]


def as_older_versions_wrote_it(path, tensors=None, about=None):
    """The file with these tensors and this JSON instead of its own, and without a digest."""
    metadata = metadata_of(path)
    text = metadata[HEADER] if about is None else about if isinstance(about, str) else json.dumps(about)
    save_file(load_file(path) if tensors is None else tensors, path, {HEADER: text})


# --- The digest ---------------------------------------------------------------------------------------------------


def test_every_byte_of_a_saved_file_is_guarded(path):
    save_features(small_features(), path)
    whole = path.read_bytes()
    assert len(whole) > 500
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << (at % 8)
        path.write_bytes(data)
        try:
            loaded = load_features(path)
        except FileError as error:
            assert str(path) in str(error)
        else:  # a space of the header that became another white space
            assert chr(whole[at]) == " " and chr(data[at]).isspace() and loaded == small_features()


def test_a_changed_tensor_is_said_to_be_damage(path, talk, model):
    save_features(small_features(), path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"x\.safetensors is damaged: its content has changed since it was saved"):
        load_features(path)
    save_conversation(talk, path)
    data = bytearray(path.read_bytes())
    at = data.index(b"What is it?")
    data[at : at + 4] = b"Who "
    path.write_bytes(data)
    with pytest.raises(FileError, match="is damaged: its content has changed"):
        load_conversation(path, model)


def test_the_digest_takes_in_names_and_shapes_and_does_not_depend_on_the_order(path, tmp_path):
    def digest(tensors, **about):
        write_tensors(path, tensors, about)
        return metadata_of(path)[DIGEST]

    a, b = torch.arange(4.0), torch.arange(2)
    seen = {digest({"a": a, "b": b})}
    assert digest({"b": b, "a": a}) in seen
    others = [({"a": b, "b": a}, {}), ({"a": a.view(2, 2), "b": b}, {}), ({"a": a, "b": b}, {"x": 1}), ({}, {})]
    others.append(({"a": a.view(torch.int32), "b": b}, {}))
    seen |= {digest(tensors, **about) for tensors, about in others}
    assert len(seen) == 1 + len(others)


def test_scalars_and_empty_tensors_and_every_dtype_can_be_written_and_read(path):
    tensors = {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "bf16": torch.ones(3, dtype=torch.bfloat16)}
    tensors |= {"bool": torch.tensor([True, False]), "view": torch.arange(12.0).view(3, 4).T}
    write_tensors(path, tensors, {"format": "f"})
    found, about = read_tensors(path, "f")
    assert about == {"format": "f"} and all(torch.equal(found[name], tensors[name]) for name in tensors)


# --- Older files --------------------------------------------------------------------------------------------------


def test_files_without_a_digest_load_as_before(path, talk, model):
    save_features(small_features(), path)
    as_older_versions_wrote_it(path)
    assert DIGEST not in metadata_of(path)
    loaded = load_features(path)
    assert loaded == small_features() and torch.equal(loaded.tokens, small_features().tokens)
    save_conversation(talk, path)
    as_older_versions_wrote_it(path)
    assert load_conversation(path, model) == talk


# --- What cannot be meant, also in files without a digest ---------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens", "latents"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, MAX_VALUE * 1.01, -7e4])
def test_values_that_are_not_finite_or_not_plausible_are_refused(path, talk, model, name, value):
    save_features(small_features(), path)
    tensors = load_file(path)
    tensors[name].view(-1)[3] = value
    as_older_versions_wrote_it(path, tensors)
    with pytest.raises(FileError, match=rf"{name} hold values that cannot be meant"):
        load_features(path)
    save_conversation(talk, path)
    tensors = load_file(path)
    tensors["latents.0"].view(-1)[3] = value
    as_older_versions_wrote_it(path, tensors)
    with pytest.raises(FileError, match="latents hold values that cannot be meant"):
        load_conversation(path, model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 2 * MAX_VALUE])
def test_what_could_not_be_loaded_is_not_saved(path, talk, value):
    features = small_features()
    features.latents[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="nothing was saved"):
        save_features(features, path)
    talk.images[0].features.latents[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="nothing was saved"):
        save_conversation(talk, path)
    assert not path.exists()


def test_every_depth_that_features_can_have_is_saved_and_loaded(path):
    deep = small_features()._replace(depth=MAX_DEPTH)
    save_features(deep, path)
    assert load_features(path).depth == MAX_DEPTH


def test_an_answer_of_one_token_is_in_the_transcript_and_in_the_file(path, model, picture):
    answers = (
        model.understand(
            Conversation(), "What is it?", features=picture, max_new_tokens=1, sampling=Sampling(1.0), seed=seed
        )
        for seed in range(50)
    )
    answer = next(answer for answer in answers if answer.text)
    assert answer.conversation.transcript().endswith(f"Ming: {answer.text}".strip())
    save_conversation(answer.conversation, path)
    loaded = load_conversation(path, model)
    assert loaded == answer.conversation and loaded.transcript() == answer.conversation.transcript()
    rounds = [model.understand(talk, "Sure?", max_new_tokens=4) for talk in (answer.conversation, loaded)]
    assert rounds[0].token_ids == rounds[1].token_ids
    model.prefix_cache.clear()
    assert model.understand(loaded, "Sure?", max_new_tokens=4).token_ids == rounds[0].token_ids


def test_the_largest_plausible_values_are_read(path):
    features = small_features()
    features.tokens[0, 0, 0], features.latents[0, 0, 0, 0] = MAX_VALUE, -MAX_VALUE
    save_features(features, path)
    assert load_features(path) == features


FEATURES_FAULTS = {
    "no image": {"tokens": torch.zeros(0, 4, 8), "latents": torch.zeros(0, 4, 2, 2)},
    "no width": {"tokens": torch.zeros(1, 4, 0), "latents": torch.zeros(1, 4, 2, 2)},
    "no grid": {"tokens": torch.zeros(1, 0, 8), "latents": torch.zeros(1, 4, 2, 0)},
    "another grid": {"tokens": torch.zeros(1, 6, 8), "latents": torch.zeros(1, 4, 2, 2)},
    "whole numbers": {"tokens": torch.zeros(1, 4, 8, dtype=torch.int64), "latents": torch.zeros(1, 4, 2, 2)},
    "complex": {"tokens": torch.zeros(1, 4, 8, dtype=torch.complex64), "latents": torch.zeros(1, 4, 2, 2)},
    "fp8": {"tokens": torch.zeros(1, 4, 8).to(torch.float8_e4m3fn), "latents": torch.zeros(1, 4, 2, 2)},
    "axes": {"tokens": torch.zeros(1, 4, 8), "latents": torch.zeros(4, 2, 2)},
    "no tokens": {"latents": torch.zeros(1, 4, 2, 2)},
    "one more": {"tokens": torch.zeros(1, 4, 8), "latents": torch.zeros(1, 4, 2, 2), "x": torch.zeros(1)},
}


@pytest.mark.parametrize("fault", FEATURES_FAULTS)
def test_tensors_that_are_not_those_of_features_are_refused(path, fault):
    save_features(small_features(), path)
    as_older_versions_wrote_it(path, FEATURES_FAULTS[fault])
    with pytest.raises(FileError, match=r"x\.safetensors: not a whole features file .*; save the features again"):
        load_features(path)


@pytest.mark.parametrize(
    "change", [{"depth": -7}, {"depth": 10**9}, {"depth": "1"}, {"depth": True}, {"depth": None}, {"tokenizer": [1]}]
)
def test_a_depth_or_a_tokenizer_that_is_none_is_refused(path, change):
    save_features(small_features(), path)
    as_older_versions_wrote_it(path, about={"format": FEATURES_FORMAT, "tokenizer": "t", "depth": 1, **change})
    with pytest.raises(FileError, match="not a whole features file"):
        load_features(path)


SURROGATE = '{"format": "ming features 1", "tokenizer": "\\ud800", "depth": 0}'
HUGE = '{"format": 1' + "0" * 5000 + "}"


@pytest.mark.parametrize(
    "about", [SURROGATE, HUGE, "[" * 5000, "null", "[]", '"x"', '{"format": NaN}', '{"format": "ming"}', "{"]
)
def test_json_that_is_no_files_is_refused(path, about):
    save_features(small_features(), path)
    as_older_versions_wrote_it(path, about=about)
    with pytest.raises(FileError, match=r"x\.safetensors"):
        load_features(path)


def segments(about):
    return about["parts"][0]["segments"]


CONVERSATION_FAULTS = {
    "parts": lambda about: about.update(parts="xy"),
    "a part": lambda about: about["parts"].insert(0, "xy"),
    "no segments": lambda about: about["parts"][0].update(segments=None),
    "a segment": lambda about: segments(about).insert(0, "a kind of"),
    "generated": lambda about: about["parts"][0].update(generated="no"),
    "a length": lambda about: segments(about)[0].update(length=None),
    "a length of truth": lambda about: segments(about)[0].update(length=True),
    "a kind": lambda about: segments(about)[0].update(kind=[]),
    "a text": lambda about: segments(about)[0].update(text=5),
    "drawn": lambda about: next(s for s in segments(about) if "drawn" in s).update(drawn=1),
    "a depth": lambda about: next(s for s in segments(about) if "drawn" in s).update(depth=10**40),
    "an image more": lambda about: segments(about).append({"drawn": False, "depth": 0}),
    "no model": lambda about: about.update(model=None),
}


@pytest.mark.parametrize("fault", CONVERSATION_FAULTS)
def test_json_that_is_not_that_of_a_conversation_is_refused(path, talk, model, fault):
    save_conversation(talk, path)
    about = read_tensors(path, CONVERSATION_FORMAT)[1]
    CONVERSATION_FAULTS[fault](about)
    as_older_versions_wrote_it(path, about=about)
    with pytest.raises(
        FileError, match=r"x\.safetensors: not a whole conversation file .*; save the conversation again"
    ):
        load_conversation(path, model)


@pytest.mark.parametrize("ids", ["two axes", "no axis", "truths", "fp8", "none"])
def test_token_ids_that_are_no_list_of_whole_numbers_are_refused(path, talk, model, ids):
    save_conversation(talk, path)
    tensors = load_file(path)
    found = tensors.pop("ids")
    changed = {
        "two axes": found[None],
        "no axis": torch.tensor(5),
        "truths": found.bool(),
        "fp8": found.float().to(torch.float8_e4m3fn),
    }
    as_older_versions_wrote_it(path, tensors | ({"ids": changed[ids]} if ids in changed else {}))
    with pytest.raises(FileError, match="it has no list of token ids"):
        load_conversation(path, model)
