"""Dialogues: well formed, true, reproducible, and each in its split."""

import numpy as np
import pytest

from tiny_shapes.world import (
    TASKS,
    compare,
    describe,
    draw,
    random_dialogue,
    read_region,
    read_scene,
    split_of,
)

DRAWING = {"generate", "edit", "identify region", "refine", "super-resolution", "denoise", "colorize"}


def dialogues(number, seed=0, **wishes):
    rng = np.random.default_rng(seed)
    return [random_dialogue(rng, **wishes) for _ in range(number)]


def is_picture(pixels):
    return pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8


def psnr(one, other):
    return 10 * np.log10(255**2 / max(np.mean((one.astype(float) - other) ** 2), 1e-9))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_task_makes_well_formed_dialogues(task, split):
    for dialogue in dialogues(5, tasks=[task], split=split, rounds=1):
        (turn,) = dialogue.rounds
        assert turn.task == task and turn.prompt.strip() == turn.prompt != ""
        draws = turn.family in DRAWING
        assert (turn.target is not None) == draws and (turn.answer is None) == draws
        assert (turn.attached is None) == (task in ("generate", "chat"))
        assert all(is_picture(pixels) for pixels in (turn.attached, turn.target) if pixels is not None)
        assert (turn.target_scene is not None) == (draws and task != "identify region")


def test_mixed_dialogues_have_one_to_five_rounds_and_meet_every_task():
    made = dialogues(600)
    assert {len(dialogue.rounds) for dialogue in made} == {1, 2, 3, 4, 5}
    assert {turn.task for dialogue in made for turn in dialogue.rounds} == set(TASKS)


def test_a_drawing_asked_for_in_few_words_shows_what_they_leave_open_by_default():
    turns = [dialogue.rounds[0] for dialogue in dialogues(300, tasks=["generate"], things=(1, 1), rounds=1)]
    unplaced = [t for t in turns if not any(place in t.prompt for place in ("top", "bottom", "left", "right"))]
    assert len(unplaced) > 80
    assert {turn.target_scene.things[0].position for turn in unplaced} == {"centre"}
    assert len({(turn.target_scene.things[0].dx, turn.target_scene.things[0].dy) for turn in unplaced}) > 4


def test_a_picture_is_in_view_or_attached_exactly_when_it_is_needed():
    for dialogue in dialogues(300):
        in_view = False
        for turn in dialogue.rounds:
            assert (turn.attached is not None) == (not in_view and turn.task not in ("generate", "chat"))
            in_view = in_view or turn.attached is not None or turn.target is not None


def test_rounds_of_a_dialogue_follow_one_scene():
    for dialogue in dialogues(300, rounds=3):
        view = None
        for turn in dialogue.rounds:
            if turn.attached is None:
                assert turn.source_scene == view
            view = turn.target_scene or turn.source_scene


@pytest.mark.parametrize("split", ["train", "eval"])
def test_no_dialogue_shows_a_scene_of_the_other_split(split):
    for dialogue in dialogues(150, split=split):
        for turn in dialogue.rounds:
            for scene in (turn.source_scene, turn.target_scene):
                assert scene is None or split_of(scene) == split


def test_the_same_generator_gives_the_same_dialogues():
    for one, other in zip(dialogues(30, seed=9), dialogues(30, seed=9), strict=True):
        for first, second in zip(one.rounds, other.rounds, strict=True):
            assert (first.prompt, first.answer, first.target_scene) == (
                second.prompt,
                second.answer,
                second.target_scene,
            )
            assert np.array_equal(first.attached, second.attached) and np.array_equal(first.target, second.target)


def test_descriptions_are_the_canonical_captions():
    for dialogue in dialogues(20, tasks=["describe"], rounds=1):
        assert dialogue.rounds[0].answer == describe(dialogue.rounds[0].source_scene)


def test_targets_show_their_scenes():
    for dialogue in dialogues(60, tasks=["generate", "edit"], rounds=1):
        (turn,) = dialogue.rounds
        assert compare(read_scene(turn.target), turn.target_scene).exact


def test_edits_start_from_the_attached_scene_and_change_it():
    for dialogue in dialogues(60, tasks=["edit"], rounds=1):
        (turn,) = dialogue.rounds
        assert np.array_equal(turn.attached, draw(turn.source_scene))
        assert turn.target_scene.content != turn.source_scene.content


