"""Ways to make an image worse."""

import numpy as np
import pytest

from tiny_shapes.world import DEGRADATIONS, degrade, draw, scene_from_seed


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_a_degraded_image_keeps_its_layout_and_follows_its_seed(kind):
    image = draw(scene_from_seed(1), 96)
    worse = degrade(image, kind, seed=5)
    assert worse.shape == image.shape and worse.dtype == np.uint8
    assert np.array_equal(worse, degrade(image, kind, seed=5))


@pytest.mark.parametrize("kind", [kind for kind in DEGRADATIONS if kind != "none"])
def test_a_degraded_image_has_lost_something(kind):
    image = draw(scene_from_seed(1))
    assert np.abs(degrade(image, kind, seed=5).astype(int) - image).mean() > 0.2


def test_none_is_an_independent_copy():
    image = draw(scene_from_seed(1))
    copy = degrade(image, "none")
    assert np.array_equal(copy, image) and not np.shares_memory(copy, image)


def test_a_pixelated_image_has_blocks_of_one_color():
    blocks = degrade(draw(scene_from_seed(1)), "pixelated").reshape(32, 4, 32, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_a_grey_image_has_equal_channels():
    grey = degrade(draw(scene_from_seed(1)), "grey")
    assert (grey == grey[..., :1]).all()


def test_noise_has_the_same_grain_at_every_size():
    scene = scene_from_seed(1)
    fine, coarse = (degrade(draw(scene, size), "noisy", seed=3) for size in (512, 128))
    assert np.abs(fine[::4, ::4].astype(int) - coarse).mean() < 3


def test_another_seed_gives_other_noise():
    image = draw(scene_from_seed(1))
    assert not np.array_equal(degrade(image, "noisy", 0), degrade(image, "noisy", 1))


def test_other_kinds_and_other_arrays_are_refused():
    with pytest.raises(ValueError, match="pixelated, grey"):
        degrade(draw(scene_from_seed(1)), "foggy")
    with pytest.raises(ValueError, match="uint8"):
        degrade(np.zeros((8, 8, 3)), "grey")
