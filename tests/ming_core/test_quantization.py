"""Quantised weights: how exact, how small, made while loading, saved and loaded again, and what is refused."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from ming_univision.ming_core import (
    CheckpointError,
    Conversation,
    Engine,
    UniVision,
    load_mingtok,
    load_univision,
    save_univision,
)
from ming_univision.ming_core.checkpoint import checkpoint_bytes, stored_quantization
from ming_univision.ming_core.checkpoint import save as saving
from ming_univision.ming_core.config import MingTokConfig, UniVisionConfig
from ming_univision.ming_core.experts import ExpertPerRow, Experts, OneExpert, SortedRows
from ming_univision.ming_core.prompts import ChatFormat
from ming_univision.ming_core.quantization import (
    FORMATS,
    QuantizedLinear,
    QuantizedStackedLinear,
    QuantizedWeight,
    kernels,
    layers,
    packed_state_dict,
    quantize,
    unpack_weights,
)
from ming_univision.ming_core.quantization.formats import dequantize, quantize_int4, quantize_int8, split_nibbles
from ming_univision.tests.kernels import grouped_product, int4_kernel
from safetensors.torch import load_file, save_file
from torch import nn

both = pytest.mark.parametrize("kind", FORMATS)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(kind, rows=192, width=256, dtype=torch.bfloat16):
    """A quantised layer, and the plain one with the weights that it stands for."""
    plain = nn.Linear(width, rows, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(normal(rows, width) * width**-0.5), plain.bias.copy_(normal(rows, seed=1))
    layer = QuantizedLinear(plain, kind)
    plain.weight.data = dequantize(layer.values, layer.scale)
    return layer, plain


# --- the numbers --------------------------------------------------------------------------------------------------


def test_int8_is_off_by_half_a_step_at_most():
    weight = normal(96, 300)
    values, scale = quantize_int8(weight)
    assert values.dtype == torch.int8 and scale.shape == (96,)
    error = (dequantize(values, scale.float()) - weight).abs()
    # the scale is rounded to 8 bits, so the largest weight of a row may be cut by half a unit in the last of them
    assert (error <= scale.float()[:, None] * (0.5 + 127 * 2**-9) + 1e-7).all()
    assert (error.norm() / weight.norm()) < 0.01


def test_int4_is_off_by_half_a_step_of_its_group_at_most():
    weight = normal(64, 256) + 0.5 * normal(64, 1, seed=1)  # rows away from zero: the offset has to follow them
    values, scale = quantize_int4(weight, 64)
    assert values.shape == (64, 128) and values.dtype == torch.uint8 and scale.shape == (4, 64, 2)
    error = (dequantize(values, scale.float()) - weight).abs().view(64, 4, 64)
    step, offset = scale.float().transpose(0, 1).unbind(-1)
    assert (error <= (step * (0.5 + 15 * 2**-9) + offset.abs() * 2**-9 + 1e-7)[..., None]).all()
    assert (error.norm() / weight.norm()) < 0.1


@both
def test_rows_of_equal_weights_survive(kind):
    weight = torch.tensor([0.0, 0.5, -0.25])[:, None].expand(3, 64).contiguous()
    stored = quantize_int8(weight) if kind == "int8" else quantize_int4(weight, 64)
    assert torch.allclose(dequantize(*stored).float(), weight, atol=2e-3)


@both
def test_the_integers_are_the_same_whatever_the_dtype(kind):
    weight = normal(64, 64, dtype=torch.bfloat16)
    make = quantize_int8 if kind == "int8" else lambda w: quantize_int4(w, 64)
    for a, b in zip(make(weight), make(weight.float()), strict=True):
        assert torch.equal(a, b)


@int4_kernel
def test_the_order_of_a_kernel_is_undone_exactly():
    values, _ = quantize_int4(normal(192, 320), 64)
    packed = kernels.pack(values)
    official = torch._convert_weight_to_int4pack_for_cpu(split_nibbles(values).int(), 1)
    assert torch.equal(packed.flatten(), official.flatten()) and not torch.equal(packed, values)
    assert torch.equal(kernels.unpack(packed, "cpu"), values)


# --- products -----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 3, 12, 40])
def test_a_product_is_that_of_the_dequantised_weights(kind, dtype, rows):
    layer, plain = linear(kind, dtype=dtype)
    x = normal(2, rows, 256, seed=2, dtype=dtype)
    with torch.no_grad():
        found, again, expected = layer(x), layer(x), plain.double()(x.double())
    assert torch.equal(found, again) and found.shape == (2, rows, 192) and found.dtype == dtype
    assert (found - expected).norm() / expected.norm() < (4e-3 if dtype == torch.bfloat16 else 1e-6)


@both
def test_inputs_that_are_slices_of_others_are_taken(kind):
    layer, _ = linear(kind)
    x = normal(7, 259, seed=2, dtype=torch.bfloat16)
    with torch.no_grad():
        for part in (x[::3, :256], x[1:, 3:], x[:, None, 1:257], x[:1, 1:257]):
            assert torch.equal(layer(part), layer(part.clone(memory_format=torch.contiguous_format)))


@int4_kernel
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("wide", "packed"), [(64, True), (192, True), (96, False)])
def test_int8_through_the_kernel_of_int4_is_the_same(quantised_as_on_a_gpu, rows, wide, packed):
    layer, plain = linear("int8", wide)
    values = layer.values.clone()
    x = normal(rows, 256, seed=2, dtype=torch.bfloat16) + 1  # whose mean must not cost exactness
    with torch.no_grad():
        found = layer(x)
        assert (layer.order == "cpu") == packed and torch.equal(layer.values, values) == (not packed)
        assert (found.float() - plain(x).float()).norm() / plain(x).float().norm() < 5e-3
    layer.arrange("plain")
    assert torch.equal(layer.values, values)


@int4_kernel
def test_every_int8_value_has_its_two_halves():
    values = torch.arange(-128, 128).to(torch.int8).repeat(64, 1)
    halves = kernels._nibbles(values)
    assert halves.max() == 15 and torch.equal(kernels._from_nibbles(halves, torch.int8), values)
    high, low = halves.view(2, 64, 256).int()
    assert torch.equal(16 * high + low - 128, values.int())
    packed, one_each = kernels.pack(values), torch.eye(256, dtype=torch.bfloat16)
    found = kernels._packed_product(one_each, packed, torch.ones(64, dtype=torch.bfloat16))
    assert torch.equal(found, values.T.bfloat16())


@int4_kernel
def test_weights_in_the_order_of_a_kernel_keep_it_while_they_rest_elsewhere(quantised_as_on_a_gpu, monkeypatch):
    layer, _ = linear("int8")
    x = normal(3, 256, seed=2, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        monkeypatch.setattr(layers, "can_pack", lambda values, device: False)  # as of weights on another device
        packed = layer.values.clone()
        layer(x)
    assert layer.order == "cpu" and torch.equal(layer.values, packed)


@both
def test_a_product_without_a_kernel_is_the_same(kind, monkeypatch):
    layer, _ = linear(kind)
    x = normal(3, 256, seed=2, dtype=torch.bfloat16)
    with torch.no_grad():
        fast = layer(x)
        monkeypatch.setattr(kernels, "kernel_works", lambda *_: False)
        slow = layer(x)
    assert layer.order == "plain"
    assert (fast.float() - slow.float()).norm() / slow.float().norm() < 1e-2


@int4_kernel
@both
def test_a_kernel_that_gives_wrong_numbers_is_not_used(kind, monkeypatch):
    for name in ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu"):
        monkeypatch.setattr(torch, name, lambda x, *_: x.new_zeros(len(x), 128))
    assert not kernels.kernel_works.__wrapped__(kind, torch.device("cpu"), torch.bfloat16)


@both
def test_gradients_pass_through_to_the_input_also_after_a_kernel_has_run(kind):
    layer, plain = linear(kind)
    x = normal(3, 256, seed=2, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).float().square().sum().backward()
    plain(b).float().square().sum().backward()
    assert torch.allclose(a.grad, b.grad, rtol=0.02, atol=0.02)


@int4_kernel
@both
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_weights_stay_usable_when_packing_or_unpacking_them_fails_on_the_way(
    kind, error, quantised_as_on_a_gpu, monkeypatch
):
    monkeypatch.setattr(layers, "CHUNK", 64 * 64)  # four pieces
    layer, plain = linear(kind, rows=256, width=128)
    values, x = layer.values.clone(), normal(3, 128, seed=2, dtype=torch.bfloat16)

    def failing_at_the_third(function):
        calls = iter(range(10))

        def attempt(*args):
            if next(calls) == 2:
                raise error
            return function(*args)

        return attempt

    with torch.no_grad():
        assert layer.kernel_serves(x)  # which packs a small weight to see whether the kernel works
        with monkeypatch.context() as patched:
            patched.setattr(layers, "pack", failing_at_the_third(layers.pack))
            with pytest.raises(error):
                layer(x)
        assert torch.equal(layer.values, values) and layer.order == "plain"
        found = layer(x)
        assert layer.order == "cpu" and (found - plain(x)).norm() / plain(x).norm() < 5e-3
        with monkeypatch.context() as patched:
            patched.setattr(layers, "unpack", failing_at_the_third(layers.unpack))
            with pytest.raises(error):
                layer.arrange("plain")
        assert torch.equal(layer(x), found)
        layer.arrange("plain")
    assert torch.equal(layer.values, values)


# --- experts ------------------------------------------------------------------------------------------------------


def experts(dtype=torch.bfloat16):
    plain = Experts(6, 128, 128, dtype=dtype).requires_grad_(False)
    for seed, weight in enumerate(plain.parameters()):
        weight.copy_(normal(*weight.shape, seed=seed) * weight.shape[-1] ** -0.5)
    chosen = torch.tensor([[0, 2], [2, 5], [4, 0], [2, 0], [5, 4]])  # expert 1 and 3 have no token
    return plain, normal(5, 128, seed=1, dtype=dtype), chosen


def quantised(plain, kind):
    """A copy of the experts with quantised weights."""
    mixed = copy.deepcopy(plain)
    mixed.gate_up, mixed.down = (QuantizedStackedLinear(weight, kind) for weight in (plain.gate_up, plain.down))
    return mixed


def forget(mixed, *experts):
    """Make the weights of some experts unusable."""
    for expert in experts:
        mixed.gate_up.scale[expert] = mixed.down.scale[expert] = float("nan")


@grouped_product
def test_experts_give_the_same_on_every_route():
    plain, x, chosen = experts()
    expected = plain.outputs(x, chosen, OneExpert).float()
    for route in (ExpertPerRow, SortedRows):
        assert torch.allclose(plain.outputs(x, chosen, route).float(), expected, rtol=0.02, atol=0.02)
    assert expected.abs().max() > 0.5


@both
def test_quantised_experts_are_experts_of_the_dequantised_weights(kind):
    plain, x, chosen = experts()
    mixed = quantised(plain, kind)
    for name in ("gate_up", "down"):
        weight = getattr(mixed, name)
        getattr(plain, name).values.copy_(dequantize(weight.values, weight.scale))
    expected = plain.outputs(x, chosen, OneExpert).float()
    found = mixed.outputs(x, chosen, OneExpert).float()
    assert (found - expected).norm() / expected.norm() < 0.02


@int4_kernel
@both
def test_quantised_experts_give_the_same_sorted_and_gathered(kind, quantised_as_on_a_gpu):
    plain, x, chosen = experts()
    mixed = quantised(plain, kind)
    assert mixed.dispatch(x, chosen.numel()) is ExpertPerRow and not mixed.synchronizes(x, chosen.numel())
    gathered = mixed.outputs(x, chosen, ExpertPerRow)
    assert mixed.gate_up.order == mixed.down.order == "cpu"
    torch.testing.assert_close(gathered, mixed.outputs(x, chosen, OneExpert), rtol=0.02, atol=0.02)
    forget(mixed, 1, 3)  # not chosen
    assert torch.equal(mixed.outputs(x, chosen, ExpertPerRow), gathered)


def test_a_route_that_quantised_experts_have_no_product_for_is_refused():
    plain, x, _ = experts()
    weight = QuantizedStackedLinear(plain.gate_up, "int8")
    with pytest.raises(TypeError, match="SortedRows"):
        weight(x, SortedRows(torch.tensor([1, 2, 3, 4, 5, 5])))


@pytest.mark.parametrize("kind", [None, *FORMATS])
def test_on_a_cpu_experts_are_multiplied_one_after_the_other(kind):
    plain, x, chosen = experts()
    mixed = quantised(plain, kind) if kind else plain
    assert mixed.dispatch(x, chosen.numel()) is OneExpert and mixed.synchronizes(x, chosen.numel())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_product_without_a_kernel_goes_piece_by_piece(kind, dtype, monkeypatch):
    layer = nn.Linear(64, 192, bias=False, dtype=dtype)
    mixed, x = QuantizedLinear(layer, kind), torch.randn(3, 64).to(dtype)
    whole, pieces, exact = mixed(x), [], kernels.F.linear
    monkeypatch.setattr(kernels, "PRODUCT_CHUNK", 64 * 64)
    monkeypatch.setattr(kernels.F, "linear", lambda x, w: pieces.append(w.shape) or exact(x, w))
    torch.testing.assert_close(mixed(x), whole)
    assert len(pieces) > 1 and sum(shape[0] for shape in pieces) == 192


def test_only_the_chosen_experts_are_read():
    plain, x, chosen = experts()
    mixed = quantised(plain, "int8")
    whole = mixed.outputs(x, chosen, OneExpert)
    forget(mixed, 1, 3)
    assert torch.equal(mixed.outputs(x, chosen, OneExpert), whole)


@both
@pytest.mark.parametrize(("rows", "width"), [(33, 88), (64, 24), (20, 48), (64, 96)])
def test_layers_of_odd_sizes_run_as_well(kind, rows, width):
    """Torch's int8 kernel reads past the end of rows that are no multiple of 16, so it must not be given any."""
    layer, plain = linear(kind, rows, width)
    x = normal(7, width, seed=2, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.allclose(layer(x).float(), plain(x).float(), rtol=0.02, atol=0.02)


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    return shutil.copytree(checkpoint_folder, tmp_path / "model", ignore=shutil.ignore_patterns("io.safetensors"))


def draw(model):
    return model.generate_image(Conversation(), "A cat.", max_new_tokens=4).features.latents


def save(model, original, folder, **options):
    save_univision(model, folder, {"tokenizer.json": (original / "tokenizer.json").read_text()}, **options)
    return folder


@pytest.mark.parametrize(("kind", "most"), [("int8", 20e9), ("int4", 12e9)])
def test_the_published_size_takes_at_most(kind, most):
    model = UniVision(UniVisionConfig(mingtok_config=MingTokConfig()), device="meta", dtype=torch.bfloat16)
    quantize(model, kind)
    parameters = dict(model.named_parameters())
    assert 0.97 * most < sum(p.nbytes for p in parameters.values()) <= most
    kept = {name: p for name, p in parameters.items() if p.dtype == torch.bfloat16 and not name.endswith(".scale")}
    large = {
        name.split(".")[-2] for name, p in kept.items() if p.ndim > 1 and not name.startswith(("mingtok", "linear"))
    }
    assert large == {"word_embeddings", "gate", "image_gate", "input_proj", "linear", "0", "2"}  # 0, 2: of the time
    assert "language_model.lm_head.weight" not in kept
    if kind == "int4":
        assert not [name for name, p in parameters.items() if p.dtype == torch.int8]


@both
def test_loading_quantised_is_quantising_what_was_loaded(kind, folder):
    loaded, made = load_univision(folder, quantization=kind), load_univision(folder)
    original = made.fingerprint
    quantize(made.network, kind)
    theirs = dict(made.network.named_parameters())
    for name, parameter in loaded.network.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert any(isinstance(m, QuantizedStackedLinear) for m in loaded.network.modules())
    assert loaded.fingerprint == original and loaded.network.quantization == kind
    assert not any(p.is_meta for p in loaded.network.parameters())


@both
def test_loading_never_holds_a_full_precision_copy(kind, folder, tensors_alive):
    load_univision(folder, quantization=kind)
    read, most = tensors_alive
    assert read > 100 and most == 1


@pytest.mark.parametrize(("kind", "closest"), [("int8", 0.998), ("int4", 0.85)])
def test_hidden_states_stay_close_to_those_of_the_whole_weights(kind, closest, folder):
    """As far as random routers allow, which send a token to other experts for a small change."""
    whole, mixed = load_univision(folder), load_univision(folder, quantization=kind)
    ids = torch.arange(20, 60)

    def hidden(model):
        with torch.no_grad():
            language_model = model.network.language_model
            return language_model.prefill(language_model.embed(ids), language_model.new_cache(40))

    assert torch.cosine_similarity(hidden(mixed), hidden(whole), dim=0) > closest


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_quantised_folder_loads_the_same_and_keeps_its_originals_fingerprint(kind, dtype, folder, tmp_path):
    model = load_univision(folder, dtype=dtype, quantization=kind)
    drawn = draw(model)  # the weights are in a kernel's order now
    saved = save(model, folder, tmp_path / "saved", dtype=dtype)
    again = load_univision(saved, dtype=dtype)
    assert torch.equal(draw(again), drawn) and again.network.quantization == kind
    assert torch.equal(draw(load_univision(saved, dtype=dtype, quantization=kind)), drawn)
    whole = load_univision(folder)
    for other in (again, load_univision(save(again, folder, tmp_path / "once more", dtype=dtype))):
        assert (other.fingerprint, other.mingtok.fingerprint) == (whole.fingerprint, whole.mingtok.fingerprint)
    assert load_mingtok(saved).fingerprint == whole.mingtok.fingerprint
    assert stored_quantization(saved) == kind and stored_quantization(folder) is None


@torch.no_grad()
def random_weights(network):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))


