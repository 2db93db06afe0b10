"""Captions and the reader of what people type."""

import numpy as np
import pytest

from tiny_shapes.world import Scene, SceneObject, caption, describe, mentions, parse_scene, scene_from_seed
from tiny_shapes.world.captions import terse_caption

EXAMPLE = "a large red circle at the top left and a small blue star at the centre on a white background"


def test_the_canonical_caption_is_the_documented_one():
    objects = (SceneObject("circle", "red", "large", "top left"), SceneObject("star", "blue", "small", "centre"))
    assert describe(Scene(objects, "white")) == EXAMPLE
    assert describe(Scene((), "mint")) == "an empty mint background"


def test_parsing_a_description_gives_the_scene_back():
    for seed in range(300):
        scene = scene_from_seed(seed, objects=(1, 9)).without_jitter()
        assert parse_scene(describe(scene)) == scene


def test_every_varied_caption_means_its_scene():
    rng = np.random.default_rng(0)
    for seed in range(1000):
        scene = scene_from_seed(seed)
        assert parse_scene(caption(rng, scene)) == scene.without_jitter()


def test_captions_vary():
    rng = np.random.default_rng(0)
    assert len({caption(rng, scene_from_seed(1)) for _ in range(50)}) > 15


def test_every_object_is_found_in_a_caption_up_to_where_its_words_end():
    rng = np.random.default_rng(0)
    for seed in range(300):
        scene = scene_from_seed(seed)
        text = caption(rng, scene)
        found = list(mentions(text, scene))
        assert sorted(obj.content for _, obj in found) == sorted(obj.content for obj in scene.objects)
        begin = 0
        for end, obj in found:
            assert f"{obj.color} {obj.shape}" in text[begin:end]
            assert not text[end:] or text[end:].startswith((",", ".", " and ", " on ", " against "))
            begin = end


def test_a_terse_caption_is_true_of_the_scene_and_leaves_out_most_of_it():
    rng = np.random.default_rng(0)
    placed = colored = 0
    for seed in range(500):
        scene = scene_from_seed(seed)
        text = terse_caption(rng, scene)
        meant = parse_scene(text)
        assert sorted(obj.shape for obj in meant.objects) == sorted(obj.shape for obj in scene.objects)
        looks = [(obj.shape, obj.color, obj.size) for obj in meant.objects]
        named = sum(looks.count(look) == 1 and look[1] in text for look in looks)
        assert len(list(mentions(text, meant))) >= named
        placed += any(place in text for place in ("top", "bottom", "left", "right", "cent", "middle"))
        colored += all(obj.color in text for obj in scene.objects)
    assert placed < 200 and colored > 400


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("square, circle", ["red square centre", "orange circle left"]),
        ("a star and a red star at the top", ["orange star centre", "red star top"]),
        ("a red circle and a circle on the left", ["red circle centre", "orange circle left"]),
        ("a star and a star", []),  # the words do not say which is which
    ],
)
def test_words_without_a_color_name_the_object_that_is_left_for_them(text, meant):
    found = [f"{obj.color} {obj.shape} {obj.position}" for _, obj in mentions(text, parse_scene(text))]
    assert found == meant


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("a circle", "a large red circle at the centre on a white background"),
        ("Tiny green plus, upper-right; GREY background!", "a small green cross at the top right on a gray background"),
        ("a blue box in the middle of the picture", "a large blue square at the centre on a white background"),
        ("on beige: an orange diamond on the left side", "a large orange diamond at the left on a beige background"),
        ("There's a star. The background is black.", "a large red star at the centre on a black background"),
        ("an empty navy background", "an empty navy background"),
        (
            "at the top a red disc and at the lower left a small star",
            "a large red circle at the top and a small orange star at the bottom left on a white background",
        ),
        (
            "a circle and a square",
            "a large orange square at the left and a large red circle at the centre on a white background",
        ),
    ],
)
def test_free_wording_is_understood_and_completed(typed, meant):
    assert describe(parse_scene(typed)) == meant


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("a red hexagon", "'hexagon' was not understood"),
        ("3 circles", "'3' was not understood"),
        ("a white circle", "white is a background"),
        ("a circle on a purple background", "no background is purple"),
        ("the background is red", "no background is red"),
        ("a circle on a white background on a black background", "two backgrounds"),
        ("a red blue circle", "name one color"),
        ("a circle at the top and a star at the top", "two objects at the top"),
        ("a circle at the top bottom", "name one place"),
        ("something red", "'something' was not understood"),
        ("a red one at the left", "which shape is 'red left'"),
        ("", "no object and no background"),
    ],
)
def test_what_was_not_understood_is_said(typed, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_scene(typed)


def test_the_complaint_lists_the_known_words():
    with pytest.raises(ValueError, match=r"circle.*purple.*small.*top left.*navy"):
        parse_scene("a dog")
