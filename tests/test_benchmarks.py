"""The benchmarks compare things that are equal, and what they count is right. Nothing here looks at a clock."""

import importlib
import subprocess
import sys

import pytest
import torch
from ming_univision.nodes.host import PACK

# Largest difference of latents in float32. A trained model sees what it has drawn, so rounding grows with every token.
SAME = {"golden": 3e-4, "built in": 2e-2}


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Lets benchmarks import each other, ming_core and tiny_shapes by bare names, and forgets them afterwards."""
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(PACK / "benchmarks"))
    yield
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if name.split(".")[0] in ("ming_core", "tiny_shapes", *(p.stem for p in (PACK / "benchmarks").glob("*.py"))):
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


@pytest.mark.parametrize("script", sorted((PACK / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_script_starts_and_knows_its_options(script):
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rows", [2, 3])
def test_the_plain_implementation_draws_what_ours_does(loaded, rows):
    speed, engine, same = loaded
    case = speed.make_case(engine, rows)
    assert len(case.masks) == rows
    result = engine.generate_image(
        speed.Conversation(), speed.PROMPT, features=case.features, noise=case.noise, solver=speed.Solver(speed.STEPS)
    )
    torch.testing.assert_close(case.plain(), result.features.latents[0].flatten(1).T, rtol=0, atol=same)


@pytest.mark.parametrize("rows", [2, 3])
def test_the_parts_that_are_timed_give_the_same_on_both_sides(loaded, rows):
    speed, engine, _ = loaded
    names = []
    for name, ours, plain, reads in speed.parts(speed.make_case(engine, rows)):
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
    engine = importlib.import_module("ming_core").load_univision(checkpoint_folder)
    results = list(rounds.chain(engine, rounds=5))
    assert len({result.conversation.length for result in results}) == 5
    for result in results:  # however long the past
        assert result.prefilled == result.conversation.parts[-2].length == results[0].prefilled


def test_between_two_rounds_there_is_at_most_a_third_of_the_operations_of_the_way_through_pixels():
    rounds = importlib.import_module("rounds")
    engine = importlib.import_module("reduced").reduced_model(tokens=256, depth_divisor=24)
    (previous,) = rounds.chain(engine, rounds=1)
    steps = (rounds.through_features, rounds.through_pixels)
    features, pixels = (rounds.operations(rounds.first_time(engine, step, previous)) for step in steps)
    assert 0 < features <= pixels / 3


def test_the_reduced_model_keeps_the_proportions_of_the_published_one():
    reduced = importlib.import_module("reduced")
    full, small = reduced.UniVisionConfig(), reduced.reduced_config()
    sizes = []
    for config, hidden in ((full, None), (small, reduced.FLOW_HIDDEN)):
        network = reduced.UniVision(config, flow_hidden=hidden, device="meta")
        head, layers = network.flow_head.net, network.language_model.model.layers
        sizes.append([sum(p.numel() for p in m.parameters()) for m in (head, layers, network.mingtok.semantic_decoder)])
    shares = [[n / sum(of) for n in of] for of in sizes]
    assert shares[1] == pytest.approx(shares[0], rel=0.05)


def test_the_second_order_rules_are_nearer_to_the_reference_than_euler_on_the_built_in_model():
    steps = importlib.import_module("steps")
    engine = steps.load_univision(PACK / "models" / "tiny-shapes")
    drawn = []
    with steps.recording(drawn):
        engine.generate_image(importlib.import_module("speed").Conversation(), "a large red circle", max_new_tokens=1)
    assert len(drawn) == engine.config.llm_config.num_image_tokens_for_gen
    drawn = drawn[::4]

    def error(evaluations, method):
        """Median and root mean square."""
        return steps.token_error(engine.network.flow_head, drawn, steps.Solver(evaluations, method))

    euler = error(16, "euler")
    assert 0 < error(16, "ab2")[0] < euler[0]
    assert all(0 < x < of_euler for x, of_euler in zip(error(8, "data_ab2"), euler, strict=True))
    assert error(4, "data_ab2")[1] < error(4, "euler")[1]
    assert steps.token_error(engine.network.flow_head, drawn, steps.REFERENCE) == (0, 0)


@pytest.mark.slow
def test_two_checkouts_are_compared_round_by_round(capsys, monkeypatch):
    compare = importlib.import_module("compare")
    monkeypatch.setattr(sys, "argv", ["compare.py", str(PACK), str(PACK), "--repeats", "2", "--only", "understand"])
    compare.main()
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| understand")]
    assert row.endswith("| same text |")
    with pytest.raises(SystemExit, match="no ming_core"):
        compare.Worker(PACK / "benchmarks", compare.Settings(PACK / "models" / "tiny-shapes", "fp32", None, 1))
