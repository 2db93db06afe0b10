"""Checkpoint folders with damaged or strange files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ming_univision.ming_core import CheckpointError, Engine, load_univision
from ming_univision.nodes import NODE_CLASS_MAPPINGS
from ming_univision.tests.fuzz.hostile import any_json, changed_header, changed_json, dumped, examples, said_in_words
from safetensors.torch import load_file, save_file


@pytest.fixture
def spoiled(checkpoint: Path):
    """A copy of the checkpoint in the models folder; removed afterwards, so that lists have the whole one alone."""
    copy = checkpoint.with_name("spoiled")
    shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
    yield copy
    shutil.rmtree(copy)


@pytest.fixture
def sharded(spoiled: Path) -> Path:
    """The same in two shards with an index."""
    tensors = load_file(spoiled / "model.safetensors")
    (spoiled / "model.safetensors").unlink()
    places = {}
    for i in range(2):
        part = {key: tensors[key] for key in sorted(tensors)[i::2]}
        save_file(part, spoiled / f"model-0000{i + 1}-of-00002.safetensors")
        places |= dict.fromkeys(part, f"model-0000{i + 1}-of-00002.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (spoiled / "model.safetensors.index.json").write_text(json.dumps(index))
    return spoiled


def loaded_or_refused(folder: Path) -> Engine | None:
    """The model of a folder, or None if it was refused in words. Whatever it holds, loaders list what there is."""
    for name in ("MingUniVisionLoader", "MingTokLoader"):
        assert "tiny" in NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]["model_name"][0]
    with said_in_words(CheckpointError):
        return load_univision(folder)
    return None


def same_weights(engine: Engine | None, other: Engine) -> bool:
    """Whether a model was refused, or has the other one's weights."""
    if engine is None:
        return True
    found, meant = engine.network.state_dict(), other.network.state_dict()
    return found.keys() == meant.keys() and all(torch.equal(found[key], meant[key]) for key in meant)


@examples(100)
@given(data=st.data())
def test_a_changed_config_is_refused_in_words_or_loads(spoiled, checkpoint, data):
    config = json.loads((checkpoint / "config.json").read_text())
    (spoiled / "config.json").write_bytes(data.draw(changed_json(config)))
    loaded_or_refused(spoiled)


@examples(50)
@given(tree=any_json)
def test_any_json_as_a_config_is_refused_in_words(spoiled, tree):
    (spoiled / "config.json").write_bytes(dumped(tree))
    assert loaded_or_refused(spoiled) is None


@examples(100)
@given(data=st.data())
def test_weights_with_a_changed_header_load_the_same_or_are_refused_in_words(spoiled, checkpoint, engine, data):
    weights = (checkpoint / "model.safetensors").read_bytes()
    (spoiled / "model.safetensors").write_bytes(data.draw(changed_header(weights)))
    assert same_weights(loaded_or_refused(spoiled), engine)


@examples(50)
@given(data=st.data())
def test_shards_with_a_changed_index_load_the_same_or_are_refused_in_words(sharded, engine, data):
    index = sharded / "model.safetensors.index.json"
    whole = index.read_bytes()
    index.write_bytes(data.draw(changed_json(json.loads(whole))))
    try:
        assert same_weights(loaded_or_refused(sharded), engine)
    finally:
        index.write_bytes(whole)


@examples(75)
@given(data=st.data(), name=st.sampled_from(("tokenizer.json", "tokenizer_config.json")))
def test_a_changed_tokenizer_is_refused_in_words_or_loads(spoiled, checkpoint, data, name):
    tokenizer = json.loads((checkpoint / name).read_text())
    (spoiled / name).write_bytes(data.draw(changed_json(tokenizer)))
    loaded_or_refused(spoiled)
    shutil.copy(checkpoint / name, spoiled)
