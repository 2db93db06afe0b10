"""The scorer: it must be right on what anyone can see, and never kind to what is wrong."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tiny_shapes.world import (
    Scene,
    SceneObject,
    compare,
    degrade,
    draw,
    parse_scene,
    read_region,
    read_scene,
    region_image,
    scene_from_seed,
)

SCENES = [scene_from_seed(seed) for seed in range(5000, 5200)]


def as_jpeg(pixels, quality=80):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def with_noise(pixels, deviation=8.0):
    noise = np.random.default_rng(int(pixels.sum())).normal(0.0, deviation, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def blurred(pixels, radius=1.5):
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def share_read_exactly(damage, scenes=SCENES):
    return np.mean([compare(read_scene(damage(draw(scene))), scene).exact for scene in scenes])


@pytest.mark.parametrize("damage", [lambda pixels: pixels, as_jpeg, with_noise], ids=["fresh", "jpeg 80", "noise"])
def test_drawn_scenes_are_read_exactly(damage):
    assert share_read_exactly(damage) >= 0.995


def test_soft_images_are_read_too():
    assert share_read_exactly(blurred, SCENES[:100]) >= 0.99


@pytest.mark.parametrize("size", [64, 100, 512])
def test_any_side_length_is_read(size):
    for scene in SCENES[:20]:
        assert read_scene(draw(scene, size)).to_scene() == scene.without_jitter()


def test_images_in_floats_read_as_those_in_bytes():
    image = draw(SCENES[0])
    assert read_scene(image.astype(np.float32) / 255) == read_scene(image)


def test_centers_are_found_to_the_pixel():
    for scene in SCENES[:20]:
        for seen, obj in zip(read_scene(draw(scene)).objects, scene.objects, strict=True):
            assert np.abs(np.subtract(seen.center, obj.center)).max() < 0.5


def test_an_empty_image_has_nothing_but_its_background():
    reading = read_scene(draw(Scene((), "navy")))
    assert reading.objects == () and reading.background == "navy"


def test_specks_are_not_objects():
    image = draw(SCENES[0])
    image[2:7, 2:7] = (214, 30, 40)
    assert len(read_scene(image).objects) == len(SCENES[0].objects)


def test_a_blot_has_no_shape():
    image = draw(Scene((), "white"))
    image[60:64, 20:110] = (214, 30, 40)
    reading = read_scene(image)
    assert [obj.shape for obj in reading.objects] == [None]
    with pytest.raises(ValueError, match="no shape"):
        reading.to_scene()


def test_an_image_of_nothing_known_is_read_without_failing():
    rng = np.random.default_rng(0)
    for pixels in (rng.integers(0, 256, (128, 128, 3), dtype=np.uint8), np.zeros((128, 128, 3), np.uint8)):
        read_scene(pixels)
    half = np.zeros((128, 128, 3), np.uint8)
    half[:, 70:] = 255
    assert all(obj.shape is None for obj in read_scene(half).objects)


def test_another_layout_than_that_of_an_image_is_refused():
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        read_scene(np.zeros((3, 128, 128), np.uint8))
    with pytest.raises(ValueError, match="uint8 or float"):
        read_scene(np.zeros((128, 128, 3), np.int64))


WANTED = "a large red circle at the top left and a small blue star at the centre on a white background"


@pytest.mark.parametrize(
    ("drawn", "right", "extra", "background"),
    [
        (WANTED, (True, True), 0, True),
        (WANTED.replace("white", "gray"), (True, True), 0, False),
        (WANTED.replace("circle", "diamond"), (False, True), 0, True),
        (WANTED.replace("blue", "green"), (True, False), 0, True),
        (WANTED.replace("centre", "top"), (True, False), 0, True),
        (WANTED.replace("small", "large"), (True, True), 0, True),
        ("a large red circle at the top left on a white background", (True, False), 0, True),
        (WANTED + ", a pink cross at the right", (True, True), 1, True),
    ],
)
def test_comparing_counts_each_kind_of_mistake(drawn, right, extra, background):
    result = compare(read_scene(draw(parse_scene(drawn))), parse_scene(WANTED))
    assert (result.right, result.extra, result.background) == (right, extra, background)
    assert result.all_right == (all(right) and not extra and background)


def test_size_is_told_apart_from_what_is_right():
    result = compare(read_scene(draw(parse_scene(WANTED.replace("small", "large")))), parse_scene(WANTED))
    assert result.all_right and result.size == (True, False) and not result.exact


def test_an_object_in_the_wrong_cell_still_counts_for_its_other_attributes():
    result = compare(read_scene(draw(parse_scene(WANTED.replace("centre", "bottom")))), parse_scene(WANTED))
    assert result.shape == result.color == (True, True) and result.position == (True, False)


def test_one_found_object_does_not_answer_for_two_wanted_ones():
    twins = (SceneObject("star", "red", "small", "left"), SceneObject("star", "red", "small", "right"))
    result = compare(read_scene(draw(Scene(twins[:1], "white"))), Scene(twins, "white"))
    assert sorted(result.right) == [False, True]


def test_a_region_is_read_back_from_its_image():
    source = parse_scene(WANTED)
    target = parse_scene(WANTED.replace("blue", "green"))
    image = region_image(source, target)
    circle = np.hypot(*(np.indices((128, 128)) + 0.5 - 64)) < 14
    for pixels in (image, as_jpeg(image), degrade(image, "blurred", 1), image / 255.0):
        region = read_region(pixels)
        assert not (region & ~circle).any() and 150 < region.sum() < 250
