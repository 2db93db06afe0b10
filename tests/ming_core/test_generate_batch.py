"""`Engine.generate_batch`: many rounds drawn at once give what each gives alone."""

from pathlib import Path

import pytest
import torch

from ming_core import Conversation, DrawRequest, Engine, ImageOptions, Solver, load_univision
from ming_core.engine import BATCH
from ming_core.images import to_pixels
from tiny_shapes.world import draw, parse_scene

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-3  # on latents of the built-in model, alone or in a batch


def assert_as_alone(engine, requests, results, **options):
    for request, result in zip(requests, results, strict=True):
        engine.prefix_cache.clear()
        alone = engine.generate_image(
            request.conversation,
            request.prompt,
            seed=request.seed,
            features=request.features,
            noise=request.noise,
            **options,
        )
        assert (result.features.latents - alone.features.latents).abs().max() < TOLERANCE
        assert (result.text, result.token_ids) == (alone.text, alone.token_ids)
        assert result.features.depth == alone.features.depth
        assert repr(result.conversation) == repr(alone.conversation)


@pytest.fixture(scope="module")
def built_in() -> Engine:
    return load_univision(ROOT / "models" / "tiny-shapes")


@pytest.fixture
def engine() -> Engine:
    """A small Ming-UniVision with random weights, which has something to say after an image."""
    return load_univision(ROOT / "tests" / "golden" / "edit_round")


@pytest.fixture
def random_image(engine):
    """Features of a random image."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        return engine.mingtok.semantic_features(engine.mingtok.encode(pixels))


@pytest.fixture(scope="module")
def scene_image(built_in):
    """An image of the model's world: of anything else it is so unsure that rounding grows into another image."""
    image = torch.from_numpy(draw(parse_scene("a large red circle at the left on a white background")))
    with torch.no_grad():
        return built_in.mingtok.semantic_features(built_in.mingtok.encode(to_pixels(image[None] / 255, 128)))


@pytest.mark.slow
def test_images_of_different_pasts_are_drawn_as_each_alone(built_in, scene_image):
    greeting = built_in.understand(Conversation(), "Hello!", max_new_tokens=4).conversation
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(5))
    requests = [
        DrawRequest("a large red circle at the left", seed=1),
        DrawRequest("Make it blue.", seed=2, features=scene_image),
        DrawRequest("a small star", noise=noise),
        DrawRequest("a green square on a black background", seed=3, conversation=greeting),
    ]
    results = built_in.generate_batch(requests)
    following = [DrawRequest("Remove it.", seed=4, conversation=result.conversation) for result in results[:2]]
    continued = built_in.generate_batch(following)
    assert_as_alone(built_in, requests, results)
    assert_as_alone(built_in, following, continued)
    assert continued[0].prefilled < results[0].conversation.length, "what was drawn is computed again"


def test_the_options_hold_for_every_request(built_in):
    requests = [DrawRequest("a large red circle at the left", seed=1), DrawRequest("a small star", seed=2)]
    options = {"solver": Solver(6, "ab2"), "temperature": 0.9}
    results = built_in.generate_batch(requests, ImageOptions(**options))
    assert_as_alone(built_in, requests, results, **options)


def test_a_model_that_has_something_to_say_after_an_image_says_it(engine, random_image):
    requests = [DrawRequest("draw", seed=k, features=random_image if k else None) for k in range(2)]
    results = engine.generate_batch(requests)
    assert any(len(result.token_ids) > 2 for result in results)
    assert_as_alone(engine, requests, results)


def test_more_than_fit_into_one_pass_come_back_in_their_order(engine):
    requests = [DrawRequest(f"draw {k}", seed=k) for k in range(BATCH + 1)]
    results = engine.generate_batch(requests)
    prompts = [result.conversation.parts[0].segments[1].text for result in results]
    assert prompts == [request.prompt for request in requests]


def test_an_empty_prompt_is_refused_as_anywhere(engine):
    with pytest.raises(ValueError, match="prompt is empty"):
        engine.generate_batch([DrawRequest("draw"), DrawRequest(" ")])
