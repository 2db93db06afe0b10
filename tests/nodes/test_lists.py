"""The lists of checkpoints and saved files: one bad file or folder is left out, with one line in the log."""

import json
import os
import shutil
import sys

import pytest
import torch
from ming_univision.ming_core import FileError, load_univision, save_features
from ming_univision.ming_core.features import Features
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host, models
from ming_univision.nodes.saved_files import saved_files, saved_path

pytestmark = pytest.mark.skipif(os.name == "nt", reason="makes pipes, links and names that are not there")
surrogates = pytest.mark.skipif(sys.platform == "darwin", reason="disks there refuse names that are not Unicode")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """models/, input/ and output/ming/ of this test."""
    for name in ("models", "input", "output/ming"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(host, "model_folders", lambda: [tmp_path / "models"])
    with host.folders(output=tmp_path / "output", input=tmp_path / "input"):
        yield tmp_path


@pytest.fixture
def unreadable(monkeypatch):
    """unreadable(folder): the system refuses to list it, also to root."""
    refused, scandir = set(), os.scandir

    def guarded(path="."):
        if str(path) in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    return lambda folder: refused.add(str(folder))


def left_out(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "is left out of the list" in r.getMessage()]


def answers() -> dict[str, dict]:
    """What /object_info is made of."""
    return {name: node.INPUT_TYPES() for name, node in NODE_CLASS_MAPPINGS.items()}


# --- Checkpoints --------------------------------------------------------------------------------------------------


@surrogates
def test_bad_folders_are_left_out_of_the_list_of_models_with_one_line_each_however_often_it_is_asked_for(
    folders, checkpoint_folder, caplog, unreadable
):
    root = folders / "models"
    good = shutil.copytree(checkpoint_folder, root / "good")

    def bad(name):
        (root / name).mkdir()
        return root / name / "config.json"

    os.mkfifo(bad("pipe"))
    bad("folder").mkdir()
    bad("device").symlink_to("/dev/zero")
    bad("broken").symlink_to("nowhere")
    bad("loop").symlink_to("config.json")
    bad("huge").write_bytes(b"[" + b"0," * (10 << 20) + b"0]")
    bad("deep").write_text("[" * 100_000)
    bad("text").write_text("{nope")
    bad("\udcff").write_bytes((good / "config.json").read_bytes())
    bad("latin").write_bytes(b'{"llm_config": "\xe9"}')
    (root / "round").symlink_to(root / "round")
    unreadable(root / "empty")
    (root / "empty").mkdir()
    for _ in range(3):
        assert answers()["MingUniVisionLoader"]["required"]["model_name"][0] == [models.BUILT_IN, "good"]
        assert answers()["MingTokLoader"]["required"]["model_name"][0] == [models.BUILT_IN, "good"]
    lines = left_out(caplog)
    named = ("pipe", "folder", "device", "broken", "loop", "huge", "deep", "text", r"\udcff", "latin", "empty")
    assert [[name for name in named if f"models/{name} is left out" in line] for line in sorted(lines)] == [
        [name] for name in sorted(named, key=lambda name: f"models/{name} ")
    ]
    (root / "text" / "config.json").write_text("[1, nope]")
    answers()
    assert len(left_out(caplog)) == len(lines) + 1  # another fault: it is said again
    shutil.copy(good / "config.json", root / "text" / "config.json")
    assert list(models.find_checkpoints("univision")) == [models.BUILT_IN, "good", "text"]


def test_links_among_folders_cannot_make_the_list_endless(folders):
    root = folders / "models"
    for a in "abcdefghij":
        (root / a).mkdir()
    for a in "abcdefghij":
        for b in "abcdefghij":
            (root / a / b).symlink_to(root / b)
    assert list(models.find_checkpoints("univision")) == [models.BUILT_IN]


def test_folders_in_folders_without_end_do_not_break_the_list(folders, checkpoint_folder):
    shutil.copytree(checkpoint_folder, folders / "models" / "good")
    deep = folders / "models"
    for _ in range(300):
        deep = deep / "d"
    deep.mkdir(parents=True)
    assert list(models.find_checkpoints("univision")) == [models.BUILT_IN, "good"]


def test_a_snapshot_in_the_cache_of_the_hub_is_listed_and_loads(folders, checkpoint_folder):
    cache = folders / "models" / "models--x--Tiny-HF"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, name in enumerate(("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")):
        shutil.copy(checkpoint_folder / name, cache / "blobs" / str(i))
        (snapshot / name).symlink_to(os.path.join("..", "..", "blobs", str(i)))
    name = "models--x--Tiny-HF/snapshots/abc"
    assert list(models.find_checkpoints("univision")) == [models.BUILT_IN, name]
    (model, _) = NODE_CLASS_MAPPINGS["MingUniVisionLoader"]().load(model_name=name, precision="fp32")
    assert model.model.fingerprint == load_univision(checkpoint_folder).fingerprint


@pytest.mark.parametrize("name", ["tiny-hf", "TINY-HF", "sub\\Other", "SUB/other"])
def test_another_capitalization_is_asked_about_and_nobody_is_sent_to_download(folders, checkpoint_folder, name):
    shutil.copytree(checkpoint_folder, folders / "models" / "Tiny-HF")
    shutil.copytree(checkpoint_folder, folders / "models" / "sub" / "Other")
    meant = "Tiny-HF" if "hf" in name.lower() else "sub/Other"
    verdict = NODE_CLASS_MAPPINGS["MingUniVisionLoader"].VALIDATE_INPUTS(model_name=name)
    assert f'did you mean "{meant}"?' in verdict and "download" not in verdict
    with pytest.raises(ValueError, match="did you mean"):
        NODE_CLASS_MAPPINGS["MingUniVisionLoader"]().load(model_name=name, precision="fp32")


def test_a_name_that_is_close_to_one_is_asked_about_too(folders, checkpoint_folder):
    shutil.copytree(checkpoint_folder, folders / "models" / "Ming-UniVision-16B")
    verdict = models.missing_message("Ming-UniVision-16B-A3B", "univision")
    assert verdict.startswith('did you mean "Ming-UniVision-16B"? ')
    assert "was not found. Put its folder" in verdict and "quickstart.py" in verdict


def test_why_a_folder_is_not_in_the_list_is_said_and_nobody_is_sent_to_download_it(folders):
    (folders / "models" / "mine").mkdir()
    (folders / "models" / "mine" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    verdict = NODE_CLASS_MAPPINGS["MingUniVisionLoader"].VALIDATE_INPUTS(model_name="mine")
    assert "mine/config.json has no llm_config" in verdict and "download" not in verdict
    (folders / "secret.json").write_text("{")
    assert "was not found" in models.missing_message("../secret", "univision")


@pytest.mark.parametrize("name", [5, ["x"], {}, 1.5, True, "\0", "\ud800", "x" * 5000, ""])
def test_a_model_name_that_is_none_is_refused_in_words(name):
    for node in ("MingUniVisionLoader", "MingTokLoader"):
        verdict = NODE_CLASS_MAPPINGS[node].VALIDATE_INPUTS(model_name=name)
        assert (isinstance(verdict, str) and "choose a model" in verdict) or "was not found" in verdict
        assert NODE_CLASS_MAPPINGS[node].IS_CHANGED(model_name=name, precision="fp32") == ()
        with pytest.raises(ValueError, match=r"choose a model|was not found"):
            NODE_CLASS_MAPPINGS[node]().load(model_name=name, precision="fp32")


def test_the_state_of_a_folder_takes_in_its_tokenizer_and_bears_what_is_no_file(folders, checkpoint_folder):
    folder = shutil.copytree(checkpoint_folder, folders / "models" / "good")
    before = models.file_state(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert models.file_state(folder) != before
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "config.json")
    assert models.file_state(folder) != before


# --- Saved files --------------------------------------------------------------------------------------------------


def features(seed=0) -> Features:
    make = torch.Generator().manual_seed(seed)
    return Features(torch.randn(1, 16, 64, generator=make), torch.randn(1, 8, 4, 4, generator=make), (4, 4), "t")


@surrogates
def test_bad_files_are_left_out_of_the_list_of_saved_files_with_one_line_each_however_often_it_is_asked_for(
    folders, caplog, unreadable
):
    root = folders / "output" / "ming"
    save_features(features(), root / "good.safetensors")
    os.mkfifo(root / "pipe.safetensors")
    (root / "device.safetensors").symlink_to("/dev/zero")
    (root / "broken.safetensors").symlink_to("nowhere")
    (root / "loop.safetensors").symlink_to("loop.safetensors")
    (root / "text.safetensors").write_text("not one")
    (root / "huge.safetensors").write_bytes((50 << 20).to_bytes(8, "little") + bytes(50 << 20))
    (root / "deep.safetensors").write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    save_features(features(), root / "\udcff.safetensors")
    (root / "round").symlink_to(root / "round")
    (folders / "input" / "up").symlink_to(folders / "input", target_is_directory=True)
    save_features(features(), folders / "input" / "other.safetensors")
    unreadable(root / "closed")
    (root / "closed").mkdir()
    for _ in range(3):
        offered = answers()["MingLoadFeatures"]["required"]["file"][0]
        assert offered == ["ming/good.safetensors [output]", "other.safetensors [input]"]
        assert answers()["MingLoadConversation"]["required"]["file"][0] == []
        assert NODE_CLASS_MAPPINGS["MingLoadFeatures"].IS_CHANGED(file=None)
    lines = sorted(left_out(caplog))
    bad = ("pipe", "device", "broken", "loop", "text", "huge", "deep", r"\udcff")
    assert len(lines) == len(bad) + 1 and sum("closed" in line for line in lines) == 1
    assert all(sum(f"{name}.safetensors is left out" in line for line in lines) == 1 for name in bad)


def test_a_damaged_file_is_listed_again_when_it_is_mended(folders, caplog):
    path = folders / "output" / "ming" / "x.safetensors"
    path.write_bytes(b"")
    assert answers()["MingLoadFeatures"]["required"]["file"][0] == []
    save_features(features(), path)
    assert answers()["MingLoadFeatures"]["required"]["file"][0] == ["ming/x.safetensors [output]"]


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a/" * 3000, "\ud800.safetensors", "pipe.safetensors [input]", "folder [input]", "/dev/zero"]
)
def test_a_name_that_leads_to_no_file_is_refused_in_words(folders, name):
    os.mkfifo(folders / "input" / "pipe.safetensors")
    (folders / "input" / "folder").mkdir()
    node = NODE_CLASS_MAPPINGS["MingLoadFeatures"]
    verdict = node.VALIDATE_INPUTS(file=name)
    assert isinstance(verdict, str) and "choose" in verdict and len(verdict) < 1000
    for call in (saved_path, lambda name: node.IS_CHANGED(file=name), lambda name: node().load(file=name)):
        with pytest.raises(FileError, match="choose"):
            call(name)


def test_links_that_lead_in_a_circle_are_no_obstacle_to_what_is_saved(folders):
    (folders / "output" / "ming" / "a").symlink_to(folders / "output" / "ming" / "b")
    (folders / "output" / "ming" / "b").symlink_to(folders / "output" / "ming" / "a")
    assert saved_files() == []
    with pytest.raises(FileError, match="there is no file"):
        saved_path("ming/a/x.safetensors [output]")
