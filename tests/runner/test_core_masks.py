"""Our versions of ComfyUI's mask nodes: what they give, and, where ComfyUI can be imported, that core gives the same.

The comparison runs with ComfyUI's Python and from its folder:
`PYTHONPATH=. python -m pytest PACK/tests/runner/test_core_masks.py`.
"""

from __future__ import annotations

import pytest
import torch
from ming_univision.runner.core_masks import NODE_CLASS_MAPPINGS

try:
    from comfy_extras import nodes_images, nodes_mask

    import nodes as core
except ImportError:
    core = None


def call(node_class, **inputs) -> tuple:
    """What a node returns, of our classes and of both kinds of core's."""
    if hasattr(node_class, "define_schema"):
        return tuple(node_class.execute(**inputs).args)
    return tuple(getattr(node_class(), node_class.FUNCTION)(**inputs))


def ours(name: str, **inputs) -> torch.Tensor:
    return call(NODE_CLASS_MAPPINGS[name], **inputs)[0]


def image(height=20, width=30, batch=1, channels=3, seed=0) -> torch.Tensor:
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def mask(*args, **more) -> torch.Tensor:
    return image(*args, **more)[..., 0]


def box(height=8, width=8, top=3, left=3, bottom=5, right=5) -> torch.Tensor:
    found = torch.zeros(1, height, width)
    found[:, top:bottom, left:right] = 1
    return found


# --- What they give -----------------------------------------------------------------------------------------------


def test_a_composite_changes_only_what_the_mask_covers():
    below, above = image(seed=1), image(seed=2)
    where = box(20, 30, 5, 5, 9, 11)
    result = ours("ImageCompositeMasked", destination=below, source=above, x=0, y=0, resize_source=False, mask=where)
    assert torch.equal(result, torch.where(where[..., None].bool(), above, below))
    assert not torch.equal(below, result)  # what was given is not written to


def test_a_small_picture_is_laid_over_a_large_one_and_cut_at_its_edges():
    below, above = image(seed=1), image(10, 10, seed=2)
    result = ours("ImageCompositeMasked", destination=below, source=above, x=25, y=15, resize_source=False)
    assert torch.equal(result[:, 15:, 25:], above[:, :5, :5])
    assert torch.equal(result[:, :15], below[:, :15])
    outside = ours("ImageCompositeMasked", destination=below, source=above, x=30, y=0, resize_source=False)
    assert torch.equal(outside, below)


def test_a_padded_picture_keeps_its_pixels_and_the_mask_is_white_around_it():
    padded, where = call(
        NODE_CLASS_MAPPINGS["ImagePadForOutpaint"], image=image(), left=8, top=0, right=16, bottom=8, feathering=0
    )
    assert padded.shape == (1, 28, 54, 3) and where.shape == (1, 28, 54)
    assert torch.equal(padded[:, :20, 8:38], image()) and (padded[:, 20:] == 0.5).all()
    assert not where[:, :20, 8:38].any() and where[:, 20:].all() and where[..., :8].all()


def test_a_mask_grows_by_pixels_and_shrinks_back():
    corners = {True: 4, False: 0}  # of a square, which tapered corners leave out
    for tapered, missing in corners.items():
        grown = ours("GrowMask", mask=box(), expand=1, tapered_corners=tapered)
        assert grown.sum() == 16 - missing
        assert torch.equal(ours("GrowMask", mask=grown, expand=-1, tapered_corners=tapered), box())
    assert ours("GrowMask", mask=box(), expand=16384, tapered_corners=True).all()
    assert not ours("GrowMask", mask=box(), expand=-1, tapered_corners=True).any()


def test_masks_are_combined_inverted_cut_and_made_of_a_threshold():
    a, b = box(), box(right=8)
    combine = {"source": b, "x": 0, "y": 0}
    sums = {"multiply": 4, "add": 10, "subtract": 0, "and": 4, "or": 10, "xor": 6}
    for operation, white in sums.items():
        assert ours("MaskComposite", destination=a, operation=operation, **combine).sum() == white
    assert ours("InvertMask", mask=a).sum() == 60
    assert torch.equal(ours("CropMask", mask=a, x=3, y=3, width=2, height=2), torch.ones(1, 2, 2))
    assert torch.equal(ours("ThresholdMask", mask=a * 0.6, value=0.5), a)
    assert ours("ThresholdMask", mask=a * 0.5, value=0.5).sum() == 0
    assert torch.equal(ours("SolidMask", value=0.25, width=3, height=2), torch.full((1, 2, 3), 0.25))


def test_a_mask_is_shown_as_a_picture_and_a_channel_is_taken_as_a_mask():
    assert torch.equal(ours("MaskToImage", mask=box())[..., 2], box())
    assert torch.equal(ours("ImageToMask", image=image(), channel="green"), image()[..., 1])
    assert call(NODE_CLASS_MAPPINGS["GetImageSize"], image=image(20, 30, 2)) == (30, 20, 2)


def test_what_cannot_be_is_said_in_words():
    with pytest.raises(ValueError, match="no alpha channel: choose"):
        ours("ImageToMask", image=image(), channel="alpha")
    with pytest.raises(ValueError, match="outside the mask of 8x8 pixels"):
        ours("CropMask", mask=box(), x=8, y=0, width=2, height=2)
    with pytest.raises(ValueError, match="2 masks cannot be laid over 3"):
        ours("MaskComposite", destination=mask(batch=3), source=mask(batch=2), x=0, y=0, operation="add")


