"""Quantizing a checkpoint folder: complete or not at all, and what is said."""

from __future__ import annotations

import pytest
import torch
from ming_univision.ming_core import load_univision
from ming_univision.ming_core.checkpoint import stored_quantization
from ming_univision.runner import quantize


@pytest.fixture
def target(tmp_path):
    return tmp_path / "small"


def test_the_new_folder_is_quantized_and_has_the_fingerprint_of_the_original(checkpoint_folder, target, capsys):
    assert quantize.main(checkpoint_folder, target) == 0
    assert stored_quantization(target) == "int4"
    assert load_univision(target, dtype=torch.bfloat16).fingerprint == load_univision(checkpoint_folder).fingerprint
    said, bars = capsys.readouterr()
    assert "Reading" in said and "Writing" in said and f"Done: {target} is complete" in said
    assert bars == ""  # there is no terminal


def test_a_folder_that_exists_is_refused_and_left_alone(checkpoint_folder, target, capsys):
    target.mkdir()
    assert quantize.main(checkpoint_folder, target, "int8") == 2
    assert "exists already" in capsys.readouterr().out and not list(target.iterdir())


def test_a_source_that_is_no_checkpoint_is_an_error_that_leaves_nothing(target, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert quantize.main(tmp_path / "empty", target) == 1
    assert "Failed:" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_interrupted_run_leaves_nothing_and_what_a_killed_run_left_is_no_obstacle(
    checkpoint_folder, target, monkeypatch
):
    left = target.parent / ".small.ming-new"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").touch()

    def interrupted(model, to, *args, **kwargs):
        (to / "model.safetensors").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "save_univision", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize.main(checkpoint_folder, target)
    assert not target.exists() and not left.exists()
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").touch()
    assert quantize.main(checkpoint_folder, target) == 0 and not left.exists()
    assert not list(target.glob("*-of-*"))
