"""The batches of a stage: reproducible, and without any scene of the evaluation split."""

import hashlib
import pickle

import numpy as np
import pytest
import torch

from tiny_shapes.training import images
from tiny_shapes.training.data import QUIZ, DialogueData, ImageData, StepDataset
from tiny_shapes.training.recipe import STAGES
from tiny_shapes.world import draw, random_scene, region_image, split_of, tasks

GRID = (4, 4)


def dialogue_data(tokenizer, **changes):
    fields = {"grid": GRID, "batch": 1, "objects": (1, 3), "tasks": {"generate": 1.0}, "rounds": 1} | changes
    return DialogueData(tokenizer["tokenizer.json"], **fields)


def test_a_quiz_is_several_questions_about_one_image(tokenizer):
    quiz = dialogue_data(tokenizer, objects=(2, 3), quizzes=1.0).dialogue(np.random.default_rng(0)).tasks
    assert len(quiz) == QUIZ and {task.family for task in quiz} == {"question"}
    assert quiz[0].attached is not None and all(task.attached is None for task in quiz[1:])


def test_half_of_the_quizzes_are_about_two_images_if_there_are_such_tasks(tokenizer):
    data = dialogue_data(tokenizer, tasks={"pair/which": 2.0, "generate": 1.0}, quizzes=1.0)
    quizzes = [data.dialogue(np.random.default_rng(i)).tasks for i in range(40)]
    kinds = [{task.name if task.family == "pair" else task.family for task in quiz} for quiz in quizzes]
    assert 10 <= kinds.count({"pair/which"}) <= 30
    assert all(kind in ({"pair/which"}, {"question"}) for kind in kinds)


def test_a_share_of_the_dialogues_is_long_chains_of_edits(tokenizer):
    data, generator = dialogue_data(tokenizer, chains=0.5), np.random.default_rng(0)
    made = [data.dialogue(generator).tasks for _ in range(60)]
    chains = [tasks for tasks in made if len(tasks) > 1]
    assert 15 < len(chains) < 45 and {len(tasks) for tasks in chains} == {3, 4, 5}
    assert {task.family for tasks in chains for task in tasks} == {"edit", "masked edit"}


def test_a_share_of_the_dialogues_is_a_region_and_the_edit_inside_it(tokenizer):
    data, generator = dialogue_data(tokenizer, regions=0.5), np.random.default_rng(0)
    made = [data.dialogue(generator).tasks for _ in range(60)]
    pairs = [tasks for tasks in made if len(tasks) == 2]
    assert 15 < len(pairs) < 45
    for asked, edit in pairs:
        assert (asked.family, edit.family) == ("identify region", "masked edit") and edit.subject == asked.subject
        assert np.array_equal(edit.attached, asked.attached)  # the newest image is that of the region
        changed = (edit.target != edit.attached).any(-1)
        assert edit.mask.any() and not (changed & ~edit.mask).any()


def test_a_share_of_the_prompts_has_additions_and_nothing_else_is_changed(tokenizer):
    plain, with_additions = (
        [dialogue_data(tokenizer, cluttered=share).dialogue(np.random.default_rng(n)).tasks[0] for n in range(60)]
        for share in (0.0, 0.5)
    )
    changed = 0
    for one, other in zip(plain, with_additions, strict=True):
        changed += one.prompt != other.prompt
        assert one.target_scene == other.target_scene and np.array_equal(one.target, other.target)
    assert 15 < changed < 45


def test_a_share_of_the_dialogues_has_two_objects_or_more(tokenizer):
    def share(several: float) -> float:
        data, rng = dialogue_data(tokenizer, several=several), np.random.default_rng(0)
        return np.mean([len(data.dialogue(rng).tasks[0].target_scene.objects) > 1 for _ in range(200)])

    assert share(1.0) == 1.0 and share(0.0) < share(0.6) < 1.0


def test_a_share_of_the_dialogues_has_objects_that_are_alike(tokenizer):
    def share(alike: float) -> float:
        data, rng = dialogue_data(tokenizer, several=1.0, alike=alike), np.random.default_rng(0)
        scenes = (data.dialogue(rng).tasks[0].target_scene.objects for _ in range(200))
        return np.mean(
            [sum(a != b for a, b in zip(x.content[:3], y.content[:3], strict=True)) < 2 for x, y, *_ in scenes]
        )

    assert share(0.0) < 0.3 < share(0.5) < share(1.0)


@pytest.mark.parametrize("stage", [s for s in STAGES if s.trains == "joint"], ids=lambda s: s.name)
def test_no_scene_of_the_evaluation_split_is_in_the_dialogues(stage, tokenizer, monkeypatch):
    scenes = []

    def region(source, target):
        scenes.extend((source, target))
        return region_image(source, target)

    monkeypatch.setattr(tasks, "draw", lambda scene: scenes.append(scene) or draw(scene))
    monkeypatch.setattr(tasks, "region_image", region)
    chosen = {"tasks": dict(stage.tasks), "rounds": stage.rounds, "quizzes": stage.quizzes}
    chosen |= {"chains": stage.chains, "regions": stage.regions, "cluttered": stage.cluttered}
    data = dialogue_data(tokenizer, objects=stage.objects, **chosen)
    rng = np.random.default_rng(11)
    for _ in range(300):
        data.dialogue(rng)
    assert len(scenes) > 300 and {split_of(scene) for scene in scenes} == {"train"}


def test_no_scene_of_the_evaluation_split_is_in_the_images(monkeypatch):
    drawn, regions = [], []

    def recorded(*arguments):
        drawn.append(random_scene(*arguments))
        return drawn[-1]

    def region(source, target):
        regions.extend((source, target))
        return region_image(source, target)

    monkeypatch.setattr(images, "random_scene", recorded)
    monkeypatch.setattr(images, "region_image", region)
    dataset = StepDataset(ImageData(4, (1, 1), 4), 0)
    for step in range(60):
        dataset[step]
    assert len(drawn) == 240 and len(regions) > 20
    assert {split_of(scene) for scene in drawn + regions} == {"train"}


def test_steps_have_different_batches_and_a_step_always_the_same(tokenizer):
    dataset = StepDataset(dialogue_data(tokenizer, batch=4), 0)
    first, again, other = dataset[1], dataset[1], dataset[2]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.ids.shape != other.ids.shape or not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize("kind", ["mingtok", "joint"])
def test_what_makes_batches_can_be_sent_to_another_process(kind, make_objective):
    data = make_objective(kind).data
    assert pickle.loads(pickle.dumps(data)) == data


def test_the_data_of_a_step_are_those_that_the_built_in_model_was_trained_on(tokenizer):
    digest = hashlib.sha256()
    _, labels = StepDataset(ImageData(16, (1, 6), 8), 0)[0]
    for name in sorted(labels):
        digest.update(labels[name].numpy().tobytes())
    data, rng = dialogue_data(tokenizer, tasks={}, rounds=0, several=0.5, quizzes=0.1), np.random.default_rng(0)
    for _ in range(50):
        for task in data.dialogue(rng).tasks:
            digest.update(f"{task.name}|{task.prompt}|{task.answer}".encode())
    assert digest.hexdigest()[:16] == "87ee12543b1cc22f"
