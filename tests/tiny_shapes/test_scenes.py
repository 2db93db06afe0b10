"""What a scene may be, and how the splits keep apart."""

from itertools import product

import numpy as np
import pytest

from tiny_shapes.world import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    random_scene,
    scene_from_seed,
    split_of,
)


def luminance(rgb):
    return float(np.dot(rgb, (0.299, 0.587, 0.114)))


def test_the_world_is_as_rich_as_promised():
    assert len(SHAPES) >= 6 and len(COLORS) >= 8 and len(BACKGROUNDS) >= 6 and len(SIZES) == 2 and len(POSITIONS) == 9


def test_every_object_shows_on_every_background_in_color_and_in_gray():
    for paint, ground in product(COLORS.values(), BACKGROUNDS.values()):
        assert np.linalg.norm(np.subtract(paint, ground)) > 100
        assert abs(luminance(paint) - luminance(ground)) > 15


def test_unknown_words_and_too_much_jitter_are_refused():
    with pytest.raises(ValueError, match="circle, square"):
        SceneObject("hexagon", "red", "large", "top")
    with pytest.raises(ValueError, match="dx and dy"):
        SceneObject("circle", "red", "large", "top", dx=9.0)
    with pytest.raises(ValueError, match="white, black"):
        Scene((), "red")


def test_two_objects_cannot_share_a_cell():
    with pytest.raises(ValueError, match="at the top"):
        Scene((SceneObject("circle", "red", "large", "top"), SceneObject("star", "blue", "small", "top")), "white")


def test_a_scene_does_not_depend_on_the_order_of_its_objects():
    one, other = SceneObject("circle", "red", "large", "bottom"), SceneObject("star", "blue", "small", "top left")
    scene = Scene((one, other), "white")
    assert scene == Scene((other, one), "white")
    assert scene.objects == (other, one)


def test_a_seed_always_gives_its_scene_and_seeds_differ():
    scenes = [scene_from_seed(seed) for seed in range(50)]
    assert scenes == [scene_from_seed(seed) for seed in range(50)]
    assert len(set(scenes)) == 50


def test_a_known_seed_gives_the_scene_it_gave_when_the_model_was_trained():
    scene = scene_from_seed(0)
    assert (scene.background, [obj.content for obj in scene.objects]) == (
        "beige",
        [
            ("cross", "cyan", "small", "top right"),
            ("star", "pink", "large", "centre"),
            ("cross", "yellow", "large", "right"),
        ],
    )


def test_the_number_of_objects_keeps_to_its_range():
    rng = np.random.default_rng(0)
    counts = {len(random_scene(rng, objects=(2, 4)).objects) for _ in range(100)}
    assert counts == {2, 3, 4}
    with pytest.raises(ValueError, match="between 1 and 9"):
        random_scene(rng, objects=(0, 3))


def test_a_share_of_the_scenes_has_objects_that_differ_in_one_attribute_at_most():
    def differences(alike: float) -> list[int]:
        """In how many of shape, color and size the second object differs from the first."""
        rng = np.random.default_rng(0)
        scenes = [random_scene(rng, (2, 2), alike=alike).objects for _ in range(200)]
        return [sum(a != b for a, b in zip(one.content[:3], two.content[:3], strict=True)) for one, two in scenes]

    assert max(differences(1.0)) == 1
    near = [np.mean(np.array(differences(alike)) <= 1) for alike in (0.0, 0.5)]
    assert near[0] < 0.3 and 0.4 < near[1] < 0.8


def test_the_split_follows_from_the_content_without_jitter():
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = random_scene(rng)
        assert split_of(scene) == split_of(scene.without_jitter())


def test_training_and_evaluation_scenes_never_overlap():
    rng = np.random.default_rng(2)
    train = {random_scene(rng, (1, 1), "train").content for _ in range(2000)}
    evaluation = {random_scene(rng, (1, 1), "eval").content for _ in range(700)}
    assert not train & evaluation
    assert len(evaluation) > 200  # enough different ones to examine a model on single objects


def test_about_one_scene_in_sixteen_is_kept_for_evaluation():
    rng = np.random.default_rng(3)
    share = np.mean([split_of(random_scene(rng)) == "eval" for _ in range(4000)])
    assert 0.045 < share < 0.08


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train, eval"):
        random_scene(np.random.default_rng(0), split="test")
