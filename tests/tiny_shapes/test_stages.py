"""The stages: what they start from, what they train, and what they write."""

import dataclasses

import numpy as np
import pytest
import torch

from ming_core import Conversation, load_mingtok, load_univision, save_mingtok, save_univision
from ming_core.images import from_uint8
from tiny_shapes.training import stages as stages_module
from tiny_shapes.training.data import batches
from tiny_shapes.training.images import image_batch
from tiny_shapes.training.loop import Run
from tiny_shapes.training.stages import MingTokStage


def first_batch(objective):
    return next(batches(objective.data, 0))


def test_a_stage_begins_on_the_cpu_and_is_moved_as_a_whole(monkeypatch, stages, mingtok):
    """Random numbers that are the same on every device are drawn on the CPU, into weights that are there."""
    devices = []
    monkeypatch.setattr(
        stages_module, "initialize", lambda module, generator: devices.extend(p.device for p in module.parameters())
    )
    stage = MingTokStage(stages["mingtok"], mingtok, "meta")
    assert {device.type for device in devices} == {"cpu"}
    assert {p.device.type for p in stage.module.parameters()} == {"meta"}


def test_a_mingtok_stage_writes_latents_of_mean_0_and_deviation_1(make_objective, tmp_path):
    objective = make_objective("mingtok")
    objective.export(objective.module, tmp_path)
    tok = load_mingtok(tmp_path)
    sample = image_batch(np.random.default_rng(9), 64, (1, 3), kind="scene")[0]
    with torch.no_grad():
        latents = tok.encode(from_uint8(torch.from_numpy(sample)))
    assert abs(float(latents.mean())) < 0.1 and abs(float(latents.std()) - 1) < 0.1
    assert objective.module.mingtok.config.scaling_factor == 1.0


def test_a_joint_stage_writes_a_model_that_loads_and_continues(make_objective, stages, tokenizer, tmp_path):
    objective = make_objective("joint")
    objective.export(objective.module, tmp_path)
    engine = load_univision(tmp_path)
    theirs, ours = engine.network.state_dict(), objective.module.network.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name].bfloat16().float()) for name in ours)
    assert engine.understand(Conversation(), "Which shapes do you know?", max_new_tokens=3).token_ids
    again = stages_module.make_objective(stages["joint"], tmp_path)
    assert again.tokenizer == tokenizer
    assert torch.equal(again.module.network.flow_head.vis_head[0].weight, theirs["flow_head.vis_head.0.weight"])


def test_a_joint_stage_from_a_mingtok_keeps_it_frozen(make_objective, stages, tokenizer, engine, tmp_path, monkeypatch):
    first = make_objective("mingtok")
    first.export(first.module, tmp_path)
    monkeypatch.setattr(stages_module, "train_text_tokenizer", lambda vocabulary: tokenizer)
    monkeypatch.setattr(stages_module, "univision_config", lambda *_: engine.config)
    objective = stages_module.make_objective(stages["joint"], tmp_path)
    before = {name: value.clone() for name, value in load_mingtok(tmp_path).state_dict().items()}
    Run(stages["joint"], objective, tmp_path / "run").update(first_batch(objective))
    after = objective.module.network.mingtok.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_mingtok_stage_inside_a_whole_model_writes_all_of_it(stages, tokenizer, engine, tmp_path):
    save_univision(engine, tmp_path / "start", tokenizer, dtype=torch.float16)
    objective = stages_module.make_objective(stages["mingtok"], tmp_path / "start")
    objective.evaluate = lambda module: {}
    run = Run(stages["mingtok"], objective, tmp_path / "run")
    run.update(first_batch(objective))
    run.checkpoint()
    before, after = load_univision(tmp_path / "start"), load_univision(tmp_path / "run" / "model")
    old, new = before.network.state_dict(), after.network.state_dict()
    assert {name.split(".")[0] for name in new if not new[name].equal(old[name])} == {"mingtok"}
    averaged = run.average.module.mingtok.state_dict()
    assert all(torch.equal(new[f"mingtok.{name}"], averaged[name].bfloat16().float()) for name in averaged)


@pytest.mark.parametrize("inside", [True, False], ids=["inside a whole model", "alone"])
def test_a_pixel_stage_changes_the_pixel_decoder_and_nothing_else(inside, stages, tokenizer, engine, tmp_path):
    if inside:
        save_univision(engine, tmp_path / "start", tokenizer, dtype=torch.float16)
    else:
        save_mingtok(engine.mingtok, tmp_path / "start")
    stage = dataclasses.replace(stages["mingtok"], trains="pixel decoder")
    trained = stages_module.make_objective(stage, tmp_path / "start")
    trained.evaluate = lambda module: {}
    run = Run(stage, trained, tmp_path / "run")
    run.update(first_batch(trained))
    run.checkpoint()

    def load(folder):
        return load_univision(folder).network if inside else load_mingtok(folder)

    before, after = load(tmp_path / "start"), load(tmp_path / "run" / "model")
    changed = {name for name, value in after.state_dict().items() if not value.equal(before.state_dict()[name])}
    assert changed and all("pixel_decoder" in name or "sem_to_pix" in name for name in changed)
    old, new = (model.mingtok if inside else model for model in (before, after))
    assert old.config == new.config and old.fingerprint == new.fingerprint


def test_a_joint_stage_without_a_mingtok_says_what_to_do(stages):
    with pytest.raises(ValueError, match="train the first stage"):
        stages_module.make_objective(stages["joint"], None)
