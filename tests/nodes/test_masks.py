"""Masks on nodes: painted on a picture, fitted like it, and limiting an edit."""

import pytest
import torch
from ming_univision.ming_core import Features
from ming_univision.ming_core.images import FITS, fit_mask, to_images, to_pixels
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host

SIDE = 32


@pytest.fixture
def loaded(model):
    return host.Loaded(model, None, "small")


@pytest.fixture
def mingtok(model, loaded):
    return host.Loaded(model.mingtok, None, "small: MingTok", owner=loaded)


def edit(loaded, **inputs):
    widgets = {
        "seed": 1,
        "batch_size": 1,
        "text_guidance": 3.0,
        "image_guidance": 1.1,
        "steps": 2,
        "temperature": 1.0,
        "solver": "euler",
        "start": "draw now",
        "max_new_tokens": 2,
    }
    return NODE_CLASS_MAPPINGS["MingEdit"]().edit(loaded, instruction="Make it blue.", **{**widgets, **inputs})


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 60), (90, 50), (33, 32), (200, 320)])
def test_a_mask_is_fitted_as_the_picture_is(size, fit):
    """A white rectangle in the picture, and the mask that is painted on it, cover the same pixels."""
    height, width = size
    painted = torch.zeros(1, height, width)
    painted[:, height // 4 : height // 2, width // 3 : width // 2 + 3] = 1
    shown = to_images(to_pixels(painted[..., None], SIDE, fit))[..., 0]
    mask = fit_mask(painted, SIDE, fit)
    assert mask.shape == (1, SIDE, SIDE)
    assert (mask[shown > 0.7] == 1).all(), "what shows the rectangle is in the mask"
    grown = torch.nn.functional.max_pool2d((shown > 0.55).float(), 5, 1, 2) > 0
    assert (grown[mask > 0]).all(), "the mask goes no further than its edge"


def test_a_thin_stroke_survives_scaling_down():
    stroke = torch.zeros(1, 640, 640)
    stroke[:, 320] = 1
    assert fit_mask(stroke, SIDE).amax(2).sum() == 1


def test_encode_gives_the_mask_back_and_edit_keeps_what_is_black(loaded, mingtok):
    image = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(1))
    painted = torch.zeros(1, 48, 64)
    painted[:, 20:28, 28:36] = 1
    latent, mask = NODE_CLASS_MAPPINGS["MingTokEncode"]().encode(mingtok, image, "center crop", "standard", painted)
    assert mask.shape == (1, SIDE, SIDE)
    (features,) = NODE_CLASS_MAPPINGS["MingTokSemanticFeatures"]().expand(mingtok, latent)
    (edited,), _, _ = edit(loaded, features=features, mask=mask)
    changed = (edited.latents != features.latents).any(1)[0]
    assert changed.any() and not changed.all() and not changed[0].any()


def test_a_mask_whose_white_is_cropped_away_says_so(mingtok):
    image, painted = torch.rand(2, 32, 96, 3, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 32, 96)
    painted[0, :, 40:60], painted[1, :, :8] = 1, 1
    encode = NODE_CLASS_MAPPINGS["MingTokEncode"]().encode
    with pytest.raises(ValueError, match="lies outside the center of the image"):
        encode(mingtok, image, "center crop", "standard", painted)
    for fit in ("stretch", "pad"):
        assert encode(mingtok, image, fit, "standard", painted)[1].amax((1, 2)).tolist() == [1, 1]
    _, mask = encode(mingtok, image, "center crop", "standard", torch.zeros(2, 32, 96))
    assert not mask.any(), "a black mask, as of an image without alpha, stays black"


@pytest.mark.parametrize("size", [(1, 24, 32), (1, 480, 640), (48, 64)])
def test_a_mask_of_another_size_is_scaled_to_the_picture_first(mingtok, size):
    image = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(1))
    painted = torch.zeros(size)
    painted[..., : size[-1] // 2] = 1
    _, mask = NODE_CLASS_MAPPINGS["MingTokEncode"]().encode(mingtok, image, "stretch", "standard", painted)
    assert torch.equal(mask[0].bool(), (torch.arange(SIDE) < SIDE // 2).expand(SIDE, SIDE))


def test_without_a_mask_encode_gives_an_all_white_one_with_which_an_edit_is_what_it_was(loaded, mingtok):
    image = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(1))
    latent, mask = NODE_CLASS_MAPPINGS["MingTokEncode"]().encode(mingtok, image, "pad", "standard")
    (features,) = NODE_CLASS_MAPPINGS["MingTokSemanticFeatures"]().expand(mingtok, latent)
    (plain,), _, _ = edit(loaded, features=features)
    loaded.model.prefix_cache.clear()
    (masked,), _, _ = edit(loaded, features=features, mask=mask)
    assert torch.equal(plain.latents, masked.latents)


def test_a_black_mask_says_what_to_do(loaded, picture):
    with pytest.raises(ValueError, match=r"black everywhere.*invert the mask"):
        edit(loaded, features=picture, mask=torch.zeros(1, 16, 16))


def compare(**inputs):
    return NODE_CLASS_MAPPINGS["MingFeaturesCompare"]().compare(threshold=0.1, **inputs)


@pytest.mark.parametrize(("grid", "side"), [(16, 512), (32, 1024)])
def test_a_mask_of_what_changed_has_the_side_of_the_published_models_picture(grid, side):
    features = Features(torch.ones(1, grid**2, 8), torch.ones(1, 4, grid, grid), (grid, grid), "published")
    heatmap, mask, _ = compare(features_a=features, features_b=features)
    assert heatmap.shape == (1, side, side, 3) and mask.shape == (1, side, side)


def test_a_mask_of_what_changed_has_the_side_of_the_picture_that_the_connected_tokenizer_decodes(mingtok, picture):
    other = picture._replace(tokens=picture.tokens.clone())
    other.tokens[:, 5] *= -1  # row 1, column 1 of 4
    heatmap, mask, _ = compare(features_a=picture, features_b=other, mingtok=mingtok)
    (decoded,) = NODE_CLASS_MAPPINGS["MingTokDecode"]().decode(mingtok, picture)
    assert heatmap.shape == decoded.shape and mask.shape == decoded.shape[:3] == (1, SIDE, SIDE)
    expected = torch.zeros(SIDE, SIDE)
    expected[8:16, 8:16] = 1
    assert torch.equal(mask[0], expected)
    with pytest.raises(ValueError, match="another tokenizer"):
        strange = picture._replace(tokenizer="f" * 64)
        compare(features_a=strange, features_b=strange, mingtok=mingtok)


def test_a_region_that_marks_nothing_is_told_in_the_log_too_where_no_page_shows_it(mingtok, caplog):
    nodes = (NODE_CLASS_MAPPINGS[name]() for name in ("MingTokEncode", "MingTokSemanticFeatures", "MingRegionMask"))
    encode, expand, read = nodes
    latent = encode.encode(mingtok, torch.rand(1, SIDE, SIDE, 3), "center crop", "standard")[0]
    (features,) = expand.expand(mingtok, latent)
    (mask,) = read.read(features, features, 0.3, 1)
    assert not mask.any()
    assert "No region was found. Lower the threshold" in caplog.text
