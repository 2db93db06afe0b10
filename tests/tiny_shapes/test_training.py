"""Training: small models learn, runs resume exactly, and what is taught is what inference does."""

import dataclasses
import math
import pickle
import random
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from ming_univision.ming_core import files, load_mingtok, load_univision
from ming_univision.ming_core.checkpoint import save_mingtok, save_univision
from ming_univision.ming_core.config import (
    FlowHeadConfig,
    LanguageModelConfig,
    LowLevelEncoderConfig,
    MingTokConfig,
    PixelDecoderConfig,
    SemanticDecoderConfig,
    UniVisionConfig,
)
from ming_univision.ming_core.conversation import Conversation, Picture, guidance_masks
from ming_univision.ming_core.features import to_grid
from ming_univision.ming_core.files import FileError, write_whole_folder
from ming_univision.ming_core.images import from_uint8
from ming_univision.ming_core.language_model import Causal, Rows
from ming_univision.ming_core.mingtok import MingTok
from ming_univision.ming_core.prompts import ChatFormat
from ming_univision.ming_core.rounds import open_round
from ming_univision.ming_core.univision import UniVision

from tiny_shapes.training import __main__ as command
from tiny_shapes.training import loop, pictures, stages
from tiny_shapes.training.loop import Run, make_batch
from tiny_shapes.training.objectives import initialise, noted_routing
from tiny_shapes.training.optimizers import MovingAverage, Muon, learning_rate, orthogonalise
from tiny_shapes.training.recipe import RECIPE, Stage
from tiny_shapes.training.sequences import (
    ATTRIBUTES,
    EDIT_WEIGHT,
    FIRST_WEIGHT,
    IGNORE,
    OBJECT_WEIGHT,
    QUIZ,
    SHORT_WEIGHT,
    SHOWN,
    TEXT_UNCONDITIONAL,
    UNCONDITIONAL,
    DialogueData,
    PlacedPicture,
    pack,
    spell,
    token_weights,
)
from tiny_shapes.training.stages import JointStage, MingTokStage, objective
from tiny_shapes.training.tokenizer import SPECIAL_TOKENS, make_tokenizer
from tiny_shapes.world import (
    BACKGROUNDS,
    POSITIONS,
    Scene,
    Thing,
    draw,
    random_dialogue,
    random_scene,
    region_picture,
    split_of,
    tasks,
)

GRID = (4, 4)
TINY_MINGTOK = MingTokConfig(
    LowLevelEncoderConfig(img_size=128, patch_size=32, depth=1, embed_dim=64, out_dim=8),
    SemanticDecoderConfig(in_dim=8, patch_size=32, embed_dim=64, decoder_depth=1),
    PixelDecoderConfig(patch_size=16, decoder_depth=1, embed_dim=64),
    scaling_factor=1.0,
    mean=0.0,
)
MINGTOK_STAGE = Stage("mingtok", "mingtok", batch=4, lr=3e-3, steps=8, warmup=2, average=0.5, things=(1, 1))
JOINT_STAGE = Stage("joint", "joint", batch=4, lr=3e-3, steps=8, warmup=2, average=0.5, things=(1, 2))


@pytest.fixture(scope="module")
def tokenizer() -> dict[str, str]:
    return make_tokenizer(320, dialogues=200)


@pytest.fixture(scope="module")
def chat(tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer["tokenizer.json"])


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def tiny_univision(chat: ChatFormat) -> UniVision:
    config = LanguageModelConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        eos_token_id=chat.end_id,
        image_patch_token=chat.patch_id,
        image_start_token=chat.image_open_id,
        num_image_tokens_for_gen=GRID[0] * GRID[1],
    )
    model = UniVision(UniVisionConfig(config, FlowHeadConfig(diffloss_w=32, diffloss_d=1), TINY_MINGTOK), chat)
    initialise(model, seeded())
    return model


def mingtok_stage(tokenizer, chat) -> MingTokStage:
    mingtok = MingTok(TINY_MINGTOK)
    initialise(mingtok, seeded())
    return MingTokStage(MINGTOK_STAGE, mingtok)


def joint_stage(tokenizer, chat) -> JointStage:
    return JointStage(JOINT_STAGE, tiny_univision(chat), tokenizer)


STAGES = [(MINGTOK_STAGE, mingtok_stage), (JOINT_STAGE, joint_stage)]
both_stages = pytest.mark.parametrize(("stage", "make"), STAGES, ids=["mingtok", "joint"])


