"""Where a model computes, and how much memory a round asks for beside the weights."""

import pytest
import torch
from ming_univision.ming_core import Conversation, Solver, UniVision
from ming_univision.ming_core.buffers import LayerCache
from ming_univision.ming_core.language_model import Prefix


def test_a_model_computes_where_its_weights_are_until_it_is_told_otherwise(model):
    assert model.device == model.mingtok.device == model.language_model.device == torch.device("cpu")
    model.compute_on(torch.device("meta"))
    assert model.device == model.mingtok.device == model.language_model.device == torch.device("meta")
    assert model.dtype == model.mingtok.dtype == torch.float32


@pytest.fixture
def allocated(monkeypatch):
    """Bytes of keys and values that were allocated."""
    total = [0]
    for cls in (Prefix, LayerCache):
        make = cls.__init__

        def counted(self, *args, make=make, **kwargs):
            make(self, *args, **kwargs)
            total[0] += self.keys.nbytes + self.values.nbytes

        monkeypatch.setattr(cls, "__init__", counted)
    return total


@pytest.mark.parametrize("pictures", [1, 3])
def test_a_drawing_round_asks_for_its_keys_and_values(model, picture, allocated, pictures):
    said = model.understand(Conversation(), "Hello.", max_new_tokens=8).conversation
    allocated[0] = 0
    options = {"features": picture, "max_new_tokens": 8}
    model.generate_images(said, "Draw it.", seeds=list(range(pictures)), solver=Solver(1), **options)
    asked = model.working_memory(said, "Draw it.", picture, 8, pictures)
    assert allocated[0] <= asked
    assert asked > pictures / 2 * model.working_memory(said, "Draw it.", picture, 8, 1)


def test_an_answer_asks_for_its_keys_and_values(model, picture, allocated):
    model.understand(Conversation(), "What is it?", features=picture, max_new_tokens=64)
    assert allocated[0] <= model.working_memory(Conversation(), "What is it?", picture, 64)
    more = model.working_memory(Conversation(), "What is it?", picture, 128)
    assert more > model.working_memory(Conversation(), "What is it?", picture, 64)


def test_the_published_model_takes_57_kb_a_position_in_bf16():
    language_model = UniVision(device="meta", dtype=torch.bfloat16).language_model
    positions = language_model.working_memory(0, 1, 1001) - language_model.working_memory(0, 1, 1)
    assert positions == 57_344 * 1000