@pytest.fixture
def meta_by_default():
    """A default device that holds no values, as another library may have set one."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)  # no device at all: setting the CPU would leave a mode on


@pytest.mark.parametrize("feathering", [0, 3])
def test_a_default_device_changes_nothing(meta_by_default, feathering):
    given = torch.full((1, 20, 30, 3), 0.25, device="cpu")
    borders = {"left": 8, "top": 0, "right": 16, "bottom": 8, "feathering": feathering}
    padded, where = call(NODE_CLASS_MAPPINGS["ImagePadForOutpaint"], image=given, **borders)
    assert padded.device == where.device == torch.device("cpu")
    assert (padded[:, :20, 8:38] == 0.25).all() and where[:, 20:].all() and not where[0, 5, 20]
    assert ours("SolidMask", value=0.5, width=3, height=2).sum() == 3


# --- The same as core ---------------------------------------------------------------------------------------------

PAIR = {"destination": image(40, 50, 2, seed=1), "source": image(20, 30, 2, seed=2), "x": 7, "y": 30}
MASKS = {"destination": mask(40, 50, 2, seed=1), "source": mask(20, 30, 1, seed=2), "x": 35, "y": 3}
CALLS = [
    ("GetImageSize", {"image": image(9, 7, 2)}),
    ("ImageCrop", {"image": image(), "width": 12, "height": 99, "x": 25, "y": 3}),
    ("ImageCrop", {"image": image(), "width": 12, "height": 9, "x": 16384, "y": 16384}),
    ("ImagePadForOutpaint", {"image": image(), "left": 8, "top": 16, "right": 0, "bottom": 24, "feathering": 7}),
    ("ImagePadForOutpaint", {"image": image(batch=2), "left": 0, "top": 8, "right": 8, "bottom": 0, "feathering": 3}),
    ("ImagePadForOutpaint", {"image": image(), "left": 8, "top": 8, "right": 8, "bottom": 8, "feathering": 10}),
    ("ImageCompositeMasked", {**PAIR, "resize_source": False}),
    ("ImageCompositeMasked", {**PAIR, "resize_source": True, "mask": mask(13, 17)}),
    ("ImageCompositeMasked", {**PAIR, "resize_source": False, "mask": mask(20, 30, 2, seed=3)}),
    ("ImageCompositeMasked", {**PAIR, "resize_source": False, "mask": mask(20, 30)[0]}),
    ("ImageCompositeMasked", {**PAIR, "resize_source": False, "source": image(20, 30, 1, 4)}),
    ("ImageCompositeMasked", {**PAIR, "resize_source": False, "destination": image(40, 50, 3, 4)}),
    ("SolidMask", {"value": 0.3, "width": 5, "height": 3}),
    ("InvertMask", {"mask": mask()}),
    ("ThresholdMask", {"mask": mask(), "value": 0.5}),
    *(
        ("GrowMask", {"mask": mask(batch=2), "expand": expand, "tapered_corners": tapered})
        for expand in (-40, -3, 0, 1, 6, 60)
        for tapered in (True, False)
    ),
    ("FeatherMask", {"mask": mask(batch=2), "left": 5, "top": 3, "right": 40, "bottom": 0}),
    ("CropMask", {"mask": mask(), "x": 3, "y": 4, "width": 5, "height": 60}),
    ("MaskToImage", {"mask": mask(batch=2)}),
    ("ImageToMask", {"image": image(channels=4), "channel": "alpha"}),
    ("ImageToMask", {"image": image(), "channel": "red"}),
    *(
        ("MaskComposite", {**MASKS, "operation": operation})
        for operation in ("multiply", "add", "subtract", "and", "or", "xor")
    ),
]


def test_every_node_is_among_the_calls():
    assert {name for name, _ in CALLS} == set(NODE_CLASS_MAPPINGS)


@pytest.mark.skipif(core is None, reason="ComfyUI is not on the path")
@pytest.mark.parametrize(("name", "inputs"), CALLS)
def test_core_gives_the_same_to_the_bit(name, inputs):
    places = (core, nodes_mask, nodes_images)
    core_class = next(getattr(place, name) for place in places if hasattr(place, name))
    if name == "GetImageSize":  # core tells the size to the page, which needs a server
        expected = tuple(inputs["image"].shape[i] for i in (2, 1, 0))
    else:
        expected = call(core_class, **inputs)
    found = call(NODE_CLASS_MAPPINGS[name], **inputs)
    for ours_value, core_value in zip(found, expected, strict=True):
        if isinstance(core_value, torch.Tensor):
            core_value = core_value.reshape(ours_value.shape)  # some versions give a single mask as [H, W]
            assert ours_value.dtype == core_value.dtype and torch.equal(ours_value, core_value)
        else:
            assert ours_value == core_value


@pytest.mark.skipif(core is None, reason="ComfyUI is not on the path")
@pytest.mark.parametrize("name", sorted(NODE_CLASS_MAPPINGS))
def test_core_has_the_same_sockets_and_widgets(name):
    places = (core, nodes_mask, nodes_images)
    core_class = next(getattr(place, name) for place in places if hasattr(place, name))
    theirs, mine = core_class.INPUT_TYPES(), NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    for group in ("required", "optional"):
        assert list(theirs.get(group, {})) == list(mine.get(group, {}))
        for widget, (kind, *options) in mine.get(group, {}).items():
            core_kind, *core_options = theirs[group][widget]
            assert isinstance(kind, list) or kind == core_kind
            for key, value in (options[0] if options else {}).items():
                assert core_options[0][key] == value
    assert tuple(core_class.RETURN_TYPES) == NODE_CLASS_MAPPINGS[name].RETURN_TYPES