def without_looking(objective):
    """The objective with an evaluation that costs nothing."""
    objective.evaluate = lambda: {"figure": 0.5}
    return objective


def dialogue_of(tasks, number: int = 0, rounds: int = 1, things=(1, 2)):
    return random_dialogue(np.random.default_rng(number), tasks, things, rounds=rounds)


# --- the loop -----------------------------------------------------------------------------------------------------


@both_stages
def test_a_few_steps_on_one_batch_make_its_loss_fall(stage, make, tokenizer, chat, tmp_path):
    objective = make(tokenizer, chat)
    run = Run(dataclasses.replace(stage, steps=100), objective, tmp_path)
    batch = make_batch(objective.data, 0, 0)

    def loss():
        with torch.no_grad():
            return float(objective.loss(batch, seeded())["loss"])

    before = loss()
    for _ in range(12):
        run.update(batch)
    assert loss() < 0.8 * before


@both_stages
def test_a_run_that_was_stopped_goes_on_exactly(stage, make, tokenizer, chat, tmp_path):
    def run(folder):
        return Run(stage, without_looking(make(tokenizer, chat)), tmp_path / folder)

    whole = run("whole")
    whole.train()
    half = run("halves")
    for step in range(3):
        half.update(make_batch(half.objective.data, stage.seed, step))
    half.checkpoint()
    other = run("halves")
    assert other.resume() and other.step == 3
    other.train()
    for name, value in whole.objective.module.state_dict().items():
        assert torch.equal(value, other.objective.module.state_dict()[name]), name
    for name, value in whole.average.weights.items():
        assert torch.equal(value, other.average.weights[name]), name


def test_a_folder_without_a_checkpoint_has_nothing_to_resume(tokenizer, chat, tmp_path):
    assert not Run(MINGTOK_STAGE, mingtok_stage(tokenizer, chat), tmp_path).resume()


def test_a_checkpoint_of_another_recipe_is_named(tokenizer, chat, tmp_path):
    Run(MINGTOK_STAGE, without_looking(mingtok_stage(tokenizer, chat)), tmp_path).checkpoint()
    other = Run(JOINT_STAGE, joint_stage(tokenizer, chat), tmp_path)
    with pytest.raises(FileError, match=r"state\.pt is of another recipe"):
        other.resume()


@both_stages
def test_training_leaves_the_global_random_state_alone(stage, make, tokenizer, chat, tmp_path):
    objective = without_looking(make(tokenizer, chat))
    run = Run(stage, objective, tmp_path)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run.update(make_batch(objective.data, 0, 0))
    run.checkpoint()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_batches_made_ahead_are_the_same(tokenizer, chat, tmp_path, monkeypatch):
    # threads for processes: what is loaded under the name of the tests cannot be imported in another process
    started = {}
    monkeypatch.setattr(
        loop, "ProcessPoolExecutor", lambda workers, **how: started.update(how) or ThreadPoolExecutor(workers)
    )
    stage = dataclasses.replace(MINGTOK_STAGE, steps=2)
    runs = [Run(stage, without_looking(mingtok_stage(tokenizer, chat)), tmp_path / str(n), workers=n) for n in (0, 1)]
    for run in runs:
        run.train()
    assert runs[0].averages == runs[1].averages
    # Ctrl-C reaches them too, and the batch that is waited for must come for a checkpoint to be written
    assert (started["initializer"], started["initargs"]) == (signal.signal, (signal.SIGINT, signal.SIG_IGN))


def test_a_stage_whose_model_could_not_be_written_is_not_done(tokenizer, chat, tmp_path):
    objective = without_looking(mingtok_stage(tokenizer, chat))
    run = Run(dataclasses.replace(MINGTOK_STAGE, steps=1), objective, tmp_path)
    objective.publish = lambda folder: (folder / "half").write_text("") or 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert not Run(run.stage, objective, tmp_path).resume()


def test_a_stage_begins_on_the_cpu_and_is_moved_as_a_whole(monkeypatch):
    """Random numbers that are the same on every device are drawn on the CPU, into weights that are there."""
    places = []
    monkeypatch.setattr(
        stages, "initialise", lambda module, generator: places.extend(p.device for p in module.parameters())
    )
    stage = MingTokStage(MINGTOK_STAGE, MingTok(TINY_MINGTOK), "meta")
    assert {place.type for place in places} == {"cpu"}
    assert {p.device.type for p in stage.module.parameters()} == {"meta"}


