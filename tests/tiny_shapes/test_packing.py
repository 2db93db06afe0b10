"""Batches: sequences packed into rows, the weights of image tokens, and the auxiliary targets."""

import dataclasses

import numpy as np
import pytest

from tiny_shapes.training.packing import (
    ATTRIBUTES,
    EDIT_WEIGHT,
    EMPTY,
    FIRST_CELL,
    FIRST_NAMED,
    FIRST_WEIGHT,
    OBJECT_WEIGHT,
    PATCH_TARGETS,
    first_tokens,
    flow_weights,
    opened_tokens,
    origins,
    pack,
    patch_targets,
)
from tiny_shapes.training.sequences import IGNORE, UNCONDITIONAL, tokenize_dialogue
from tiny_shapes.world import (
    BACKGROUNDS,
    POSITIONS,
    Dialogue,
    Scene,
    SceneObject,
    Task,
    draw,
    parse_scene,
    random_dialogue,
)

GRID = (4, 4)


def dialogue_of(tasks, number: int = 0, rounds: int = 1, objects=(1, 2)):
    return random_dialogue(np.random.default_rng(number), tasks, objects, rounds=rounds)


def test_packed_sequences_do_not_attend_to_one_another(chat):
    sequences = [tokenize_dialogue(dialogue_of(["edit", "generate", "question"], n), chat, GRID) for n in range(3)]
    batch = pack(sequences, 4096, GRID)
    assert batch.ids.shape == (1, 4096)
    position = 0
    for sequence in sorted(sequences, key=lambda s: -len(s.ids)):
        own = slice(position, position + len(sequence.ids))
        assert batch.ids[0, own].tolist() == sequence.ids and batch.targets[0, own].tolist() == sequence.targets
        assert batch.positions[0, own].tolist() == sequence.positions
        assert batch.loss_weights[0, own].tolist() == sequence.loss_weights
        assert np.array_equal(batch.mask[0, own, own], sequence.mask())
        assert not batch.mask[0, own, : own.start].any() and not batch.mask[0, own, own.stop :].any()
        position = own.stop
    assert batch.mask.any(-1).all()  # padding, too, attends to something


def test_the_object_that_a_prompt_is_about_is_told_where_the_prompt_ends(chat):
    dialogues = [dialogue_of(tasks, 3, rounds=2, objects=(2, 2)) for tasks in ("question", "edit/move")]
    sequences = [tokenize_dialogue(dialogue, chat, GRID) for dialogue in dialogues]
    batch = pack(sequences, 4096, GRID)
    ends = (batch.ids.flatten() == chat.role_close_id).nonzero().flatten().tolist()
    assert len(batch.object_positions) > 1 and set(batch.object_positions.tolist()) <= set(ends)
    objects = [obj for s in sorted(sequences, key=lambda s: -len(s.ids)) for obj in s.subjects.values()]
    assert [
        {name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row, strict=True)}
        for row in batch.object_targets.tolist()
    ] == [{name: getattr(obj, name) for name in ATTRIBUTES} for obj in objects]


def test_objects_of_a_drawing_come_from_the_words_in_their_order(chat):
    scene = parse_scene("a green star, a square and a red circle at the top")
    task = Task("a red circle at the top, a square, a green star", None, None, draw(scene), "few words", scene)
    (found,) = pack([tokenize_dialogue(Dialogue((task,)), chat, GRID)], 0, GRID).origins.tolist()
    placed = {place: number for place, number in zip(POSITIONS, found, strict=True) if number != EMPTY}
    assert placed == {"top": FIRST_NAMED, "left": FIRST_NAMED + 1, "centre": FIRST_NAMED + 2}
    # nothing is told where the words do not say which object is which, or are those of another dialogue
    alike = parse_scene("a star and a star")
    twins = Task("a star and a star", None, None, draw(alike), "few words", alike)
    rows = [
        tokenize_dialogue(Dialogue((twins,)), chat, GRID),
        tokenize_dialogue(Dialogue((task,)), chat, GRID, UNCONDITIONAL, twins),
        tokenize_dialogue(dialogue_of("describe"), chat, GRID),
    ]
    assert (pack(rows, 0, GRID).origins == IGNORE).all()


@pytest.mark.parametrize(
    ("kind", "in_words"), [("move", 1), ("recolor", 1), ("add", 1), ("remove", 0), ("background", 0)]
)
def test_objects_of_an_edit_come_from_where_they_are_and_what_changes_from_the_words(kind, in_words):
    (task,) = dialogue_of(f"edit/{kind}", 3, objects=(2, 3)).tasks
    before = task.source_scene.objects
    after = {obj.position: obj for obj in task.target_scene.objects}
    found = dict(zip(POSITIONS, origins(task, (8, 8)).tolist(), strict=True))
    assert {place for place, number in found.items() if number != EMPTY} == set(after)
    changed = [obj for place, obj in after.items() if found[place] == FIRST_NAMED]
    assert len(changed) == in_words and not set(changed) & set(before)
    for cell, (place, number) in enumerate(found.items(), FIRST_CELL):
        assert number in (EMPTY, FIRST_NAMED) or (number == cell and after[place] in before)


