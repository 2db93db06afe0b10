"""LoRAs: files of several trainers, their effect at every precision, and what engines with other LoRAs share."""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ming_univision.ming_core import Conversation, FileError, Solver, load_univision
from ming_univision.ming_core.adapters import Adapters, Lora, LowRank, branches
from ming_univision.ming_core.experts import ExpertPerRow, Experts, OneExpert, SortedRows, StackedWeight
from ming_univision.ming_core.lora import ROUTERS, read_lora, save_lora, targets
from ming_univision.ming_core.quantization import QuantizedWeight
from ming_univision.ming_core.quantization.formats import dequantize
from ming_univision.tests.kernels import grouped_product
from safetensors.torch import load_file, save_file
from torch import nn

RANK, ALPHA = 4, 2.0
ROUNDING = 3e-4  # as between any two ways of computing one result


def tensors_for(network, seed=0, only="", size=0.3):
    """(down, up) for every layer that may have them, by published names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(RANK, target.shape[1], generator=generator) / target.shape[1] ** 0.5,
            torch.randn(target.shape[0], RANK, generator=generator) * size,
        )
        for name, target in targets(network).items()
        if re.search(only, name)
    }


def write(path, pairs, style="ours"):
    """A file with these pairs, as this pack, PEFT or kohya's scripts name them."""
    tensors = {}
    for name, (down, up) in pairs.items():
        if style == "ours":
            tensors |= {f"{name}.lora_A": down, f"{name}.lora_B": up, f"{name}.alpha": torch.tensor(ALPHA)}
        elif style == "peft":
            given = f"base_model.model.{name}"
            tensors |= {f"{given}.lora_A.weight": down, f"{given}.lora_B.weight": up}
        else:
            given = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{given}.lora_down.weight": down, f"{given}.lora_up.weight": up}
            tensors[f"{given}.alpha"] = torch.tensor(ALPHA)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    if style == "peft":
        (path.parent / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    return path


@pytest.fixture
def file(model, tmp_path):
    return write(tmp_path / "lora.safetensors", tensors_for(model.network))


def a_round(engine, *, remembered=False):
    """An answer and a picture, as tensors. remembered: what other rounds have computed may be used."""
    if not remembered:
        engine.prefix_cache.clear()
    said = engine.understand(Conversation(), "Hello.", max_new_tokens=2, return_logits=True)
    drawn = engine.generate_image(said.conversation, "A cat.", solver=Solver(2), max_new_tokens=2)
    return said.logits, drawn.features.latents


def same(one, other, tolerance=0.0):
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def merge(network, pairs, strength=1.0):
    """Change the weights themselves, as a LoRA that is merged does."""
    for name, target in targets(network).items():
        if name in pairs:
            down, up = pairs[name]
            module = network.get_submodule(target.module)
            weight = module.weight if isinstance(module, nn.Linear) else module.values
            (weight if target.expert is None else weight[target.expert])[target.rows] += (
                strength * ALPHA / RANK * up @ down
            )


# --- what it does -------------------------------------------------------------------------------------------------


def test_branches_go_beside_every_linear_layer_but_the_routers(model):
    names = set(targets(model.network))
    linear = {
        name
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("mingtok.") and not ROUTERS.search(name)
    }
    adapted = {target.module for target in targets(model.network).values()}
    stacks = {name for name, module in model.network.named_modules() if isinstance(module, StackedWeight)}
    assert adapted == linear | stacks and stacks
    assert "model.model.layers.1.mlp.experts.2.up_proj" in names and "linear_proj.0" in names
    assert "model.model.layers.0.attention.query_key_value" in names and "model.diffloss.net.cond_embed" in names
    assert not any("gate" in name.split(".")[-1] and "proj" not in name for name in names)


@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_a_lora_computes_what_merged_weights_would(model, file, checkpoint_folder, strength):
    plain, merged = a_round(model), load_univision(checkpoint_folder)
    merge(merged.network, tensors_for(model.network), strength)
    found, expected = a_round(model.with_lora(file, strength)), a_round(merged)
    assert same(found, expected, ROUNDING) and not same(found, plain, 0.01)
    assert same(a_round(model), plain)  # the model that it was added to is as it was


@pytest.mark.parametrize(
    "only",
    [
        "query_key_value",
        "attention.dense",
        "shared_experts.gate_proj",
        "shared_experts.up_proj",
        "shared_experts.down_proj",
        r"experts\.1\.gate_proj",
        r"experts\.\d+\.up_proj",
        r"experts\.[0-2]\.down_proj",
        "lm_head",
        "linear_proj",
        "vis_head",
        "time_embed",
        "cond_embed",
        "input_proj",
        "mlp.w12",
        "mlp.w3",
        r"res_blocks.*adaLN",
        r"final_layer\.adaLN",
        r"final_layer\.linear",
    ],
)
def test_every_kind_of_layer_has_its_branch(model, tmp_path, checkpoint_folder, picture, only):
    pairs = tensors_for(model.network, only=only)
    file, merged = write(tmp_path / "lora.safetensors", pairs), load_univision(checkpoint_folder)
    merge(merged.network, pairs)

    def seen(engine):
        engine.prefix_cache.clear()
        said = engine.understand(Conversation(), "Hello.", features=picture, max_new_tokens=1, return_logits=True)
        drawn = engine.generate_image(said.conversation, "A cat.", solver=Solver(2), max_new_tokens=1)
        return torch.cat([said.logits.flatten(), drawn.features.latents.flatten()])

    found, plain = seen(model.with_lora(file)), seen(model)
    assert (found - seen(merged)).norm() < 0.01 * (found - plain).norm() > 1e-3


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@torch.no_grad()
def test_a_branch_goes_beside_weights_of_every_precision(checkpoint_folder, tmp_path, quantization):
    engine = load_univision(checkpoint_folder, dtype=torch.bfloat16, quantization=quantization)
    pairs = tensors_for(engine.network, size=1.0)
    lora = read_lora(write(tmp_path / "lora.safetensors", pairs), engine.network)
    exact = load_univision(checkpoint_folder, dtype=torch.float32)
    for name, module in engine.network.named_modules():
        if isinstance(module, QuantizedWeight):
            target = exact.network.get_submodule(name)
            weight = target.weight if isinstance(target, nn.Linear) else target.values
            weight.copy_(dequantize(module.values, module.scale))
    merge(exact.network, pairs)
    layer = engine.network.language_model.model.layers[1]
    x = torch.randn(5, engine.config.llm_config.hidden_size, generator=torch.Generator().manual_seed(1))
    with Adapters().added(lora, 1.0).applied_to(engine.network):
        found = [layer.mlp(x.bfloat16()), layer.attention.query_key_value(x.bfloat16())]
    other = exact.network.language_model.model.layers[1]
    for one, expected in zip(found, [other.mlp(x), other.attention.query_key_value(x)], strict=True):
        assert (one.float() - expected).norm() < 0.02 * expected.norm()


@grouped_product
@pytest.mark.parametrize("route", [ExpertPerRow, SortedRows])
@torch.no_grad()
def test_experts_give_the_same_on_every_route(route):
    generator = torch.Generator().manual_seed(0)
    experts = Experts(5, 32, 16)
    for weight in experts.parameters():
        weight.normal_(0, 0.2, generator=generator)
    x, chosen = torch.randn(40, 32, generator=generator), torch.randint(4, (40, 2), generator=generator)  # one is idle

    def low_rank(rows, width):
        down = torch.randn(5, RANK, width, generator=generator)
        return LowRank(down, torch.randn(5, rows, RANK, generator=generator), 0.1)

    joined = {"gate_up": low_rank(32, 32), "down": low_rank(32, 16)}
    plain = experts.outputs(x, chosen, OneExpert)
    with branches(experts, joined):
        expected = experts.outputs(x, chosen, OneExpert)
        dtype = torch.bfloat16 if route is SortedRows else torch.float32
        found = experts.to(dtype).outputs(x.to(dtype), chosen, route).float()
    assert (found - expected).norm() < (0.03 if route is SortedRows else 1e-5) * expected.norm()
    assert (expected - plain).norm() > 0.3 * plain.norm()


def test_gradients_flow_into_branches_that_are_trained(model, picture):
    network = model.network.requires_grad_(False)
    target = targets(network)["model.model.layers.0.attention.dense"]
    down = torch.randn(RANK, target.shape[1], requires_grad=True)
    up = torch.zeros(target.shape[0], RANK, requires_grad=True)
    ids, at = torch.full((1, 3), 5), torch.zeros(1, 3, dtype=torch.bool)
    with branches(network, {target.module: LowRank(down, up, 0.5)}):
        network(ids, picture.tokens[:, :3], at, at).logits.square().mean().backward()
    assert up.grad.abs().sum() > 0


# --- strengths and several at once --------------------------------------------------------------------------------


def test_strength_0_is_the_model_itself_bit_for_bit(model, file):
    expected = a_round(model)
    engine = model.with_lora(file, 0)
    assert same(a_round(engine), expected) and engine.weights_key() == model.weights_key()
    assert same(a_round(model.with_lora(file, 0.7).with_lora(file, -0.7)), expected)


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(model, file, strength):
    with pytest.raises(ValueError, match="strength"):
        model.with_lora(file, strength)


def test_several_add_up_in_any_order(model, file, tmp_path, checkpoint_folder):
    other = write(tmp_path / "other.safetensors", tensors_for(model.network, seed=1, only="attention|cond_embed"))
    merged = load_univision(checkpoint_folder)
    merge(merged.network, tensors_for(model.network), 0.5)
    merge(merged.network, tensors_for(model.network, seed=1, only="attention|cond_embed"), -1.2)
    one = a_round(model.with_lora(file, 0.5).with_lora(other, -1.2))
    assert same(one, a_round(model.with_lora(other, -1.2).with_lora(file, 0.5)))
    assert same(one, a_round(merged), ROUNDING)


def test_the_same_lora_twice_counts_with_the_sum_of_its_strengths(model, file, tmp_path):
    copied = tmp_path / "another name.safetensors"
    copied.write_bytes(file.read_bytes())
    twice, once = model.with_lora(file, 0.5).with_lora(copied, 0.25), model.with_lora(file, 0.75)
    assert twice.adapters.key == once.adapters.key and same(a_round(twice), a_round(once))


# --- what engines share -------------------------------------------------------------------------------------------


def test_engines_share_weights_and_prefix_cache_but_never_take_each_others_keys_and_values(model, file, tmp_path):
    other = write(tmp_path / "other.safetensors", tensors_for(model.network, seed=1))
    engines = [model, model.with_lora(file), model.with_lora(file, 0.5), model.with_lora(other)]
    assert len({id(engine.network) for engine in engines}) == len({id(e.prefix_cache) for e in engines}) == 1
    assert len({engine.weights_key() for engine in engines}) == 4
    alone = [a_round(engine) for engine in engines]
    model.prefix_cache.clear()
    for _ in range(2):  # the second time all that was remembered is there
        for engine, expected in zip(engines, alone, strict=True):
            assert same(a_round(engine, remembered=True), expected, ROUNDING)
    prefilled = [engine.understand(Conversation(), "Hello.", max_new_tokens=2).prefilled for engine in engines]
    assert len(set(prefilled)) == 1  # each found what it had computed itself


def test_a_conversation_goes_on_with_another_lora_of_the_same_model(model, file):
    tuned = model.with_lora(file)
    said = tuned.understand(Conversation(), "Hello.", max_new_tokens=2).conversation
    after = model.generate_image(said, "A cat.", solver=Solver(1), max_new_tokens=2).conversation
    assert len(tuned.understand(after, "Go on.", max_new_tokens=2).conversation.parts) == len(after.parts) + 2


def test_threads_with_different_loras_of_one_model_get_what_each_gets_alone(model, file, tmp_path):
    other = write(tmp_path / "other.safetensors", tensors_for(model.network, seed=1))
    model.prefix_cache.limit = 0
    engines = [model, model.with_lora(file), model.with_lora(other)]
    expected = [a_round(engine) for engine in engines]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(a_round, engines * 2))
    assert all(same(a, b) for a, b in zip(found, expected * 2, strict=True))


