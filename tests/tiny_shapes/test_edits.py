"""Edits: what they change, what they leave alone, and where."""

import numpy as np
import pytest

from tiny_shapes.world import (
    EDIT_KINDS,
    Edit,
    Scene,
    SceneObject,
    draw,
    edit_region,
    masks,
    random_edit,
    random_scene,
    read_region,
    region_image,
    split_of,
)

STAR, CROSS = SceneObject("star", "red", "large", "left", 1.0, -1.0), SceneObject("cross", "blue", "small", "top right")
SCENE = Scene((STAR, CROSS), "white")


def test_each_edit_does_what_it_says():
    assert Edit("recolor", STAR, "green").apply(SCENE).objects == (
        CROSS,
        SceneObject("star", "green", "large", "left", 1.0, -1.0),
    )
    assert Edit("move", STAR, "centre").apply(SCENE).objects == (
        CROSS,
        SceneObject("star", "red", "large", "centre", 1.0, -1.0),
    )
    assert Edit("remove", STAR).apply(SCENE) == Scene((CROSS,), "white")
    assert Edit("background", None, "black").apply(SCENE) == Scene((STAR, CROSS), "black")
    added = SceneObject("circle", "pink", "small", "bottom")
    assert Edit("add", added).apply(SCENE) == Scene((STAR, CROSS, added), "white")


def test_an_impossible_edit_is_refused():
    with pytest.raises(ValueError, match="not in the scene"):
        Edit("remove", SceneObject("circle", "pink", "small", "bottom")).apply(SCENE)
    with pytest.raises(ValueError, match="at the top right"):
        Edit("move", STAR, "top right").apply(SCENE)
    with pytest.raises(ValueError, match="recolor, remove"):
        Edit("rotate", STAR)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_random_edits_change_one_object_and_leave_all_others_exactly_alone(kind):
    rng = np.random.default_rng(0)
    for _ in range(50):
        source = random_scene(rng, (2, 2))
        target = random_edit(rng, source, kind).apply(source)
        gone, new = set(source.objects) - set(target.objects), set(target.objects) - set(source.objects)
        expected = {"recolor": (1, 1), "move": (1, 1), "remove": (1, 0), "add": (0, 1), "background": (0, 0)}[kind]
        assert (len(gone), len(new)) == expected
        assert (source.background != target.background) == (kind == "background")


def test_random_edits_keep_to_split_and_numbers():
    rng = np.random.default_rng(1)
    for kind in EDIT_KINDS:
        for split in ("train", "eval"):
            edits = ((scene, random_edit(rng, scene, kind, (1, 3), split)) for scene in _scenes(rng, 60))
            targets = [edit.apply(scene) for scene, edit in edits if edit]
            assert targets and all(split_of(target) == split and 1 <= len(target.objects) <= 3 for target in targets)


def test_a_lone_object_is_not_removed_and_a_full_scene_gets_no_more():
    rng = np.random.default_rng(2)
    assert random_edit(rng, random_scene(rng, (1, 1)), "remove") is None
    assert random_edit(rng, random_scene(rng, (3, 3)), "add") is None
    assert random_edit(rng, random_scene(rng, (9, 9)), "move", (1, 9)) is None


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_the_region_of_an_edit_is_where_the_images_differ(kind):
    rng = np.random.default_rng(3)
    for scene in _scenes(rng, 30):
        edit = random_edit(rng, scene, kind)
        if edit is None:
            continue
        target = edit.apply(scene)
        region, differs = edit_region(scene, target), (draw(scene) != draw(target)).any(axis=2)
        assert region.min() >= 0.0 and region.max() <= 1.0
        assert differs[region > 0.1].all() and not differs[region == 0.0].any()


def test_the_region_of_a_move_is_the_old_and_the_new_place():
    target = Edit("move", STAR, "bottom right").apply(SCENE)
    assert edit_region(SCENE, target).sum() == pytest.approx(2 * masks(Scene((STAR,), "white")).sum(), rel=1e-3)


def test_a_region_image_is_white_in_the_region_and_dim_elsewhere():
    target = Edit("background", None, "navy").apply(SCENE)
    image = region_image(SCENE, target)
    region = edit_region(SCENE, target)
    assert (image[region == 1.0] == 255).all() and image[region == 0.0].max() < 80
    assert read_region(image)[region > 0.5].all() and not read_region(image)[region < 0.2].any()


def _scenes(rng, number):
    return [random_scene(rng) for _ in range(number)]
