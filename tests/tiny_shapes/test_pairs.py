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


def test_the_conversation_goes_on_with_the_second_image():
    for n in range(20):
        tasks = random_dialogue(np.random.default_rng(n), {"pair/which": 1e6, "describe": 1.0}, rounds=2).tasks
        assert tasks[0].name == "pair/which" and tasks[1].attached is None
        shapes = {obj.shape for obj in read_scene(tasks[0].second).objects}
        assert all(shape in tasks[1].answer for shape in shapes), "it is the newest one"
