"""Edits limited to a mask: what is outside stays the source's own latents, and is never sampled."""

import pytest
import torch
from ming_univision.ming_core import (
    Conversation,
    DrawRequest,
    Guidance,
    Solver,
    load_conversation,
    save_conversation,
)
from ming_univision.ming_core.image_decoder import KeptTokens
from ming_univision.ming_core.options import ImageOptions

GRID = 4  # tokens a side of the small model's images, of 8 pixels each
SHORT = {"max_new_tokens": 4}


def mask(*open_tokens: tuple[int, int], side: int = GRID) -> torch.Tensor:
    """White at these (row, column) of the token grid, in `side` pixels."""
    tokens = torch.zeros(GRID, GRID)
    for row, column in open_tokens:
        tokens[row, column] = 1
    return tokens.repeat_interleave(side // GRID, 0).repeat_interleave(side // GRID, 1)


SQUARE = ((1, 1), (1, 2), (2, 1), (2, 2))


def edit(model, picture, open_tokens=SQUARE, **options):
    options = {"features": picture, "mask": mask(*open_tokens), **SHORT, **options}
    return model.generate_image(options.pop("conversation", Conversation()), "Make it blue.", **options)


def outside(features, open_tokens=SQUARE):
    """Latents of the kept tokens."""
    return features.latents[0, :, mask(*open_tokens) == 0]


@pytest.mark.parametrize("start", ["draw now", "model decides"])
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(1.0, 1.0), Guidance(3.0, 1.0), Guidance(0.0, 0.0)])
def test_latents_outside_are_those_of_the_source_bit_for_bit_and_inside_others(model, picture, guidance, start):
    if start == "model decides":  # make a model of random weights decide to draw
        model.network.language_model.lm_head.weight.data[model.chat.image_open_id] *= 40
    result = edit(model, picture, guidance=guidance, start=start)
    assert torch.equal(outside(result.features), outside(picture))
    inside = mask(*SQUARE) == 1
    assert not (result.features.latents[0, :, inside] == picture.latents[0, :, inside]).any()


@pytest.mark.parametrize(
    "open_tokens", [SQUARE, ((0, 0),), ((3, 3),), ((0, 0), (3, 3)), ((0, 3), (1, 0)), tuple((1, c) for c in range(4))]
)
def test_runs_that_are_prefilled_give_what_token_by_token_gives(model, picture, open_tokens, monkeypatch):
    """The same edit with every kept token forwarded on its own, as if the model had drawn it."""
    found = edit(model, picture, open_tokens, return_logits=True)
    model.prefix_cache.clear()
    monkeypatch.setattr(KeptTokens, "spans", lambda self: [(0, self.kept.shape[1], False)])
    slow = edit(model, picture, open_tokens, return_logits=True)
    torch.testing.assert_close(found.features.latents, slow.features.latents, rtol=0, atol=3e-4)
    torch.testing.assert_close(found.features.tokens, slow.features.tokens, rtol=0, atol=3e-4)
    assert found.token_ids == slow.token_ids
    torch.testing.assert_close(found.logits, slow.logits, rtol=0, atol=3e-4)


@pytest.mark.parametrize("full", [torch.ones(GRID, GRID), torch.ones(1, 50, 70, dtype=torch.bool)])
def test_an_all_white_mask_changes_no_bit(model, picture, full):
    plain = model.generate_image(Conversation(), "Make it blue.", features=picture, **SHORT)
    model.prefix_cache.clear()
    masked = model.generate_image(Conversation(), "Make it blue.", features=picture, mask=full, **SHORT)
    assert torch.equal(plain.features.latents, masked.features.latents) and plain.token_ids == masked.token_ids


def test_kept_tokens_never_reach_the_flow_head_and_go_through_the_language_model_in_runs(model, picture):
    sampled, forwarded = [], []
    net, decoder = model.network.flow_head.net, model.network.language_model.model
    net.res_blocks[0].mlp.register_forward_pre_hook(lambda _, x: sampled.append(len(x[0])))
    decoder.register_forward_pre_hook(lambda _, x: forwarded.append(x[0].shape[1]))
    edit(model, picture, ((1, 1), (1, 2), (3, 0)), solver=Solver(5), max_new_tokens=1)
    assert len(sampled) == 3 * 5
    steps = forwarded[1:]  # after the prompt
    # `<image>` and tokens 0 to 3; token 4; tokens 5 to 10; token 11; then what is kept at the end, for the text
    assert steps == [5, 1, 1, 5, 1, 4] and sum(steps) == 1 + GRID * GRID


def test_progress_counts_kept_tokens_and_an_interrupt_leaves_everything_as_it_was(model, picture):
    seen = []
    first = edit(model, picture, on_token=lambda p: seen.append((p.kind, p.done, p.total)))
    image = [(done, total) for kind, done, total in seen if kind == "image"]
    assert image == [(5, 16), (6, 16), (7, 16), (9, 16), (10, 16), (11, 16), (16, 16)]

    def stop(progress):
        if progress.kind == "image" and progress.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edit(model, picture, on_token=stop)
    assert torch.equal(edit(model, picture).features.latents, edit(model, picture).features.latents)
    torch.testing.assert_close(edit(model, picture).features.latents, first.features.latents, rtol=0, atol=3e-4)