def hooks(network):
    return sum(len(module._forward_hooks) for module in network.modules())


def test_an_interrupt_takes_the_branches_away(model, file):
    seen = []

    def stop(_):
        seen.append(hooks(model.network))
        raise KeyboardInterrupt

    expected = a_round(model)
    with pytest.raises(KeyboardInterrupt):
        model.with_lora(file).generate_image(Conversation(), "A cat.", solver=Solver(1), on_token=stop)
    assert seen[0] > 0 and hooks(model.network) == 0
    assert same(a_round(model), expected)


def test_a_lora_that_makes_the_model_overflow_is_named_and_not_the_weights_alone(model, tmp_path):
    file = write(tmp_path / "huge.safetensors", tensors_for(model.network, only="attention", size=1e37))
    expected, tuned = a_round(model), model.with_lora(file)
    words = r"NaN or infinite .*: lower the strength of the LoRA huge\.safetensors, or leave it out; if"
    with pytest.raises(RuntimeError, match=words):
        tuned.understand(Conversation(), "Hello.", max_new_tokens=2)
    with pytest.raises(RuntimeError, match=words):
        tuned.generate_image(Conversation(), "A cat.", solver=Solver(1), max_new_tokens=2)
    assert same(a_round(model), expected)


def test_a_round_within_a_round_has_its_own_loras(model, file):
    tuned = model.with_lora(file)
    model.prefix_cache.limit = 0
    expected, plain = a_round(tuned), a_round(model)
    within = []

    def ask(_):
        if not within:
            within.append(a_round(model))

    said = tuned.understand(Conversation(), "Hello.", max_new_tokens=2, return_logits=True, on_token=ask)
    assert same(within[0], plain) and torch.equal(said.logits, expected[0])


