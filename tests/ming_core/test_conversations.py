"""Rounds on one another: what is the same, whatever the cache, the branch, the batch or the file in between."""

import os
import random

import numpy as np
import pytest
import safetensors.torch
import torch
from ming_univision.ming_core import (
    Conversation,
    FileError,
    Guidance,
    NoPictureError,
    Sampling,
    Solver,
    language_model,
    load_conversation,
    load_univision,
    save_conversation,
)
from ming_univision.ming_core.conversation import MARK, PROMPT, ROLE, Image, Part, Text, guidance_masks, prompt_masks
from ming_univision.ming_core.features import Features
from ming_univision.ming_core.files import read_tensors, write_tensors
from ming_univision.ming_core.image_decoder import ImageDecoder
from ming_univision.ming_core.saved import load_features, save_features
from ming_univision.ming_core.weights_state import WeightsState

SAME = 3e-4  # latents, float32, on this small model
SHORT = {"max_new_tokens": 6}


def assert_same_turn(a, b) -> None:
    assert a.token_ids == b.token_ids
    assert (a.features is None) == (b.features is None)
    if a.features is not None:
        torch.testing.assert_close(a.features.latents, b.features.latents, rtol=0, atol=SAME)


def three_rounds(model, picture, seed: int = 0):
    """Ask about a picture, edit it, edit again; the turns."""
    first = model.understand(Conversation(), "What is it?", features=picture, **SHORT)
    second = model.generate_image(first.conversation, "Make it blue.", seed=seed, **SHORT)
    third = model.generate_image(second.conversation, "Refine it.", seed=seed, **SHORT)
    return first, second, third


# --- the prefix cache ---------------------------------------------------------------------------------------------


def test_rounds_are_the_same_with_the_prefix_cache_off_and_emptied_in_the_middle(model, picture):
    with_cache = three_rounds(model, picture)
    model.prefix_cache.clear()
    first, second, _ = three_rounds(model, picture)
    model.prefix_cache.clear()
    third = model.generate_image(second.conversation, "Refine it.", **SHORT)
    model.prefix_cache.clear()
    model.prefix_cache.limit = 0
    without = three_rounds(model, picture)
    assert len(model.prefix_cache) == 0
    for a, b, c in zip(with_cache, (first, second, third), without, strict=True):
        assert_same_turn(a, b)
        assert_same_turn(a, c)


def test_a_hit_prefills_only_what_is_new_and_a_miss_everything(model, picture):
    first, second, third = three_rounds(model, picture)
    prompts = [t.conversation.parts[-2].length for t in (first, second, third)]
    assert [first.prefilled, second.prefilled, third.prefilled] == prompts
    model.prefix_cache.clear()
    again = model.generate_image(second.conversation, "Refine it.", **SHORT)
    assert again.prefilled == second.conversation.length + prompts[2]


def test_the_same_call_twice_in_the_same_cache_state_is_bit_equal(model, picture):
    def run():
        model.prefix_cache.clear()
        return three_rounds(model, picture)

    for a, b in zip(run(), run(), strict=True):
        assert a.token_ids == b.token_ids
        assert a.features is None or torch.equal(a.features.latents, b.features.latents)


def test_the_cache_stays_within_its_bytes_and_forgets_the_end_of_a_transcript_first(model, picture):
    cache = model.prefix_cache
    three_rounds(model, picture)
    everything = cache.bytes
    cache.clear()
    cache.limit = everything // 2
    _, second, third = three_rounds(model, picture)
    assert 0 < cache.bytes <= cache.limit
    again = model.generate_image(second.conversation, "Refine it.", **SHORT)
    assert again.prefilled < second.conversation.length + third.conversation.parts[-2].length
    assert_same_turn(third, again)


def test_pictures_that_were_seen_and_drawn_do_not_share_keys_and_values(model, picture):
    seen, drawn = (Conversation((Part(False, (Image(picture, d),)),)) for d in (False, True))
    assert seen.segments[0].content() != drawn.segments[0].content()


