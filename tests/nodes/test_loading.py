"""Checkpoint folders: where they are found, under which names; progress and interruption while one is loaded."""

import gc
import os
import shutil
import sys

import pytest
import torch
from ming_univision.ming_core import MingTok, UniVision, load_mingtok, save_mingtok
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host, models
from ming_univision.nodes.models import BUILT_IN

needs_links = pytest.mark.skipif(os.name == "nt", reason="making links takes a right that few users have there")


@pytest.fixture
def put(tmp_path, monkeypatch, checkpoint_folder):
    """put("a/b"): a small checkpoint in that folder. The loaders look into tmp_path / "models"."""
    monkeypatch.setattr(host, "model_folders", lambda: [tmp_path / "models"])
    return lambda name: shutil.copytree(checkpoint_folder, tmp_path / name)


def names() -> list[str]:
    first, *others = models.find_checkpoints("univision")
    assert first == BUILT_IN
    return others


def load(name: str, precision: str = "fp32") -> host.Loaded:
    return NODE_CLASS_MAPPINGS["MingUniVisionLoader"]().load(model_name=name, precision=precision)[0]


# --- Found --------------------------------------------------------------------------------------------------------


@needs_links
def test_a_checkpoint_behind_a_link_is_found_under_the_links_name(put, tmp_path):
    (tmp_path / "models" / "sub").mkdir(parents=True)
    put("elsewhere/x")
    (tmp_path / "models" / "linked").symlink_to(tmp_path / "elsewhere" / "x", target_is_directory=True)
    (tmp_path / "models" / "sub" / "all").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert names() == ["linked", "sub/all/x"]


@needs_links
def test_links_that_lead_in_a_circle_come_to_an_end(put, tmp_path):
    put("models/a")
    put("elsewhere/b")
    (tmp_path / "models" / "a" / "up").symlink_to(tmp_path / "models", target_is_directory=True)
    (tmp_path / "models" / "out").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "models", target_is_directory=True)
    assert names() == ["a", "out/b"]


def test_a_checkpoint_that_is_itself_a_model_folder_has_its_own_name(put, tmp_path, monkeypatch):
    folder = put("mine")
    monkeypatch.setattr(host, "model_folders", lambda: [folder])
    assert names() == ["mine"]


def test_two_checkpoints_of_one_name_are_told_apart_and_one_that_is_reached_twice_is_listed_once(
    put, tmp_path, monkeypatch
):
    roots = [tmp_path / "models", tmp_path / "more", tmp_path / "other" / "mine", tmp_path / "models" / "mine"]
    for name in ("models/mine", "more/mine", "other/mine"):
        put(name)
    monkeypatch.setattr(host, "model_folders", lambda: roots)
    assert models.find_checkpoints("univision") == {
        BUILT_IN: models.BUILT_IN_FOLDER,
        "mine": roots[0] / "mine",
        "more/mine": roots[1] / "mine",
        "other/mine": roots[2],
    }


def test_a_checkpoint_in_the_packs_own_models_folder_is_found_too(put, tmp_path, monkeypatch):
    put("pack/models/fetched before the pack lay in ComfyUI")
    monkeypatch.setattr(models, "BUILT_IN_FOLDER", tmp_path / "pack" / "models" / "tiny-shapes")
    assert names() == ["fetched before the pack lay in ComfyUI"]


def test_the_mingtok_of_a_whole_model_can_be_loaded_alone(put):
    put("models/b whole")
    folder = put("models/a whole")
    save_mingtok(load_mingtok(folder), folder.with_name("c alone"))
    assert list(models.find_checkpoints("mingtok")) == [BUILT_IN, "c alone", "a whole", "b whole"]
    assert names() == ["a whole", "b whole"]
    (loaded,) = NODE_CLASS_MAPPINGS["MingTokLoader"]().load(model_name="a whole", precision="fp32")
    (alone,) = NODE_CLASS_MAPPINGS["MingTokLoader"]().load(model_name="c alone", precision="fp32")
    assert isinstance(loaded.model, MingTok) and loaded.model.fingerprint == alone.model.fingerprint


def test_the_mingtok_of_a_quantized_model_is_as_exact_as_any(put, monkeypatch):
    folder = put("models/quantized")
    monkeypatch.setattr(models, "stored_quantization", lambda folder: "int4")
    assert models.choose_precision("auto", "mingtok", folder) == (torch.float32, None)
    assert models.choose_precision("auto", "univision", folder) == (torch.bfloat16, None)


def test_a_precision_that_is_not_offered_is_refused(put):
    put("models/x")
    for precision in ("int2", "BF16", None):
        with pytest.raises(ValueError, match=r"precision is .*: choose one of .*'int4'"):
            load("x", precision)


def test_the_command_for_an_absent_model_names_the_python_that_runs():
    assert f'"{sys.executable}" "{host.PACK / "quickstart.py"}" download' in models.missing_message("x", "univision")


@pytest.mark.parametrize("node", ["MingTokLoader", "MingUniVisionLoader"])
def test_a_linked_name_is_looked_for_only_when_it_is_known(node):
    node = NODE_CLASS_MAPPINGS[node]
    assert node.VALIDATE_INPUTS(model_name=None) is True


def test_behind_a_linked_name_the_model_is_loaded_again_only_when_any_has_changed(put):
    node = NODE_CLASS_MAPPINGS["MingUniVisionLoader"]
    put("models/mine")
    state = node.IS_CHANGED(model_name=None, precision=None)
    assert node.IS_CHANGED(model_name=None, precision=None) == state
    put("models/other")
    assert node.IS_CHANGED(model_name=None, precision=None) != state


# --- Loaded -------------------------------------------------------------------------------------------------------


def test_one_way_to_hold_the_weights_is_loaded_once_whatever_the_precision_is_called(put):
    put("models/mine")
    auto = load("mine", "auto")
    assert load("mine", "fp32") is auto
    assert load("mine", "bf16") is not auto


@pytest.mark.parametrize("node", ["MingTokLoader", "MingUniVisionLoader"])
def test_the_bar_moves_while_a_model_is_loaded_and_comes_to_its_end(put, monkeypatch, node):
    told = []
    monkeypatch.setattr(host, "progress", lambda total: lambda value: told.append((value, total)))
    if node == "MingUniVisionLoader":
        put("models/mine")
        load("mine")
    else:
        NODE_CLASS_MAPPINGS[node]().load(model_name=BUILT_IN, precision="fp16")
    assert told == sorted(told) and told[-1] == (100, 100) and len(set(told)) > 20


def test_an_interrupt_while_a_model_is_loaded_leaves_nothing_behind(put, monkeypatch):
    class Interrupted(BaseException):
        pass

    def stop(value):
        if value > 50:
            raise Interrupted

    def networks() -> int:
        return sum(type(o) is UniVision for o in gc.get_objects())

    put("models/mine")
    gc.collect()  # what other tests have left
    before, live = networks(), dict(models._live)
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(host, "progress", lambda total: stop)
        load("mine")
    del caught
    assert networks() == before and dict(models._live) == live
    assert load("mine").model.fingerprint
