"""Downloading a published checkpoint, from a local server that answers huggingface_hub as the hub does."""

import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
from ming_univision.ming_core import load_univision
from ming_univision.nodes import host, models
from ming_univision.runner import cli, download
from safetensors.torch import load_file, save_file

NAME = "Ming-UniVision-16B-A3B"
REPOSITORY = f"inclusionAI/{NAME}"
REVISION = "5" * 40
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """A repository behind HTTP. `sent`: (file, first byte) of every download; `spoil`, `stall`, `cut`: how."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.sent = files, []
        self.code: dict[str, bytes] = {}  # the folder of the code repository
        self.told_to_code: list[dict] = []  # the headers of the downloads from it
        self.spoil: dict[str, int] = {}  # file -> how often it is still to be sent with a wrong byte
        self.stall: dict[str, int] = {}  # file -> bytes after which nothing more comes
        self.cut: dict[str, list[int]] = {}  # file -> bytes that are sent, time after time, as if they were all
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def listing(self) -> dict:
        siblings = []
        for name, data in self.files.items():
            large = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
            sibling = {"rfilename": name, "size": len(data), "blobId": git_digest(data)}
            siblings.append(sibling | ({"lfs": large} if name.endswith((".safetensors", ".bin")) else {}))
        return {"id": REPOSITORY, "modelId": REPOSITORY, "sha": REVISION, "siblings": siblings}

    def code_listing(self) -> list[dict]:
        return [
            {"name": name, "size": len(data), "sha": git_digest(data), "download_url": f"{self.endpoint}/raw/{name}"}
            for name, data in self.code.items()
        ]

    def _handler(hub):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, status: int, body: bytes, **headers: str):
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()

            def do_GET(self):
                if self.path.split("?")[0] == f"/api/models/{REPOSITORY}" and "blobs=" in self.path:
                    body = json.dumps(hub.listing()).encode()
                    self.answer(200, body, Content_Type="application/json")
                    self.wfile.write(body)
                    return
                if self.path == "/code":
                    body = json.dumps(hub.code_listing()).encode()
                    self.answer(200, body, Content_Type="application/json")
                    self.wfile.write(body)
                    return
                if self.path.startswith("/raw/") and self.path[5:] in hub.code:
                    hub.sent.append((self.path, 0))
                    hub.told_to_code.append(dict(self.headers))
                    self.answer(200, hub.code[self.path[5:]])
                    self.wfile.write(hub.code[self.path[5:]])
                    return
                prefix = f"/{REPOSITORY}/resolve/{REVISION}/"
                name = self.path.removeprefix(prefix)
                if not self.path.startswith(prefix) or name not in hub.files:
                    known = self.path.startswith(prefix)
                    self.answer(404, b"", X_Error_Code="EntryNotFound" if known else "RepoNotFound")
                    return
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
                begin, data = int(asked[1]), bytearray(hub.files[name])
                hub.sent.append((name, begin))
                if hub.spoil.get(name, 0):
                    hub.spoil[name] -= 1
                    data[-1] ^= 1
                body = bytes(data[begin:])[: hub.cut[name].pop(0) if hub.cut.get(name) else None]
                span = {"Content_Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
                self.answer(206 if begin else 200, body, **span)
                if name in hub.stall:
                    self.wfile.write(body[: hub.stall.pop(name)])
                    self.wfile.flush()
                    time.sleep(600)  # until whoever asked has gone
                self.wfile.write(body)

        return Handler

    def fetched(self) -> list[str]:
        return [name for name, _ in self.sent]


@pytest.fixture
def hub(checkpoint_folder, tmp_path):
    """The small recorded checkpoint in two shards, among files that nobody needs."""
    tensors = load_file(checkpoint_folder / "model.safetensors")
    names, files, where = sorted(tensors), {}, {}
    for i, shard in enumerate(SHARDS):
        part = {name: tensors[name] for name in names[i::2]}
        save_file(part, tmp_path / shard)
        files[shard] = (tmp_path / shard).read_bytes()
        where |= dict.fromkeys(part, shard)
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": where}).encode()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        files[name] = (checkpoint_folder / name).read_bytes()
    files["LICENSE"] = b"Apache-2.0\n"
    unwanted = dict.fromkeys(("modeling.py", "weights.bin", "README.md", "sub/config.json"), b"nobody needs this")
    hub = Hub(files | unwanted)
    hub.wanted = set(files)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def run(hub, tmp_path, capsys, monkeypatch):
    """run() -> (exit code, what was printed); the checkpoint goes to tmp_path/models/NAME."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(download, "TOKENIZER_LISTING", f"{hub.endpoint}/code")

    def call(name=NAME, **options):
        hub.sent.clear()
        code = download.main(name, **{"to": tmp_path / "models", "endpoint": hub.endpoint, **options})
        return code, capsys.readouterr().out

    return call


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "models" / NAME


