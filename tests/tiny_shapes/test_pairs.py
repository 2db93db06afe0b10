"""Questions about two images in one message."""

import re
from collections import Counter

import numpy as np

from tiny_shapes.world import random_dialogue, read_scene, split_of
from tiny_shapes.world.pairs import DIFFERENCES, WHICH


def tasks_of(kind, count=200, split="train"):
    return [
        random_dialogue(np.random.default_rng(n), [f"pair/{kind}"], split=split, rounds=1).tasks[0]
        for n in range(count)
    ]


def has(reading, words):
    """Whether an image shows what the end of the question names, as the scorer reads it."""
    if words[-1] == "background":
        return reading.background == words[-2]
    kind, color = words[-1], words[-2] if len(words) > 1 else None
    return any(
        kind in ("object", obj.shape) and (color in (None, "a", "an") or obj.color == color) for obj in reading.objects
    )


def test_the_answer_says_which_of_the_two_images_has_it():
    checked = Counter()
    for task in tasks_of("which"):
        said = task.prompt.lower().replace("grey", "gray").split(",")[0].rstrip("?. ")
        if " at the " in said:
            continue
        words = re.search(r"\b(an?) (.*)$", said)[2].split()
        there = tuple(has(read_scene(image), words) for image in (task.attached, task.second))
        assert WHICH[there] == task.answer, task.prompt
        checked[task.answer] += 1
    assert len(checked) == 4 and min(checked.values()) > 5 and sum(checked.values()) > 120


def test_the_answer_says_what_differs():
    seen = Counter()
    for task in tasks_of("difference"):
        first, second = read_scene(task.attached), read_scene(task.second)
        colors, places = (
            [[getattr(obj, name) for obj in reading.objects] for reading in (first, second)]
            for name in ("color", "position")
        )
        expected = (
            "the background"
            if first.background != second.background
            else "the place"
            if places[0] != places[1]
            else "the color"
            if colors[0] != colors[1]
            else "nothing"
        )
        assert task.answer == expected
        seen[task.answer] += 1
    assert set(seen) == set(DIFFERENCES.values()) and min(seen.values()) > 20


def test_both_images_belong_to_the_split():
    for task in tasks_of("which", 60, "eval"):
        for image in (task.attached, task.second):
            assert split_of(read_scene(image).to_scene()) == "eval"


def test_more_questions_about_both_images_may_follow_and_then_it_goes_on_with_the_second():
    followed = described = 0
    for n in range(60):
        weights = {"pair": 1.0, "describe": 0.5, "edit": 0.5}
        first, *others = random_dialogue(np.random.default_rng(n), weights, rounds=3).tasks
        if first.family != "pair":
            assert "pair" not in {task.family for task in others}, "there is one image in view"
            continue
        assert all(task.attached is None and task.second is None for task in others)
        followed += others[0].family == "pair"
        if others[0].name == "describe":
            described += 1
            assert {obj.shape for obj in read_scene(first.second).objects} == {
                obj.shape for obj in others[0].source_scene.objects
            }
    assert followed > 3 and described > 3


def test_the_subject_is_the_only_thing_that_is_asked_for():
    told = [task for task in tasks_of("which", 100) if task.subject is not None]
    assert 40 < len(told) < 95
    for task in told:
        assert task.answer in ("the first", "the second")
        image = task.attached if task.answer == "the first" else task.second
        assert task.subject.position in {obj.position for obj in read_scene(image).objects}


def test_a_question_about_one_of_the_images_says_which_and_is_answered_from_that_one():
    counted = 0
    for task in tasks_of("one", 120):
        number = int("second picture" in task.prompt.lower() or "second image" in task.prompt.lower())
        assert number or "first picture" in task.prompt.lower() or "first image" in task.prompt.lower()
        if "background" in task.prompt and task.answer not in ("yes", "no"):
            counted += 1
            assert task.answer == read_scene((task.attached, task.second)[number]).background
    assert counted > 8