@both
def test_a_flow_head_of_whole_groups_throughout_as_the_published_one_comes_back_from_a_quantised_folder(
    kind, folder, tmp_path
):
    chat = ChatFormat.from_folder(folder)
    config = load_univision(folder).config
    head = dataclasses.replace(config.vishead_diffloss_config, diffloss_w=64)
    wide = UniVision(dataclasses.replace(config, vishead_diffloss_config=head), flow_hidden=128)
    random_weights(wide)
    model = load_univision(save(Engine(wide, chat), folder, tmp_path / "wide"), quantization=kind)
    again = load_univision(save(model, folder, tmp_path / "saved"))
    inner = again.network.flow_head.net.res_blocks[0].mlp.w3.values
    assert inner.dtype == (torch.uint8 if kind == "int4" else torch.int8)
    assert torch.equal(draw(again), draw(model))


@both
def test_what_a_folder_will_take_is_known_before_it_is_loaded(kind, folder, tmp_path):
    model = load_univision(folder, dtype=torch.bfloat16, quantization=kind)
    size = sum(p.nbytes for p in model.network.parameters())
    assert checkpoint_bytes(folder, "univision", torch.bfloat16, kind) == size
    assert checkpoint_bytes(save(model, folder, tmp_path / "saved"), "univision", torch.bfloat16) == size
    assert size < checkpoint_bytes(folder, "univision", torch.bfloat16)
    vision = sum(p.nbytes for p in model.mingtok.parameters())
    assert checkpoint_bytes(folder, "mingtok", torch.bfloat16) == vision


