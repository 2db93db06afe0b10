"""The reader for JSON: what is accepted, and that everything else is one error that names the file."""

import json
import os
import socket
import time

import pytest
from ming_univision.ming_core import FileError, json_files
from ming_univision.ming_core.json_files import MissingFileError, check_regular, printable, read_file, read_json, shown


def test_values_come_back_as_they_were_written_with_or_without_a_byte_order_mark(tmp_path):
    value = {"a": [1, -2.5, True, None, "\u00e9 \U0001f431"], "b": {"c": 2**64 - 1}}
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "x.json").write_text(json.dumps(value, ensure_ascii=False), encoding=encoding)
        assert read_json(tmp_path / "x.json") == value
    assert read_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON: .* at line 1, column 2"),
        (b'{"a": {"b": [1, NaN]}}', r"a.b\[1\] is nan, not a finite number"),
        (b"[-Infinity]", r"\[0\] is -inf, not a finite number"),
        (b'{"a": 1e999, "b": 1}', "a is inf, not a finite number"),
        (b"1" * 301, "it is 1{20}... .301 digits., not a finite number"),
        (b"[" + b"1" * 1_000_000 + b"]", "1000000 digits"),
        (b"\xff\xfe{\x00", "not UTF-8"),
        (b"[" * 65 + b"]" * 65, "more than 64 levels"),
        (b"[" * 1_000_000, "more than 64 levels"),
        (b'{"a":' * 1_000_000, "more than 64 levels"),
        (b" " * (json_files.MAX_BYTES + 1), "too long"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_text_that_is_not_sound_json_is_one_error_that_names_the_file(tmp_path, text, complaint):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    start = time.monotonic()
    for source, name in ((path, "x.json"), (text, "the header")):
        with pytest.raises(FileError, match=rf"(?s){name}.*{complaint}.*; get it|{name}.*{complaint}.*: get it"):
            read_json(source, what="" if source is path else name, remedy="get it")
    assert time.monotonic() - start < 2


def test_64_levels_and_300_digits_are_read():
    assert read_json(b"[" * 64 + b"]" * 64) is not None
    assert read_json(b"9" * 300) == int("9" * 300)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_only_regular_files_are_opened_and_nothing_blocks(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "through").symlink_to(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        server.bind("socket")
    for name, complaint in {
        "pipe": "is a pipe, not a file",
        "through": "is a pipe, not a file",
        "folder": "is a folder, not a file",
        "socket": "is a socket, not a file",
        "zero": "is a device, not a file",
        "loop": "cannot be read",
        "bro\0ken": "is not a file name",
        "\ud800": "is not a file name",
        "x" * 300: "cannot be read",
    }.items():
        for reader in (read_json, read_file, check_regular):
            with pytest.raises(FileError, match=complaint):
                reader(tmp_path / name)
    with pytest.raises(MissingFileError, match="absent: no such file"):
        read_json(tmp_path / "absent")
    with pytest.raises(MissingFileError, match=r"broken is a link to .*nowhere, which is not there"):
        read_json(tmp_path / "broken")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_says_so(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.json").chmod(0)
    with pytest.raises(FileError, match=r"cannot be read .*may read it"):
        read_json(tmp_path / "x.json")


def test_a_file_is_read_up_to_its_bound(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert read_file(tmp_path / "x", max_bytes=5) == b"12345"
    with pytest.raises(FileError, match=r"x is too long \(5 bytes, where at most 4 are read\)"):
        read_file(tmp_path / "x", max_bytes=4)


def test_messages_can_be_printed_whatever_the_name():
    assert printable("a\udcff b") == "a\\udcff b"
    with pytest.raises(FileError) as error:
        read_json(b"{", what="\udcff.json")
    str(error.value).encode("utf-8")


def test_values_in_messages_are_short():
    assert shown("swiglu") == "'swiglu'"
    assert len(shown("x" * 5000)) < 150 and len(shown({"name": ["x" * 5000] * 20})) < 1500