def changed_in_one_value(layer):
    with torch.no_grad():
        layer.weight[3, 5] += 1


def changed_by_loading(layer):
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()})


def changed_through_data(layer):
    layer.weight.data.mul_(1.5)


def test_writing_to_a_drawn_result_leaves_its_conversation_as_it_is(model):
    result = model.generate_image(Conversation(), "A star.", **SHORT)
    before = result.conversation.digest()
    result.features.latents.zero_()
    result.features.tokens.zero_()
    assert result.conversation.digest() == before and result.conversation.images[0].features.tokens.any()


def test_weights_are_the_same_wherever_a_part_of_them_lies():
    """Parts of a model are copied together by device and dtype; here another dtype stands for another device."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
    state = WeightsState(layers)
    expected = state.key()
    for layer in layers:
        layer.double()
        assert state.key() == expected
        layer.float()
    layers[0].weight.data, layers[2].weight.data = layers[2].weight.data, layers[0].weight.data
    assert state.key() != expected


@pytest.mark.parametrize("change", [changed_in_one_value, changed_by_loading, changed_through_data])
def test_weights_that_change_in_place_make_the_next_round_compute_everything(model, picture, change):
    first = model.understand(Conversation(), "What is it?", features=picture, **SHORT)
    change(model.network.language_model.model.layers[0].attention.dense)
    found = model.understand(first.conversation, "Sure?", return_logits=True, **SHORT)
    assert found.prefilled == first.conversation.length + found.conversation.parts[-2].length
    model.prefix_cache.clear()
    fresh = model.understand(first.conversation, "Sure?", return_logits=True, **SHORT)
    torch.testing.assert_close(found.logits, fresh.logits, rtol=0, atol=SAME)


def test_weights_that_only_move_keep_what_was_computed(model, picture):
    first = model.understand(Conversation(), "What is it?", features=picture, **SHORT)
    for module in model.network.modules():  # as a host moves weights: the values stay, the tensors do not
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), requires_grad=False))
    again = model.understand(first.conversation, "Sure?", **SHORT)
    assert again.prefilled == again.conversation.parts[-2].length


# --- branches and immutability ------------------------------------------------------------------------------------


def test_two_edits_of_one_conversation_are_the_same_as_each_alone(model, picture):
    start = model.understand(Conversation(), "What is it?", features=picture, **SHORT).conversation
    red = model.generate_image(start, "Make it red.", **SHORT)
    blue = model.generate_image(start, "Make it blue.", **SHORT)
    for turn, prompt in ((red, "Make it red."), (blue, "Make it blue.")):
        model.prefix_cache.clear()
        assert_same_turn(turn, model.generate_image(start, prompt, **SHORT))
    assert red.features != blue.features


def test_no_operation_changes_the_conversation_and_the_features_it_is_given(model, picture, tmp_path):
    before = picture.digest()
    for turn in three_rounds(model, picture):
        digest = turn.conversation.digest()
        model.understand(turn.conversation, "And now?", **SHORT)
        model.generate_images(turn.conversation, "Make it red.", seeds=[1, 2], features=picture, **SHORT)
        turn.conversation.transcript()
        save_conversation(turn.conversation, tmp_path / "c.safetensors")
        assert turn.conversation.digest() == digest
    assert picture.digest() == before


def test_conversations_and_features_are_equal_by_content(model, picture, checkpoint_folder):
    a, b = (three_rounds(load_univision(checkpoint_folder), picture)[2] for _ in range(2))
    assert a.conversation == b.conversation and hash(a.conversation) == hash(b.conversation)
    assert a.features == b.features and len({a.features, b.features}) == 1
    other = model.generate_image(a.conversation, "Another.", **SHORT)
    assert other.conversation != a.conversation and other.features != a.features


def test_what_travels_has_a_short_repr(model, picture):
    turn = three_rounds(model, picture)[2]
    for value in (turn.conversation, turn.features, *turn.conversation.parts, *turn.conversation.segments):
        assert len(repr(value)) < 80 and "tensor" not in repr(value)


# --- pictures in a round ------------------------------------------------------------------------------------------


def test_a_picture_attached_in_a_later_round_is_used_and_routed_by_the_image_gate(model, picture):
    start = model.understand(Conversation(), "Hello.", **SHORT).conversation
    with_picture = model.understand(start, "What is it?", features=picture, return_logits=True, **SHORT)
    without = model.understand(start, "What is it?", return_logits=True, **SHORT)
    assert (with_picture.logits[0] - without.logits[0]).abs().max() > 0.05
    assert with_picture.conversation.images[0].drawn is False

    gates = [layer.mlp.image_gate for layer in model.network.language_model.model.layers]
    for gate in gates:
        gate.weight.data.mul_(-1)
    model.prefix_cache.clear()
    other_gate = model.understand(start, "What is it?", features=picture, return_logits=True, **SHORT)
    assert (with_picture.logits[0] - other_gate.logits[0]).abs().max() > 0.01


def test_the_newest_picture_in_view_is_not_attached_again_and_an_older_one_is(model, picture):
    first = model.understand(Conversation(), "What is it?", features=picture, **SHORT)
    again = model.understand(first.conversation, "Sure?", features=picture, **SHORT)
    assert len(again.conversation.images) == 1
    drawn = model.generate_image(first.conversation, "Make it blue.", **SHORT)
    on = model.generate_image(drawn.conversation, "Refine it.", features=drawn.features, **SHORT)
    assert [p.drawn for p in on.conversation.images] == [False, True, True]
    back = model.generate_image(on.conversation, "Make it red instead.", features=picture, **SHORT)
    assert [p.drawn for p in back.conversation.images] == [False, True, True, False, True]
    assert torch.equal(back.conversation.images[-2].features.latents, picture.latents)


def test_what_is_attached_has_memory_of_its_own(model):
    latents = torch.randn(16, model.network.flow_head.net.channels, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        one = model.mingtok.semantic_features(latents).split()[3]
    conversation = model.understand(Conversation(), "What is it?", features=one, **SHORT).conversation
    digest, attached = conversation.digest(), conversation.images[0].features
    for tensor in (attached.latents, attached.tokens):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    one.latents.zero_()
    assert conversation.digest() == digest


def test_a_prompt_that_cannot_fit_is_refused_before_all_of_it_is_tokenized(model, monkeypatch):
    encoded, exact = [], model.chat.encode
    monkeypatch.setattr(model.chat, "encode", lambda text: encoded.append(len(text)) or exact(text))
    with pytest.raises(ValueError, match=r"too long: the prompt of 20000000 characters"):
        model.understand(Conversation(), "word " * 4_000_000, **SHORT)
    assert sum(encoded) < 1_000_000


def test_an_answer_that_the_limit_ended_is_marked_and_the_transcript_has_all_of_it(model, picture):
    said = model.understand(Conversation(), "What is it?", features=picture, max_new_tokens=3)
    assert said.truncated and len(said.token_ids) == 3 and said.text
    assert said.conversation.transcript().endswith(said.text.strip())
    assert said.conversation.parts[-1].length == 2  # the last token was never forwarded
    end = model.config.llm_config.eos_token_id
    head = model.network.language_model.lm_head.weight.data
    head[end] = head[said.token_ids[0]] * 2
    model.prefix_cache.clear()
    ended = model.understand(Conversation(), "What is it?", features=picture, max_new_tokens=3)
    assert not ended.truncated and ended.token_ids == [end]


def test_a_batch_of_pictures_goes_into_one_message_before_the_text(model):
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        batch = model.mingtok.semantic_features(model.mingtok.encode(pixels))
    prompt = model.understand(Conversation(), "Compare.", features=batch, **SHORT).conversation.parts[0]
    kinds = [s.kind if isinstance(s, Text) else "picture" for s in prompt.segments]
    one = [MARK, "picture", MARK]
    assert kinds == [ROLE, *one, PROMPT, *one, PROMPT, *one, PROMPT, ROLE]
    for given, attached in zip(batch.split(), prompt.images, strict=True):
        assert torch.equal(given.latents, attached.features.latents)


def test_a_picture_is_masked_as_in_a_first_round_and_visible_to_all_from_the_next_round_on(model, picture):
    talk = model.understand(Conversation(), "Hello.", **SHORT).conversation
    shown = model.understand(talk, "What is it?", features=picture, **SHORT).conversation
    attached = shown.parts[2]
    _, unconditional, text_unconditional = guidance_masks(shown.parts[:3])
    n, past = picture.tokens.shape[1], talk.length
    role = attached.segments[0].length
    picture_columns = slice(past + role, past + role + n + 2)  # with its two marks
    assert not unconditional[picture_columns].any() and text_unconditional[picture_columns].all()
    assert not unconditional[talk.parts[0].length : past].any()  # the newest answer
    assert prompt_masks(attached)[0] == unconditional[past:].tolist()

    later = model.understand(shown, "Sure?", **SHORT).conversation
    _, unconditional, text_unconditional = guidance_masks(later.parts[:5])
    assert unconditional[: shown.length - shown.parts[3].length].all() and text_unconditional[: shown.length].all()


# --- drawing ------------------------------------------------------------------------------------------------------


def test_pictures_of_a_batch_are_the_same_as_each_seed_alone(model, picture):
    start = model.understand(Conversation(), "What is it?", features=picture, **SHORT).conversation
    together = model.generate_images(start, "Make it blue.", seeds=[7, 8, 2**64], **SHORT)
    for seed, turn in zip([7, 8, 0], together, strict=True):
        assert_same_turn(turn, model.generate_image(start, "Make it blue.", seed=seed, **SHORT))
        assert turn.features.batch == 1
    assert together[0].features != together[1].features


@pytest.mark.parametrize("guidance", [(1.0, 1.0), (3.0, 1.0), (2.0, 2.0), (0.0, 1.1), (1.0, 0.0)])
def test_a_guidance_row_whose_factor_is_zero_is_not_needed(model, picture, guidance, monkeypatch):
    options = {"features": picture, "guidance": Guidance(*guidance), **SHORT}
    lean = model.generate_image(Conversation(), "Make it blue.", **options)

    exact = Guidance.weights
    # the same velocity with every row run: a factor too small to be felt is not zero
    monkeypatch.setattr(Guidance, "weights", lambda self, rows: tuple(f or 1e-30 for f in exact(self, rows)))
    full = model.generate_image(Conversation(), "Make it blue.", **options)
    assert_same_turn(lean, full)


def test_guidance_without_text_is_held_to_the_length_of_the_conditional_velocity(model, picture, monkeypatch):
    options = {"features": picture, "guidance": Guidance(0.0, 2.0), "solver": Solver(renorm=True), **SHORT}
    lean = model.generate_image(Conversation(), "Make it blue.", **options)
    exact = Guidance.weights
    monkeypatch.setattr(Guidance, "weights", lambda self, rows: tuple(f or 1e-30 for f in exact(self, rows)))
    assert_same_turn(lean, model.generate_image(Conversation(), "Make it blue.", **options))


def test_drawing_reaches_neither_the_encoder_nor_the_pixel_decoder(model, picture):
    calls = model.mingtok.calls.copy()
    three_rounds(model, picture)
    assert model.mingtok.calls == calls


@pytest.fixture
def noises(monkeypatch):
    """The noise of every drawing, in turn."""
    drawn, exact = [], ImageDecoder.__init__

    def noted(decoder, network, cache, rows, noise, *others):
        drawn.append(noise)
        exact(decoder, network, cache, rows, noise, *others)

    monkeypatch.setattr(ImageDecoder, "__init__", noted)
    return drawn


def test_no_two_rounds_of_a_chain_share_noise_however_their_pictures_and_conversations_travel(model, picture, noises):
    asked = model.understand(Conversation(), "What is it?", features=picture, **SHORT)
    drawn = model.generate_image(asked.conversation, "Refine it.", **SHORT)
    again = model.generate_image(drawn.conversation, "Refine it.", **SHORT)
    for alone in (drawn.features, again.features):  # features handed on without their conversation
        for _ in range(3):
            alone = model.generate_image(Conversation(), "Refine it.", features=alone, **SHORT).features
    assert [turn.features.depth for turn in (drawn, again)] == [1, 2] and alone.depth == 5
    chains = (noises[:2] + noises[2:5], noises[:2] + noises[5:])
    assert all(len({noise.numpy().tobytes() for noise in chain}) == 5 for chain in chains)


def test_the_same_seed_gives_the_same_noise_to_a_branch_and_another_seed_another(model, picture, noises):
    for seed in (0, 2**64, 1):
        model.generate_image(Conversation(), "Refine it.", features=picture, seed=seed, **SHORT)
    assert torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])


def test_the_global_random_state_is_untouched(model, picture):
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    three_rounds(model, picture)
    model.understand(Conversation(), "Hello.", sampling=Sampling(1.0, 0.9), seed=3, **SHORT)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate() and (states[2] == np.random.get_state()[1]).all()


def test_noise_may_be_given_with_or_without_the_row_that_is_ignored(model):
    n, c = model.config.llm_config.num_image_tokens_for_gen, model.network.flow_head.net.channels
    noise = torch.randn(n + 1, c, generator=torch.Generator().manual_seed(1))
    a = model.generate_image(Conversation(), "A cat.", noise=noise, **SHORT)
    model.prefix_cache.clear()
    b = model.generate_image(Conversation(), "A cat.", noise=noise[:n], **SHORT)
    assert torch.equal(a.features.latents, b.features.latents)
    with pytest.raises(ValueError, match=rf"give \({n}, {c}\)"):
        model.generate_image(Conversation(), "A cat.", noise=noise[:3])
    with pytest.raises(ValueError, match=rf"noise is \(1, {n + 1}, {c}\): give \(2, {n}, {c}\)"):
        model.generate_images(Conversation(), "A cat.", seeds=[0, 1], noise=noise[None])
    with pytest.raises(ValueError, match=r"noise is \(1,\): give"):
        model.generate_image(Conversation(), "A cat.", noise=torch.tensor(1.0))
    with pytest.raises(ValueError, match="noise contains NaN or infinite values"):
        model.generate_image(Conversation(), "A cat.", noise=noise / 0, on_token=pytest.fail)


@pytest.mark.parametrize("spoilt", ["language_model.model.layers.0.attention.dense", "flow_head.vis_head.0"])
def test_a_drawing_that_outgrows_fp16_ends_in_an_error_and_leaves_nothing_in_the_cache(checkpoint_folder, spoilt):
    model = load_univision(checkpoint_folder, dtype=torch.float16)
    said = model.understand(Conversation(), "Hello.", **SHORT).conversation
    model.prefix_cache.clear()
    weight = model.network.get_submodule(spoilt).weight.data
    whole = weight.clone()
    weight.fill_(60000)
    with pytest.raises(RuntimeError, match=r"float16: choose fp32 \(or bf16\)"):
        model.generate_image(said, "A cat.", **SHORT)
    weight.copy_(whole)
    after = model.generate_image(said, "A cat.", **SHORT)
    model.prefix_cache.clear()
    assert_same_turn(after, model.generate_image(said, "A cat.", **SHORT))


@pytest.mark.parametrize(
    ("ends", "words"),
    [(True, r'answered in words and .*"draw now"'), (False, r'in 4 tokens: .* Raise max_new_tokens, .*"draw now"')],
)
def test_a_model_that_decides_not_to_draw_is_quoted_with_the_remedy(model, monkeypatch, ends, words):
    llm, exact = model.config.llm_config, model.network.language_model.logits
    never = torch.zeros(llm.vocab_size)
    never[llm.image_start_token] = float("-inf")
    never[llm.eos_token_id] = 1e9 if ends else float("-inf")
    monkeypatch.setattr(model.network.language_model, "logits", lambda hidden: exact(hidden) + never)
    said = model.understand(Conversation(), "A cat.", max_new_tokens=4).text
    with pytest.raises(NoPictureError, match=words) as error:
        model.generate_image(Conversation(), "A cat.", start="model decides", max_new_tokens=4)
    assert f'"{said}"' in str(error.value)


def test_the_text_that_progress_shows_goes_on_after_a_picture(model, monkeypatch):
    llm, exact = model.config.llm_config, model.network.language_model.logits
    script = [5, 6, llm.image_start_token, 7, 8, llm.eos_token_id]

    def scripted(hidden):
        said = torch.full_like(exact(hidden), float("-inf"))
        said[..., script.pop(0)] = 0.0
        return said

    monkeypatch.setattr(model.network.language_model, "logits", scripted)
    seen = []
    turn = model.generate_image(Conversation(), "A cat.", start="model decides", on_token=seen.append)
    assert not script and turn.token_ids[:2] == [5, 6]
    assert [p.text for p in seen if p.kind == "text"][-1] == turn.text == model.chat.decode([5, 6, 7, 8])


def test_a_long_prompt_can_be_stopped_between_its_parts_and_leaves_nothing_behind(model, picture, monkeypatch):
    monkeypatch.setattr(language_model, "PREFILL_CHUNK", 5)
    seen = []
    turn = model.understand(Conversation(), "What is it?", features=picture, on_token=seen.append, **SHORT)
    prompt = [p.done for p in seen if p.kind == "prompt"]
    assert prompt == list(range(5, turn.prefilled, 5)) and seen[len(prompt)].kind == "text"

    class Stop(BaseException):
        pass

    def stop(progress):
        assert progress.kind == "prompt"
        if progress.done == 10:
            raise Stop

    model.prefix_cache.clear()
    with pytest.raises(Stop):
        model.understand(Conversation(), "What is it?", features=picture, on_token=stop, **SHORT)
    assert model.prefix_cache.bytes == 0
    assert_same_turn(turn, model.understand(Conversation(), "What is it?", features=picture, **SHORT))


def test_progress_counts_every_token_and_raising_from_it_stops_without_harm(model, picture):
    seen = []
    turn = model.generate_image(Conversation(), "A cat.", on_token=seen.append, **SHORT)
    images = [p for p in seen if p.kind == "image"]
    assert [p.done for p in images] == list(range(1, 17)) and {p.total for p in images} == {16}
    assert torch.equal(images[-1].latents[0].T.unflatten(1, (4, 4)), turn.features.latents[0])
    assert [p.done for p in seen if p.kind == "text"] == list(range(1, len(turn.token_ids)))

    class Stop(BaseException):
        pass

    def stop(progress):
        if progress.done == 5:
            raise Stop

    model.prefix_cache.clear()
    with pytest.raises(Stop):
        model.generate_image(Conversation(), "A cat.", on_token=stop, **SHORT)
    assert_same_turn(turn, model.generate_image(Conversation(), "A cat.", **SHORT))


def test_steps_temperature_and_guidance_change_the_picture_and_none_of_them_means_the_checkpoints_steps(model):
    def latents(**options):
        return model.generate_image(Conversation(), "A cat.", **options, **SHORT).features.latents

    usual = latents()
    torch.testing.assert_close(latents(solver=Solver(steps=4)), usual, rtol=0, atol=SAME)
    for options in ({"solver": Solver(steps=2)}, {"temperature": 0.5}, {"guidance": Guidance(1.0)}):
        assert (latents(**options) - usual).abs().max() > 0.05


# --- text ---------------------------------------------------------------------------------------------------------


def test_text_is_greedy_at_temperature_zero_and_follows_the_seed_above(model):
    def ask(**options):
        return model.understand(Conversation(), "What is it?", max_new_tokens=12, **options).token_ids

    assert ask() == ask(seed=5)
    warm = {"sampling": Sampling(1.5)}
    assert ask(seed=1, **warm) == ask(seed=1, **warm)
    assert len({tuple(ask(seed=s, **warm)) for s in range(4)}) > 1
    assert ask(sampling=Sampling(1.5, top_p=0.01)) == ask()  # only the most likely token is left
    assert ask(sampling=Sampling(1e-39)) == ask(sampling=Sampling(1e-99)) == ask()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_of_no_numbers_is_refused(model, temperature):
    model.network.language_model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(RuntimeError, match="float32: the weights are damaged"):
        model.understand(Conversation(), "What is it?", sampling=Sampling(temperature), **SHORT)


def test_an_answer_ends_at_the_end_token_or_at_the_limit_and_its_last_token_is_not_in_the_conversation(model):
    turn = model.understand(Conversation(), "What is it?", max_new_tokens=3)
    assert len(turn.token_ids) == 3
    assert turn.conversation.parts[-1].length == 2
    end = model.config.llm_config.eos_token_id
    model.network.language_model.lm_head.weight.data[end] = (
        model.network.language_model.lm_head.weight.data[turn.token_ids[1]] * 2
    )
    turn = model.understand(Conversation(), "What is it?", max_new_tokens=12)
    assert turn.token_ids.index(end) == len(turn.token_ids) - 1 < 11
    assert turn.conversation.parts[-1].length == len(turn.token_ids) - 1


def test_an_answer_never_begins_a_picture(model):
    head, image = model.network.language_model.lm_head.weight.data, model.config.llm_config.image_start_token
    favourite = model.understand(Conversation(), "What is it?", max_new_tokens=1).token_ids[0]
    head[image] = head[favourite] * 3
    turn = model.understand(Conversation(), "What is it?", max_new_tokens=8, return_logits=True)
    assert turn.logits[0].argmax() == image and image not in turn.token_ids


# --- files --------------------------------------------------------------------------------------------------------


def test_a_saved_conversation_goes_on_the_same(model, picture, tmp_path, checkpoint_folder):
    _, second, third = three_rounds(model, picture)
    path = tmp_path / "sub" / "talk.safetensors"
    save_conversation(second.conversation, path)
    fresh = load_univision(checkpoint_folder)
    loaded = load_conversation(path, fresh)
    assert loaded == second.conversation and loaded.transcript() == second.conversation.transcript()
    assert loaded.depth == second.conversation.depth
    assert_same_turn(third, fresh.generate_image(loaded, "Refine it.", **SHORT))


def test_loading_runs_the_semantic_decoder_once_a_picture_and_never_the_encoder(
    model, picture, tmp_path, checkpoint_folder
):
    third = three_rounds(model, picture)[2]
    save_conversation(third.conversation, tmp_path / "talk.safetensors")
    fresh = load_univision(checkpoint_folder)
    load_conversation(tmp_path / "talk.safetensors", fresh)
    assert fresh.mingtok.calls == {"semantic": 3}


def test_a_three_round_conversation_at_full_size_is_under_200_kb(model, tmp_path):
    def full_size(seed: int) -> Features:
        latents = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(seed))
        return Features(torch.zeros(1, 256, 1024), latents, (16, 16), "t")

    parts = [model.chat.prompt([[Image(full_size(0), False)], "What is it?"])]
    for k in range(3):
        drawn = (model.chat.answer([5]), Image(full_size(k + 1), True), model.chat.answer(range(64)))
        parts += [Part(True, drawn), model.chat.prompt(["Make it blue, and a little larger, please. " * 5])]
    path = tmp_path / "talk.safetensors"
    save_conversation(Conversation(tuple(parts), "m"), path)
    assert path.stat().st_size < 200_000


def test_the_file_of_another_model_is_refused(model, tmp_path):
    talk = model.understand(Conversation(), "Hello.", **SHORT).conversation
    save_conversation(talk._replace(model="f" * 64), tmp_path / "talk.safetensors")
    with pytest.raises(ValueError, match="another model"):
        load_conversation(tmp_path / "talk.safetensors", model)


@pytest.mark.parametrize("damage", ["cut", "empty", "other kind", "no file", "missing latents"])
def test_a_damaged_conversation_file_is_named_with_the_remedy(model, picture, tmp_path, damage):
    path = tmp_path / "talk.safetensors"
    talk = model.understand(Conversation(), "What is it?", features=picture, **SHORT).conversation
    save_conversation(talk, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other kind":
        save_features(picture, path)
    elif damage == "no file":
        path.unlink()
    else:
        tensors, about = read_tensors(path, "ming conversation 1")
        write_tensors(path, {"ids": tensors["ids"]}, about)
    with pytest.raises(FileError, match=r"talk\.safetensors"):
        load_conversation(path, model)
    if damage != "other kind":
        with pytest.raises(FileError, match=r"talk\.safetensors"):
            load_features(path)


@pytest.mark.parametrize(
    "damage", ["unknown id", "negative length", "no length", "depth", "latents", "no model", "a list", "text"]
)
def test_a_conversation_file_that_lies_is_named(model, picture, tmp_path, damage):
    path = tmp_path / "talk.safetensors"
    save_conversation(model.understand(Conversation(), "What?", features=picture, **SHORT).conversation, path)
    tensors, about = read_tensors(path, "ming conversation 1")
    segments = about["parts"][0]["segments"]
    if damage == "unknown id":
        tensors["ids"][2] = model.config.llm_config.vocab_size
    elif damage == "negative length":
        segments[0]["length"] = -1
    elif damage == "no length":
        segments.insert(0, {**segments[0], "length": 0})
    elif damage == "depth":
        next(s for s in segments if "depth" in s)["depth"] = "deep"
    elif damage == "latents":
        tensors["latents.0"] = tensors["latents.0"][:-1]
    elif damage == "text":
        segments[0]["text"] = 5
    elif damage == "no model":
        del about["model"]
    write_tensors(path, tensors, about)
    if damage == "a list":
        path.write_bytes(safetensors.torch.save(tensors, {"ming": "[]"}))
    with pytest.raises(FileError, match=r"talk\.safetensors"):
        load_conversation(path, model)


def test_what_is_raised_to_stop_reading_a_conversation_is_not_taken_for_damage(model, picture, tmp_path):
    path = tmp_path / "talk.safetensors"
    save_conversation(model.understand(Conversation(), "What?", features=picture, **SHORT).conversation, path)

    def stop(done, pictures):
        raise ValueError("stopped")

    with pytest.raises(ValueError, match=r"^stopped$"):
        load_conversation(path, model, on_image=stop)


def test_saved_features_come_back_without_a_loss_and_without_a_model(model, picture, tmp_path):
    drawn = model.generate_image(Conversation(), "Make it blue.", features=picture, **SHORT).features
    save_features(drawn, tmp_path / "f.safetensors")
    loaded = load_features(tmp_path / "f.safetensors")
    assert loaded == drawn and torch.equal(loaded.tokens, drawn.tokens) and loaded.depth == 1


def test_a_failed_save_leaves_the_folder_as_it_was(model, picture, tmp_path, monkeypatch):
    save_features(picture, tmp_path / "f.safetensors")
    before = (tmp_path / "f.safetensors").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full_disk)
    with pytest.raises(FileError, match="No space left"):
        save_features(picture._replace(depth=4), tmp_path / "f.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]
    assert (tmp_path / "f.safetensors").read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
def test_a_saved_file_may_be_read_by_whom_the_umask_lets(picture, tmp_path):
    save_features(picture, tmp_path / "f.safetensors")
    (tmp_path / "plain").touch()
    assert (tmp_path / "f.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