@both_stages
def test_what_makes_batches_can_be_sent_to_another_process(stage, make, tokenizer, chat):
    data = make(tokenizer, chat).data
    assert pickle.loads(pickle.dumps(data)) == data


def test_the_log_has_a_row_a_checkpoint_and_is_plotted(tokenizer, chat, tmp_path):
    from tiny_shapes.training.plot import plot

    pytest.importorskip("matplotlib")
    run = Run(MINGTOK_STAGE, without_looking(mingtok_stage(tokenizer, chat)), tmp_path)
    for step in range(2):
        run.update(make_batch(run.objective.data, 0, step))
        run.checkpoint(look=step > 0)
    rows = (tmp_path / "log.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[0].startswith("stage,step,hours,l1") and rows[0].endswith("figure")
    assert rows[1].endswith(",") and not rows[2].endswith(",")  # the first checkpoint was not evaluated
    assert plot(tmp_path / "log.csv", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm(tokenizer, chat, tmp_path):
    objective = mingtok_stage(tokenizer, chat)
    objective.loss = lambda batch, generator: {"loss": objective.module.reader.weight.sum() * float("nan")}
    run = Run(MINGTOK_STAGE, objective, tmp_path)
    with pytest.raises(RuntimeError, match="lower this stage's learning rate"):
        run.update(None)
    assert all(torch.isfinite(p).all() for p in objective.module.parameters())


def test_patches_that_tell_nothing_of_a_label_cost_nothing(tokenizer, chat):
    loss = mingtok_stage(tokenizer, chat).module
    semantic = torch.randn(1, 4, loss.mingtok.config.semantic_decoder.embed_dim, requires_grad=True)
    unknown = {name: torch.full((1, 4), IGNORE) for name in pictures.LABELS}
    assert loss.label_loss(semantic, unknown) == 0
    known = unknown | {"shape": torch.tensor([[1, IGNORE, 2, IGNORE]])}
    mean = torch.nn.functional.cross_entropy(loss.read(semantic)["shape"][0], known["shape"][0], ignore_index=IGNORE)
    torch.testing.assert_close(loss.label_loss(semantic, known), mean)


def test_routing_is_noted_while_it_is_asked_for_and_no_longer(model):
    with noted_routing(model) as found, torch.no_grad():
        model.generate_image(Conversation(), "a red circle", max_new_tokens=1)
    noted = len(found)
    model.generate_image(Conversation(), "a red circle", max_new_tokens=1)
    assert noted and len(found) == noted and all(1 <= float(x) <= 64 for x in found)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    write_whole_folder(lambda f: (f / "a").write_text("1"), folder)

    def half(f):
        (f / "a").write_text("2")
        raise OSError("disk full")

    with pytest.raises(FileError, match="disk full"):
        write_whole_folder(half, folder)
    assert (folder / "a").read_text() == "1"
    write_whole_folder(lambda f: (f / "b").write_text("3"), folder)
    assert [p.name for p in folder.iterdir()] == ["b"]


def _write(word):
    return lambda folder: (folder / "a").write_text(word)


def test_a_rename_that_a_scanner_holds_up_is_tried_again(tmp_path, monkeypatch):
    replace, failures = Path.replace, [PermissionError(13, "in use")] * 2

    def held_up(self, to):
        if failures:
            raise failures.pop()
        return replace(self, to)

    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "replace", held_up)
    write_whole_folder(_write("1"), tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == "1"


def test_folders_beside_it_that_the_user_called_old_and_new_are_left_alone(tmp_path):
    for name in ("model.old", "model.new"):
        (tmp_path / name).mkdir()
    for text in "12":
        write_whole_folder(_write(text), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.new", "model.old"]


def test_what_was_written_is_kept_where_the_old_folder_cannot_be_replaced(tmp_path, monkeypatch):
    folder, replace = tmp_path / "model", Path.replace
    write_whole_folder(_write("1"), folder)

    def refused(self, to):
        if self.name == ".model.ming-new":
            raise PermissionError(13, "in use")
        return replace(self, to)

    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(FileError, match=r"in use.*model\.ming-new"):
        write_whole_folder(_write("2"), folder)
    assert (folder / "a").read_text() == "1"
    assert (tmp_path / ".model.ming-new" / "a").read_text() == "2"


def test_a_folder_that_a_killed_run_left_beside_its_place_is_not_lost(tmp_path):
    folder = tmp_path / "model"
    write_whole_folder(_write("1"), folder)
    folder.rename(tmp_path / ".model.ming-old")

    def fails(f):
        raise OSError("disk full")

    with pytest.raises(FileError, match="disk full"):
        write_whole_folder(fails, folder)
    assert (folder / "a").read_text() == "1"


# --- what is written ----------------------------------------------------------------------------------------------


def test_a_mingtok_stage_writes_latents_of_mean_0_and_deviation_1(tokenizer, chat, tmp_path):
    objective = mingtok_stage(tokenizer, chat)
    objective.publish(tmp_path)
    tok = load_mingtok(tmp_path)
    sample = pictures.picture_batch(np.random.default_rng(9), 64, (1, 3), kind="scene")[0]
    with torch.no_grad():
        latents = tok.encode(from_uint8(torch.from_numpy(sample)))
    assert abs(float(latents.mean())) < 0.1 and abs(float(latents.std()) - 1) < 0.1
    assert objective.module.mingtok.config.scaling_factor == 1.0


def test_a_joint_stage_writes_a_model_that_loads_and_continues(tokenizer, chat, tmp_path, monkeypatch):
    objective = joint_stage(tokenizer, chat)
    objective.publish(tmp_path)
    model = load_univision(tmp_path)
    theirs, ours = model.state_dict(), objective.module.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name].half().float()) for name in ours)
    assert model.understand(Conversation(), "Which shapes do you know?", max_new_tokens=3).token_ids
    again = stages.objective(JOINT_STAGE, tmp_path)
    assert again.tokenizer == tokenizer
    assert torch.equal(again.module.model.flow_head.vis_head[0].weight, theirs["flow_head.vis_head.0.weight"])