def test_what_the_model_needs_is_announced_fetched_and_loads(hub, run, folder, checkpoint_folder):
    code, said = run()
    assert code == 0
    assert {p.name for p in folder.iterdir()} == hub.wanted == set(hub.fetched())
    assert all((folder / name).read_bytes() == hub.files[name] for name in hub.wanted)
    total = sum(len(hub.files[name]) for name in hub.wanted) / 1e6
    announced = said[: said.index("[1/7]")]
    for word in (REPOSITORY, REVISION[:12], str(folder), f"to download: {total:.1f} MB", "free on that disk"):
        assert word in announced
    assert load_univision(folder).fingerprint == load_univision(checkpoint_folder).fingerprint


def test_a_second_run_checks_everything_and_fetches_nothing(hub, run):
    run()
    code, said = run()
    assert code == 0 and hub.sent == [] and "Done" in said and "to download" not in said


@pytest.mark.parametrize("name", [SHARDS[1], "config.json"])
@pytest.mark.parametrize("how", ["a changed byte", "cut off"])
def test_a_damaged_file_is_named_and_only_that_one_is_fetched_again(hub, run, folder, name, how):
    run()
    data = bytearray(hub.files[name])
    data[-2] ^= 1
    (folder / name).write_bytes(data if how == "a changed byte" else data[:-5])
    code, said = run()
    assert code == 0 and hub.fetched() == [name]
    assert f"{folder / name} is damaged" in said and ("instead of" in said)
    assert (folder / name).read_bytes() == hub.files[name]


def test_a_download_resumes_in_the_middle_of_a_file(hub, run, folder):
    run()
    (file,) = (f for f in download.remote_files(REPOSITORY, hub.endpoint)[1] if f.name == SHARDS[0])
    whole = (folder / SHARDS[0]).read_bytes()
    (folder / SHARDS[0]).unlink()
    file.part(folder).write_bytes(whole[:1000])
    code, said = run()
    assert code == 0 and hub.sent == [(SHARDS[0], 1000)]
    assert f"to download: {(len(whole) - 1000) / 1e6:.1f} MB" in said
    assert (folder / SHARDS[0]).read_bytes() == whole and not list(folder.glob("*.part"))


def test_a_part_of_another_revision_or_with_too_many_bytes_is_not_resumed(hub, run, folder):
    folder.mkdir(parents=True)
    (folder / f"{SHARDS[0]}.0123456789ab.part").write_bytes(b"of another revision")
    (file,) = (f for f in download.remote_files(REPOSITORY, hub.endpoint)[1] if f.name == SHARDS[1])
    file.part(folder).write_bytes(bytes(file.size + 1))
    code, _ = run()
    assert code == 0 and (SHARDS[0], 0) in hub.sent and (SHARDS[1], 0) in hub.sent
    assert {p.name for p in folder.iterdir()} == hub.wanted


@pytest.mark.skipif(os.name == "nt", reason="needs a signal that can be sent to one process")
def test_ctrl_c_keeps_what_has_arrived_and_the_next_run_goes_on_there(hub, run, folder):
    hub.stall[SHARDS[1]] = len(hub.files[SHARDS[1]]) // 2
    code = (
        "import importlib, importlib.util, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it\n"
        "root, to = sys.argv[1:]\n"
        "import huggingface_hub.constants\n"
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 16  # of 10 MB, more than the whole file here\n"
        "spec = importlib.util.spec_from_file_location('p', root + '/__init__.py', submodule_search_locations=[root])\n"
        "sys.modules['p'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"importlib.import_module('p.runner.download').main('{NAME}', to=to)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(host.PACK), str(folder.parent)],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        while not any(part.stat().st_size for part in folder.glob(f"{SHARDS[1]}.*.part")):
            assert child.poll() is None, child.communicate()
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate()
    finally:
        child.kill()
    assert child.returncode != 0 and b"KeyboardInterrupt" in errors
    assert not (folder / SHARDS[1]).exists()
    (part,) = folder.glob("*.part")
    arrived = part.stat().st_size
    assert 0 < arrived < len(hub.files[SHARDS[1]])
    code, _ = run()
    assert code == 0 and (SHARDS[1], arrived) in hub.sent and SHARDS[0] not in hub.fetched()
    assert (folder / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]


