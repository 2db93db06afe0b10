"""Nodes that are called with values which other packs, or links past a widget's range, may bring."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ming_univision.ming_core import Conversation, Engine, Features, FileError
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host
from ming_univision.tests.fuzz.hostile import CONTAINERS, NUMBERS, TEXTS, examples, said_in_words

SMALL = {"max_new_tokens": 3, "steps": 2, "size": 64, "model_name": "tiny"}

SAID_AS = {  # inputs that an error may call otherwise
    "index": ("picture",),
    "scene": ("known shapes",),
    "strength": ("lora",),  # none is here, which is said first
    "model": ("lora",),
}

numbers = st.sampled_from(
    (*NUMBERS, math.nan, math.inf, -math.inf, True, np.int64(3), np.float32(0.5), torch.tensor(2), 2.0, 1j)
)
texts = st.sampled_from(TEXTS) | st.text(max_size=30)
shapes = st.lists(st.sampled_from((0, 1, 2, 3, 4, 8, 9, 32)), max_size=5)
dtypes = st.sampled_from(
    (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64,
     torch.float8_e4m3fn)
)  # fmt: skip
fills = st.sampled_from((None, math.nan, math.inf, -1.0, 255.0, 1e38))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of a shape, a dtype and numbers that nobody expects."""
    plausible = ((1, 32, 32, 3), (1, 8, 4, 4), (2, 8, 8, 4), (1, 32, 32))
    values = torch.rand(draw(shapes | st.sampled_from(plausible)))
    fill = draw(fills)
    values = values if fill is None else torch.full_like(values, fill)
    values = values.nan_to_num().to(draw(dtypes)) if draw(st.booleans()) else values
    layout = draw(st.sampled_from(("as it is", "as it is", "meta", "sparse", "reversed")))
    if layout == "meta":
        return values.to("meta")
    if layout == "sparse" and values.dtype == torch.float32:
        return values.to_sparse()
    return values.transpose(0, -1) if layout == "reversed" and values.ndim else values


class Sockets(dict):
    def __repr__(self) -> str:
        return "a value of each type"  # instead of pages of numbers


@pytest.fixture(scope="module")
def sockets(engine: Engine, features: Features) -> dict[str, Any]:
    """A value of each type that travels."""
    loaded = host.managed(engine, "tiny")
    said = engine.understand(Conversation(), "What is it?", features=features.split()[0], max_new_tokens=3)
    return Sockets(
        {
            "MING_UNIVISION": loaded,
            "MINGTOK": host.Loaded(engine.mingtok, None, "tiny: MingTok", owner=loaded),
            "MING_FEATURES": features,
            "MING_CONVERSATION": said.conversation,
            "IMAGE": torch.rand(1, 32, 32, 3),
            "MASK": torch.ones(1, 32, 32),
            "LATENT": {"samples": features.latents},
        }
    )


def anything(sockets: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What a link may bring: of the right type, of another one, or of none."""
    odd = st.sampled_from((*CONTAINERS, None, b"x", object, *sockets.values()))
    latents = st.fixed_dictionaries({"samples": tensors()}, optional={"type": texts, "ming_depth": numbers})
    return st.one_of(numbers, texts, odd, tensors(), tensors(), latents)


def plain_inputs(node: Any, sockets: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a node as a graph would give them."""
    values = {}
    for name, (kind, options) in node.INPUT_TYPES()["required"].items():
        default = "" if kind == "STRING" else None
        values[name] = SMALL.get(name, sockets.get(str(kind), options.get("default", default)))
    words = ("prompt", "instruction")
    values |= {name: "A cat." for name in words if name in values}
    return values | {"features": sockets["MING_FEATURES"].split()[0]} if "instruction" in values else values


def numbers_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, float):
        yield torch.tensor(value)
    elif isinstance(value, Features):
        yield from (value.tokens, value.latents)
    elif isinstance(value, dict):
        yield from numbers_in(list(value.values()))
    elif isinstance(value, (list, tuple)) and not isinstance(value, Conversation):
        for inner in value:
            yield from numbers_in(inner)


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
@examples(20)
@given(data=st.data())
def test_a_node_gives_finite_numbers_or_an_error_in_words_that_names_the_input(name, sockets, data):
    node = NODE_CLASS_MAPPINGS[name]
    inputs, declared = plain_inputs(node, sockets), node.INPUT_TYPES()
    changed = data.draw(st.sampled_from([*declared["required"], *declared.get("optional", ())]))
    inputs[changed] = data.draw(anything(sockets))
    with said_in_words(ValueError, FileError) as refused:
        result = getattr(node(), node.FUNCTION)(**inputs)
    if refused:
        named = re.sub("_(name|a|b)$", "", changed)
        assert any(word in str(refused[0]).lower() for word in (named, *SAID_AS.get(changed, ()))), refused[0]
    else:
        for found in numbers_in(result):
            assert not found.is_complex() and torch.isfinite(found.float()).all()


@examples(40)
@given(prefix=texts)
def test_a_save_makes_one_whole_file_in_the_output_folder_or_none_and_says_why(folder, sockets, prefix):
    before = set(folder.rglob("*"))
    node = NODE_CLASS_MAPPINGS["MingSaveFeatures"]
    with said_in_words(FileError, ValueError) as refused:
        node().save(features=sockets["MING_FEATURES"], filename_prefix=prefix)
    new = [path for path in folder.rglob("*") if path not in before and path.is_file()]
    assert len(new) == (0 if refused else 1)
    for path in new:
        assert (folder / "output" / "ming") in path.resolve().parents and path.stat().st_size > 1000
        path.unlink()