def test_the_memory_of_the_branches_is_asked_for(model, file):
    lora = read_lora(file, model.network)
    bytes_ = sum(4 * (layer.down.numel() + layer.up.numel()) for layer in lora.layers.values())
    options = {"max_new_tokens": 2}

    def asked(engine):
        from ming_univision.ming_core import TextOptions

        return engine.plan(Conversation(), "Hello.", TextOptions(**options)).working_memory

    assert asked(model.with_lora(file)) - asked(model) == bytes_ == Adapters().added(lora, 1.0).bytes(torch.float32)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["peft", "kohya"])
def test_files_of_other_trainers_are_read_as_ours(model, file, tmp_path, style):
    folder = tmp_path / style
    folder.mkdir()
    other = write(folder / "adapter_model.safetensors", tensors_for(model.network), style)
    assert read_lora(other, model.network).digest == read_lora(file, model.network).digest


def renamed(file, change):
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, file)
    return file


@pytest.mark.parametrize(
    "change",
    [
        lambda key: re.sub(r"\.(lora_[AB])", r".\1.default.weight", key),
        lambda key: f"diffusion_model.{key}",
        lambda key: key.replace("model.model.", "model.", 1),  # the language model alone was wrapped
        lambda key: key.replace("model.diffloss.net.", "flow_head.net."),
        lambda key: key.replace("lora_A", "lora_down.weight").replace("lora_B", "lora_up.weight"),
    ],
    ids=["adapter's name", "diffusion_model", "language model", "our modules", "down and up"],
)
def test_names_are_found_in_other_spellings(model, file, change):
    expected = read_lora(file, model.network).digest
    assert read_lora(renamed(file, change), model.network).digest == expected