@pytest.mark.parametrize("name", ["colorize", "color again"])
def test_objects_of_an_image_that_gets_its_colors_come_from_the_words(name):
    (task,) = dialogue_of(name, 3, objects=(3, 3)).tasks
    numbers = dict(zip(POSITIONS, origins(task, (8, 8)).tolist(), strict=True))
    in_the_order_of_words = sorted(task.target_scene.objects, key=lambda obj: numbers[obj.position])
    assert [numbers[obj.position] for obj in in_the_order_of_words] == list(range(FIRST_NAMED, FIRST_NAMED + 3))
    told = [task.prompt.lower().index(f"{obj.color} {obj.shape}") for obj in in_the_order_of_words]
    assert told == sorted(told)


def test_cells_that_a_mask_keeps_have_no_origin():
    (task,) = dialogue_of("masked edit/recolor", 3, objects=(2, 3)).tasks
    kept = ~opened_tokens(task, (8, 8))[first_tokens((8, 8))]
    assert kept.any() and ((origins(task, (8, 8)) == IGNORE) == kept).all()


def weights_but_for_first_tokens(task):
    """The flow loss weights of 8 by 8 tokens, without the factor on the first one of each cell."""
    weights = flow_weights(task, (8, 8)).reshape(8, 8)
    weights[::3, ::3] /= FIRST_WEIGHT  # nine cells of two by two tokens, with one between them
    return weights


def test_tokens_of_objects_weigh_more_than_the_plain_background():
    scene = Scene((SceneObject("square", "red", "small", "top left"),), "white")
    weights = weights_but_for_first_tokens(Task("", None, None, draw(scene), "generate", scene))
    assert (weights[:2, :2] == OBJECT_WEIGHT).all()
    weights[:2, :2] = 1
    assert (weights == 1).all()
    assert not flow_weights(None, GRID).any()


def test_what_is_completed_weighs_alike_whether_an_object_comes_or_not():
    (task,) = dialogue_of("complete", 4).tasks
    opened = opened_tokens(task, (8, 8)).reshape(8, 8)
    weights = weights_but_for_first_tokens(task)
    assert (weights[opened] == OBJECT_WEIGHT).all() and (weights[~opened] == 0).all() and not opened.all()


def test_an_edit_weighs_what_it_changes_and_the_objects_that_it_must_not_change_alike():
    (task,) = dialogue_of("edit/move", 4, objects=(2, 3)).tasks
    background = np.array(BACKGROUNDS[task.source_scene.background])
    different = [np.abs(image.astype(int) - background) > 12 for image in (task.attached, task.target)]
    occupied = (different[0] | different[1]).any(-1).reshape(8, 16, 8, 16).any((1, 3))
    weights = weights_but_for_first_tokens(task)
    assert 9 <= occupied.sum() <= 16
    assert (weights[occupied] == EDIT_WEIGHT).all() and (weights[~occupied] == 1).all()


@pytest.mark.parametrize("name", ["edit/recolor", "identify region"])
def test_the_tokens_that_an_edit_changes_or_its_region_covers_are_told_from_those_of_other_objects(name):
    for seed in range(8):
        (task,) = dialogue_of({name: 1.0}, seed, objects=(2, 3)).tasks
        if task.subject not in task.source_scene.objects:
            continue  # a background, or an object that is to be added
        edited = patch_targets(task, (8, 8))[list(PATCH_TARGETS).index("edited")].reshape(8, 8)
        for obj in task.source_scene.objects:
            x, y = (int(middle) // 16 for middle in POSITIONS[obj.position])
            assert edited[y - 1 : y + 1, x - 1 : x + 1].any() == (obj == task.subject)


def test_a_new_background_is_no_change_of_some_tokens():
    (task,) = dialogue_of("edit/background", 1).tasks
    assert set(np.unique(weights_but_for_first_tokens(task))) == {1.0, OBJECT_WEIGHT}


def test_tokens_that_a_mask_keeps_cost_nothing_and_the_others_what_they_cost_without_it():
    for seed in range(8):
        (task,) = dialogue_of("masked edit", seed).tasks
        opened = opened_tokens(task, (8, 8))
        assert np.array_equal(opened.reshape(8, 8), task.mask[::16, ::16])
        whole = flow_weights(dataclasses.replace(task, mask=None), (8, 8))
        assert np.array_equal(flow_weights(task, (8, 8)), whole * opened)


def test_every_masked_image_of_a_batch_finds_its_source(chat):
    masked = [dialogue_of({"edit": 1.0, "masked edit": 3.0}, n, rounds=2) for n in range(4)]
    sequences = [tokenize_dialogue(dialogue, chat, GRID) for dialogue in masked]
    donor = dialogue_of("generate", 1).tasks[0]
    single = dialogue_of("masked edit", 7)
    sequences.append(tokenize_dialogue(single, chat, GRID, 1, donor))  # its source is in no sequence
    batch = pack(sequences, 200, GRID)
    count = len(batch.drawn)
    assert len(batch.images) == count + 1 and batch.opened.shape == batch.flow_weights.shape == (count, 16)
    tasks = [image.task for s in sorted(sequences, key=lambda s: -len(s.ids)) for image in s.images]
    wanted = {id(task): task for task in tasks if task is not None and task.mask is not None}
    assert int((batch.sources >= 0).sum()) == len(wanted) > 3
    for i, source in enumerate(batch.sources.tolist()):
        if source >= 0:
            before = batch.images[source].numpy()
            target = batch.images[i].numpy()
            (task,) = [t for t in wanted.values() if np.array_equal(t.target, target)]
            assert np.array_equal(before, draw(task.source_scene))
        else:
            assert batch.opened[i].all()
