"""Whole rounds through the public API on the recorded checkpoint folders: 3e-4 a case."""

import pytest
import torch
from ming_univision.ming_core import Conversation, load_univision
from ming_univision.ming_core.conversation import guidance_masks, segment_keys

TOLERANCE = 3e-4
CASES = ["understand", "generate_image", "edit_image", "edit_round", "edit_after_answer"]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def play(model, case, start: str = "draw now"):
    """Every round of a case, as (recorded round, turn, tensors of the round)."""
    conversation = Conversation()
    for recorded in case.rounds:
        io = {k.removeprefix(recorded["prefix"]): v for k, v in case.io.items() if k.startswith(recorded["prefix"])}
        features = None
        if recorded["picture"]:
            with torch.no_grad():
                features = model.mingtok.semantic_features(model.mingtok.encode(io["pixel_values"]))
        options = {"features": features, "max_new_tokens": recorded["max_new_tokens"], "return_logits": True}
        if recorded["op"] == "understand":
            turn = model.understand(conversation, recorded["prompt"], **options)
        else:
            turn = model.generate_image(conversation, recorded["prompt"], noise=io["img_noise"], start=start, **options)
        yield recorded, turn, io
        conversation = turn.conversation


@pytest.mark.parametrize("start", ["draw now", "model decides"])
@pytest.mark.parametrize("name", CASES)
def test_every_round_gives_the_recorded_tokens_pictures_and_state(golden, name, start):
    case = golden(name)
    model = load_univision(case.folder)
    for recorded, turn, io in play(model, case, start):
        assert turn.token_ids == recorded["new_tokens"]
        assert_close(turn.logits, io["logits"])
        if turn.features is not None:
            n = turn.features.tokens.shape[1]
            assert_close(turn.features.latents[0].flatten(1).T, io["img_latents"][0, :n])
            assert_close(turn.features.tokens[0], io["img_sem"][0])
            with torch.no_grad():
                assert_close(model.mingtok.decode(turn.features), io["img_image"][:1])
        known = model.prefix_cache.lookup(segment_keys(turn.conversation.segments, model.weights_key()))
        for layer in range(model.config.llm_config.num_hidden_layers):
            assert_close(torch.cat([k.keys[layer] for k in known], dim=1), io[f"state_key_{layer}"][0])
            assert_close(torch.cat([k.values[layer] for k in known], dim=1), io[f"state_value_{layer}"][0])


@pytest.mark.parametrize("name", CASES)
def test_guidance_rows_see_and_count_what_was_recorded(golden, name):
    case = golden(name)
    model = load_univision(case.folder)
    for _, turn, io in play(model, case):
        *parts, _ = turn.conversation.parts
        ids = [i for s in parts[-1].segments for i in getattr(s, "ids", [model.chat.patch_id] * s.length)]
        assert ids == io["input_ids"][0].tolist()
        if "img_in_uncond_attention_mask" not in io:
            continue
        views = guidance_masks(tuple(parts))
        assert torch.equal(views[1].long(), io["img_in_uncond_attention_mask"][0])
        if len(views) == 3:
            assert torch.equal(views[2].long(), io["img_in_text_uncond_attention_mask"][0])
        else:
            assert torch.equal(io["img_in_text_uncond_attention_mask"], io["img_in_uncond_attention_mask"])
        assert len(views) == len(io["img_position_ids"])
        assert torch.equal(views.sum(1), io["img_position_ids"][:, 0])
