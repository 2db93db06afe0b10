"""Experts, language model and flow head against recorded numbers: 1e-5 a module."""

import json

import pytest
import torch
from ming_univision.ming_core import Guidance, Solver
from ming_univision.ming_core.attention import CausalAttention
from ming_univision.ming_core.checkpoint import fill
from ming_univision.ming_core.checkpoint.reader import CheckpointReader
from ming_univision.ming_core.config import LanguageModelConfig, read_config
from ming_univision.ming_core.experts import ExpertPerRow, MixtureOfExperts, OneExpert
from ming_univision.ming_core.flow_head import FlowHead, TimeEmbed
from ming_univision.ming_core.kv_cache import DecodeCache
from ming_univision.ming_core.language_model import LanguageModel
from safetensors.torch import load_file
from torch import nn

TOLERANCE = 1e-5


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def filled(module: type[nn.Module], case, *arguments) -> nn.Module:
    """The module on the meta device, filled from the case's files as a checkpoint is."""
    model = module(*arguments, device="meta", dtype=torch.float32)
    fill(model, CheckpointReader(case.folder), "cpu", torch.float32)
    return model


def test_experts_are_chosen_by_the_gate_of_each_token_and_weighted_as_recorded(golden):
    case = golden("moe_block")
    io, config = case.io, read_config(LanguageModelConfig, case.config)
    moe = filled(MixtureOfExperts, case, config)
    by_image_gate = io["image_mask"].bool()
    assert_close(moe(io["x"], by_image_gate), io["y_masked"])
    assert_close(moe(io["x"]), io["y_text"])
    flat = io["x"].flatten(0, 1)
    for gate, name, weights in (
        (None, "topk_idx_text", "text_gate_topk_weight"),
        (torch.ones(len(flat), dtype=torch.bool), None, "image_gate_topk_weight"),
    ):
        chosen, weight = moe.route(flat, gate)
        assert_close(weight, io[weights].flatten(0, 1))
        assert name is None or torch.equal(chosen, io[name].flatten(0, 1))
    assert torch.equal(moe.route(flat, by_image_gate.flatten())[0], io["topk_idx_masked"].flatten(0, 1))


def test_gathered_experts_equal_sorted_experts(golden):
    case = golden("moe_block")
    moe = filled(MixtureOfExperts, case, read_config(LanguageModelConfig, case.config))
    flat = case.io["x"].flatten(0, 1)
    chosen, _ = moe.route(flat)
    assert_close(moe.experts.outputs(flat, chosen, ExpertPerRow), moe.experts.outputs(flat, chosen, OneExpert))


@pytest.mark.parametrize("name", ["moe_model_k0", "moe_model_k1"])
@pytest.mark.parametrize("chunk", [512, 4])
def test_the_language_model_prefills_and_steps_as_recorded_in_runs_of_any_size(golden, name, chunk, monkeypatch):
    monkeypatch.setattr("ming_univision.ming_core.language_model.PREFILL_CHUNK", chunk)
    case = golden(name)
    io = case.io
    model = filled(LanguageModel, case, read_config(LanguageModelConfig, case.config))
    gate, x = io["image_mask"].bool(), io["inputs_embeds"]
    positions = torch.arange(x.shape[1])[None]
    assert_close(model.model(x, positions, CausalAttention(), gate), io["prefill_last_hidden"])
    assert_close(model.logits(model.model(x, positions, CausalAttention(), gate)), io["prefill_logits"])
    assert_close(model.logits(model.model(x, positions, CausalAttention())), io["prefill_logits_no_image_mask"])

    prefix = model.new_cache(x.shape[1])
    assert_close(model.prefill(x[0], prefix, gate[0]), io["prefill_last_hidden"][0, -1])
    rows = DecodeCache(prefix, 3)
    for step in range(3):
        hidden = model.decode(model.embed(io[f"step{step}_input_id"]), rows)[:, 0]
        assert_close(model.logits(hidden), io[f"step{step}_logits"][:, 0])
    at_once = DecodeCache(prefix, 3)
    ids = torch.cat([io[f"step{step}_input_id"] for step in range(3)], dim=1)
    for step, hidden in enumerate(model.decode(model.embed(ids), at_once).unbind(1)):
        assert_close(model.logits(hidden), io[f"step{step}_logits"][:, 0])
    past, own = prefix.slice(0, prefix.length), rows.slice(0, 0, 3)
    for layer in range(model.config.num_hidden_layers):
        assert_close(torch.cat([past.keys[layer], own.keys[layer]], 1), io[f"cache_key_{layer}"][0])
        assert_close(torch.cat([past.values[layer], own.values[layer]], 1), io[f"cache_value_{layer}"][0])