def test_a_file_that_arrives_damaged_is_named_and_fetched_again(hub, run, folder):
    hub.spoil[SHARDS[0]] = 1
    code, said = run()
    assert code == 0 and f"{SHARDS[0]} arrived damaged" in said and hub.fetched().count(SHARDS[0]) == 2
    assert (folder / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


def test_a_file_of_which_only_parts_arrive_is_resumed(hub, run, folder):
    hub.cut[SHARDS[0]] = [1000, 1000, 1000, 1000]  # more often than a damaged one is fetched
    code, said = run()
    assert code == 0 and f"{SHARDS[0]} was interrupted at 1000 of {len(hub.files[SHARDS[0]])} bytes, resuming" in said
    assert [begin for name, begin in hub.sent if name == SHARDS[0]] == [0, 1000, 2000, 3000, 4000]
    assert (folder / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]


def test_a_file_of_which_nothing_more_arrives_is_given_up(hub, run, folder):
    hub.cut[SHARDS[0]] = [1000, *[0] * 9]
    code, said = run()
    assert code == 1 and f"{SHARDS[0]} arrived damaged 3 times" in said and len(hub.cut[SHARDS[0]]) == 6


def test_a_file_that_keeps_arriving_damaged_is_an_error_and_never_gets_its_name(hub, run, folder):
    hub.spoil[SHARDS[0]] = 99
    code, said = run()
    assert code == 1 and f"{SHARDS[0]} arrived damaged 3 times" in said
    assert not (folder / SHARDS[0]).exists() and not list(folder.glob("*.part"))


def test_too_little_room_is_refused_with_the_figures_before_anything_is_fetched(hub, run, folder, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 300_000, 300_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    code, said = run()
    total = sum(len(hub.files[name]) for name in hub.wanted) / 1e6
    assert code == 2 and hub.sent == [] and not folder.exists()
    for word in (f"the download takes {total:.1f} MB", "0.3 MB free", f"{total - 0.3:.1f} MB more", "--to"):
        assert word in said


def test_a_drive_that_is_not_there_is_named(hub, run, folder, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    code, said = run()
    assert code == 2 and f"cannot make {folder}: {folder.anchor} does not exist; choose another folder" in said


def test_a_file_of_another_revision_stays_until_the_new_one_has_arrived(hub, run, folder, monkeypatch):
    run()
    old = hub.files["config.json"]
    hub.files["config.json"] = old + b" "
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 0)
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: usage)
        assert run()[0] == 2 and (folder / "config.json").read_bytes() == old
    hub.spoil["config.json"] = 99
    assert run()[0] == 1 and (folder / "config.json").read_bytes() == old
    hub.spoil.clear()
    assert run()[0] == 0 and (folder / "config.json").read_bytes() == old + b" "


def test_a_hub_that_cannot_be_reached_or_has_no_such_model_is_an_error_with_a_remedy(hub, run, folder):
    code, said = run(endpoint="http://127.0.0.1:9")
    assert code == 1 and "http://127.0.0.1:9 cannot be reached" in said and "HF_ENDPOINT" in said
    assert "check your connection" in said
    code, said = run("MingTok-Vision")
    assert code == 2 and "does not have this model" in said
    for shard in SHARDS:
        del hub.files[shard]
    code, said = run()
    assert code == 2 and "no safetensors files" in said
    assert not folder.exists()


def test_an_environment_that_forbids_downloads_is_named(hub, run, folder, monkeypatch):
    monkeypatch.setattr(download.constants, "HF_HUB_OFFLINE", True)
    code, said = run()
    assert code == 2 and "HF_HUB_OFFLINE" in said and not folder.exists()


def test_a_file_that_vanishes_from_the_hub_is_an_error_that_keeps_the_rest(hub, run, folder):
    listing = hub.listing()
    hub.listing = lambda: listing
    del hub.files["tokenizer.json"]
    code, said = run()
    assert code == 1 and "404" in said and "run the same command again" in said
    assert (folder / "config.json").is_file() and not (folder / "tokenizer.json").exists()


def test_shards_that_do_not_hold_what_the_index_says_are_named(hub, run):
    hub.files[SHARDS[0]] = hub.files[SHARDS[1]]
    code, said = run()
    assert code == 1 and "model.safetensors.index.json" in said and SHARDS[0] in said


def test_a_folder_that_cannot_be_made_is_an_error(hub, run, tmp_path):
    (tmp_path / "models").write_text("in the way")
    code, said = run()
    assert code == 1 and str(tmp_path / "models") in said and hub.sent == []


@pytest.fixture
def without_tokenizer(hub):
    """The hub's repository lacks the tokenizer, which is beside the code, among other files."""
    hub.code = {name: hub.files.pop(name) for name in ("tokenizer.json", "tokenizer_config.json")}
    hub.code["modeling.py"] = b"nobody needs this"
    return hub


def test_a_tokenizer_that_the_hub_lacks_comes_from_the_code_repository_and_the_users_token_does_not_go_there(
    without_tokenizer, run, folder, checkpoint_folder, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, said = run()
    assert code == 0 and download.SOURCE in said and "Done" in said
    assert without_tokenizer.fetched()[-2:] == ["/raw/tokenizer.json", "/raw/tokenizer_config.json"]
    assert "hf_secret" not in str(without_tokenizer.told_to_code)
    assert {path.name for path in folder.iterdir()} == without_tokenizer.wanted
    assert load_univision(folder).fingerprint == load_univision(checkpoint_folder).fingerprint
    assert run()[0] == 0 and without_tokenizer.sent == []


def test_a_damaged_tokenizer_of_the_code_repository_is_fetched_again(without_tokenizer, run, folder):
    run()
    (folder / "tokenizer.json").write_bytes(without_tokenizer.code["tokenizer.json"][:-1])
    code, _ = run()
    assert code == 0 and without_tokenizer.fetched() == ["/raw/tokenizer.json"]
    assert (folder / "tokenizer.json").read_bytes() == without_tokenizer.code["tokenizer.json"]


@pytest.mark.parametrize("how", ["unreachable", "not listed", "another answer"])
def test_a_folder_is_not_called_complete_without_its_tokenizer_and_what_to_copy_from_where_is_said(
    without_tokenizer, run, folder, monkeypatch, how
):
    with monkeypatch.context() as patch:
        if how == "unreachable":
            patch.setattr(download, "TOKENIZER_LISTING", "http://127.0.0.1:9/code")
        elif how == "not listed":
            del without_tokenizer.code["tokenizer_config.json"]
        else:
            patch.setattr(without_tokenizer, "code_listing", lambda: {"message": "rate limit"})
        code, said = run()
    assert code == 1 and "Done" not in said
    for word in (
        "complete but for its tokenizer",
        "copy tokenizer.json and tokenizer_config.json from",
        download.SOURCE,
    ):
        assert word in said
    assert (folder / SHARDS[0]).read_bytes() == without_tokenizer.files[SHARDS[0]]


def test_a_tokenizer_that_was_copied_by_hand_is_taken_and_nobody_is_asked_for_it(
    without_tokenizer, run, folder, monkeypatch
):
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(without_tokenizer.code[name])
    monkeypatch.setattr(download, "TOKENIZER_LISTING", "http://127.0.0.1:9/code")
    assert run()[0] == 0


def test_models_go_to_comfyui_when_the_pack_lies_in_it_and_else_into_the_pack(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "PACK", tmp_path / "ComfyUI" / "custom_nodes" / "pack")
    assert host.own_model_folder() == tmp_path / "ComfyUI" / "models" / "ming"
    assert host.model_folders() == [host.own_model_folder()]
    monkeypatch.setattr(host, "PACK", tmp_path / "pack")
    assert host.own_model_folder() == tmp_path / "pack" / "models"


def test_an_absent_model_comes_with_the_command_that_puts_it_where_it_belongs():
    for kind, name, size in (("univision", NAME, "37.6 GB"), ("mingtok", "MingTok-Vision", "2.8 GB")):
        message = models.missing_message("x", kind)
        place = host.model_folders()[0]
        assert f'{host.PACK / "quickstart.py"}" download {name} --to "{place}"' in message
        assert str(place / name) in message and size in message
    assert set(download.REPOSITORIES) == set(cli.MODELS) == {NAME, "MingTok-Vision"}