def test_a_batch_takes_one_mask_for_all_or_one_each_and_gives_what_each_gives_alone(model, picture):
    corners = ((0, 0), (0, 1)), ((3, 3),)
    masks = torch.stack([mask(*corner) for corner in corners])
    options = {"features": picture, "seeds": [4, 5], **SHORT}
    each = model.generate_images(Conversation(), "Make it blue.", mask=masks, **options)
    both = model.generate_images(Conversation(), "Make it blue.", mask=mask(*corners[0]), **options)
    for k, corner in enumerate(corners):
        assert torch.equal(outside(each[k].features, corner), outside(picture, corner))
        assert torch.equal(outside(both[k].features, corners[0]), outside(picture, corners[0]))
        alone = edit(model, picture, corner, seed=4 + k)
        torch.testing.assert_close(each[k].features.latents, alone.features.latents, rtol=0, atol=3e-4)


def test_the_newest_picture_in_view_is_the_one_that_is_kept_through_rounds_and_files(model, picture, tmp_path):
    drawn = model.generate_image(Conversation(), "Draw.", features=picture, **SHORT)
    second = edit(model, None, conversation=drawn.conversation)
    assert torch.equal(outside(second.features), outside(drawn.features))
    save_conversation(second.conversation, tmp_path / "c.safetensors")
    resumed = load_conversation(tmp_path / "c.safetensors", model)
    third = edit(model, None, ((0, 0),), conversation=resumed)
    assert torch.equal(outside(third.features, ((0, 0),)), outside(second.features, ((0, 0),)))
    attached = edit(model, picture, conversation=second.conversation)  # not in view as the newest: it is kept from
    assert torch.equal(outside(attached.features), outside(attached.conversation.images[-2].features))


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (32, 32), (33, 31), (100, 200), (2, 2), (1, 1)])
def test_a_mask_of_any_size_opens_the_tokens_that_it_touches(size):
    height, width = size
    pixels = torch.zeros(size)
    pixels[0, 0] = 1
    tokens = ImageOptions(mask=pixels).open_tokens((4, 4)).view(4, 4)
    covered = torch.zeros(4, 4, dtype=torch.bool)
    covered[: max(1, -(-4 // height)), : max(1, -(-4 // width))] = True
    assert torch.equal(tokens, covered)
    pixels[-1, -1] = 0.6  # as a soft brush leaves it
    assert ImageOptions(mask=pixels).open_tokens((4, 4)).view(4, 4)[-1, -1]


WRONG = {
    "black everywhere": (torch.zeros(4, 4), "black everywhere.*invert"),
    "black for one": (torch.stack([torch.ones(4, 4), torch.zeros(4, 4)]), "black everywhere"),
    "empty": (torch.ones(0, 4), r"\[0, 4\]"),
    "too many": (torch.ones(3, 4, 4), "3 masks for 2 images"),
    "not finite": (torch.full((4, 4), float("nan")), "NaN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mask_that_cannot_be_used_is_refused_before_anything_is_computed(model, picture, name):
    wrong, message = WRONG[name]
    model.network.language_model.register_forward_pre_hook(lambda *_: pytest.fail("it computed"))
    with pytest.raises(ValueError, match=message):
        model.generate_images(Conversation(), "Blue.", seeds=[1, 2], features=picture, mask=wrong)


def test_a_mask_without_a_picture_or_with_one_of_another_grid_is_refused(model):
    with pytest.raises(ValueError, match="no picture is in view"):
        model.generate_image(Conversation(), "Blue.", mask=mask(*SQUARE))
    with torch.no_grad():
        large = model.mingtok.semantic_features(torch.randn(1, model.network.flow_head.net.channels, 8, 8))
    with pytest.raises(ValueError, match=r"8x8 tokens.*4x4.*detail standard"):
        model.generate_image(Conversation(), "Blue.", features=large, mask=mask(*SQUARE))


def test_a_long_kept_run_is_prefilled_in_pieces_and_its_memory_is_counted(model, picture, monkeypatch):
    whole = edit(model, picture, ((3, 3),))
    pieces = []
    monkeypatch.setattr("ming_univision.ming_core.image_decoder.PREFILL_CHUNK", 12)  # four tokens of three rows
    model.network.language_model.model.register_forward_pre_hook(lambda _, x: pieces.append(x[0].shape[:2].numel()))
    model.prefix_cache.clear()
    found = edit(model, picture, ((3, 3),))
    torch.testing.assert_close(found.features.latents, whole.features.latents, rtol=0, atol=3e-4)
    assert pieces[1:5] == [12, 12, 12, 9]  # 15 tokens of three rows, `<image>` among them
    options = {"seeds": (0, 1, 2, 3)}
    plain, masked = (
        model.plan(Conversation(), "Blue.", ImageOptions(mask=one, **options), picture).working_memory
        for one in (None, mask(*SQUARE))
    )
    assert masked > plain


def test_many_prompts_in_one_pass_keep_each_its_own_picture(model, picture):
    other = picture._replace(latents=picture.latents.flip(-1))
    with torch.no_grad():
        other = model.mingtok.semantic_features(other.latents)
    requests = [DrawRequest("Make it blue.", seed=k, features=one) for k, one in enumerate((picture, other))]
    results = model.generate_batch(requests, ImageOptions(mask=mask(*SQUARE), max_new_tokens=4))
    for k, (request, found) in enumerate(zip(requests, results, strict=True)):
        assert torch.equal(outside(found.features), outside(request.features))
        model.prefix_cache.clear()
        alone = edit(model, request.features, seed=k)
        torch.testing.assert_close(found.features.latents, alone.features.latents, rtol=0, atol=3e-4)
