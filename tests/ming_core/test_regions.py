"""Regions are read as masks from features alone: bright on dark, and marked copies."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ming_univision.ming_core import load_mingtok
from ming_univision.ming_core.images import to_pixels
from ming_univision.ming_core.regions import region_mask
from PIL import Image, ImageFilter

from tiny_shapes.world import SceneObject, draw
from tiny_shapes.world.edits import edit_region, region_image
from tiny_shapes.world.scenes import Scene

STAR = SceneObject("star", "red", "large", "top left")
CIRCLE = SceneObject("circle", "blue", "large", "centre")
SCENES = [Scene((STAR, CIRCLE), background) for background in ("white", "gray", "mint")]


@pytest.fixture(scope="module")
def mingtok(request):
    return load_mingtok(request.config.rootpath / "models" / "tiny-shapes")


def features(mingtok, images):
    pixels = torch.from_numpy(np.stack(images)).float().div(255)
    with torch.no_grad():
        return mingtok.semantic_features(mingtok.encode(to_pixels(pixels, mingtok.native_side)))


def without(scene, obj):
    return Scene(tuple(other for other in scene.objects if other != obj), scene.background)


def covered(scene, target):
    """Share of each token that the edit changes: [8, 8]."""
    return torch.from_numpy(edit_region(scene, target).reshape(8, 16, 8, 16).mean((1, 3)))


def read_and_expected(mingtok, edits):
    """The mask that is read from the region of every edit, a pair of scenes, and what the edit covers of each token."""
    before, regions = [draw(scene) for scene, _ in edits], [region_image(*edit) for edit in edits]
    mask = region_mask(features(mingtok, before), features(mingtok, regions), grow=0)
    return mask, torch.stack([covered(*edit) for edit in edits])


def outline(inside):
    """A line of three pixels around a region [H, W, 1]."""
    wide = np.asarray(Image.fromarray(np.uint8(255 * inside[..., 0])).filter(ImageFilter.MaxFilter(7)))
    return (wide > 128)[..., None] & (inside < 0.5)


def test_a_large_object_beside_a_small_one_is_not_taken_for_its_region(mingtok):
    # the template's scene in several colors, on light and on dark grounds
    edits = []
    for large, small, background in itertools.product(("red", "purple"), ("blue", "green"), ("white", "mint", "navy")):
        circle = SceneObject("circle", large, "large", "left")
        scene = Scene((circle, SceneObject("star", small, "small", "right")), background)
        edits.append((scene, Scene((circle,), background)))
    mask, expected = read_and_expected(mingtok, edits)
    assert mask[expected > 0.1].all()
    assert mask[..., :4].sum() == 0


@pytest.mark.parametrize("background", ["gray", "black", "navy"])
def test_a_region_in_a_photograph_which_has_no_plain_ground_is_read_too(mingtok, photograph, background):
    scene = Scene((STAR, CIRCLE), background)
    region = region_image(scene, without(scene, CIRCLE))  # what the built-in model draws of other images: a dark scene
    mask = region_mask(
        features(mingtok, [np.asarray(photograph.resize((128, 128)))]), features(mingtok, [region]), grow=0
    )
    assert torch.equal(mask[0] > 0, covered(scene, without(scene, CIRCLE)) > 0.3)


@pytest.mark.parametrize("gone", [STAR, CIRCLE])
@pytest.mark.parametrize("kind", ["bright on dark", "tinted", "outlined"])
def test_a_region_is_read_whole_and_hardly_any_token_more(mingtok, kind, gone):
    befores, marked, shares = [], [], []
    for scene in SCENES:
        target, before = without(scene, gone), draw(scene)
        inside = edit_region(scene, target)[..., None]
        purple = np.array([160, 0, 200])
        if kind == "bright on dark":
            image = region_image(scene, target)
        elif kind == "tinted":
            image = np.rint(before * (1 - 0.6 * inside) + 0.6 * inside * purple).astype(np.uint8)
        else:
            image = np.where(outline(inside), purple, before).astype(np.uint8)
        befores.append(before)
        marked.append(image)
        shares.append(covered(scene, target))
    mask = region_mask(features(mingtok, befores), features(mingtok, marked), grow=0)
    expected = torch.stack(shares)
    assert mask.shape == (3, 8, 8) and mask.dtype == torch.float32
    assert mask[expected > 0.3].all()
    near = F.max_pool2d((expected > 0).float(), 3, stride=1, padding=1)  # a line around the region has a width
    assert mask[near == 0].sum() <= (1 if kind == "bright on dark" else 0)  # of a dark object
    if kind != "outlined":
        assert mask[expected == 0].sum() <= 1


def test_a_region_is_found_where_larger_objects_are_as_far_from_the_ground(mingtok):
    small, large = (
        SceneObject("circle", "pink", "small", "right", dx=-1.0),
        SceneObject("circle", "yellow", "large", "bottom right", -1.0, 1.0),
    )
    moved = replace(small, position="bottom")
    diamond = SceneObject("diamond", "pink", "large", "top left", dx=1.0)
    others = (SceneObject("circle", "purple", "large", "top", dy=1.0), SceneObject("square", "red", "large", "right"))
    edits = [
        (Scene((small, large), "black"), Scene((moved, large), "black")),
        (Scene((diamond, *others), "beige"), Scene(others, "beige")),
    ]
    mask, expected = read_and_expected(mingtok, edits)
    assert mask[expected > 0.3].all()
    assert mask[expected == 0].sum() <= 1


def test_an_object_that_a_dark_copy_only_dims_is_not_taken_for_the_region(mingtok):
    gone = [
        SceneObject("star", "pink", "small", "left", -1.0, -1.0),
        SceneObject("star", "orange", "small", "top right"),
        SceneObject("diamond", "pink", "small", "bottom left", 1.0, -1.0),
    ]
    others = [
        (
            SceneObject("triangle", "purple", "large", "top"),
            SceneObject("circle", "green", "large", "bottom left", -1.0, 1.0),
        ),
        (
            SceneObject("cross", "purple", "large", "bottom left", -1.0, 1.0),
            SceneObject("circle", "orange", "small", "bottom", dy=1.0),
        ),
        (
            SceneObject("star", "blue", "large", "left", 1.0, -1.0),
            SceneObject("cross", "yellow", "large", "bottom", dx=1.0),
        ),
    ]
    edits = [
        (Scene((removed, *kept), background), Scene(kept, background))
        for removed, kept, background in zip(gone, others, ("beige", "white", "navy"), strict=True)
    ]
    mask, expected = read_and_expected(mingtok, edits)
    assert mask[expected > 0.3].all()
    assert not mask[expected == 0].any()


def test_grow_widens_by_whole_tokens_on_every_side(mingtok):
    scene = SCENES[0]
    before = features(mingtok, [draw(scene)])
    region = features(mingtok, [region_image(scene, without(scene, CIRCLE))])
    plain, grown = region_mask(before, region, grow=0)[0], region_mask(before, region, grow=2)[0]
    near = [(y, x) for y in range(8) for x in range(8) if plain[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].any()]
    assert {tuple(place) for place in grown.nonzero().tolist()} == set(near)


def test_a_higher_threshold_takes_no_more(mingtok):
    scene = SCENES[1]
    before = features(mingtok, [draw(scene)])
    region = features(mingtok, [region_image(scene, without(scene, STAR))])
    masks = [region_mask(before, region, threshold, grow=0) for threshold in (0.0, 0.15, 0.5, 1.0)]
    assert all((more >= less).all() for more, less in itertools.pairwise(masks))
    assert masks[0].any() and not masks[-1].any()


def test_a_picture_without_a_mark_and_a_flat_picture_have_no_region(mingtok):
    before = features(mingtok, [draw(SCENES[0])])
    flat = before._replace(latents=torch.ones_like(before.latents), tokens=-before.tokens)
    assert not region_mask(before, before).any()
    assert not region_mask(before, flat).any()


def test_pictures_that_do_not_match_are_refused(mingtok):
    before = features(mingtok, [draw(SCENES[0])])
    two = features(mingtok, [draw(SCENES[0])] * 2)
    with pytest.raises(ValueError, match="number of images"):
        region_mask(before, two)