def test_a_joint_stage_from_a_mingtok_keeps_it_frozen(tokenizer, chat, tmp_path, monkeypatch):
    mingtok_stage(tokenizer, chat).publish(tmp_path)
    monkeypatch.setattr(stages, "make_tokenizer", lambda vocabulary: tokenizer)
    monkeypatch.setattr(stages, "univision_config", lambda *_: tiny_univision(chat).config)
    objective = stages.objective(JOINT_STAGE, tmp_path)
    before = {name: value.clone() for name, value in load_mingtok(tmp_path).state_dict().items()}
    Run(JOINT_STAGE, objective, tmp_path / "run").update(make_batch(objective.data, 0, 0))
    assert all(torch.equal(value, before[name]) for name, value in objective.module.model.mingtok.state_dict().items())


@pytest.mark.parametrize("inside", [True, False], ids=["inside a whole model", "alone"])
def test_a_pixel_stage_changes_the_pixel_decoder_and_nothing_else(inside, tokenizer, chat, tmp_path):
    whole = tiny_univision(chat)
    if inside:
        save_univision(whole, tmp_path / "start", tokenizer, dtype=torch.float16)
    else:
        save_mingtok(whole.mingtok, tmp_path / "start")
    load = load_univision if inside else load_mingtok
    trained = objective(dataclasses.replace(MINGTOK_STAGE, trains="pixel decoder"), tmp_path / "start")
    run = Run(MINGTOK_STAGE, without_looking(trained), tmp_path / "run")
    run.update(make_batch(trained.data, 0, 0))
    run.checkpoint()
    before, after = load(tmp_path / "start"), load(tmp_path / "run" / "model")
    changed = {name for name, value in after.state_dict().items() if not value.equal(before.state_dict()[name])}
    assert changed and all("pixel_decoder" in name or "sem_to_pix" in name for name in changed)
    old, new = (model.mingtok if inside else model for model in (before, after))
    assert old.config == new.config and old.fingerprint == new.fingerprint


def test_a_joint_stage_without_a_mingtok_says_what_to_do():
    with pytest.raises(ValueError, match="train the first stage"):
        stages.objective(JOINT_STAGE, None)


