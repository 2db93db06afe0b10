"""Products with packed weights: the same numbers, only where they can be, and nothing of them left behind."""

import copy

import pytest
import torch
from ming_univision.ming_core import Conversation, Solver, few_rows
from ming_univision.ming_core.adapters import LowRank, branches
from ming_univision.ming_core.few_rows import FEWEST_ROWS, MOST_ROWS, PackedWeights
from torch import nn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def packs(monkeypatch):
    """Numbers of rows of every product with packed weights; all layers are large enough for it."""
    monkeypatch.setattr(few_rows, "SMALLEST", 1)
    used, product = [], few_rows._product

    def recorded(x, packed, bias):
        used.append(len(x))
        return product(x, packed, bias)

    for dtype in few_rows.DTYPES:  # tried once, by a product that is not one of these
        few_rows.packed_products_work(dtype)
    monkeypatch.setattr(few_rows, "_product", recorded)
    return used


def layer(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(96, 160, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (2, 96), (3, 96), (2, 1, 3, 96), (MOST_ROWS, 96), (96,)])
def test_few_rows_give_what_the_layer_gives(packs, dtype, bias, shape):
    linear = layer(dtype, bias)
    x = torch.randn(shape).to(dtype)
    with PackedWeights(linear):
        found = linear(x)
    assert packs == [max(FEWEST_ROWS, x.numel() // 96)]
    wanted = linear(x)
    assert found.shape == wanted.shape and found.dtype == dtype
    assert torch.allclose(
        found, wanted, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-2 if dtype != torch.float32 else 1e-5
    )


def test_many_rows_gradients_and_other_types_take_the_plain_product(packs):
    linear = layer()
    with PackedWeights(linear):
        linear(torch.randn(MOST_ROWS + 1, 96))
        linear(torch.randn(0, 96))
        linear(torch.randn(2, 96, requires_grad=True)).sum().backward()
    double = layer(torch.float64)
    with PackedWeights(double):
        double(torch.randn(2, 96, dtype=torch.float64))
    assert packs == []


def test_small_layers_and_weights_that_a_host_patches_are_left_alone(packs, monkeypatch):
    patched, small = layer(), layer()
    patched.weight_function = [lambda weight: weight * 2]
    with PackedWeights(patched):
        patched(torch.randn(2, 96))
    monkeypatch.setattr(few_rows, "SMALLEST", small.weight.nbytes + 1)
    with PackedWeights(small):
        small(torch.randn(2, 96))
    assert packs == []


def test_afterwards_nothing_is_left_and_new_weights_count(packs):
    linear, x = layer(), torch.randn(2, 96)
    with PackedWeights(linear):
        before = linear(x)
    assert "forward" not in vars(linear)
    copy.deepcopy(linear)
    linear.weight.data.mul_(2)
    with PackedWeights(linear):
        after = linear(x)
    assert torch.allclose(after - linear.bias, 2 * (before - linear.bias), atol=1e-5)


def test_nothing_is_left_when_an_error_ends_it(packs):
    linear = layer()
    with pytest.raises(RuntimeError), PackedWeights(linear):
        linear(torch.randn(2, 95))
    assert "forward" not in vars(linear)


def test_the_branch_of_a_lora_is_added_all_the_same(packs):
    network = nn.Sequential(layer())
    x, branch = torch.randn(2, 96), LowRank(torch.randn(4, 96), torch.randn(160, 4))
    with branches(network, {"0": branch}):
        wanted = network(x)
        with PackedWeights(network):
            found = network(x)
    assert packs and torch.allclose(found, wanted, atol=1e-4)


def test_a_drawing_is_the_same_with_it_and_without(packs, model, monkeypatch):
    def drawn():
        model.prefix_cache.clear()
        return model.generate_image(Conversation(), "A cat.", seed=1, solver=Solver(3), max_new_tokens=1).features

    packed = drawn()
    assert packs
    monkeypatch.setattr(few_rows, "packed_products_work", lambda dtype: False)
    packs.clear()
    plain = drawn()
    assert packs == []
    assert torch.allclose(packed.latents, plain.latents, atol=1e-3)
    assert not any("forward" in vars(module) for module in model.network.modules())


@pytest.mark.parametrize("trouble", ["missing", "wrong"])
def test_where_the_products_are_no_good_the_layer_computes_as_ever(monkeypatch, caplog, trouble):
    def product(x, packed, bias):
        if trouble == "missing":
            raise AttributeError("no such operation")
        return torch.zeros(len(x), 48)

    monkeypatch.setattr(few_rows, "_product", product)
    few_rows.packed_products_work.cache_clear()
    monkeypatch.setattr(few_rows, "SMALLEST", 1)
    linear, x = layer(), torch.randn(2, 96)
    try:
        with caplog.at_level("INFO"), PackedWeights(linear):
            assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    finally:
        few_rows.packed_products_work.cache_clear()
    assert "drawing takes longer" in caplog.text


def test_without_the_memory_for_it_drawing_goes_on_without(packs, caplog, monkeypatch):
    linear = layer()
    free = 2 * linear.weight.nbytes - 1
    monkeypatch.setattr(few_rows.psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    with caplog.at_level("INFO"), PackedWeights(linear):
        linear(torch.randn(2, 96))
    assert packs == [] and "are not free" in caplog.text
