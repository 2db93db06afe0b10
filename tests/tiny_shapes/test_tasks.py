"""Dialogues: well formed, true, reproducible, and each in its split."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tiny_shapes.world import (
    TASKS,
    compare,
    describe,
    draw,
    masks,
    random_dialogue,
    read_region,
    read_scene,
    split_of,
)

DRAWING = {"generate", "edit", "identify region", "refine", "super-resolution", "denoise", "colorize"}


def dialogues(number, seed=0, **arguments):
    rng = np.random.default_rng(seed)
    return [random_dialogue(rng, **arguments) for _ in range(number)]


def is_image(pixels):
    return pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8


def psnr(one, other):
    return 10 * np.log10(255**2 / max(np.mean((one.astype(float) - other) ** 2), 1e-9))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_task_makes_well_formed_dialogues(name, split):
    for dialogue in dialogues(5, tasks=[name], split=split, rounds=1):
        (task,) = dialogue.tasks
        assert task.name == name and task.prompt.strip() == task.prompt != ""
        draws = task.family in DRAWING
        assert (task.target is not None) == draws and (task.answer is None) == draws
        assert (task.attached is None) == (name in ("generate", "chat"))
        assert all(is_image(pixels) for pixels in (task.attached, task.target) if pixels is not None)
        assert (task.target_scene is not None) == (draws and name != "identify region")


def test_mixed_dialogues_have_one_to_five_rounds_and_meet_every_task():
    made = dialogues(600)
    assert {len(dialogue.tasks) for dialogue in made} == {1, 2, 3, 4, 5}
    assert {task.name for dialogue in made for task in dialogue.tasks} == set(TASKS)


def test_a_drawing_with_a_terse_prompt_shows_what_it_leaves_open_by_default():
    made = [dialogue.tasks[0] for dialogue in dialogues(300, tasks=["generate"], objects=(1, 1), rounds=1)]
    unplaced = [t for t in made if not any(place in t.prompt for place in ("top", "bottom", "left", "right"))]
    assert len(unplaced) > 80
    assert {task.target_scene.objects[0].position for task in unplaced} == {"centre"}
    assert len({(task.target_scene.objects[0].dx, task.target_scene.objects[0].dy) for task in unplaced}) > 4


def test_few_words_leave_some_colors_and_places_to_the_defaults_and_name_others():
    made = [dialogue.tasks[0] for dialogue in dialogues(200, tasks=["few words"], objects=(2, 3), rounds=1)]
    objects = [obj for task in made for obj in task.target_scene.objects]
    without_color = [sum(obj.color not in task.prompt.lower() for obj in task.target_scene.objects) for task in made]
    assert 60 < sum(count > 0 for count in without_color) < 160
    assert all(task.attached is None and np.array_equal(task.target, draw(task.target_scene)) for task in made)
    named = sum("top" in obj.position or "bottom" in obj.position for obj in objects)
    assert named > 40, "an object whose place is left open is in the middle row"


def test_coloring_again_begins_with_other_colors_and_ends_with_those_of_the_words():
    made = [dialogue.tasks[0] for dialogue in dialogues(80, tasks=["color again"], rounds=1)]
    for task in made:
        assert all(obj.color in task.prompt.lower() for obj in task.target_scene.objects)
        assert np.array_equal(task.target, draw(task.target_scene))
        difference = np.abs(task.attached.astype(int) - task.target).max(axis=2)
        assert all(difference[mask > 0.9].mean() > 20 for mask in masks(task.target_scene))
    colored = [(task, np.ptp(task.attached.astype(int), axis=2).max()) for task in made]
    assert sum(chroma < 60 for _, chroma in colored) > 5, "some are pale"
    vivid = [compare(read_scene(task.attached / 255), task.target_scene) for task, chroma in colored if chroma > 170]
    assert len(vivid) > 5 and all(all(seen.shape) and all(seen.position) for seen in vivid), "others are read as shapes"


def test_coloring_again_gives_what_is_in_view_other_colors_and_leaves_the_rest():
    found = 0
    for dialogue in dialogues(40, tasks=["generate", "super-resolution", "color again"], rounds=3):
        for before, task in itertools.pairwise(dialogue.tasks):
            if task.name != "color again":
                continue
            found += 1
            assert task.attached is None and task.source_scene == before.target_scene
            pairs = list(zip(task.source_scene.objects, task.target_scene.objects, strict=True))
            assert all(old.color != new.color and replace(old, color=new.color) == new for old, new in pairs)
            assert all(new.color in task.prompt.lower() for _, new in pairs)
            assert task.source_scene.background == task.target_scene.background
    assert found > 20


def test_an_image_is_in_view_or_attached_exactly_when_it_is_needed():
    for dialogue in dialogues(300):
        in_view = False
        for task in dialogue.tasks:
            assert (task.attached is not None) == (not in_view and task.name not in ("generate", "chat"))
            in_view = in_view or task.attached is not None or task.target is not None


def test_rounds_of_a_dialogue_follow_one_scene():
    for dialogue in dialogues(300, rounds=3):
        view = None
        for task in dialogue.tasks:
            if task.attached is None:
                assert task.source_scene == view
            view = task.target_scene or task.source_scene


@pytest.mark.parametrize("split", ["train", "eval"])
def test_no_dialogue_shows_a_scene_of_the_other_split(split):
    for dialogue in dialogues(150, split=split):
        for task in dialogue.tasks:
            for scene in (task.source_scene, task.target_scene):
                assert scene is None or split_of(scene) == split


def test_the_same_generator_gives_the_same_dialogues():
    for one, other in zip(dialogues(30, seed=9), dialogues(30, seed=9), strict=True):
        for first, second in zip(one.tasks, other.tasks, strict=True):
            assert (first.prompt, first.answer, first.target_scene) == (
                second.prompt,
                second.answer,
                second.target_scene,
            )
            assert np.array_equal(first.attached, second.attached) and np.array_equal(first.target, second.target)


def test_descriptions_are_the_canonical_captions():
    for dialogue in dialogues(20, tasks=["describe"], rounds=1):
        assert dialogue.tasks[0].answer == describe(dialogue.tasks[0].source_scene)


def test_targets_show_their_scenes():
    for dialogue in dialogues(60, tasks=["generate", "edit"], rounds=1):
        (task,) = dialogue.tasks
        assert compare(read_scene(task.target), task.target_scene).exact


def test_edits_start_from_the_attached_scene_and_change_it():
    for dialogue in dialogues(60, tasks=["edit"], rounds=1):
        (task,) = dialogue.tasks
        assert np.array_equal(task.attached, draw(task.source_scene))
        assert task.target_scene.content != task.source_scene.content


def test_what_an_edit_is_about_is_the_object_that_it_changes():
    for dialogue in dialogues(60, tasks=["edit"], rounds=1):
        (task,) = dialogue.tasks
        if task.name == "edit/background":
            assert task.subject is None
        else:
            before, after = set(task.source_scene.objects), set(task.target_scene.objects)
            assert task.subject in (after - before if task.name == "edit/add" else before - after)


@pytest.mark.parametrize("task", ["refine", "super-resolution", "denoise", "colorize"])
def test_enhancing_leads_from_a_worse_image_to_the_clean_one(task):
    for dialogue in dialogues(15, tasks=[task], rounds=1):
        (task,) = dialogue.tasks
        assert np.array_equal(task.target, draw(task.source_scene))
        assert psnr(task.attached, task.target) < 45


def test_enhancing_what_was_just_drawn_leaves_it_as_it_is():
    for dialogue in dialogues(15, tasks=["generate", "refine", "denoise"], rounds=2):
        first, second = dialogue.tasks
        if first.name == "generate":
            assert np.array_equal(first.target, second.target)


def test_a_grey_pixelated_image_becomes_sharp_first_and_colored_next():
    greys = 0
    for dialogue in dialogues(40, tasks=["super-resolution", "colorize"], rounds=2):
        first, second = dialogue.tasks
        if first.name == "super-resolution" and (first.target == first.target[..., :1]).all():
            greys += 1
            assert second.name == "colorize" and np.array_equal(second.target, draw(second.target_scene))
    assert greys > 2


@pytest.mark.parametrize("task", ["super-resolution", "denoise"])
def test_a_grey_image_that_is_to_become_sharp_stays_grey_where_colorizing_is_a_task_too(task):
    def greys(tasks):
        targets = [dialogue.tasks[0].target for dialogue in dialogues(40, tasks=tasks, rounds=1)]
        return sum(bool((target == target[..., :1]).all()) for target in targets)

    assert greys({task: 1.0, "colorize": 1e-6}) > 4 and greys([task]) == 0


def test_an_identified_region_is_that_of_the_edit_that_follows():
    followed = 0
    for dialogue in dialogues(60, tasks={"identify region": 5, "edit": 1}, rounds=2):
        first, second = dialogue.tasks
        if first.name != "identify region" or second.family != "edit":
            continue
        differs = (draw(second.source_scene) != draw(second.target_scene)).any(axis=2)
        region = read_region(first.target)
        followed += (region & differs).sum() > 0.7 * (region | differs).sum()
    assert followed > 20


def test_scenes_keep_to_the_wanted_number_of_objects():
    for dialogue in dialogues(60, objects=(1, 2), rounds=3):
        scenes = [task.target_scene or task.source_scene for task in dialogue.tasks]
        assert all(1 <= len(scene.objects) <= 2 for scene in scenes if scene)


def test_long_chains_of_edits_can_be_made_for_evaluation():
    for dialogue in dialogues(3, tasks=["edit"], split="eval", rounds=5):
        assert len(dialogue.tasks) == 5 and {task.family for task in dialogue.tasks} == {"edit"}


def test_weights_choose_among_tasks():
    made = dialogues(200, tasks={"edit": 3, "describe": 1}, rounds=1)
    share = np.mean([dialogue.tasks[0].family == "edit" for dialogue in made])
    assert 0.65 < share < 0.85


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"tasks": ["juggle"]}, "'juggle' is not a task"),
        ({"tasks": ["edit/remove"], "objects": (1, 1)}, "fits scenes"),
        ({"tasks": ["generate"], "rounds": 2}, "fewer rounds"),
        ({"split": "test"}, "train, eval"),
    ],
)
def test_what_is_impossible_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        random_dialogue(np.random.default_rng(0), **arguments)


def test_region_rounds_leave_the_scene_in_view():
    for dialogue in dialogues(20, tasks={"identify region": 1, "describe": 1}, rounds=2):
        first, second = dialogue.tasks
        assert second.source_scene == first.source_scene
        if first.family == "identify region":
            assert 0 < read_region(first.target).mean() < 1