# --- the sequences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [UNCONDITIONAL, TEXT_UNCONDITIONAL])
@pytest.mark.parametrize(("tasks", "rounds"), [("generate", 1), ("edit", 1), ("edit", 2)])
def test_a_dropped_sample_is_computed_as_inference_computes_that_guidance_row(view, tasks, rounds, tokenizer, chat):
    model = tiny_univision(chat)
    dialogue = dialogue_of(tasks, 3, rounds, (2, 2) if tasks == "generate" else (1, 3))
    # with the dialogue's own prompt in the dropped place, which is what a guidance row really has there
    sequence = spell(dialogue, chat, GRID, view, dialogue.rounds[-1])
    batch = pack([sequence], 0, GRID)
    objective = JointStage(JOINT_STAGE, model, tokenizer).module
    objective.weights = dataclasses.replace(objective.weights, noise=0.0)
    with torch.no_grad():
        latents, features = objective.pictures(batch, seeded())
        x = model.language_model.embed(batch.ids[0])
        seen = torch.zeros(len(x), dtype=torch.bool)
        for picture, tokens in zip(sequence.pictures, features, strict=True):
            x[picture.start : picture.start + len(tokens)] = model.project(tokens)
            seen[picture.start : picture.start + len(tokens)] = not picture.drawn
        causal = Causal(batch.mask)
        taught = model.language_model.model(x[None], batch.positions, causal, seen[None])[0]

        conversation, shown = Conversation(), iter(zip(sequence.pictures, latents, strict=True))

        def next_picture():
            placed, own = next(shown)
            return Picture(model.mingtok.semantic_features(to_grid(own[None], GRID)), placed.drawn)

        for turn in dialogue.rounds:
            contents = [turn.prompt] if turn.attached is None else [[next_picture()], turn.prompt]
            conversation = conversation.extended(chat.prompt(contents), "")
            if turn is not dialogue.rounds[-1]:
                drawn = chat.prompt([])._replace(
                    generated=True, segments=(chat.answer([chat.image_open_id]), next_picture())
                )
                conversation = conversation.extended(drawn, "")
        prefix = open_round(model, conversation).prefix
        views = guidance_masks(conversation.parts)
        rows = Rows(prefix, 17, 1, views[min(view, len(views) - 1)][None])
        hidden = [model.language_model.step(model.language_model.embed(torch.tensor([chat.image_open_id])), rows)]
        for token in model.project(features[-1]):
            hidden.append(model.language_model.step(token[None], rows))
    torch.testing.assert_close(taught[-17:], torch.cat(hidden), rtol=0, atol=1e-4)


def test_a_dropped_sample_has_a_strangers_prompt_and_asks_for_no_text_in_that_round(chat):
    dialogue, stranger = dialogue_of("edit", 1), dialogue_of("edit", 2).rounds[0]
    own, words = dialogue.rounds[0], chat.encode(stranger.prompt)
    for view, attached in ((UNCONDITIONAL, stranger.attached), (TEXT_UNCONDITIONAL, own.attached)):
        sequence = spell(dialogue, chat, GRID, view, stranger)
        text = ",".join(map(str, sequence.ids))
        assert ",".join(map(str, words)) in text and ",".join(map(str, chat.encode(own.prompt))) not in text
        assert sequence.pictures[0].pixels is attached and sequence.pictures[1].pixels is own.target
        assert set(sequence.wanted) == {IGNORE}


def test_an_answer_is_asked_for_token_by_token_and_then_the_end(chat):
    dialogue = dialogue_of("question", 4)
    sequence = spell(dialogue, chat, GRID)
    answer = [*chat.encode(dialogue.rounds[0].answer), chat.end_id]
    asked = [i for i, label in enumerate(sequence.wanted) if label != IGNORE]
    assert [sequence.wanted[i] for i in asked] == answer
    assert asked[0] == len(sequence.ids) - len(answer)  # the last token of the prompt predicts the first of the answer
    assert sequence.ids[asked[0]] == chat.role_close_id


def test_a_drawing_round_asks_for_the_picture_to_begin_and_for_the_end_after_it(chat):
    sequence = spell(dialogue_of("generate"), chat, GRID)
    (picture,) = sequence.pictures
    asked = {i: label for i, label in enumerate(sequence.wanted) if label != IGNORE}
    assert asked == {picture.start - 2: chat.image_open_id, len(sequence.ids) - 1: chat.end_id}
    assert picture.drawn and sequence.ids[picture.start - 1 :] == [chat.image_open_id] + [chat.patch_id] * 16


def test_a_sequence_is_the_transcript_that_a_conversation_would_have(chat):
    dialogue = dialogue_of(["question"], 5, rounds=2)
    first, second = dialogue.rounds
    sequence = spell(dialogue, chat, GRID)
    role = [[chat.role_open_id, *chat.encode(name), chat.role_close_id] for name in ("HUMAN", "ASSISTANT")]
    picture = [chat.image_open_id, *[chat.patch_id] * 16, chat.image_close_id]
    said = [*picture, *chat.encode("\n" + first.prompt), *role[1], *chat.encode(first.answer)]
    assert sequence.ids == [
        *role[0],
        *said,
        *role[0],
        *chat.encode(second.prompt),
        *role[1],
        *chat.encode(second.answer),
    ]
    assert sequence.positions == list(range(len(sequence.ids)))


