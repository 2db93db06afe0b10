"""Ming LoRA: what it lists and loads, and models with other LoRAs in one graph."""

import logging
from types import SimpleNamespace

import pytest
import torch
from ming_univision.ming_core import Conversation, FileError, Solver
from ming_univision.ming_core.lora import read_lora
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host, lora
from ming_univision.tests.loras import write_lora
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/loras of this test."""
    monkeypatch.setattr(host, "own_lora_folder", lambda: tmp_path)
    monkeypatch.setattr(host, "PACK_LORAS", tmp_path / "missing")
    monkeypatch.setattr(host, "folder_paths", None)
    return tmp_path


@pytest.fixture
def loaded(model):
    return host.managed(model, "small")


def load(loaded, name, strength=1.0, node=None):
    return (node or NODE_CLASS_MAPPINGS["MingLoraLoader"]()).load(model=loaded, lora_name=name, strength=strength)[0]


def listed():
    return NODE_CLASS_MAPPINGS["MingLoraLoader"].INPUT_TYPES()["required"]["lora_name"][0]


def draw(loaded):
    with torch.inference_mode():
        engine = host.load_to_gpu(loaded)
        engine.prefix_cache.clear()
        return engine.generate_image(Conversation(), "A cat.", solver=Solver(1), max_new_tokens=1).features.latents


def test_safetensors_files_of_the_folder_are_listed_and_no_others(folder, loaded):
    write_lora(folder / "b.safetensors", loaded.model.network)
    write_lora(folder / "cats" / "a.safetensors", loaded.model.network)
    (folder / "pickle.pt").write_bytes(b"")
    assert listed() == ["b.safetensors", "cats/a.safetensors"]


def test_a_folder_that_is_not_there_is_an_empty_list(folder, monkeypatch):
    monkeypatch.setattr(host, "own_lora_folder", lambda: folder / "missing")
    assert listed() == []


def test_loras_that_come_with_the_pack_are_listed_and_an_own_one_of_the_same_name_is_the_one_loaded(
    folder, loaded, monkeypatch, tmp_path_factory
):
    with_the_pack = tmp_path_factory.mktemp("pack")
    monkeypatch.setattr(host, "PACK_LORAS", with_the_pack)
    for name, seed in (("both.safetensors", 0), ("pack.safetensors", 1)):
        write_lora(with_the_pack / name, loaded.model.network, seed=seed)
    own = write_lora(folder / "both.safetensors", loaded.model.network, seed=2)
    assert listed() == ["both.safetensors", "pack.safetensors"]
    assert host.lora_files()["both.safetensors"] == own
    assert not torch.equal(draw(load(loaded, "pack.safetensors")), draw(loaded))


def test_a_folder_that_is_the_packs_own_is_listed_once(folder, loaded, monkeypatch):
    monkeypatch.setattr(host, "PACK_LORAS", folder)
    write_lora(folder / "a.safetensors", loaded.model.network)
    assert listed() == ["a.safetensors"]


def test_the_packs_folder_comes_after_comfyuis_own_and_only_once(tmp_path, monkeypatch):
    known = {"loras": (["first", "from extra_model_paths.yaml"], {".safetensors"})}

    def add(kind, path, is_default=False):
        assert not is_default
        if path not in known[kind][0]:
            known[kind][0].append(path)

    folders = SimpleNamespace(models_dir="models", folder_names_and_paths=known, add_model_folder_path=add)
    monkeypatch.setattr(host, "folder_paths", folders)
    for _ in range(2):
        host.register_model_folders()
    assert known["loras"][0] == ["first", "from extra_model_paths.yaml", str(host.PACK / "models" / "loras")]


def test_names_in_comfyuis_folders_have_the_same_separator_on_every_system(tmp_path, monkeypatch, loaded):
    file = write_lora(tmp_path / "a.safetensors", loaded.model.network)

    class Folders:
        @staticmethod
        def get_filename_list(kind):
            return [f"cats{host.os.sep}a.safetensors", "old.pt"] if kind == "loras" else []

        @staticmethod
        def get_full_path(kind, name):
            return str(file) if name.endswith("a.safetensors") else str(tmp_path / name)

    monkeypatch.setattr(host, "folder_paths", Folders)
    assert listed() == ["cats/a.safetensors"]
    assert not torch.equal(draw(load(loaded, "cats/a.safetensors")), draw(loaded))


def test_two_branches_of_a_graph_share_one_model(folder, loaded):
    write_lora(folder / "a.safetensors", loaded.model.network)
    write_lora(folder / "b.safetensors", loaded.model.network, seed=1)
    plain = draw(loaded)
    one, other = load(loaded, "a.safetensors"), load(loaded, "b.safetensors", -0.5)
    stacked = load(one, "b.safetensors", 0.3)
    assert all(m.model.network is loaded.model.network and m.patcher is loaded.patcher for m in (one, other, stacked))
    assert all(m.owner is loaded for m in (one, other, stacked))
    drawn = [draw(m) for m in (one, other, stacked)]
    assert not any(torch.equal(a, plain) for a in drawn) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(draw(loaded), plain)
    assert torch.equal(draw(load(load(loaded, "b.safetensors", 0.3), "a.safetensors")), drawn[2])


def test_strength_0_is_the_model_itself(folder, loaded):
    write_lora(folder / "a.safetensors", loaded.model.network)
    assert torch.equal(draw(load(loaded, "a.safetensors", 0.0)), draw(loaded))


def test_another_strength_does_not_read_the_file_again_and_a_changed_file_does(folder, loaded, monkeypatch):
    file = write_lora(folder / "a.safetensors", loaded.model.network)
    reads = []
    monkeypatch.setattr(lora, "read_lora", lambda *args: reads.append(args) or read_lora(*args))
    node = NODE_CLASS_MAPPINGS["MingLoraLoader"]()
    for strength in (1.0, 0.5):
        load(loaded, "a.safetensors", strength, node)
    assert len(reads) == 1
    state = node.IS_CHANGED(lora_name="a.safetensors")
    tensors = load_file(file)
    save_file({"extra": torch.zeros(1), **tensors}, file)
    assert node.IS_CHANGED(lora_name="a.safetensors") != state != node.IS_CHANGED(lora_name=None)
    load(loaded, "a.safetensors", 0.5, node)
    assert len(reads) == 2


def test_the_config_beside_a_file_of_peft_counts_as_part_of_it(folder, loaded):
    write_lora(folder / "adapter_model.safetensors", loaded.model.network)
    node = NODE_CLASS_MAPPINGS["MingLoraLoader"]
    states = []
    for config in (None, "{}", '{"lora_alpha": 8}'):
        if config is not None:
            (folder / "adapter_config.json").write_text(config)
        states.append(node.IS_CHANGED(lora_name="adapter_model.safetensors"))
    assert len(set(states)) == 3


def test_a_name_that_is_not_there_says_where_to_put_the_file(folder, loaded):
    node = NODE_CLASS_MAPPINGS["MingLoraLoader"]
    assert "models/loras" in node.VALIDATE_INPUTS(lora_name="gone.safetensors")
    assert "models/loras" in node.VALIDATE_INPUTS(lora_name=3)
    assert node.VALIDATE_INPUTS(lora_name=None) is True
    assert node.IS_CHANGED(lora_name="gone.safetensors") == ()
    with pytest.raises(ValueError, match="models/loras"):
        load(loaded, "gone.safetensors")


@pytest.mark.parametrize("name", [[], {}, 3, "x" * 5000, "\ud800", "\0", ""])
def test_a_name_that_is_none_is_refused_in_a_short_sentence(folder, loaded, name):
    verdict = NODE_CLASS_MAPPINGS["MingLoraLoader"].VALIDATE_INPUTS(lora_name=name)
    assert "models/loras" in verdict and len(verdict) < 400 and verdict.encode()
    with pytest.raises(ValueError, match="models/loras"):
        load(loaded, name)


def test_a_file_of_another_model_is_an_error_and_one_that_fits_in_part_a_line_in_the_log(folder, loaded, caplog):
    file = write_lora(folder / "a.safetensors", loaded.model.network)
    tensors = load_file(file)
    other = {f"lora_unet_x.lora_{part}.weight": torch.zeros(2, 2) for part in ("up", "down")}
    save_file(other, folder / "other.safetensors")
    save_file(tensors | other, file)
    with pytest.raises(FileError, match="nothing in this LoRA fits"):
        load(loaded, "other.safetensors")
    with caplog.at_level(logging.WARNING):
        load(loaded, "a.safetensors")
    assert "layers fit, left out are lora_unet_x" in caplog.text