def test_no_two_layers_have_one_name_in_any_spelling(model):
    names = list(targets(model.network))
    assert len({name.replace(".", "_") for name in names}) == len(names)


def test_alphas_of_peft_come_from_the_config_beside_the_file(model, tmp_path):
    pairs = tensors_for(model.network, only="attention")
    file = write(tmp_path / "adapter_model.safetensors", pairs, "peft")
    config = {"lora_alpha": 8, "alpha_pattern": {"attention.dense": 2}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scales = {name.rpartition(".")[2]: layer.scale for name, layer in read_lora(file, model.network).layers.items()}
    assert scales == {"query_key_value": 8 / 2, "dense": 2 / 2}
    (tmp_path / "adapter_config.json").unlink()
    assert {layer.scale for layer in read_lora(file, model.network).layers.values()} == {1.0}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({r"layers\.\d+\.attention\.dense": 2}, {"query_key_value": 2, "dense": 0.5}),
        ({"attention.(dense|query_key_value)": 2, "dense": 4}, {"query_key_value": 0.5, "dense": 0.5}),
        ({"^dense": 2, "ense": 4}, {"query_key_value": 2, "dense": 2}),
        ({"^.*dense": 2}, {"query_key_value": 2, "dense": 0.5}),
    ],
)
def test_patterns_of_peft_are_regular_expressions_of_which_the_first_that_matches_counts(
    model, tmp_path, patterns, expected
):
    file = write(tmp_path / "adapter_model.safetensors", tensors_for(model.network, only="attention"), "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "alpha_pattern": patterns}))
    scales = {name.rpartition(".")[2]: layer.scale for name, layer in read_lora(file, model.network).layers.items()}
    assert scales == expected


@pytest.mark.parametrize("pattern", ["dense(", "*", "(?i)dense", "a{1,99999999999999999999}"])
def test_a_pattern_of_peft_that_is_no_regular_expression_is_refused(model, tmp_path, pattern):
    file = write(tmp_path / "adapter_model.safetensors", tensors_for(model.network, only="attention"), "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"alpha_pattern": {pattern: 2}}))
    with pytest.raises(FileError, match=r"adapter_config.json: in alpha_pattern, '.*' is no regular expression"):
        read_lora(file, model.network)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": "8"},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"alpha_pattern": [1]},
        {"alpha_pattern": 8},
        {"lora_alpha": []},
        {"lora_alpha": 8, "alpha_pattern": {"dense": {}}},
        {"lora_alpha": 8, "alpha_pattern": "dense"},
    ],
)
def test_a_config_of_peft_whose_alphas_are_no_numbers_is_refused(model, tmp_path, config):
    file = write(tmp_path / "adapter_model.safetensors", tensors_for(model.network, only="attention"), "peft")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=r"adapter_config.json: (an alpha|alpha_pattern) is .*, and it must be"):
        read_lora(file, model.network)


