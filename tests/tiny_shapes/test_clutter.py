"""What people type around a prompt, other ways to type it, and requests from outside the world."""

import numpy as np
import pytest

from tiny_shapes.world import OUTSIDE, SHAPES, cluttered, random_dialogue, retyped
from tiny_shapes.world.clutter import VOCABULARIES, made_up_word, outside

PROMPT = "Draw a red circle and an orange star."


def rng(number=0):
    return np.random.default_rng(number)


def test_what_is_kept_for_evaluation_is_no_clutter_of_training():
    for known, unseen in VOCABULARIES.values():
        assert known and unseen and not {w.lower() for w in known} & {w.lower() for w in unseen}
    prompts = " ".join(cluttered(rng(n), PROMPT) for n in range(600)).lower()
    for kind, (known, unseen) in VOCABULARIES.items():
        if kind not in ("things", "talk"):
            assert any(word.lower() in prompts for word in known), kind
            assert not any(f" {word.lower()} " in prompts for word in unseen), kind


def test_additions_leave_the_words_of_the_prompt_in_their_order():
    for n in range(300):
        rest = iter(cluttered(rng(n), PROMPT, unseen=n % 2 == 1).lower())
        for letter in "red circle and":
            assert any(letter == each for each in rest), "each letter of the plain words is found in turn"


def test_weights_tags_and_praise_come_up():
    prompts = [cluttered(rng(n), PROMPT) for n in range(400)]
    for mark in ("(red:", "((", "<lora:", "masterpiece", "--ar", "Steps:", "🙏"):
        assert any(mark in prompt for prompt in prompts), mark


def test_an_addition_names_no_shape_of_this_world():
    for known, unseen in VOCABULARIES.values():
        assert not any(f" {shape} " in f" {word} " for word in (*known, *unseen) for shape in SHAPES)
    assert all(made_up_word(rng(n)) not in SHAPES for n in range(100))


def test_typing_it_another_way_changes_how_it_looks_alone():
    import unicodedata

    forms = {retyped(rng(n), PROMPT) for n in range(60)}
    assert len(forms) == 6 and PROMPT not in forms
    for form in forms:
        assert " ".join(unicodedata.normalize("NFKC", form).split()).lower() == PROMPT.lower()


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_request_from_outside_names_none_of_the_shapes_and_is_answered_with_all_of_them(split):
    for n in range(60):
        (task,) = random_dialogue(rng(n), ["outside"], split=split, rounds=1).tasks
        assert task.answer == OUTSIDE and task.attached is None
        assert not any(shape in task.prompt.lower() for shape in SHAPES)
    assert all(shape in OUTSIDE for shape in SHAPES)


def test_requests_of_the_evaluation_are_about_things_that_training_never_names():
    known, unseen = ({outside(rng(n), each) for n in range(300)} for each in (False, True))
    assert not known & unseen
