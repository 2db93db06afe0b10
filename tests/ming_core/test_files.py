"""Folders that are written whole or not at all."""

from pathlib import Path

import pytest
from ming_univision.ming_core import files
from ming_univision.ming_core.files import FileError, write_whole_folder


def write(text):
    return lambda folder: (folder / "a").write_text(text)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    write_whole_folder(write("1"), folder)

    def half(f):
        (f / "a").write_text("2")
        raise OSError("disk full")

    with pytest.raises(FileError, match="disk full"):
        write_whole_folder(half, folder)
    assert (folder / "a").read_text() == "1"
    write_whole_folder(lambda f: (f / "b").write_text("3"), folder)
    assert [p.name for p in folder.iterdir()] == ["b"]


def test_a_rename_that_a_virus_scanner_delays_is_tried_again(tmp_path, monkeypatch):
    replace, failures = Path.replace, [PermissionError(13, "in use")] * 2

    def delayed(self, to):
        if failures:
            raise failures.pop()
        return replace(self, to)

    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "replace", delayed)
    write_whole_folder(write("1"), tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == "1"


def test_folders_beside_it_that_the_user_called_old_and_new_are_left_alone(tmp_path):
    for name in ("model.old", "model.new"):
        (tmp_path / name).mkdir()
    for text in "12":
        write_whole_folder(write(text), tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.new", "model.old"]


def test_what_was_written_is_kept_if_the_old_folder_cannot_be_replaced(tmp_path, monkeypatch):
    folder, replace = tmp_path / "model", Path.replace
    write_whole_folder(write("1"), folder)

    def refused(self, to):
        if self.name == ".model.ming-new":
            raise PermissionError(13, "in use")
        return replace(self, to)

    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(FileError, match=r"in use.*model\.ming-new"):
        write_whole_folder(write("2"), folder)
    assert (folder / "a").read_text() == "1"
    assert (tmp_path / ".model.ming-new" / "a").read_text() == "2"


def test_a_folder_that_a_killed_run_left_beside_its_place_is_not_lost(tmp_path):
    folder = tmp_path / "model"
    write_whole_folder(write("1"), folder)
    folder.rename(tmp_path / ".model.ming-old")

    def fails(f):
        raise OSError("disk full")

    with pytest.raises(FileError, match="disk full"):
        write_whole_folder(fails, folder)
    assert (folder / "a").read_text() == "1"
