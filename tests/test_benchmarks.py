"""What the benchmarks compare is the same thing, and what they count holds. Nothing here looks at a clock."""

import importlib
import sys

import pytest
import torch
from ming_univision.nodes.host import PACK

# Latents, float32. What a trained model has drawn it sees, so that rounding grows from token to token.
SAME = {"golden": 3e-4, "built in": 2e-2}


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """They import one another, and ming_core, by bare names."""
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(PACK / "benchmarks"))
    yield
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if name.split(".")[0] in ("ming_core", *(p.stem for p in (PACK / "benchmarks").glob("*.py"))):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["golden", "built in"])
def loaded(request, checkpoint_folder, monkeypatch):
    speed = importlib.import_module("speed")
    monkeypatch.setattr(speed, "STEPS", 4)
    folder = checkpoint_folder if request.param == "golden" else PACK / "models" / "tiny-shapes"
    return speed, importlib.import_module("ming_core").load_univision(folder), SAME[request.param]


@pytest.mark.parametrize("rows", [2, 3])
def test_the_plain_implementation_draws_what_ours_does(loaded, rows):
    speed, model, same = loaded
    case = speed.make_case(model, rows)
    assert len(case.views) == rows
    turn = model.generate_image(
        speed.Conversation(), speed.PROMPT, features=case.features, noise=case.noise, solver=speed.Solver(speed.STEPS)
    )
    torch.testing.assert_close(case.plain(), turn.features.latents[0].flatten(1).T, rtol=0, atol=same)


@pytest.mark.parametrize("rows", [2, 3])
def test_the_parts_that_are_timed_give_the_same_on_both_sides(loaded, rows):
    speed, model, _ = loaded
    names = []
    for name, ours, plain, reads in speed.parts(speed.make_case(model, rows)):
        speed.check_equal(name, ours, plain)
        names.append(name)
        assert (reads > 1) == ("flow head" in name)
    assert len(names) == 3
    with pytest.raises(RuntimeError, match="differ by"):
        speed.check_equal("other", ours, lambda plain=plain: plain() + 0.1)
    with pytest.raises(RuntimeError, match="differ by nan"):
        speed.check_equal("other", ours, lambda plain=plain: plain() * float("nan"))


def test_five_rounds_prefill_only_what_is_new(checkpoint_folder):
    rounds = importlib.import_module("rounds")
    model = importlib.import_module("ming_core").load_univision(checkpoint_folder)
    turns = list(rounds.chain(model, rounds=5))
    assert len({turn.conversation.length for turn in turns}) == 5
    for turn in turns:  # however long the past
        assert turn.prefilled == turn.conversation.parts[-2].length == turns[0].prefilled


def test_between_two_rounds_there_is_at_most_a_third_of_the_operations_of_the_way_through_pixels():
    rounds = importlib.import_module("rounds")
    model = importlib.import_module("reduced").reduced_model(tokens=256, shallower=24)
    (before,) = rounds.chain(model, rounds=1)
    steps = (rounds.next_round, rounds.through_pixels)
    features, pixels = (rounds.operations(rounds.as_new(model, step, before)) for step in steps)
    assert 0 < features <= pixels / 3


def test_the_reduced_model_keeps_the_proportions_of_the_published_one():
    reduced = importlib.import_module("reduced")
    speed = importlib.import_module("speed")
    full, small = reduced.UniVisionConfig(), reduced.reduced_config()
    sizes = []
    for config, hidden in ((full, None), (small, reduced.FLOW_HIDDEN)):
        model = speed.UniVision(config, flow_hidden=hidden, device="meta")
        head, layers = model.flow_head.net, model.language_model.model.layers
        sizes.append([sum(p.numel() for p in m.parameters()) for m in (head, layers, model.mingtok.semantic_decoder)])
    shares = [[n / sum(of) for n in of] for of in sizes]
    assert shares[1] == pytest.approx(shares[0], rel=0.05)


def test_ab2_is_nearer_to_the_reference_than_euler_on_the_built_in_model():
    steps = importlib.import_module("steps")
    model = importlib.import_module("ming_core").load_univision(PACK / "models" / "tiny-shapes")
    drawn = []
    with steps.recording(drawn):
        model.generate_image(importlib.import_module("speed").Conversation(), "a large red circle", max_new_tokens=1)
    assert len(drawn) == model.config.llm_config.num_image_tokens_for_gen
    drawn = drawn[::8]
    euler, ab2 = (steps.token_error(model.flow_head, drawn, steps.Solver(16, m))[0] for m in steps.METHODS)
    assert 0 < ab2 < euler
    assert steps.token_error(model.flow_head, drawn, steps.REFERENCE) == (0, 0)