def test_answers_of_a_word_or_two_count_more_than_descriptions(chat):
    dialogue = dialogue_of(["question"], 5, rounds=2)
    sequence = spell(dialogue, chat, GRID)
    asked = [i for i, label in enumerate(sequence.wanted) if label != IGNORE]
    assert [i for i, count in enumerate(sequence.counts) if count == SHORT_WEIGHT] == asked
    batch = pack([sequence], 0, GRID)
    assert batch.counts[0].tolist() == sequence.counts
    assert set(spell(dialogue_of("describe"), chat, GRID).counts) == {1.0}


def test_a_quiz_is_a_row_of_questions_about_one_picture(tokenizer):
    data = DialogueData(tokenizer["tokenizer.json"], GRID, 1, (2, 3), {"generate": 1.0}, 1, quizzes=1.0)
    rounds = data.dialogue(np.random.default_rng(0)).rounds
    assert len(rounds) == QUIZ and {turn.family for turn in rounds} == {"question"}
    assert rounds[0].attached is not None and all(turn.attached is None for turn in rounds[1:])


def test_a_share_of_the_dialogues_has_two_things_or_more(tokenizer):
    def share(several: float) -> float:
        data = DialogueData(tokenizer["tokenizer.json"], GRID, 1, (1, 3), {"generate": 1.0}, 1, several=several)
        rng = np.random.default_rng(0)
        return np.mean([len(data.dialogue(rng).rounds[0].target_scene.things) > 1 for _ in range(200)])

    assert share(1.0) == 1.0 and share(0.0) < share(0.6) < 1.0


def test_the_thing_that_a_prompt_is_about_is_told_where_the_prompt_ends(chat):
    sequences = [
        spell(dialogue_of(tasks, 3, rounds=2, things=(2, 2)), chat, GRID) for tasks in ("question", "edit/move")
    ]
    batch = pack(sequences, 4096, GRID)
    ends = (batch.ids.flatten() == chat.role_close_id).nonzero().flatten().tolist()
    assert len(batch.told) > 1 and set(batch.told.tolist()) <= set(ends)
    things = [thing for s in sorted(sequences, key=lambda s: -len(s.ids)) for thing in s.meant.values()]
    assert [
        {name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row, strict=True)}
        for row in batch.meant.tolist()
    ] == [{name: getattr(thing, name) for name in ATTRIBUTES} for thing in things]


def test_every_thing_of_a_caption_is_told_where_its_words_end(chat):
    for seed in range(20):
        dialogue = dialogue_of(("generate", "colorize"), seed, things=(2, 3))
        scene, sequence = dialogue.rounds[0].target_scene, spell(dialogue, chat, GRID)
        named = [t for t in scene.things if f"{t.color} {t.shape}" in dialogue.rounds[0].prompt.lower()]
        assert len(named) >= len(scene.things) - 1  # few words may leave a colour out
        assert sorted(thing.content for thing in sequence.meant.values()) == sorted(t.content for t in named)
        for place, thing in sequence.meant.items():
            told = chat.decode(sequence.ids[: place + 1]).lower()
            assert told.endswith((thing.shape, "corner", "side", *re.split("[ -]", thing.position), "center", "middle"))
            assert thing.shape in told[-len("large purple triangle in the bottom right corner") :]


def test_a_guidance_row_is_not_asked_what_its_strange_prompt_is_about(chat):
    dialogue = dialogue_of("edit/recolor", 5)
    assert spell(dialogue, chat, GRID).meant
    assert not spell(dialogue, chat, GRID, 1, dialogue_of("edit/recolor", 6).rounds[0]).meant


def test_the_pointer_is_taught_to_tell_it(tokenizer, chat):
    objective = joint_stage(tokenizer, chat)
    batch = pack([spell(dialogue_of("edit/recolor", n), chat, GRID) for n in range(3)], 0, GRID)
    parts = objective.loss(batch, seeded())
    assert parts["meant"].item() == pytest.approx(sum(math.log(len(v)) for v in ATTRIBUTES.values()))  # knows nothing
    parts["meant"].backward()
    assert objective.module.pointer.weight.grad.abs().sum() > 0


