"""The evaluation itself: a model that does everything right gets full marks, one that does nothing gets none."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from ming_core import Features
from tiny_shapes.evaluation import chains as chains_module
from tiny_shapes.evaluation import judging, report, suite
from tiny_shapes.evaluation.__main__ import main
from tiny_shapes.evaluation.chains import CHAIN_ROUNDS, evaluate_chains
from tiny_shapes.evaluation.evaluator import Evaluator
from tiny_shapes.evaluation.scores import mean, share
from tiny_shapes.evaluation.suite import SUITE, photographs
from tiny_shapes.world import Scene, SceneObject, describe, draw, read_region, read_scene, split_of, to_patches
from tiny_shapes.world.masking import grown


class Oracle(Evaluator):
    """Its features are the pixels themselves, and every answer and image is the right one."""

    def features(self, pixels):
        tokens = rearrange(torch.from_numpy(pixels).float() / 255, "(h p) (w q) c -> 1 (h w) (p q c)", h=8, w=8)
        return Features(tokens, torch.zeros(1, 1, 8, 8), (8, 8), "t")

    def pixels(self, features):
        return rearrange(features.tokens[0], "(h w) (p q c) -> (h p) (w q) c", h=8, p=16, c=3).numpy()

    def answer(self, task):
        return task.answer

    def says(self, task):
        return task.answer

    def region_mask(self, before, region):
        """Where a drawn region is bright, and the tokens beside it."""
        return grown(to_patches(read_region(self.pixels(region))), 1)

    def same_words(self, one, other):
        return one.split() == other.split()

    def draw(self, tasks, previous=None, noises=None, seeds=None):
        return [SimpleNamespace(features=self.features(t.target), conversation=t.target_scene) for t in tasks]


class Idler(Oracle):
    """It answers nothing and draws a plain background."""

    def answer(self, task):
        return "nothing much"

    def says(self, task):
        return "nothing much"

    def draw(self, tasks, previous=None, noises=None, seeds=None):
        return [SimpleNamespace(features=self.features(np.full_like(t.target, 250)), conversation=None) for t in tasks]


class Careless(Oracle):
    """It removes another object than the one that was asked for."""

    def draw(self, tasks, previous=None, noises=None, seeds=None):
        wrong = []
        for task in tasks:
            (gone,) = set(task.source_scene.objects) - set(task.target_scene.objects)
            kept = [obj for obj in task.source_scene.objects if obj == gone] + list(task.target_scene.objects)[1:]
            image = draw(Scene(tuple(kept), task.source_scene.background))
            wrong.append(SimpleNamespace(features=self.features(image), conversation=None))
        return wrong


def evaluator(kind, scenes=12):
    def understand(conversation, prompt, **_):
        return SimpleNamespace(text=describe(conversation) if conversation else "")

    return kind(SimpleNamespace(understand=understand), scenes)


@pytest.mark.parametrize("name", SUITE)
def test_a_model_that_does_everything_right_gets_full_marks(name):
    for score in SUITE[name](evaluator(Oracle)):
        if score.unit == "dB":
            assert score.value > 10
        elif "Compare" in score.name:  # cosine similarity of pixels is no fair stand-in for features
            assert 0 <= score.value <= 1
        else:
            assert (score.value == 1 and score.high == 1 and score.low < 1) or score.value == score.low == 1


@pytest.mark.parametrize("name", [n for n in SUITE if n != "reconstruction"])
def test_a_model_that_does_nothing_gets_no_marks(name):
    for score in SUITE[name](evaluator(Idler)):
        if score.unit == "dB":
            assert score.value < 0
        elif "agrees" not in score.name and "Compare" not in score.name:
            # a white image is nearly the region of a new background
            assert score.value <= (0.2 if "region" in score.name else 0), score


@pytest.mark.parametrize(
    ("words", "agrees"),
    [
        ("a green circle and a square", True),
        ("square, circle", True),
        ("a small green circle at the left and a green square on navy", True),
        ("a green square at the left and a circle", False),  # the other way round
        ("a red circle and a square", False),
        ("a green circle and a green star", False),
        ("a green circle", False),  # the square is too many
        ("a green circle, a square and a square", False),
    ],
)
def test_a_drawing_is_judged_as_far_as_the_words_go(words, agrees):
    objects = (SceneObject("circle", "green", "large", "left"), SceneObject("square", "green", "large", "centre"))
    scene = Scene(objects, "white")
    assert judging.shows_what_words_name(read_scene(draw(scene)), words) is agrees


def test_a_model_that_removes_the_wrong_object_has_not_done_as_asked(monkeypatch):
    careless = evaluator(Careless)
    tasks = careless.tasks(["edit/remove"], objects=(2, 3))
    monkeypatch.setattr(Careless, "tasks", lambda *_, **__: tasks)
    done, kept, _ = suite.edits(careless)
    assert done.value == kept.value == 0 and done.count == 12


class Shifty(Oracle):
    """It draws what is asked for, unless there is an addition, and leaves a seam in what it completes."""

    def draw(self, tasks, previous=None, noises=None, seeds=None):
        results = super().draw(tasks)
        plain = {task.prompt for task in self.tasks(["generate"])}
        for i, task in enumerate(tasks):
            image = task.target.copy()
            if task.name == "complete":
                image[60:64] = 128 - image[60:64] // 2
            elif task.prompt not in plain:
                image[:] = 250
            results[i].features = self.features(image)
        return results


def test_what_additions_spoil_is_counted_against_the_drawings_that_are_right_without():
    (score,) = suite.additions(evaluator(Shifty))
    assert score.value < 0.2 and score.count == 12


def test_only_what_is_other_tokens_to_the_model_is_drawn_again():
    drawn = []

    class Counting(Oracle):
        def draw(self, tasks, previous=None, noises=None, seeds=None):
            drawn.append([] if seeds is None else list(seeds))
            return super().draw(tasks)

    (score,) = suite.ways_to_type(evaluator(Counting, 40))
    assert score.value == 1 and drawn[0] == [] and 0 < len(drawn[1]) < 40, "tabs are the same to its `same_words`"


def test_a_restored_image_with_a_wrong_color_gains_decibels_but_is_not_right():
    class WrongColor(Oracle):
        def draw(self, tasks, previous=None, noises=None, seeds=None):
            wrong = []
            for task in tasks:
                first, *others = task.target_scene.objects
                recolored = replace(first, color="cyan" if first.color != "cyan" else "pink")
                image = draw(replace(task.target_scene, objects=(recolored, *others)))
                wrong.append(SimpleNamespace(features=self.features(image), conversation=None))
            return wrong

    gained, right = list(suite.enhancements(evaluator(WrongColor)))[2:4]
    assert (gained.name, right.name) == ("denoise, PSNR gained over the input", "denoise with every object right")
    assert gained.value > 0 and right.value == 0


def test_a_seam_that_the_scorer_sees_is_no_completion():
    (score,) = suite.completions(evaluator(Shifty))
    assert score.value < 0.2


def test_a_region_is_followed_by_the_edit_that_it_was_asked_for_inside_it_and_by_the_same_without_it():
    seen = []

    class Recording(Oracle):
        def draw(self, tasks, previous=None, noises=None, seeds=None):
            seen.append((tasks, previous))
            return super().draw(tasks)

    list(suite.regions_then_edits(evaluator(Recording)))
    (asked, _), (edits, regions), (whole, previous) = seen
    assert len(asked) == len(edits) == len(regions) == len(whole) == 12
    assert previous is None and [edit.prompt for edit in edits] == [edit.prompt for edit in whole]
    assert all(edit.mask is None and edit.attached is not None for edit in whole)
    for region, edit in zip(asked, edits, strict=True):
        assert region.name == "identify region" and len(region.source_scene.objects) > 1
        assert edit.source_scene == region.source_scene and edit.attached is region.attached
        changed = (draw(edit.source_scene) != draw(edit.target_scene)).any(-1)
        assert edit.mask is None or (edit.mask[changed].mean() > 0.95 and not edit.mask.all())


def test_no_two_dialogues_of_a_measurement_are_alike():
    tasks = evaluator(Oracle, 200).tasks(["generate"], objects=(1, 1))
    assert len({task.target_scene.content for task in tasks}) == len(tasks) == 200


def test_photographs_of_any_size_are_reconstructed_at_the_models_own(tmp_path):
    for i, size in enumerate([(300, 200), (90, 128)]):
        Image.effect_noise(size, 40).save(tmp_path / f"{i}.png")
    (tmp_path / "Thumbs.db").write_text("not an image")
    oracle = evaluator(Oracle)
    oracle.engine.mingtok = SimpleNamespace(native_side=128)
    score = photographs(oracle, tmp_path)
    assert score.count == 2 and score.unit == "dB" and score.value > 45


def test_the_scenes_are_unseen_ones_and_the_same_at_every_call():
    first, again = (evaluator(Oracle, 5).tasks(["edit"]) for _ in range(2))
    assert [t.prompt for t in first] == [t.prompt for t in again]
    assert all((a.attached == b.attached).all() for a, b in zip(first, again, strict=True))
    assert {split_of(s) for t in first for s in (t.source_scene, t.target_scene)} == {"eval"}


def test_chains_of_five_rounds_are_scored_by_round(monkeypatch):
    oracle = evaluator(Oracle, 2)
    monkeypatch.setattr(
        chains_module, "WAYS", dict.fromkeys(chains_module.WAYS, lambda oracle, tasks, previous: oracle.draw(tasks))
    )
    results = evaluate_chains(oracle)
    assert len(results) == 3
    for chain in results:
        assert chain.table()["right"] == [1.0] * CHAIN_ROUNDS
        assert all(value > 90 or np.isnan(value) for value in chain.table()["untouched"])
    text = report.table([share("a", [True, False], "90 %"), mean("b", [1.0, 3.0], "3 dB", "dB")], results)
    assert "| a | 90 % | 50.0 % |" in text and "| b | 3 dB | 2.00 dB |" in text and "feature to feature" in text


def test_the_untouched_area_of_a_chain_is_what_none_of_its_edits_changes(monkeypatch):
    oracle = evaluator(Oracle, 6)
    dialogues = oracle.dialogues(["edit"], rounds=CHAIN_ROUNDS)
    drawn = iter(range(CHAIN_ROUNDS))

    def draw_round(oracle, tasks, previous):
        """All that the other rounds change is drawn wrong in this one."""
        number, wrong = next(drawn), []
        for dialogue, task in zip(dialogues, tasks, strict=True):
            images = [dialogue.tasks[0].attached, *(other.target for other in dialogue.tasks)]
            others = [(images[k + 1] != images[k]).any(-1) for k in range(CHAIN_ROUNDS) if k != number]
            spoilt = np.logical_or.reduce(others)[..., None]
            wrong.append(replace(task, target=np.where(spoilt, 255 - task.target, task.target)))
        return oracle.draw(wrong)

    monkeypatch.setattr(chains_module, "WAYS", {"wrong elsewhere": draw_round})
    (chain,) = evaluate_chains(oracle)
    assert np.nanmin(chain.table()["untouched"]) > 90


def test_intervals_hold_the_value_and_shrink_with_the_count():
    some, many = share("a", [True] * 9 + [False], ""), share("a", ([True] * 9 + [False]) * 30, "")
    assert some.low < some.value < some.high and many.high - many.low < (some.high - some.low) / 3
    assert share("a", [True] * 300, "").low > 0.98
    for count in range(1, 400):  # rounding leaves it out at some of these
        assert share("a", [True] * count, "").high == 1 and share("a", [False] * count, "").low == 0


def test_a_changed_cell_is_one_of_whose_pixels_a_quarter_changed():
    (task,) = evaluator(Oracle, 1).tasks(["edit/recolor"])
    cells = suite._changed_cells(task, (8, 8))
    differs = (draw(task.source_scene) != draw(task.target_scene)).any(-1)
    assert cells.any() and not cells.all()
    for (i, j), marked in np.ndenumerate(cells):
        part = differs[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].mean()
        assert part >= 0.25 if marked else part < 0.35  # the softest edges differ by less than what counts


def test_edits_of_a_lone_object_have_no_share_of_objects_that_stay(monkeypatch):
    oracle = evaluator(Oracle, 2)
    moves = oracle.tasks(["edit/move"], objects=(1, 1))
    monkeypatch.setattr(Oracle, "tasks", lambda *_: moves)
    names = [score.name for score in suite.edits(oracle)]
    assert "edits done as asked" in names and "objects not mentioned unchanged" not in names


def test_the_command_evaluates_what_it_is_asked_for_and_writes_it(monkeypatch, tmp_path):
    monkeypatch.setattr("tiny_shapes.evaluation.__main__.Evaluator", Oracle)
    (engine := evaluator(Oracle).engine).prefix_cache = SimpleNamespace(clear=lambda: None)
    monkeypatch.setattr("tiny_shapes.evaluation.__main__.load_univision", lambda folder: engine)
    assert main(["--scenes", "3", "--only", "questions", "edits", "--out", str(tmp_path)]) == 0
    written = (tmp_path / "evaluation.md").read_text()
    assert "| questions answered exactly | 95 % | 100.0 % |" in written and "| edits done as asked |" in written
    assert (tmp_path / "evaluation.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"), [(["--scenes", "0"], "at least 1"), (["--photographs", "."], "there are no images")]
)
def test_the_command_refuses_what_makes_no_sense(arguments, complaint, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert complaint in capsys.readouterr().err


def test_the_command_names_a_folder_without_a_model(tmp_path):
    with pytest.raises(SystemExit, match=str(tmp_path)):
        main(["--model", str(tmp_path), "--scenes", "1"])
