"""Dialogues as token sequences: the transcript of inference, with what is predicted in it."""

import re

import numpy as np
import pytest

from tiny_shapes.training.sequences import (
    IGNORE,
    SHORT_WEIGHT,
    TEXT_UNCONDITIONAL,
    UNCONDITIONAL,
    tokenize_dialogue,
)
from tiny_shapes.world import random_dialogue

GRID = (4, 4)


def dialogue_of(tasks, number: int = 0, rounds: int = 1, objects=(1, 2)):
    return random_dialogue(np.random.default_rng(number), tasks, objects, rounds=rounds)


def predicted(sequence):
    """The targets by position."""
    return {i: target for i, target in enumerate(sequence.targets) if target != IGNORE}


def test_a_sequence_is_the_transcript_that_a_conversation_would_have(chat):
    dialogue = dialogue_of(["question"], 5, rounds=2)
    first, second = dialogue.tasks
    sequence = tokenize_dialogue(dialogue, chat, GRID)
    role = [[chat.role_open_id, *chat.encode(name), chat.role_close_id] for name in ("HUMAN", "ASSISTANT")]
    image = [chat.image_open_id, *[chat.patch_id] * 16, chat.image_close_id]
    opening = [*image, *chat.encode("\n" + first.prompt), *role[1], *chat.encode(first.answer)]
    ending = [*chat.encode(second.prompt), *role[1], *chat.encode(second.answer)]
    assert sequence.ids == [*role[0], *opening, *role[0], *ending]
    assert sequence.positions == list(range(len(sequence.ids)))


def test_an_answer_is_predicted_token_by_token_and_then_the_end(chat):
    dialogue = dialogue_of("question", 4)
    sequence = tokenize_dialogue(dialogue, chat, GRID)
    answer = [*chat.encode(dialogue.tasks[0].answer), chat.end_id]
    targets = predicted(sequence)
    assert list(targets.values()) == answer
    first = min(targets)  # the last token of the prompt predicts the first of the answer
    assert first == len(sequence.ids) - len(answer) and sequence.ids[first] == chat.role_close_id


def test_of_a_drawn_image_its_beginning_is_predicted_and_the_end_after_it(chat):
    sequence = tokenize_dialogue(dialogue_of("generate"), chat, GRID)
    (image,) = sequence.images
    assert predicted(sequence) == {image.start - 2: chat.image_open_id, len(sequence.ids) - 1: chat.end_id}
    assert image.drawn and sequence.ids[image.start - 1 :] == [chat.image_open_id] + [chat.patch_id] * 16


def test_a_guidance_row_has_a_donors_prompt_and_predicts_no_text_in_that_round(chat):
    dialogue, donor = dialogue_of("edit", 1), dialogue_of("edit", 2).tasks[0]
    own, words = dialogue.tasks[0], chat.encode(donor.prompt)
    for row, attached in ((UNCONDITIONAL, donor.attached), (TEXT_UNCONDITIONAL, own.attached)):
        sequence = tokenize_dialogue(dialogue, chat, GRID, row, donor)
        text = ",".join(map(str, sequence.ids))
        assert ",".join(map(str, words)) in text and ",".join(map(str, chat.encode(own.prompt))) not in text
        assert sequence.images[0].pixels is attached and sequence.images[1].pixels is own.target
        assert not predicted(sequence)


def test_a_guidance_row_is_not_to_tell_what_its_donors_prompt_is_about(chat):
    dialogue = dialogue_of("edit/recolor", 5)
    assert tokenize_dialogue(dialogue, chat, GRID).subjects
    donor = dialogue_of("edit/recolor", 6).tasks[0]
    assert not tokenize_dialogue(dialogue, chat, GRID, 1, donor).subjects


def test_a_guidance_row_without_a_donor_is_refused(chat):
    with pytest.raises(ValueError, match="no such field"):
        tokenize_dialogue(dialogue_of("generate"), chat, GRID, UNCONDITIONAL)


def test_answers_of_a_word_or_two_count_more_than_descriptions(chat):
    sequence = tokenize_dialogue(dialogue_of(["question"], 5, rounds=2), chat, GRID)
    assert [i for i, weight in enumerate(sequence.loss_weights) if weight == SHORT_WEIGHT] == list(predicted(sequence))
    assert set(tokenize_dialogue(dialogue_of("describe"), chat, GRID).loss_weights) == {1.0}


def test_every_object_of_a_caption_is_named_where_its_words_end(chat):
    for seed in range(20):
        dialogue = dialogue_of(("generate", "colorize"), seed, objects=(2, 3))
        scene, sequence = dialogue.tasks[0].target_scene, tokenize_dialogue(dialogue, chat, GRID)
        assert sorted(obj.content for obj in sequence.subjects.values()) == sorted(obj.content for obj in scene.objects)
        for position, obj in sequence.subjects.items():
            text = chat.decode(sequence.ids[: position + 1]).lower()
            assert text.endswith((obj.shape, "corner", "side", *re.split("[ -]", obj.position), "center", "middle"))
            assert obj.shape in text[-len("large purple triangle in the bottom right corner") :]


def test_two_images_of_one_message_are_laid_out_as_inference_lays_them_out(chat):
    dialogue = dialogue_of("pair/which", 1)
    (task,) = dialogue.tasks
    sequence = tokenize_dialogue(dialogue, chat, GRID)
    image = [chat.image_open_id, *[chat.patch_id] * 16, chat.image_close_id]
    role = [chat.role_open_id, *chat.encode("HUMAN"), chat.role_close_id]
    opening = [*role, *image, *chat.encode("\n\n"), *image, *chat.encode("\n" + task.prompt)]
    assert sequence.ids[: len(opening)] == opening
    pixels = (task.attached, task.second)
    assert all(image.pixels is shown for image, shown in zip(sequence.images, pixels, strict=True))
    assert not any(image.drawn for image in sequence.images)


def test_a_masked_edit_keeps_the_newest_image_in_view(chat):
    for seed in range(12):
        dialogue = dialogue_of({"edit": 1.0, "masked edit": 2.0}, seed, rounds=3)
        sequence = tokenize_dialogue(dialogue, chat, GRID)
        for index, image in enumerate(sequence.images):
            masked = image.task is not None and image.task.mask is not None
            assert image.source == (index - 1 if masked else None)


def test_of_a_masked_edit_the_guidance_rows_keep_the_image_that_the_donor_hides(chat):
    dialogue, donor = dialogue_of("masked edit", 1), dialogue_of("edit", 2).tasks[0]
    (task,) = dialogue.tasks
    hidden = tokenize_dialogue(dialogue, chat, GRID, UNCONDITIONAL, donor).images[-1]
    assert hidden.source is task.attached and hidden.task is task
    shown = tokenize_dialogue(dialogue, chat, GRID, TEXT_UNCONDITIONAL, donor).images
    assert shown[-1].source == 0 and shown[0].pixels is task.attached
    later = dialogue_of({"edit": 1.0, "masked edit": 9.0}, 3, rounds=2)
    assert later.tasks[1].mask is not None
    drawn = tokenize_dialogue(later, chat, GRID, UNCONDITIONAL, donor).images
    assert drawn[drawn[-1].source].pixels is later.tasks[0].target, "the past stays in the sequence, behind its mask"
