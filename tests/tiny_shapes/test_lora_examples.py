"""The examples of docs/LORA.md: what is trained on and scored, and the LoRA that comes with the pack."""

import importlib.util
import logging
from pathlib import Path

import numpy as np
import pytest

from ming_core import load_univision
from ming_core.lora import read_lora
from tiny_shapes.evaluation.evaluator import Evaluator

ROOT = Path(__file__).parents[2]
LORA = ROOT / "models" / "loras" / "tiny-shapes-houses.safetensors"


@pytest.fixture(scope="module")
def examples():
    spec = importlib.util.spec_from_file_location("lora_examples", ROOT / "docs" / "lora_examples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engine(examples):
    return load_univision(examples.MODEL)


def test_what_is_scored_was_not_trained_on(examples):
    for trained, unseen in (
        (examples.trained_houses(), examples.unseen_houses(60)),
        (examples.trained_pairs(), examples.unseen_sources(60)),
    ):
        assert not {p.content for p in trained} & {p.content for p in unseen}
        assert len({p.content for p in unseen}) == 60


def test_the_data_are_forty_captioned_pictures_sixty_pairs_and_others(examples, tmp_path):
    examples.write_data(tmp_path)
    names = {folder.name: sorted(path.name for path in folder.iterdir()) for folder in tmp_path.iterdir()}
    assert {name: len(files) for name, files in names.items() if name != "others"} == {"houses": 80, "stars": 180}
    assert all("house" in path.read_text() for path in (tmp_path / "houses").glob("*.txt"))
    others = [path.read_text() for path in (tmp_path / "others").iterdir() if path.suffix in (".txt", ".jsonl")]
    assert len(others) == examples.OTHERS and not any("house" in text for text in others)


def test_the_scorer_reads_what_was_painted(examples):
    for scene in (*examples.unseen_houses(20), *map(examples.with_stars, examples.unseen_sources(20))):
        assert examples.read(examples.paint(scene)) == examples.in_reading_order(scene)


def test_the_tokenizer_of_the_built_in_model_can_show_a_house(examples, engine):
    evaluator = Evaluator(engine, 1)
    for scene in examples.unseen_houses(10):
        pixels = evaluator.pixels(evaluator.features(examples.paint(scene)))
        assert examples.read(np.rint(pixels * 255).astype(np.uint8)) == examples.in_reading_order(scene)


def test_the_lora_that_comes_with_the_pack_fits_the_built_in_model_whole(engine, caplog):
    caplog.set_level(logging.INFO)
    lora = read_lora(LORA, engine.network)
    assert f"all of its {len(lora.layers)} layers fit" in caplog.text
    assert LORA.stat().st_size < 400_000


@pytest.mark.slow
def test_the_lora_that_comes_with_the_pack_draws_houses_and_the_model_alone_draws_none(examples, engine):
    assert examples.score_houses(engine, 5) == (0, 0)
    assert examples.score_houses(engine.with_lora(LORA), 10)[0] >= 0.7
