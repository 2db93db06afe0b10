"""The benchmark of the published size, at a small one; and its count of bytes against the specification's."""

import importlib
import json
import sys
import time

import pytest
import torch
from ming_univision.ming_core import UniVision, load_univision
from ming_univision.ming_core.config import MingTokConfig, UniVisionConfig, read_config
from ming_univision.nodes.host import PACK
from ming_univision.runner.quantize import main as quantize_folder


@pytest.fixture(scope="module")
def full_size():
    before = list(sys.path)
    sys.path.insert(0, str(PACK / "benchmarks"))
    yield importlib.import_module("full_size")
    sys.path[:] = before
    del sys.modules["full_size"], sys.modules["project"]


@pytest.fixture
def folder(full_size, checkpoint_folder, tmp_path, monkeypatch):
    """A checkpoint of random weights with the published vocabulary, and otherwise small, in several shards."""
    values = json.loads((checkpoint_folder / "config.json").read_text())
    ids = {"eos_token_id": 126081, "image_start_token": 126347, "image_patch_token": 126346, "vocab_size": 126464}
    values["llm_config"] |= ids
    monkeypatch.setattr(full_size, "SHARD", 10e6)
    monkeypatch.setattr(full_size, "POOL", 1 << 16)
    full_size.make(tmp_path / "full", read_config(full_size.UniVisionConfig, values))
    return tmp_path / "full"


def test_what_it_makes_is_a_checkpoint_and_what_it_runs_draws(full_size, folder, capsys):
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    engine = load_univision(folder)
    assert engine.chat.decode(engine.chat.encode("A cat, ein Kätzchen.")) == "A cat, ein Kätzchen."
    embeddings = engine.network.language_model.model.word_embeddings.weight.detach()
    assert float(embeddings.std()) == pytest.approx(64**-0.5, rel=0.05)
    capsys.readouterr()
    full_size.run_on_cpu(folder, "int4", 3)
    said = capsys.readouterr().out
    assert "| precision | int4 |" in said and "median of 2" in said


def test_memory_that_the_system_does_not_tell_is_said_to_be_unknown(full_size, monkeypatch):
    monkeypatch.setattr(full_size.Path, "read_text", lambda path: "Name: python\nVmRSS: 1 kB\n")  # no RssAnon
    with full_size.MemoryWatch() as watch:
        time.sleep(0.2)
    assert str(watch) == "unknown on this system"


def test_the_table_of_a_gpu_has_a_figure_under_every_heading(full_size, folder, monkeypatch, capsys):
    monkeypatch.setattr(full_size, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(full_size.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(full_size.torch.cuda, "synchronize", lambda: None)
    load = full_size.load

    def loaded(folder, precision, device):
        if precision == "bf16":
            raise torch.OutOfMemoryError
        return load(folder, precision, "cpu")

    monkeypatch.setattr(full_size, "load", loaded)
    full_size.run_on_gpu(folder, ["bf16", "int8"])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1 and len(rows) == 2 + 1 + 4


def test_a_folder_that_is_there_is_not_written_into(full_size, folder):
    with pytest.raises(SystemExit, match="exists already"):
        full_size.make(folder, None)


@pytest.mark.parametrize("tokens", [1, 17])
def test_tokens_that_give_no_time_or_never_come_are_refused_before_loading(full_size, folder, monkeypatch, tokens):
    monkeypatch.setattr(full_size, "load", None)
    with pytest.raises(SystemExit, match=f"--tokens is {tokens}: it must be 2 to 16"):
        full_size.run_on_cpu(folder, "int4", tokens)


def test_bytes_of_an_image_are_those_of_the_specification(full_size):
    network = UniVision(UniVisionConfig(mingtok_config=MingTokConfig()), device="meta", dtype=torch.bfloat16)
    assert full_size.image_bytes(network, 1, 2) == pytest.approx(9.60e12, rel=0.01)
    assert full_size.image_bytes(network, 1, 3) == pytest.approx(10.22e12, rel=0.01)
    assert full_size.image_bytes(network, 4, 2) < 1.4 * full_size.image_bytes(network, 1, 2)


def test_the_command_makes_a_quantized_folder_once(folder, tmp_path, capsys):
    target = tmp_path / "small"
    assert quantize_folder(folder, target) == 0
    small, whole = load_univision(target), load_univision(folder)
    assert (small.network.quantization, small.fingerprint) == ("int4", whole.fingerprint)
    capsys.readouterr()
    assert quantize_folder(folder, target) == 2 and "exists already" in capsys.readouterr().out
    assert quantize_folder(tmp_path / "nowhere", tmp_path / "new") == 1 and "Failed" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
