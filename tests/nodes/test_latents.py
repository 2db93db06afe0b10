"""MingTok's latents through ComfyUI's own latent nodes: what they keep of a LATENT, and what a picture is after them.

What each node keeps was looked up in ComfyUI 0.33: nodes.py and comfy_extras/nodes_latent.py.
"""

import pytest
import torch
from ming_univision.ming_core import Conversation, ImageOptions
from ming_univision.ming_core.engine import round_generator
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host


@pytest.fixture
def mingtok(model):
    return host.Loaded(model.mingtok, None, "small: MingTok", owner=host.Loaded(model, None, "small"))


@pytest.fixture
def drawn(picture):
    """LATENT of a picture that was drawn, with three rounds behind it."""
    (latent,) = NODE_CLASS_MAPPINGS["MingFeaturesToLatent"]().take(picture._replace(depth=3))
    return latent


@pytest.fixture
def encoded(picture):
    (latent,) = NODE_CLASS_MAPPINGS["MingFeaturesToLatent"]().take(picture)
    return latent


def changed(latent, samples):
    """As core's nodes do it: all keys of the (first) input, and other samples."""
    return latent.copy() | {"samples": samples}


def composite(to, paste):
    samples = to["samples"].clone()
    samples[:, :, 1:3, 2:4] = paste["samples"][:, :, :2, :2]
    return changed(to, samples)


CORE = {
    "LatentBlend": lambda a, b: changed(a, a["samples"] * 0.5 + b["samples"] * 0.5),
    "LatentBatch": lambda a, b: changed(a, torch.cat([a["samples"], b["samples"]])) | {"batch_index": [0, 1]},
    "LatentFromBatch": lambda a, b: changed(a, a["samples"][:1].clone()) | {"batch_index": [0]},
    "RepeatLatentBatch": lambda a, b: changed(a, a["samples"].repeat(3, 1, 1, 1)),
    "LatentComposite": composite,
    "LatentCrop": lambda a, b: changed(a, a["samples"][:, :, :2, 1:3]),
    "LatentConcat": lambda a, b: changed(a, torch.cat([a["samples"], b["samples"]], -1)),
    "SetLatentNoiseMask": lambda a, b: a.copy() | {"noise_mask": torch.ones(1, 1, 32, 32)},
}


def features_of(mingtok, latent):
    (features,) = NODE_CLASS_MAPPINGS["MingTokSemanticFeatures"]().expand(mingtok, latent)
    return features


@pytest.mark.parametrize("core", CORE.values(), ids=CORE)
def test_the_depth_of_the_first_input_survives_cores_nodes(mingtok, drawn, encoded, core):
    features = features_of(mingtok, core(drawn, encoded))
    assert features.depth == 3
    (image,) = NODE_CLASS_MAPPINGS["MingTokDecode"]().decode(mingtok, features)
    assert image.isfinite().all()


def test_a_blend_and_a_composite_leave_the_other_tokens_as_they_are(mingtok, drawn, encoded, picture):
    other = changed(encoded, encoded["samples"].flip(1))
    found = features_of(mingtok, CORE["LatentComposite"](drawn, other)).latents
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 2:4] = True
    assert torch.equal(found[0, :, ~inside], picture.latents[0, :, ~inside])
    assert torch.equal(found[0, :, 1:3, 2:4], other["samples"][0, :, :2, :2])
    mixed = features_of(mingtok, CORE["LatentBlend"](drawn, other)).latents
    torch.testing.assert_close(mixed, (picture.latents + other["samples"]) / 2)


def saved_and_loaded(latent):
    """As core's SaveLatent and LoadLatent do it: the samples alone."""
    return {"samples": latent["samples"].contiguous().float()}


def test_a_depth_lost_in_a_file_leaves_the_picture_as_it_is_and_another_seed_gives_new_noise(mingtok, drawn):
    kept, lost = features_of(mingtok, drawn), features_of(mingtok, saved_and_loaded(drawn))
    assert torch.equal(kept.latents, lost.latents) and torch.equal(kept.tokens, lost.tokens)
    assert (kept.depth, lost.depth) == (3, 0)

    def noise(seed, features):
        plan = mingtok.owner.model.plan(Conversation(), "Blue.", ImageOptions((seed,)), features)
        return torch.randn(8, generator=round_generator(seed, "image", plan.transcript))

    first_drawing = noise(7, None)
    assert not torch.equal(noise(7, kept), first_drawing)
    assert torch.equal(noise(7, lost), first_drawing), "why the help says to use another seed"
    assert not torch.equal(noise(8, lost), first_drawing)


def test_an_edit_of_a_picture_whose_depth_was_lost_works(mingtok, drawn):
    widgets = {"seed": 7, "batch_size": 1, "text_guidance": 3.0, "image_guidance": 1.1, "steps": 2, "temperature": 1.0}
    widgets |= {"solver": "euler", "start": "draw now", "max_new_tokens": 2}
    lost = features_of(mingtok, saved_and_loaded(drawn))
    node = NODE_CLASS_MAPPINGS["MingEdit"]()
    (edited,), (talk,), _ = node.edit(mingtok.owner, instruction="Blue.", features=lost, **widgets)
    assert edited.latents.isfinite().all() and edited.depth == 1 and talk.images[0].features == lost
