"""The two designs of the ablation: they differ in how drawn images enter, and in nothing else."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from ming_core import Conversation, Engine
from tiny_shapes.ablation import __main__ as command
from tiny_shapes.ablation import figures
from tiny_shapes.ablation.designs import TAG, AblationStage, ablation_stage, seen_again
from tiny_shapes.ablation.report import first_reached, write_report
from tiny_shapes.training.packing import pack
from tiny_shapes.training.sequences import tokenize_dialogue
from tiny_shapes.world import Dialogue, random_dialogue

STAGE = command.PLAN[0].stage(2)


@pytest.fixture(scope="module")
def stages() -> dict[str, AblationStage]:
    return {design: ablation_stage(STAGE, design, command.MODEL) for design in ("unified", "separate")}


def losses_of(stage: AblationStage, *dialogues: Dialogue) -> dict[str, float]:
    sequences = [tokenize_dialogue(dialogue, stage.chat, (8, 8)) for dialogue in dialogues]
    found = stage.module(pack(sequences, 64, (8, 8)), torch.Generator().manual_seed(0))
    return {name: float(value.detach()) for name, value in found.items()}


def dialogue_of(*tasks: str, number: int = 0) -> Dialogue:
    return random_dialogue(np.random.default_rng(number), list(tasks), (1, 2), rounds=len(tasks))


def test_both_designs_begin_with_the_same_weights_and_see_alike(stages):
    names = dict(stages["separate"].module.named_parameters())
    for name, value in stages["unified"].module.named_parameters():
        assert torch.equal(value, names[name]), name
    asked = dialogue_of("question")
    assert losses_of(stages["unified"], asked) == losses_of(stages["separate"], asked)


def test_drawn_images_enter_as_features_in_one_design_and_as_latents_in_the_other(stages):
    drawing = pack([tokenize_dialogue(dialogue_of("generate"), stages["unified"].chat, (8, 8))], 64, (8, 8))
    fed = {name: s.module.images(drawing, torch.Generator().manual_seed(0)) for name, s in stages.items()}
    assert torch.equal(fed["unified"][0], fed["separate"][0])  # what is to be drawn
    mingtok, channels = stages["separate"].module.network.mingtok, 16
    tokens = fed["separate"][1]
    assert (tokens[..., -1] == TAG).all() and (fed["unified"][1][..., -1] != TAG).all()
    expanded = mingtok.semantic_decoder(mingtok.denormalise(tokens[..., :channels]))
    torch.testing.assert_close(expanded, fed["unified"][1])


def test_a_drawn_image_must_be_seen_before_a_round_is_about_it():
    for number in range(20):
        before = dialogue_of("generate", "edit", "question", number=number)
        after = seen_again(before)
        drawn = None
        for task, old in zip(after.tasks, before.tasks, strict=True):
            if old.attached is None and old.source_scene is not None and drawn is not None:
                assert task.attached is drawn
                drawn = None
            else:
                assert task.attached is old.attached
            drawn = task.target if task.target is not None else drawn


def test_the_separate_design_goes_on_from_the_latents_that_it_draws(stages):
    stage = stages["separate"]
    engine = Engine(stage.module.network, stage.chat)
    result = engine.generate_image(Conversation(), "Draw a red star.", seed=1, max_new_tokens=8)
    tokens = result.features.tokens
    assert (tokens[..., -1] == TAG).all()
    torch.testing.assert_close(tokens[0, :, :16], result.features.latents[0].flatten(1).T)


def test_what_was_drawn_is_asked_about_after_it_was_seen(stages):
    stage = stages["separate"]
    engine = Engine(stage.module.network, stage.chat)
    drawn = engine.generate_image(Conversation(), "Draw a red star.", seed=1, max_new_tokens=8)
    mingtok = engine.mingtok
    pixels = mingtok.decode(mingtok.semantic_features(drawn.features.latents))
    seen = mingtok.semantic_features(mingtok.encode(pixels))
    said = engine.understand(drawn.conversation, "What is it?", features=seen, max_new_tokens=2)
    assert len(said.conversation.images) == 2


def test_the_level_of_a_curve_is_reached_between_its_points():
    times, values = np.array([10.0, 20.0, 30.0]), np.array([0.1, 0.5, 0.4])
    assert first_reached(times, values, 0.3) == 15.0
    assert first_reached(times, values, 0.05) == 10.0
    assert first_reached(times, values, 0.6) is None


def test_every_run_is_trained_resumed_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PLAN", command.PLAN[:4])
    for name in ("DRAWINGS", "EDITS", "QUESTIONS"):
        monkeypatch.setattr(figures, name, 1)
    monkeypatch.setattr(figures, "HELD_OUT", 1)
    arguments = ["--folder", str(tmp_path), "--steps", "2", "--device", "cpu"]
    monkeypatch.setattr(command.Planned, "stage", lambda self, steps: STAGE.__class__(**{**vars(STAGE), "batch": 2}))
    assert command.main(arguments) == 0
    first = (tmp_path / "unified-1" / "log.csv").read_text()
    assert [int(row["step"]) for row in csv.DictReader(first.splitlines())] == [1, 2]
    assert command.main(arguments) == 0 and (tmp_path / "unified-1" / "log.csv").read_text() == first
    text = write_report(tmp_path, tmp_path).read_text()
    assert "| separate, drawing alone | 1 | 2 |" in text and "steps to the level of *unified* at" in text


def test_a_report_gives_the_range_over_the_seeds_and_no_level_where_nothing_was_right(tmp_path):
    drawn = {"unified-1": (0.0, 0.2), "unified-2": (0.0, 0.4), "separate-1": (0.1, 0.5), "separate-2": (0.1, 0.5)}
    drawn |= {"unified-drawing-alone-1": (0.1, 0.2), "separate-drawing-alone-1": (0.1, 0.2)}
    for name, shares in drawn.items():
        (tmp_path / name).mkdir()
        rows = [f"{step},{step / 600},{share}" for step, share in zip((100, 300), shares, strict=True)]
        (tmp_path / name / "log.csv").write_text("\n".join(["step,hours,drawn", *rows]))
    text = write_report(tmp_path, tmp_path).read_text()
    assert "| unified, everything | 2 | 300 | 30 | 30 % (20 % to 40 %) |" in text
    assert "| drawings right |  |  | 30 %: 300, *separate* 200 (0.67 times) |" in text


def test_a_report_without_runs_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match="has no log of unified: train it first"):
        command.main(["--report", "--folder", str(tmp_path)])
