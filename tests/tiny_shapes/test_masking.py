"""Masks of edits, and images to complete."""

from itertools import pairwise

import numpy as np
import pytest

from tiny_shapes.world import Scene, SceneObject, draw, random_dialogue, read_region, read_scene, to_mask, to_patches
from tiny_shapes.world.masking import PADDING, changed_patches, grown, padded_image, visible_part, wholly_visible


def rng(number=0):
    return np.random.default_rng(number)


def tasks_of(name, count, rounds=1, objects=(1, 3)):
    return [random_dialogue(rng(n), name, objects, rounds=rounds).tasks for n in range(count)]


def test_the_mask_of_an_edit_covers_what_changes_and_mostly_leaves_the_rest():
    masks = []
    for (task,) in tasks_of("masked edit", 60):
        changed = (task.attached != task.target).any(-1)
        assert task.mask.shape == (128, 128) and task.mask.dtype == bool and changed.any()
        assert task.mask[changed].all()
        masks.append(task.mask.mean())
    assert np.mean([share == 1 for share in masks]) < 0.2 and min(masks) < 0.1
    assert len(set(masks)) > 6, "margins and forms vary"


def test_a_mask_without_a_margin_is_among_them():
    exact = sum(
        np.array_equal(to_patches(task.mask), changed_patches(task.source_scene, task.target_scene))
        for (task,) in tasks_of("masked edit", 60)
    )
    assert 3 < exact < 40


def test_growing_adds_the_neighbours_in_all_directions():
    one = np.zeros((8, 8), dtype=bool)
    one[0, 3] = True
    assert np.argwhere(grown(one, 1)).tolist() == [[0, 2], [0, 3], [0, 4], [1, 2], [1, 3], [1, 4]]
    assert np.array_equal(grown(one, 0), one) and np.array_equal(to_patches(to_mask(one)), one)


def test_after_a_region_the_image_comes_again_and_the_mask_is_often_that_region():
    followed = by_region = 0
    for first, second in tasks_of({"identify region": 5.0, "masked edit": 1.0}, 80, rounds=2, objects=(2, 3)):
        if first.name != "identify region" or second.family != "masked edit":
            continue
        followed += 1
        assert np.array_equal(second.attached, draw(second.source_scene)), "the newest image is that of a region"
        assert second.mask[(second.attached != second.target).any(-1)].all(), "it may be another edit's region"
        region = to_patches(read_region(first.target))
        by_region += np.array_equal(to_patches(second.mask), grown(region, 1))
    assert followed > 20 and 0.2 < by_region / followed < 0.6


def test_a_masked_edit_in_a_chain_keeps_to_the_newest_image_without_showing_it_again():
    for tasks in tasks_of({"edit": 1.0, "masked edit": 1.0}, 20, rounds=4):
        for before, task in pairwise(tasks):
            assert task.attached is None and task.source_scene == before.target_scene


def test_an_image_to_complete_is_the_target_with_grey_where_the_mask_is_white():
    covered = 0
    for (task,) in tasks_of("complete", 60):
        grey = (task.attached != task.target).any(-1)
        assert (task.attached[grey] == PADDING).all() and 0.15 < grey.mean() < 0.95
        assert task.target_scene == task.source_scene and np.array_equal(task.target, draw(task.target_scene))
        if task.mask is not None:
            covered += 1
            assert task.mask[grey].all() and not task.mask.all()
    assert 40 < covered < 60


def test_what_cannot_be_seen_wholly_is_asked_for_in_words():
    for n, (task,) in enumerate(tasks_of("complete", 60)):
        visible = (task.attached == task.target).all(-1)
        for obj in task.target_scene.objects:
            if not wholly_visible(obj, visible):
                assert obj.shape in task.prompt, n


def test_a_quarter_to_three_quarters_of_a_side_are_missing_in_steps_of_eight_pixels():
    for n in range(80):
        part, side = visible_part(rng(n))
        for axis, sides in ((1, ("top", "bottom")), (0, ("left", "right"))):
            missing = int((~part.any(axis)).sum())
            assert missing % 8 == 0 and (32 <= missing <= 96 or missing == 0)
            assert side == "" or (missing > 0) == (side in sides)


def test_padding_hides_what_is_not_in_the_part_that_is_there():
    star, cross = SceneObject("star", "red", "large", "left"), SceneObject("cross", "blue", "large", "right")
    scene = Scene((star, cross), "white")
    part = np.ones((128, 128), dtype=bool)
    part[:, 64:] = False
    image = padded_image(scene, part)
    assert wholly_visible(scene.objects[0], part) and not wholly_visible(scene.objects[1], part)
    assert np.array_equal(image[part], draw(scene)[part]) and (image[~part] == PADDING).all()
    assert "cross" not in {obj.shape for obj in read_scene(image).objects}


@pytest.mark.parametrize("name", ["masked edit", "complete"])
def test_the_same_generator_gives_the_same_masks(name):
    for (one,), (other,) in zip(tasks_of(name, 8), tasks_of(name, 8), strict=True):
        assert np.array_equal(one.mask, other.mask) and one.prompt == other.prompt
