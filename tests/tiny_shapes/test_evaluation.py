"""The examination itself: who does everything right gets full marks, who does nothing gets none."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange
from ming_univision.ming_core.features import Features
from PIL import Image

from tiny_shapes.training import chains as chains_module
from tiny_shapes.training import evaluation
from tiny_shapes.training.chains import CHAIN_ROUNDS, chains
from tiny_shapes.training.evaluation import EXAMINATIONS, mean, photographs, share
from tiny_shapes.training.examiner import Examiner
from tiny_shapes.world import Scene, describe, draw


class Oracle(Examiner):
    """Features are the pixels themselves, and every answer and picture is the right one."""

    def features(self, pixels):
        tokens = rearrange(torch.from_numpy(pixels).float() / 255, "(h p) (w q) c -> 1 (h w) (p q c)", h=8, w=8)
        return Features(tokens, torch.zeros(1, 1, 8, 8), (8, 8), "t")

    def pixels(self, features):
        return rearrange(features.tokens[0], "(h w) (p q c) -> (h p) (w q) c", h=8, p=16, c=3).numpy()

    def answer(self, turn):
        return turn.answer

    def draw_rounds(self, turns, before=None, noises=None):
        return [SimpleNamespace(features=self.features(t.target), conversation=t.target_scene) for t in turns]


class Idler(Oracle):
    """Answers nothing and draws plain ground."""

    def answer(self, turn):
        return "nothing much"

    def draw_rounds(self, turns, before=None, noises=None):
        return [SimpleNamespace(features=self.features(np.full_like(t.target, 250)), conversation=None) for t in turns]


class Careless(Oracle):
    """Removes another thing than the one that was asked for."""

    def draw_rounds(self, turns, before=None, noises=None):
        wrong = []
        for turn in turns:
            (gone,) = set(turn.source_scene.things) - set(turn.target_scene.things)
            kept = [thing for thing in turn.source_scene.things if thing == gone] + list(turn.target_scene.things)[1:]
            picture = draw(Scene(tuple(kept), turn.source_scene.background))
            wrong.append(SimpleNamespace(features=self.features(picture), conversation=None))
        return wrong


def examiner(kind, scenes=12):
    def understand(conversation, prompt, **_):
        return SimpleNamespace(text=describe(conversation) if conversation else "")

    return kind(SimpleNamespace(understand=understand), scenes)


@pytest.mark.parametrize("name", EXAMINATIONS)
def test_who_does_everything_right_gets_full_marks(name):
    for score in EXAMINATIONS[name](examiner(Oracle)):
        if score.unit == "dB":
            assert score.value > 10
        elif "Compare" in score.name:  # cosine similarity of pixels is no fair stand-in for features
            assert 0 <= score.value <= 1
        else:
            assert (score.value == 1 and score.high == 1 and score.low < 1) or score.value == score.low == 1


@pytest.mark.parametrize("name", [n for n in EXAMINATIONS if n != "reconstruction"])
def test_who_does_nothing_gets_no_marks(name):
    for score in EXAMINATIONS[name](examiner(Idler)):
        if score.unit == "dB":
            assert score.value < 0
        elif "agrees" not in score.name and "Compare" not in score.name:
            # a white picture is nearly the region of a new background
            assert score.value <= (0.2 if "region" in score.name else 0), score


def test_who_removes_the_wrong_thing_has_not_done_as_asked(monkeypatch):
    careless = examiner(Careless)
    asked = careless.rounds(["edit/remove"], things=(2, 3))
    monkeypatch.setattr(Careless, "rounds", lambda *_, **__: asked)
    done, kept, _ = evaluation.edits(careless)
    assert done.value == kept.value == 0 and done.count == 12


def test_no_two_dialogues_of_an_examination_are_alike():
    rounds = examiner(Oracle, 200).rounds(["generate"], things=(1, 1))
    assert len({turn.target_scene.content for turn in rounds}) == len(rounds) == 200


def test_photographs_of_any_size_are_reconstructed_at_the_models_own(tmp_path):
    for i, size in enumerate([(300, 200), (90, 128)]):
        Image.effect_noise(size, 40).save(tmp_path / f"{i}.png")
    (tmp_path / "Thumbs.db").write_text("no picture")
    exam = examiner(Oracle)
    exam.model.mingtok = SimpleNamespace(native_side=128)
    score = photographs(exam, tmp_path)
    assert score.count == 2 and score.unit == "dB" and score.value > 45


def test_the_scenes_are_unseen_ones_and_the_same_at_every_call():
    first, again = (examiner(Oracle, 5).rounds(["edit"]) for _ in range(2))
    assert [t.prompt for t in first] == [t.prompt for t in again]
    assert all((a.attached == b.attached).all() for a, b in zip(first, again, strict=True))
    from tiny_shapes.world import split_of

    assert {split_of(s) for t in first for s in (t.source_scene, t.target_scene)} == {"eval"}


def test_chains_of_five_rounds_are_scored_by_round(monkeypatch):
    oracle = examiner(Oracle, 2)
    monkeypatch.setattr(
        chains_module, "WAYS", dict.fromkeys(chains_module.WAYS, lambda ex, asked, before: ex.draw_rounds(asked))
    )
    results = chains(oracle)
    assert len(results) == 3
    for chain in results:
        assert chain.table()["right"] == [1.0] * CHAIN_ROUNDS
        assert all(value > 90 or np.isnan(value) for value in chain.table()["untouched"])
    text = evaluation.report([share("a", [True, False], "90 %"), mean("b", [1.0, 3.0], "3 dB", "dB")], results)
    assert "| a | 90 % | 50.0 % |" in text and "| b | 3 dB | 2.00 dB |" in text and "feature to feature" in text


def test_intervals_hold_the_value_and_shrink_with_the_count():
    few, many = share("a", [True] * 9 + [False], ""), share("a", ([True] * 9 + [False]) * 30, "")
    assert few.low < few.value < few.high and many.high - many.low < (few.high - few.low) / 3
    assert share("a", [True] * 300, "").low > 0.98
    for count in range(1, 400):  # rounding leaves it out at some of these
        assert share("a", [True] * count, "").high == 1 and share("a", [False] * count, "").low == 0


def test_a_changed_cell_is_one_of_whose_pixels_a_quarter_changed():
    (turn,) = examiner(Oracle, 1).rounds(["edit/recolor"])
    cells = evaluation._changed_cells(turn, (8, 8))
    differs = (draw(turn.source_scene) != draw(turn.target_scene)).any(-1)
    assert cells.any() and not cells.all()
    for (i, j), marked in np.ndenumerate(cells):
        part = differs[16 * i : 16 * i + 16, 16 * j : 16 * j + 16].mean()
        assert part >= 0.25 if marked else part < 0.35  # the softest edges differ by less than what counts


def test_edits_of_a_lone_thing_have_no_share_of_things_that_stay(monkeypatch):
    oracle = examiner(Oracle, 2)
    moves = oracle.rounds(["edit/move"], things=(1, 1))
    monkeypatch.setattr(Oracle, "rounds", lambda *_: moves)
    names = [score.name for score in evaluation.edits(oracle)]
    assert "edits done as asked" in names and "objects not mentioned unchanged" not in names
