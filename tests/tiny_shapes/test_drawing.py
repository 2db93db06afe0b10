"""Images of scenes: exact, anti-aliased, the same at every size; masks and patch labels that agree with them."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from tiny_shapes.world import (
    BACKGROUNDS,
    COLORS,
    LABEL_CLASSES,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    draw,
    drawing,
    masks,
    patch_labels,
    scene_from_seed,
)


def test_nothing_of_a_large_image_is_kept():
    draw(scene_from_seed(4))
    before = drawing._cached_coverage.cache_info().currsize, drawing._sprite.cache_info().currsize
    for seed in range(5):
        draw(scene_from_seed(seed), 1000)
        masks(scene_from_seed(seed), 1000)
    assert before == (drawing._cached_coverage.cache_info().currsize, drawing._sprite.cache_info().currsize)


def test_a_drawing_is_uint8_of_the_asked_side_and_always_the_same():
    scene = scene_from_seed(4)
    for size in (64, 128, 200, 512):
        image = draw(scene, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert np.array_equal(image, draw(scene, size))


def test_changing_a_drawing_does_not_change_the_next_one():
    scene = scene_from_seed(4)
    before = draw(scene)
    spoiled = draw(scene)
    spoiled[:] = 0
    assert np.array_equal(draw(scene), before)


def test_middle_and_corner_have_the_colors_of_object_and_background():
    for shape, size in product(SHAPES, SIZES):
        image = draw(Scene((SceneObject(shape, "purple", size, "centre"),), "mint"))
        assert tuple(image[64, 64]) == COLORS["purple"]
        assert tuple(image[0, 0]) == BACKGROUNDS["mint"]


def test_a_large_drawing_made_smaller_is_the_small_drawing():
    for seed in range(5):
        scene = scene_from_seed(seed)
        reduced = np.asarray(Image.fromarray(draw(scene, 512)).resize((128, 128), Image.Resampling.BOX))
        assert np.abs(reduced.astype(int) - draw(scene)).mean() < 0.2


def test_edges_are_anti_aliased():
    covered = masks(Scene((SceneObject("circle", "red", "large", "centre"),), "white"))
    assert ((covered > 0) & (covered < 1)).sum() > 50


def test_a_drawing_is_background_and_paint_mixed_by_the_mask():
    scene = scene_from_seed(11)
    expected = np.broadcast_to(np.asarray(BACKGROUNDS[scene.background], float), (128, 128, 3)).copy()
    for obj, mask in zip(scene.objects, masks(scene), strict=True):
        expected += mask[..., None] * (np.asarray(COLORS[obj.color], float) - expected)
    assert np.abs(expected - draw(scene)).max() <= 0.51


@pytest.mark.parametrize("jitter", [-1.0, 0.0, 0.7, 1.0])
def test_nine_large_objects_neither_touch_nor_leave_the_canvas(jitter):
    for shape in SHAPES:
        objects = (
            SceneObject(shape, "red", "large", cell, jitter * (-1) ** index, -jitter)
            for index, cell in enumerate(POSITIONS)
        )
        covered = masks(Scene(tuple(objects), "white"))
        assert covered.sum(axis=0).max() <= 1.0
        areas = covered.sum(axis=(1, 2))
        assert areas.max() - areas.min() < 0.01 * areas.max()  # none is cut off


def test_masks_of_an_empty_scene_are_empty():
    assert masks(Scene((), "white")).shape == (0, 128, 128)


def test_patch_labels_name_what_covers_a_patch():
    scene = Scene(
        (SceneObject("star", "cyan", "large", "top left"), SceneObject("cross", "red", "small", "bottom right")), "navy"
    )
    labels = patch_labels(scene)
    assert {name: values.shape for name, values in labels.items()} == dict.fromkeys(LABEL_CLASSES, (8, 8))
    cover = masks(scene).reshape(2, 8, 16, 8, 16).mean(axis=(2, 4))
    for obj, share in zip(scene.objects, cover, strict=True):
        here = share > 0.08
        assert (labels["shape"][here] == 1 + SHAPES.index(obj.shape)).all()
        assert (labels["color"][here] == 1 + list(COLORS).index(obj.color)).all()
        assert (labels["size"][here] == 1 + list(SIZES).index(obj.size)).all()
    nothing = cover.sum(axis=0) < 0.05
    assert all((labels[name][nothing] == 0).all() for name in ("shape", "color", "size", "part", "dx", "dy"))
    assert (labels["background"] == list(BACKGROUNDS).index("navy")).all()


def test_parts_of_an_object_are_numbered_in_reading_order():
    part = patch_labels(Scene((SceneObject("square", "red", "large", "centre"),), "white"), patches=16)["part"]
    rows, columns = np.nonzero(part)
    inner = part[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert inner[0, 0] == 1 and inner[0, -1] == 3 and inner[-1, 0] == 7 and inner[-1, -1] == 9
    assert set(inner.flat) == set(range(1, 10))
    assert (np.diff((inner - 1) // 3, axis=0) >= 0).all() and (np.diff((inner - 1) % 3, axis=1) >= 0).all()


def test_patch_labels_tell_by_how_many_pixels_an_object_is_off_the_middle_of_its_cell():
    for dx, dy in ((-1, 1), (0, -1), (1, 0)):
        scene = Scene((SceneObject("circle", "red", "large", "centre", float(dx), float(dy)),), "white")
        labels = patch_labels(scene)
        here = labels["shape"] > 0
        assert (labels["dx"][here] == 2 + dx).all() and (labels["dy"][here] == 2 + dy).all()
        assert not labels["dx"][~here].any() and not labels["dy"][~here].any()


def test_labels_stay_below_their_number_of_classes():
    for seed in range(40):
        for name, values in patch_labels(scene_from_seed(seed)).items():
            assert values.min() >= 0 and values.max() < LABEL_CLASSES[name]


def test_an_image_of_a_few_pixels_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        draw(scene_from_seed(0), 4)