def test_packed_sequences_do_not_see_one_another(chat):
    sequences = [spell(dialogue_of(["edit", "generate", "question"], n), chat, GRID) for n in range(3)]
    batch = pack(sequences, 4096, GRID)
    assert batch.ids.shape == (1, 4096)
    position = 0
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        own = slice(position, position + len(sequence.ids))
        assert batch.ids[0, own].tolist() == sequence.ids and batch.wanted[0, own].tolist() == sequence.wanted
        assert batch.positions[0, own].tolist() == sequence.positions
        assert np.array_equal(batch.mask[0, own, own], sequence.mask())
        assert not batch.mask[0, own, : own.start].any() and not batch.mask[0, own, own.stop :].any()
        position = own.stop
    assert batch.mask.any(-1).all()  # padding too sees something


def test_a_batch_without_pictures_has_a_loss(tokenizer, chat):
    objective = joint_stage(tokenizer, chat)
    batch = pack([spell(dialogue_of("chat"), chat, GRID)], 0, GRID)
    parts = objective.loss(batch, seeded())
    parts["loss"].backward()
    assert parts["flow"].item() == 0 and torch.isfinite(parts["loss"])


def weights_but_for_first_tokens(picture):
    """Of 8 by 8 tokens, with what the first one of each cell counts more taken off again."""
    weights = token_weights(picture, (8, 8)).reshape(8, 8)
    weights[::3, ::3] /= FIRST_WEIGHT  # nine cells of two by two tokens, with one between them
    return weights


def test_tokens_on_things_weigh_more_than_plain_ground():
    pixels = draw(Scene((Thing("square", "red", "small", "top left"),), "white"))
    weights = weights_but_for_first_tokens(PlacedPicture(pixels, 0, True))
    assert (weights[:2, :2] == OBJECT_WEIGHT).all()
    weights[:2, :2] = 1
    assert (weights == 1).all()
    assert not token_weights(PlacedPicture(pixels, 0, False), GRID).any()


def test_an_edit_weighs_what_it_changes_and_the_things_that_it_must_not_change_alike(chat):
    dialogue = random_dialogue(np.random.default_rng(4), "edit/move", (2, 3), rounds=1)
    (turn,) = dialogue.rounds
    (_, target) = spell(dialogue, chat, (8, 8)).pictures
    ground = np.array(BACKGROUNDS[turn.source_scene.background])
    shown = [np.abs(picture.astype(int) - ground) > 12 for picture in (turn.attached, turn.target)]
    things = (shown[0] | shown[1]).any(-1).reshape(8, 16, 8, 16).any((1, 3))
    weights = weights_but_for_first_tokens(target)
    assert 9 <= things.sum() <= 16 and (weights[things] == EDIT_WEIGHT).all() and (weights[~things] == 1).all()