def test_what_is_written_is_read_back(model, file, tmp_path):
    lora = read_lora(file, model.network)
    save_lora(tmp_path / "again.safetensors", lora.layers, model.network)
    again = read_lora(tmp_path / "again.safetensors", model.network)
    assert same(a_round(model.with_lora(lora)), a_round(model.with_lora(again)), ROUNDING)
    assert set(load_file(tmp_path / "again.safetensors")) == set(load_file(file))


def test_a_file_that_fits_in_part_is_used_and_says_what_was_left_out(model, file, caplog):
    tensors = load_file(file)
    for part in ("lora_A", "lora_B"):
        tensors[f"model.model.layers.99.attention.dense.{part}"] = torch.zeros(64, 64)
    save_file(tensors, file)
    with caplog.at_level(logging.INFO):
        lora = read_lora(file, model.network)
    count = len(targets(model.network))
    assert f"{count} of {count + 1} layers fit" in caplog.text and "layers.99.attention.dense" in caplog.text
    assert lora.layers


def test_experts_without_a_branch_compute_as_before(model, tmp_path):
    pairs = tensors_for(model.network, only=r"layers\.0\.mlp\.experts\.1\.")
    lora = read_lora(write(tmp_path / "lora.safetensors", pairs), model.network)
    gate_up = lora.layers["language_model.model.layers.0.mlp.experts.gate_up"]
    assert gate_up.down.shape[1] == 2 * RANK and gate_up.down[0].abs().sum() == 0 < gate_up.down[1].abs().sum()


