"""What a folder has: samples, and what is left out with the reason."""

import json

import numpy as np
import pytest
import torch
from ming_univision.ming_core import FileError
from ming_univision.ming_core.training.cache import ImageCache, occupied
from ming_univision.ming_core.training.data import pictures_of, read_folder, read_image
from PIL import Image

from .conftest import write_image


def read(folder, most=500):
    return read_folder(folder, 32, "center crop", len, most)


def test_samples_of_all_kinds_are_found(data):
    found = read(data)
    kinds = {sample.name: sample.kind for sample in found.samples}
    assert kinds == {"cat.txt": "drawings", "day.txt": "edits", "dog.jsonl": "questions", "hello.jsonl": "questions"}
    edit = next(sample for sample in found.samples if sample.kind == "edits")
    assert (edit.source.name, edit.target.name, edit.prompt) == ("day_before.png", "day_after.png", "Make it night.")
    assert found.left_out == {} and found.report() == [f"{data}: 1 drawings, 1 edits, 2 questions; 0 files left out"]


@pytest.mark.parametrize(
    ("name", "content", "file", "why"),
    [
        ("lone.txt", b"A bird.", "lone.txt", "no picture goes with it"),
        ("cat.txt", b"  \n", "cat.txt", "it is empty"),
        ("cat.txt", b"\xff\xfe\xfa", "cat.txt", "cannot be read as UTF-8"),
        ("cat.txt", b"long " * 200, "cat.txt", "takes 999 tokens, and 500 are left"),
        ("cat.png", b"not a picture", "cat.txt", "cat.png cannot be used"),
        ("dog.jsonl", b'{"question": "What?"}', "dog.jsonl", "line 1 must be"),
        ("dog.jsonl", b"\n[1]", "dog.jsonl", "line 2 must be"),
        ("dog.jsonl", b"What?", "dog.jsonl", "line 1 is not JSON"),
        ("notes.md", b"# Notes", "notes.md", "neither a picture nor"),
    ],
)
def test_what_cannot_be_used_is_left_out_with_the_reason(data, name, content, file, why):
    (data / name).write_bytes(content)
    found = read(data)
    assert list(found.left_out) == [file] and why in found.left_out[file]
    assert any(why in line and file in line for line in found.report())


def test_pictures_without_a_text_or_without_their_other_half_are_left_out(data):
    write_image(data / "bird.png")
    (data / "day_after.png").unlink()
    found = read(data)
    assert "no text goes with it" in found.left_out["bird.png"]
    assert "day_after is missing" in found.left_out["day.txt"]


def test_a_picture_that_is_too_narrow_is_left_out(data):
    Image.new("RGB", (2, 200)).save(data / "cat.png")
    assert "cat.png cannot be used" in read(data).left_out["cat.txt"]


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_a_gray_picture_of_16_bits_keeps_its_grays(tmp_path, mode):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16 if mode == "I;16" else np.int32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.tif")
    with Image.open(tmp_path / "ramp.tif") as file:
        assert file.mode == mode
    found = read_image(tmp_path / "ramp.tif")
    assert found.shape == (1, 8, 8, 3)
    torch.testing.assert_close(found[0, ..., 1], torch.from_numpy(ramp / 65535).float(), rtol=0, atol=1 / 255)


def test_of_two_pictures_of_one_name_one_is_used(data):
    write_image(data / "cat.webp")
    found = read(data)
    assert found.left_out == {"cat.webp": "cat.png has the same name"} and len(found.samples) == 4


def test_folders_inside_the_folder_are_read_and_hidden_ones_are_not(data):
    for name in ("inner", ".hidden"):
        (data / name).mkdir()
        write_image(data / name / "bird.png")
        (data / name / "bird.txt").write_text("A bird.")
    assert [s.name for s in read(data).samples if "bird" in s.name] == ["inner/bird.txt"]


def test_a_long_list_of_what_is_left_out_is_cut_short(data):
    for i in range(30):
        (data / f"n{i:02}.txt").write_text("no picture")
    lines = read(data).report()
    assert "30 files left out" in lines[0] and lines[-1] == "  and 10 more" and len(lines) == 22


def test_a_folder_of_which_nothing_can_be_used_is_an_error(tmp_path):
    with pytest.raises(FileError, match="is not a folder"):
        read(tmp_path / "missing")
    (tmp_path / "lone.txt").write_text("A bird.")
    with pytest.raises(FileError, match="nothing to train on") as error:
        read(tmp_path)
    assert "lone.txt: no picture goes with it" in str(error.value)


def test_questions_may_have_spaces_around_them_and_empty_lines_between(data):
    line = json.dumps({"question": " What? ", "answer": "A dog.\n"})
    (data / "dog.jsonl").write_text(f"\n{line}\n\n")
    assert next(s for s in read(data).samples if s.name == "dog.jsonl").questions == (("What?", "A dog."),)


# --- Encoded pictures ---------------------------------------------------------------------------------------------


def test_pictures_are_encoded_once(model, data, tmp_path):
    paths = list(pictures_of(read(data).samples))
    assert len(paths) == 4
    first = ImageCache(model.mingtok, "center crop", tmp_path / "cache").load(paths)
    assert model.mingtok.calls["encode"] == 4
    again = ImageCache(model.mingtok, "center crop", tmp_path / "cache").load(paths)
    assert model.mingtok.calls["encode"] == 4
    assert all((again[p].latents == first[p].latents).all() for p in paths)


@pytest.mark.parametrize("change", ["picture", "fit", "tokenizer", "damage"])
def test_pictures_are_encoded_again_when_something_has_changed(model, data, tmp_path, change):
    path = data / "cat.png"
    cache = ImageCache(model.mingtok, "center crop", tmp_path / "cache")
    before = cache.load([path])[path]
    if change == "picture":
        write_image(path, seed=9)
    elif change == "fit":
        cache.fit = "stretch"
    elif change == "tokenizer":
        model.mingtok.fingerprint = "another"
    else:
        file = cache.file_of(path)
        file.write_bytes(file.read_bytes()[:-8])
    after = cache.load([path])[path]
    assert model.mingtok.calls["encode"] == 2
    assert (after.latents == before.latents).all() == (change != "picture")


def test_another_process_reads_what_is_there_and_writes_nothing(model, data, tmp_path):
    cache = ImageCache(model.mingtok, "center crop", tmp_path / "cache")
    cache.load([data / "cat.png"], write=False)
    assert not (tmp_path / "cache").exists()


def test_plain_background_is_told_from_what_is_on_it():
    import torch

    pixels = torch.full((1, 3, 32, 32), -0.5)
    pixels[:, 0, 9, 20] = 1.0
    assert occupied(pixels, 8).nonzero().flatten().tolist() == [1 * 4 + 2]