@pytest.mark.parametrize("task", ["edit/recolor", "identify region"])
def test_the_tokens_that_an_edit_changes_or_its_region_covers_are_told_from_those_of_other_things(task, chat):
    for seed in range(8):
        dialogue = random_dialogue(np.random.default_rng(seed), {task: 1.0}, (2, 3), rounds=1)
        (turn,) = dialogue.rounds
        if turn.meant not in turn.source_scene.things:
            continue  # a background, or a thing that is to be added
        (_, target) = spell(dialogue, chat, (8, 8)).pictures
        edited = target.shown[list(SHOWN).index("edited")].reshape(8, 8)
        for thing in turn.source_scene.things:
            x, y = (int(middle) // 16 for middle in POSITIONS[thing.position])
            assert edited[y - 1 : y + 1, x - 1 : x + 1].any() == (thing == turn.meant)


def test_a_new_background_is_no_change_of_some_tokens(chat):
    (_, target) = spell(dialogue_of("edit/background", 1), chat, (8, 8)).pictures
    assert set(np.unique(weights_but_for_first_tokens(target))) == {1.0, OBJECT_WEIGHT}


# --- the data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [s for s in RECIPE if s.trains == "joint"], ids=lambda s: s.name)
def test_no_scene_of_the_evaluation_split_is_in_the_stream_of_dialogues(stage, tokenizer, monkeypatch):
    scenes = []

    def region(source, target):
        scenes.extend((source, target))
        return region_picture(source, target)

    monkeypatch.setattr(tasks, "draw", lambda scene: scenes.append(scene) or draw(scene))
    monkeypatch.setattr(tasks, "region_picture", region)
    shown = dict(stage.tasks), stage.rounds, stage.quizzes
    data = DialogueData(tokenizer["tokenizer.json"], (8, 8), 1, stage.things, *shown)
    rng = np.random.default_rng(11)
    for _ in range(300):
        data.dialogue(rng)
    assert len(scenes) > 300 and {split_of(scene) for scene in scenes} == {"train"}


def test_no_scene_of_the_evaluation_split_is_in_the_stream_of_pictures(monkeypatch):
    drawn, regions = [], []

    def watched(*arguments):
        drawn.append(random_scene(*arguments))
        return drawn[-1]

    def region(source, target):
        regions.extend((source, target))
        return region_picture(source, target)

    monkeypatch.setattr(pictures, "random_scene", watched)
    monkeypatch.setattr(pictures, "region_picture", region)
    data = mingtok_stage(None, None).data
    for step in range(60):
        make_batch(data, 0, step)
    assert len(drawn) == 240 and len(regions) > 20
    assert {split_of(scene) for scene in drawn + regions} == {"train"}


def test_steps_have_different_batches_and_a_step_always_the_same(tokenizer, chat):
    data = joint_stage(tokenizer, chat).data
    first, again, other = make_batch(data, 0, 1), make_batch(data, 0, 1), make_batch(data, 0, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


# --- the text tokenizer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a large red circle", "把它变成蓝色 🌊", "\x00\t\r\n é\u0301", "<image></role>", ""])
def test_any_text_goes_through_the_tokenizer_and_comes_back(text, chat):
    ids = chat.encode(text)
    assert chat.decode(ids) == text
    assert not set(ids) & {chat.end_id, chat.role_open_id, chat.image_open_id, chat.patch_id}


def test_the_tokenizer_has_the_size_asked_for_and_knows_the_special_tokens(tokenizer, chat):
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_str(tokenizer["tokenizer.json"])
    assert tokens.get_vocab_size() == 320
    assert all(len(tokens.encode(token).ids) == 1 for token in SPECIAL_TOKENS)
    assert make_tokenizer(320, dialogues=200) == tokenizer


# --- the optimizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 8, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    result = orthogonalise(torch.randn(shape, generator=seeded()))
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.min() > 0.4 and values.max() < 1.6


def test_matrices_of_one_shape_step_together_as_they_would_alone():
    def step(shapes, grads):
        params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        Muon(params, lr=0.1).step()
        return [p.detach() for p in params]

    a, b = torch.randn(4, 6, generator=seeded(1)), torch.randn(2, 4, 6, generator=seeded(2))
    together = step([a.shape, b.shape], [a, b])
    assert torch.allclose(together[0], step([a.shape], [a])[0], atol=1e-6)
    assert torch.allclose(together[1][1], step([a.shape], [b[1]])[0], atol=1e-6)
    # as large as a step of AdamW would be: 0.2 a value
    assert 0.1 * 0.2 * 0.5 < float(together[0].square().mean().sqrt()) < 0.1 * 0.2 * 1.5


def test_the_learning_rate_rises_stays_and_falls():
    assert learning_rate(0.0, 0, 10, 0.5) == 0.1
    assert learning_rate(0.4, 50, 10, 0.5) == 1.0
    assert 0.4 < learning_rate(0.75, 80, 10, 0.5) < 0.6
    assert learning_rate(1.0, 100, 10, 0.5) == pytest.approx(0.02)


def test_averaged_weights_are_in_place_only_within():
    layer = torch.nn.Linear(2, 2)
    average = MovingAverage(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(4.0)
    average.update(1000)
    own = layer.weight.detach().clone()
    with average.in_place():
        assert torch.equal(layer.weight, average.weights["weight"]) and not torch.equal(layer.weight, own)
    assert torch.equal(layer.weight, own)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_refuses_a_stage_that_the_recipe_lacks():
    with pytest.raises(SystemExit, match="its stages are 'mingtok', "):
        command.main(["nonsense"])


def test_the_command_trains_a_stage_and_skips_it_once_it_is_done(tmp_path, monkeypatch, tokenizer, chat):
    made = []

    def objective(stage, start, device):
        made.append(start)
        return without_looking(mingtok_stage(tokenizer, chat))

    monkeypatch.setattr(command, "objective", objective)
    arguments = [
        "mingtok",
        "--folder",
        str(tmp_path),
        "--steps",
        "2",
        "--batch",
        "4",
        "--start",
        "here",
        "--device",
        "cpu",
    ]
    assert command.main(arguments) == 0
    written = (tmp_path / "mingtok" / "model" / "model.safetensors").stat().st_mtime_ns
    assert command.main(arguments) == 0
    assert (tmp_path / "mingtok" / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert [str(start) for start in made] == ["here", "here"]