@pytest.fixture(scope="session")
def flow_case(golden):
    case = golden("flow_head")
    head = FlowHead(40, 8, 48, 3)
    weights = load_file(case.folder / "model.safetensors")
    head.load_state_dict({k.replace("diffloss.net", "net"): v for k, v in weights.items()})
    return case, head


def test_the_velocity_network_gives_the_recorded_velocity(flow_case):
    case, head = flow_case
    io = case.io
    assert_close(head.vis_head(io["hidden"]), io["z"])
    # Processors differ in the last bit of exp, hence of the frequencies; an angle reaches 1000, and feels it.
    angles = 1000 * io["t"][:, None] * torch.logspace(0, -4, 129)[:128]
    assert ((TimeEmbed.waves(io["t"]) - io["time_freq"]).abs() <= TOLERANCE + angles.repeat(1, 2) * 2**-23).all()
    assert_close(head.net.time_embed.mlp(io["time_freq"]), io["time_emb"])
    assert_close(head.net.time_embed(io["t"]), io["time_emb"])
    assert_close(head.net(io["x"], io["t"], io["z"]), io["velocity"])


VARIANTS = [
    "b1",
    "b1_temp",
    "b1_cfg3",
    "b2",
    "b2_temp",
    "b2_renorm",
    "b2_shift",
    "b3",
    "b3_renorm",
    "b3_shift",
    "b3_all",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_solver_draws_the_recorded_latent(flow_case, variant):
    case, head = flow_case
    io, asked = case.io, case.config["variants"][variant]
    z = io[f"sample_{variant}_z"][None]
    guidance = Guidance(asked["text_cfg"], asked.get("image_cfg", 1.0))
    solver = Solver(renorm="cfg_renorm_type" in asked, time_shift=asked.get("time_shifting_factor", 1.0))
    noise = io[f"sample_{variant}_noise"] * asked.get("temperature", 1.0)
    drawn = head.sample(z, noise, guidance.weights(z.shape[1]), steps=5, solver=solver)
    # Latents reach 6 here, and the recorded float32 ones are up to 1.6e-5 from the same sums done in float64. Another
    # processor's exp moves them by up to 1.4e-5 through the frequencies of the time embedding.
    torch.testing.assert_close(drawn, io[f"sample_{variant}_out"][:1], rtol=TOLERANCE, atol=2 * TOLERANCE)


def test_every_recorded_solver_variant_is_tested(flow_case):
    assert set(VARIANTS) == set(flow_case[0].config["variants"])


def test_pictures_of_a_batch_are_drawn_independently(flow_case):
    case, head = flow_case
    z = torch.stack([case.io["sample_b3_z"], case.io["sample_b3_renorm_z"]])
    noise = torch.cat([case.io["sample_b3_noise"], case.io["sample_b3_renorm_noise"]])
    factors = Guidance().weights(3)
    together = head.sample(z, noise, factors, steps=5)
    alone = torch.cat([head.sample(z[i : i + 1], noise[i : i + 1], factors, steps=5) for i in range(2)])
    assert_close(together, alone)


def test_config_of_a_case_is_read_with_its_extra_entries(golden):
    config = json.loads((golden("moe_block").folder / "config.json").read_text())
    assert read_config(LanguageModelConfig, config).num_experts == config["num_experts"]