def test_a_large_model_is_saved_in_shards(folder, tmp_path, monkeypatch):
    model = load_univision(folder, quantization="int4")
    monkeypatch.setattr(saving, "SHARD", 100_000)
    saved = save(model, folder, tmp_path / "saved")
    files = sorted(saved.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    drawn = draw(model)
    assert torch.equal(draw(load_univision(saved)), drawn)
    monkeypatch.setattr(saving, "SHARD", 200_000)
    (saved / "mine.safetensors").write_bytes(b"")
    save(model, folder, saved)  # over the shards, in fewer
    assert 1 < len(list(saved.glob("model-*.safetensors"))) < len(files)
    assert torch.equal(draw(load_univision(saved)), drawn)
    monkeypatch.undo()
    save(model, folder, saved)  # in one file
    assert {path.name for path in saved.glob("*.safetensors*")} == {"model.safetensors", "mine.safetensors"}
    assert torch.equal(draw(load_univision(saved)), drawn)


def test_a_model_that_nothing_identifies_is_not_saved_quantised(folder, tmp_path):
    model = load_univision(folder)
    model.fingerprint = ""
    quantize(model.network, "int8")
    with pytest.raises(ValueError, match="save it, load it and quantize it"):
        save(model, folder, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@int4_kernel
def test_arranging_back_and_forth_changes_nothing(folder):
    model = load_univision(folder, dtype=torch.bfloat16, quantization="int4")
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    drawn = draw(model)
    assert any(m.order == "cpu" for m in model.network.modules() if isinstance(m, QuantizedWeight))
    unpack_weights(model.network)
    assert all(torch.equal(p, before[name]) for name, p in model.network.named_parameters())
    model.prefix_cache.clear()
    assert torch.equal(draw(model), drawn)


def all_features(model):
    model.prefix_cache.clear()
    return model.generate_image(Conversation(), "A cat.", max_new_tokens=1).features.tokens


@int4_kernel
@pytest.mark.parametrize("assign", [False, True])
@both
def test_a_twin_loaded_from_a_state_dict_gives_the_same_features(kind, assign, folder, quantised_as_on_a_gpu):
    model, twin, third = (load_univision(folder, dtype=torch.bfloat16, quantization=kind) for _ in range(3))
    fresh = model.network.state_dict()
    before = {name: tensor.clone() for name, tensor in fresh.items()}
    drawn = all_features(model)  # the weights are packed now
    packed = {m for m in model.network.modules() if isinstance(m, QuantizedWeight) and m.order == "cpu"}
    assert packed
    used = model.network.state_dict()
    for state in (fresh, used):
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    for other in (twin, third):  # one has not computed yet, one has
        spoil_weights(other.network)
        if other is third:
            all_features(other)
        other.network.load_state_dict(used, assign=assign)
        assert torch.equal(all_features(other), drawn)
        assert torch.equal(all_features(model), drawn)
    assert all(torch.equal(used[name], tensor) for name, tensor in before.items())  # also what a twin has taken over


@torch.no_grad()
def spoil_weights(network):
    for module in network.modules():
        if isinstance(module, QuantizedWeight):
            module.values.zero_()


@both
def test_a_deep_copy_of_a_model_that_has_computed_gives_the_same_features(kind, folder, quantised_as_on_a_gpu):
    model = load_univision(folder, dtype=torch.bfloat16, quantization=kind)
    drawn = all_features(model)
    other = Engine(copy.deepcopy(model.network), model.chat, model.fingerprint)
    assert torch.equal(all_features(other), drawn)
    unpack_weights(other.network)
    assert torch.equal(all_features(other), drawn) and torch.equal(all_features(model), drawn)


def test_a_state_dict_of_the_wrong_shapes_changes_nothing(quantised_as_on_a_gpu):
    layer, _ = linear("int8")
    x = normal(3, 256, seed=2, dtype=torch.bfloat16)
    with torch.no_grad():
        found = layer(x)
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict({**layer.state_dict(), "values": torch.zeros(1, 1, dtype=torch.int8)})
        assert torch.equal(layer(x), found)


@int4_kernel
def test_who_only_counts_bytes_gets_packed_values_without_a_copy(quantised_as_on_a_gpu):
    layer, _ = linear("int8")
    with torch.no_grad():
        layer(normal(3, 256, seed=2, dtype=torch.bfloat16))
    with packed_state_dict():
        assert layer.state_dict()["values"].data_ptr() == layer.values.data_ptr()
    assert not torch.equal(layer.state_dict()["values"], layer.values)


@both
def test_it_does_not_matter_what_is_done_under_inference_mode(kind, folder):
    with torch.inference_mode():
        model = load_univision(folder, dtype=torch.bfloat16, quantization=kind)
    drawn = draw(model)
    model.prefix_cache.clear()
    with torch.inference_mode():
        unpack_weights(model.network)
        assert torch.equal(draw(model), drawn)
    model.prefix_cache.clear()
    assert torch.equal(draw(model), drawn)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.fixture
def quantised_folder(folder, tmp_path):
    return save(load_univision(folder, quantization="int4"), folder, tmp_path / "quantised")


def refused(folder, *words, **options):
    with pytest.raises(CheckpointError) as error:
        load_univision(folder, **options)
    message = str(error.value)
    assert all(word in message for word in (str(folder), *words)), message


KEY = "model.model.layers.0.attention.query_key_value.weight"


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_another_format_than_the_folders_is_refused(quantised_folder):
    refused(quantised_folder, "quantized to int4 already", "int8", "original", quantization="int8")


def test_a_missing_scale_is_named_with_its_shape(quantised_folder):
    spoil(quantised_folder, lambda t: t.pop(KEY + "_scale"))
    refused(quantised_folder, f"{KEY}_scale [1, 256, 2] is missing", "download")


def test_a_misshapen_scale_is_named_with_both_shapes(quantised_folder):
    spoil(quantised_folder, lambda t: t.update({KEY + "_scale": torch.ones(2, 256, 2)}))
    refused(quantised_folder, f"{KEY}_scale is [2, 256, 2], expected [1, 256, 2]")


def test_a_scale_that_is_no_number_is_named(quantised_folder):
    spoil(quantised_folder, lambda t: t[KEY + "_scale"].fill_(float("nan")))
    refused(quantised_folder, f"{KEY}_scale holds NaN or infinite values", "download")


def test_whole_numbers_of_another_kind_are_named(quantised_folder):
    spoil(quantised_folder, lambda t: t.update({KEY: t[KEY].to(torch.int8)}))
    refused(quantised_folder, f"{KEY} is stored as I8, expected U8")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["gptq", "not supported", "bf16"]),
        ({"quantization": "int3"}, ["int3", "not supported"]),
        ({"fingerprint": 7}, ["lacks one of", "fingerprint"]),
        ({"fingerprint": "\ud800"}, ["lacks one of", "fingerprint"]),
        (None, ["_scale", "quantized", "no quantization_config"]),
    ],
)
def test_a_quantization_config_that_cannot_be_meant_is_refused(quantised_folder, entry, words):
    path = quantised_folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = entry and {**config["quantization_config"], **entry}
    path.write_text(json.dumps(config))
    refused(quantised_folder, *words)


def test_an_unknown_quantization_is_refused(folder):
    with pytest.raises(ValueError, match="'int2' is unknown: give None or one of int8, int4"):
        load_univision(folder, quantization="int2")
