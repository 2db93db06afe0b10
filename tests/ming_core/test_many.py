"""Many rounds at once give what each gives alone."""

from pathlib import Path

import pytest
import torch
from ming_univision.ming_core import Conversation, load_univision
from ming_univision.ming_core.images import to_pixels

from tiny_shapes.training.many import AT_ONCE, Wish, draw_many
from tiny_shapes.world import draw, parse_scene

BUILT_IN = Path(__file__).parents[2] / "models" / "tiny-shapes"
SAME = 1e-3  # latents of the built-in model, alone or in a batch


def assert_as_alone(model, wishes, turns):
    for wish, turn in zip(wishes, turns, strict=True):
        model.prefix_cache.clear()
        alone = model.generate_image(
            wish.conversation, wish.prompt, seed=wish.seed, features=wish.features, noise=wish.noise
        )
        assert (turn.features.latents - alone.features.latents).abs().max() < SAME
        assert (turn.text, turn.token_ids) == (alone.text, alone.token_ids)
        assert turn.features.depth == alone.features.depth
        assert repr(turn.conversation) == repr(alone.conversation)


@pytest.fixture(scope="module")
def built_in():
    return load_univision(BUILT_IN)


@pytest.fixture(scope="module")
def seen(built_in):
    """A picture of its world: of what it has never seen it is so unsure that rounding grows into another picture."""
    picture = torch.from_numpy(draw(parse_scene("a large red circle at the left on a white background")))
    with torch.no_grad():
        return built_in.mingtok.semantic_features(built_in.mingtok.encode(to_pixels(picture[None] / 255, 128)))


def test_pictures_of_different_pasts_are_drawn_as_each_alone(built_in, seen):
    said = built_in.understand(Conversation(), "Hello!", max_new_tokens=4).conversation
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(5))
    wishes = [
        Wish("a large red circle at the left", seed=1),
        Wish("Make it blue.", seed=2, features=seen),
        Wish("a small star", noise=noise),
        Wish("a green square on a black background", seed=3, conversation=said),
    ]
    turns = draw_many(built_in, wishes)
    after = [Wish("Remove it.", seed=4, conversation=turn.conversation) for turn in turns[:2]]
    continued = draw_many(built_in, after)
    assert_as_alone(built_in, wishes, turns)
    assert_as_alone(built_in, after, continued)
    assert continued[0].prefilled < turns[0].conversation.length, "what was drawn is computed again"


def test_a_model_that_has_something_to_say_after_a_picture_says_it(model, picture):
    wishes = [Wish("draw", seed=k, features=picture if k else None) for k in range(2)]
    turns = draw_many(model, wishes)
    assert any(len(turn.token_ids) > 2 for turn in turns)
    assert_as_alone(model, wishes, turns)


def test_more_than_fit_at_once_come_back_in_their_order(model):
    wishes = [Wish(f"draw {k}", seed=k) for k in range(AT_ONCE + 1)]
    turns = draw_many(model, wishes)
    said = [turn.conversation.parts[0].segments[1].text for turn in turns]
    assert said == [wish.prompt for wish in wishes]


def test_an_empty_prompt_is_refused_as_anywhere(model):
    with pytest.raises(ValueError, match="prompt is empty"):
        draw_many(model, [Wish("draw"), Wish(" ")])