def damaged(tensors, how):
    first = next(key for key in tensors if key.endswith("query_key_value.lora_A"))
    if how == "another model":
        return {
            f"lora_unet_down_blocks_{i}.lora_{p}.weight": torch.zeros(4, 4) for i in range(3) for p in ("down", "up")
        }
    if how == "another size":
        return tensors | {first: torch.zeros(RANK, 48)}
    if how == "ranks":
        return tensors | {first: torch.zeros(RANK + 1, tensors[first].shape[1])}
    if how == "no rank":
        return tensors | {first: tensors[first][:0], first.replace("_A", "_B"): torch.zeros(192, 0)}
    if how == "half":
        return {key: tensor for key, tensor in tensors.items() if key != first}
    if how == "NaN":
        return tensors | {first: torch.full_like(tensors[first], float("nan"))}
    if how == "whole numbers":
        return tensors | {first: tensors[first].to(torch.int8)}
    if how == "alphas":
        return tensors | {first.replace("lora_A", "alpha"): torch.ones(2)}
    if how == "complex alpha":
        return tensors | {first.replace("lora_A", "alpha"): torch.ones(1, dtype=torch.complex64)}
    if how == "DoRA":
        return tensors | {first.replace("lora_A", "dora_scale"): torch.ones(1)}
    if how == "twice":
        return tensors | {
            f"diffusion_model.{first}": tensors[first].clone(),
            f"diffusion_model.{first.replace('_A', '_B')}": tensors[first.replace("_A", "_B")].clone(),
        }
    return {"model.model.norm.weight": torch.zeros(4)}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("another model", "nothing in this LoRA fits.*down_blocks_0.*model.model.layers.0"),
        ("another size", r"query_key_value is .*\[\d+, 4\] by \[4, 48\].*belongs to another model"),
        ("ranks", "belongs to another model"),
        ("no rank", "belongs to another model"),
        ("half", "has no lora_A or lora_down: the file is incomplete"),
        ("NaN", "NaN or infinite"),
        ("whole numbers", "stored as I8"),
        ("alphas", r"alpha is F32 \[2\], and an alpha is one number"),
        ("complex alpha", r"alpha is C64 \[1\], and an alpha is one number"),
        ("DoRA", "is DoRA"),
        ("twice", "twice"),
        ("weights", "is not a LoRA"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_what_is_wrong(model, file, how, said):
    save_file({key: t.contiguous() for key, t in damaged(load_file(file), how).items()}, file)
    with pytest.raises(FileError, match=said) as error:
        model.with_lora(file)
    assert str(file) in str(error.value)


def test_a_file_that_is_cut_off_or_missing_is_refused(model, file, tmp_path):
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileError, match="cut off"):
        model.with_lora(file)
    with pytest.raises(FileError, match="missing"):
        model.with_lora(tmp_path / "missing.safetensors")


def test_content_tells_loras_apart_not_names():
    one = {"lm_head": LowRank(torch.zeros(1, 2), torch.zeros(2, 1))}
    other = {"lm_head": LowRank(torch.zeros(1, 2), torch.ones(2, 1))}
    assert Lora("a", one).digest == Lora("b", one).digest != Lora("a", other).digest
