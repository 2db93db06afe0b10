"""Features joined to one batch: for several pictures in one message."""

import pytest
import torch
from ming_univision.ming_core import Conversation
from ming_univision.ming_core.features import joined


def encoded(model, seed, side=32):
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.no_grad():
        return model.mingtok.semantic_features(model.mingtok.encode(pixels))


def test_joined_features_keep_their_order_and_the_largest_depth(model):
    one, two = encoded(model, 1), encoded(model, 2)._replace(depth=3)
    batch = joined(one, two)
    assert (batch.batch, batch.depth) == (2, 3)
    assert batch.split() == [one._replace(depth=3), two]


def test_a_message_about_joined_features_shows_both_pictures_in_order(model):
    one, two = encoded(model, 1), encoded(model, 2)
    for first, second in ((one, two), (two, one)):
        conversation = model.understand(
            Conversation(), "Which one?", features=joined(first, second), max_new_tokens=1
        ).conversation
        assert [image.features.latents.tolist() for image in conversation.images] == [
            first.latents.tolist(),
            second.latents.tolist(),
        ]


def test_features_that_do_not_fit_together_are_refused_with_the_remedy(model):
    one = encoded(model, 1)
    with pytest.raises(ValueError, match=r"4x4 and 8x8 tokens.*detail"):
        joined(one, encoded(model, 2, side=64))
    with pytest.raises(ValueError, match="one MingTok"):
        joined(one, one._replace(tokenizer="another"))