def test_what_an_edit_is_about_is_the_thing_that_it_changes():
    for dialogue in dialogues(60, tasks=["edit"], rounds=1):
        (turn,) = dialogue.rounds
        if turn.task == "edit/background":
            assert turn.meant is None
        else:
            before, after = set(turn.source_scene.things), set(turn.target_scene.things)
            assert turn.meant in (after - before if turn.task == "edit/add" else before - after)


@pytest.mark.parametrize("task", ["refine", "super-resolution", "denoise", "colorize"])
def test_enhancing_leads_from_a_worse_picture_to_the_clean_one(task):
    for dialogue in dialogues(15, tasks=[task], rounds=1):
        (turn,) = dialogue.rounds
        assert np.array_equal(turn.target, draw(turn.source_scene))
        assert psnr(turn.attached, turn.target) < 45


def test_enhancing_what_was_just_drawn_leaves_it_as_it_is():
    for dialogue in dialogues(15, tasks=["generate", "refine", "denoise"], rounds=2):
        first, second = dialogue.rounds
        if first.task == "generate":
            assert np.array_equal(first.target, second.target)


def test_a_grey_pixelated_picture_becomes_sharp_first_and_colored_next():
    greys = 0
    for dialogue in dialogues(40, tasks=["super-resolution", "colorize"], rounds=2):
        first, second = dialogue.rounds
        if first.task == "super-resolution" and (first.target == first.target[..., :1]).all():
            greys += 1
            assert second.task == "colorize" and np.array_equal(second.target, draw(second.target_scene))
    assert greys > 2


@pytest.mark.parametrize("task", ["super-resolution", "denoise"])
def test_a_grey_picture_that_is_to_become_sharp_stays_grey_where_colorizing_is_a_task_too(task):
    def greys(tasks):
        targets = [dialogue.rounds[0].target for dialogue in dialogues(40, tasks=tasks, rounds=1)]
        return sum(bool((target == target[..., :1]).all()) for target in targets)

    assert greys({task: 1.0, "colorize": 1e-6}) > 4 and greys([task]) == 0


def test_an_identified_region_is_that_of_the_edit_that_follows():
    followed = 0
    for dialogue in dialogues(60, tasks={"identify region": 5, "edit": 1}, rounds=2):
        first, second = dialogue.rounds
        if first.task != "identify region" or second.family != "edit":
            continue
        differs = (draw(second.source_scene) != draw(second.target_scene)).any(axis=2)
        region = read_region(first.target)
        followed += (region & differs).sum() > 0.7 * (region | differs).sum()
    assert followed > 20


def test_scenes_keep_to_the_wanted_number_of_things():
    for dialogue in dialogues(60, things=(1, 2), rounds=3):
        scenes = [turn.target_scene or turn.source_scene for turn in dialogue.rounds]
        assert all(1 <= len(scene.things) <= 2 for scene in scenes if scene)


def test_long_chains_of_edits_can_be_made_for_evaluation():
    for dialogue in dialogues(3, tasks=["edit"], split="eval", rounds=5):
        assert len(dialogue.rounds) == 5 and {turn.family for turn in dialogue.rounds} == {"edit"}


def test_weights_choose_among_tasks():
    made = dialogues(200, tasks={"edit": 3, "describe": 1}, rounds=1)
    share = np.mean([dialogue.rounds[0].family == "edit" for dialogue in made])
    assert 0.65 < share < 0.85


@pytest.mark.parametrize(
    ("wishes", "complaint"),
    [
        ({"tasks": ["juggle"]}, "'juggle' is not a task"),
        ({"tasks": ["edit/remove"], "things": (1, 1)}, "fits scenes"),
        ({"tasks": ["generate"], "rounds": 2}, "fewer rounds"),
        ({"split": "test"}, "train, eval"),
    ],
)
def test_wishes_that_cannot_be_met_are_refused(wishes, complaint):
    with pytest.raises(ValueError, match=complaint):
        random_dialogue(np.random.default_rng(0), **wishes)


def test_region_rounds_leave_the_scene_in_view():
    for dialogue in dialogues(20, tasks={"identify region": 1, "describe": 1}, rounds=2):
        first, second = dialogue.rounds
        assert second.source_scene == first.source_scene
        if first.family == "identify region":
            assert 0 < read_region(first.target).mean() < 1
