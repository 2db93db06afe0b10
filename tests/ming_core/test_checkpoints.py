"""Checkpoint folders: what is accepted, and that everything else gives one clear error."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from ming_univision.ming_core import (
    CheckpointError,
    Conversation,
    FileError,
    MingTok,
    UniVision,
    checkpoint,
    files,
    load_mingtok,
    load_univision,
    save_mingtok,
    save_univision,
)
from ming_univision.ming_core.checkpoint import Checkpoint, checkpoint_bytes, checkpoint_kind, save, stored_quantization
from ming_univision.ming_core.checkpoint.keys import checkpoint_keys
from ming_univision.ming_core.config import ConfigError, MingTokConfig, UniVisionConfig, read_config
from ming_univision.ming_core.files import write_whole
from safetensors.torch import load_file, save_file

PUBLISHED_VALUES = 18_804_506_432


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    """A copy of the small checkpoint, to be damaged."""
    return shutil.copytree(checkpoint_folder, tmp_path / "model", ignore=shutil.ignore_patterns("io.safetensors"))


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for dotted, value in changes.items():
        place, *inner = dotted.split("__")
        if inner:
            config[place][inner[0]] = value
        else:
            config[place] = value
        if value is ...:
            del config[place]
    path.write_text(json.dumps(config))


def shard(folder, count=3):
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors, reverse=True), {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def draw(model):
    return model.generate_image(Conversation(), "A cat.", max_new_tokens=4).features


# --- the published size -------------------------------------------------------------------------------------------


def published_keys(config: UniVisionConfig) -> dict[str, tuple]:
    """The published key list, written out independently of the modules."""
    llm, flow, tok = config.llm_config, config.vishead_diffloss_config, config.mingtok_config or MingTokConfig()
    keys: dict[str, tuple] = {}

    def linear(name, out, into, bias=True):
        keys[f"{name}.weight"] = (out, into)
        if bias:
            keys[f"{name}.bias"] = (out,)

    def norm(name, dim):
        keys[f"{name}.weight"], keys[f"{name}.bias"] = (dim,), (dim,)

    def block(name, dim, hidden, swiglu):
        norm(f"{name}.norm1", dim), norm(f"{name}.norm2", dim)
        linear(f"{name}.attn.qkv", 3 * dim, dim), linear(f"{name}.attn.proj", dim, dim)
        if swiglu:
            linear(f"{name}.mlp.w12", 2 * hidden, dim), linear(f"{name}.mlp.w3", dim, hidden)
        else:
            linear(f"{name}.mlp.fc1", hidden, dim), linear(f"{name}.mlp.fc2", dim, hidden)

    enc, sem, pix = "vision.low_level_encoder", "vision.semantic_decoder", "vision.pixel_decoder"
    e, s, p = tok.low_level_encoder, tok.semantic_decoder, tok.pixel_decoder
    keys[f"{enc}.cls_token"] = (1, 1, e.embed_dim)
    keys[f"{enc}.pos_embed"] = (1, (e.img_size // e.patch_size) ** 2 + 1, e.embed_dim)
    keys[f"{enc}.patch_embed.proj.weight"] = (e.embed_dim, 3, e.patch_size, e.patch_size)
    keys[f"{enc}.patch_embed.proj.bias"] = (e.embed_dim,)
    for i in range(e.depth):
        block(f"{enc}.blocks.0.{i}", e.embed_dim, 2048, True)
    norm(f"{enc}.out_norm", e.embed_dim), linear(f"{enc}.out_proj", e.out_dim, e.embed_dim)
    linear(f"{sem}.in_proj", s.embed_dim, s.in_dim), norm(f"{sem}.norm", s.embed_dim)
    for i in range(s.decoder_depth):
        block(f"{sem}.blocks.0.{i}", s.embed_dim, 2736, True)
    for i in range(p.decoder_depth):
        block(f"{pix}.blocks.0.{i}", p.embed_dim, 4 * p.embed_dim, False)
    norm(f"{pix}.norm", p.embed_dim), linear(f"{pix}.head", 3 * p.patch_size**2, p.embed_dim)
    linear("vision.sem_to_pix", 4 * p.embed_dim, s.embed_dim)

    keys["model.model.word_embeddings.weight"] = keys["model.lm_head.weight"] = (llm.vocab_size, llm.hidden_size)
    keys["model.model.norm.weight"] = (llm.hidden_size,)
    h, i_size = llm.hidden_size, llm.moe_intermediate_size
    for layer in range(llm.num_hidden_layers):
        name = f"model.model.layers.{layer}"
        linear(f"{name}.attention.query_key_value", (16 + 8) * 128, h, bias=False)
        linear(f"{name}.attention.dense", h, 16 * 128, bias=False)
        keys[f"{name}.input_layernorm.weight"] = keys[f"{name}.post_attention_layernorm.weight"] = (h,)
        for gate in ("gate", "image_gate", "audio_gate"):
            linear(f"{name}.mlp.{gate}", llm.num_experts, h, bias=False)
        experts = [(f"experts.{x}", i_size) for x in range(llm.num_experts)] + [("shared_experts", 2 * i_size)]
        for expert, hidden in experts:
            linear(f"{name}.mlp.{expert}.gate_proj", hidden, h, bias=False)
            linear(f"{name}.mlp.{expert}.up_proj", hidden, h, bias=False)
            linear(f"{name}.mlp.{expert}.down_proj", h, hidden, bias=False)

    w, net = flow.diffloss_w, "model.diffloss.net"
    linear("model.vis_head.0", w, h), norm("model.vis_head.1", w)
    linear(f"{net}.time_embed.mlp.0", w, 256), linear(f"{net}.time_embed.mlp.2", w, w)
    linear(f"{net}.cond_embed", w, w), linear(f"{net}.input_proj", w, 32)
    for i in range(flow.diffloss_d):
        name = f"{net}.res_blocks.{i}"
        norm(f"{name}.in_ln", w), linear(f"{name}.mlp.w12", 16384, w), linear(f"{name}.mlp.w3", w, 8192)
        linear(f"{name}.adaLN_modulation.1", 3 * w, w)
    linear(f"{net}.final_layer.linear", 32, w), linear(f"{net}.final_layer.adaLN_modulation.1", 2 * w, w)
    linear("linear_proj.0", h, s.embed_dim), linear("linear_proj.2", h, h)
    return keys


def test_the_published_keys_map_one_to_one_onto_the_model_but_for_the_audio_gates():
    keys = published_keys(UniVisionConfig())
    assert sum(torch.Size(shape).numel() for shape in keys.values()) == PUBLISHED_VALUES
    parts = checkpoint_keys(UniVision(device="meta"))
    assert {key: part.shape for key, part in parts.items()} == {k: s for k, s in keys.items() if "audio_gate" not in k}
    places = [(part.module, part.parameter, str(part.place)) for part in parts.values()]
    assert len(set(places)) == len(places)


def test_every_value_of_the_model_has_its_place_in_the_published_keys():
    model = UniVision(device="meta")
    filled = sum(torch.Size(part.shape).numel() for part in checkpoint_keys(model).values())
    assert filled == sum(p.numel() for p in model.parameters())


# --- what is accepted ---------------------------------------------------------------------------------------------


def test_shards_give_the_same_model_and_the_same_fingerprint(folder, checkpoint_folder):
    shard(folder)
    one, many = load_univision(checkpoint_folder), load_univision(folder)
    assert one.fingerprint == many.fingerprint and one.mingtok.fingerprint == many.mingtok.fingerprint
    assert torch.equal(draw(one).latents, draw(many).latents)


def test_the_fingerprint_does_not_depend_on_the_precision_but_on_the_values(folder, checkpoint_folder):
    fingerprint = load_univision(checkpoint_folder).fingerprint
    assert load_univision(folder, dtype=torch.bfloat16).fingerprint == fingerprint
    tensors = tensors_of(folder)
    tensors["model.lm_head.weight"][0, 0] += 1
    rewrite(folder, tensors)
    other = load_univision(folder)
    assert other.fingerprint != fingerprint
    assert other.mingtok.fingerprint == load_univision(checkpoint_folder).mingtok.fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_kind_of_file_and_of_model_draws_and_answers(folder, dtype):
    rewrite(folder, {k: t.to(dtype) for k, t in tensors_of(folder).items()})
    for precision in (dtype, torch.float32):
        model = load_univision(folder, dtype=precision)
        assert {p.dtype for p in model.network.parameters()} == {precision}
        features = draw(model)
        assert torch.isfinite(features.latents).all() and features.latents.dtype == torch.float32
        assert model.understand(Conversation(), "What is it?", features=features, max_new_tokens=2).token_ids


@pytest.mark.parametrize("scaling", [None, {"type": "3D"}])
def test_both_rope_spellings_are_read(folder, scaling, checkpoint_folder):
    edit_config(folder, llm_config__rope_scaling=scaling)
    assert torch.equal(draw(load_univision(folder)).latents, draw(load_univision(checkpoint_folder)).latents)


def test_audio_keys_and_rope_buffers_may_be_there_or_not(folder, checkpoint_folder):
    tensors = tensors_of(folder)
    without = {k: t for k, t in tensors.items() if "audio_gate" not in k and "inv_freq" not in k}
    assert len(without) < len(tensors)
    rewrite(folder, without)
    assert torch.equal(draw(load_univision(folder)).latents, draw(load_univision(checkpoint_folder)).latents)


def test_the_flow_heads_sizes_are_read_from_the_tensors(folder, checkpoint_folder):
    edit_config(folder, vishead_diffloss_config={"num_sampling_steps": "4"})
    model = load_univision(folder)
    assert model.config.vishead_diffloss_config.diffloss_w == 32
    assert torch.equal(draw(model).latents, draw(load_univision(checkpoint_folder)).latents)


def test_a_sibling_mingtok_folder_gives_its_config(folder, checkpoint_folder):
    config = json.loads((folder / "config.json").read_text())
    sibling = folder.parent / "MingTok-Vision"
    sibling.mkdir()
    (sibling / "config.json").write_text(json.dumps(config["mingtok_config"]))
    edit_config(folder, mingtok_config=...)
    assert torch.equal(draw(load_univision(folder)).latents, draw(load_univision(checkpoint_folder)).latents)


def test_a_sibling_folder_that_only_sounds_like_a_mingtok_is_passed_over(folder, checkpoint_folder):
    config = json.loads((folder / "config.json").read_text())
    for name, content in (("MingTok-A-notes", {"title": "notes"}), ("MingTok-Vision", config["mingtok_config"])):
        (folder.parent / name).mkdir()
        (folder.parent / name / "config.json").write_text(json.dumps(content))
    edit_config(folder, mingtok_config=...)
    assert load_univision(folder).mingtok.config == load_univision(checkpoint_folder).mingtok.config


def test_of_several_sibling_mingtoks_those_of_other_shapes_are_passed_over_and_two_that_fit_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())["mingtok_config"]
    deeper = {**config, "pixel_decoder": {**config["pixel_decoder"], "decoder_depth": 9}}
    newer = {**config, "low_level_encoder": {**config["low_level_encoder"], "ffn_layer": "mlp"}}
    for name, content in (("A-MingTok", deeper), ("MingTok-3", newer), ("MingTok-Vision", config)):
        (folder.parent / name).mkdir()
        (folder.parent / name / "config.json").write_text(json.dumps(content))
    edit_config(folder, mingtok_config=...)
    assert load_univision(folder).mingtok.config == read_config(MingTokConfig, config)
    (folder.parent / "A-MingTok" / "config.json").write_text(json.dumps({**config, "mean": 0.25}))
    with pytest.raises(CheckpointError, match=r"A-MingTok and .*MingTok-Vision differ"):
        load_univision(folder)


def test_a_sibling_mingtok_is_found_beside_the_link_to_a_model_and_beside_what_the_link_leads_to(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())["mingtok_config"]
    edit_config(folder, mingtok_config=...)
    models = tmp_path / "models"
    models.mkdir()
    (models / "linked").symlink_to(folder, target_is_directory=True)
    for place in (models, folder.parent):
        (place / "MingTok-Vision").mkdir()
        (place / "MingTok-Vision" / "config.json").write_text(json.dumps(config))
        assert load_univision(models / "linked").mingtok.config == read_config(MingTokConfig, config)
        shutil.rmtree(place / "MingTok-Vision")


def test_without_any_mingtok_config_the_published_one_is_assumed_and_said_to_misfit(folder):
    edit_config(folder, mingtok_config=...)
    with pytest.raises(CheckpointError, match=r"vision\."):
        load_univision(folder)


def test_mingtok_loads_from_a_whole_model_and_equals_the_one_inside(folder, tmp_path):
    inside = load_univision(folder).mingtok
    alone = load_mingtok(folder)
    save_mingtok(alone, tmp_path / "MingTok")
    again = load_mingtok(tmp_path / "MingTok")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(inside.encode(pixels), alone.encode(pixels))
        assert torch.equal(inside.encode(pixels), again.encode(pixels))
    assert inside.fingerprint == alone.fingerprint == again.fingerprint
    assert [checkpoint_kind(f) for f in (folder, tmp_path / "MingTok", tmp_path)] == ["univision", "mingtok", None]


def test_a_saved_model_is_a_published_folder_that_loads_the_same(folder, tmp_path):
    model = load_univision(folder)
    tokenizer = {"tokenizer.json": (folder / "tokenizer.json").read_text()}
    save_univision(model, tmp_path / "saved", tokenizer)
    stored = tensors_of(folder)
    saved = tensors_of(tmp_path / "saved")
    assert set(stored) - set(saved) == {k for k in stored if "audio_gate" in k or "inv_freq" in k}
    assert all(torch.equal(saved[k], stored[k]) for k in saved)
    assert torch.equal(draw(load_univision(tmp_path / "saved")).latents, draw(model).latents)
    values = sum(p.numel() for p in model.network.parameters())
    assert checkpoint_bytes(tmp_path / "saved", "univision", torch.bfloat16) == 2 * values


def test_a_save_that_fails_leaves_the_checkpoint_that_was_there_whole(folder, monkeypatch):
    shard(folder)
    model = load_univision(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer = {"tokenizer.json": (folder / "tokenizer.json").read_text()}

    def until_the_disk_is_full(path, data):
        if path.name == "config.json":
            raise FileError(f"cannot write {path}")
        write_whole(path, data)

    with monkeypatch.context() as patch, pytest.raises(FileError):
        patch.setattr(save, "write_whole", until_the_disk_is_full)
        save_univision(model, folder, tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    def in_use(path, to):
        raise PermissionError(13, "in use")

    with monkeypatch.context() as patch, pytest.raises(FileError, match="in use"):
        patch.setattr(Path, "replace", in_use)
        patch.setattr(files.time, "sleep", lambda seconds: None)
        save_univision(model, folder, tokenizer)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_univision(model, folder, tokenizer)
    assert not list(folder.glob(".*")) and not (folder / checkpoint.INDEX).exists()
    assert torch.equal(draw(load_univision(folder)).latents, draw(model).latents)


def test_a_checkpoint_reads_its_config_and_headers_once_whatever_is_asked_of_it(folder, monkeypatch):
    opened = []

    def note(module, name):
        read = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path: opened.append(path.name) or read(path))

    note(checkpoint.config, "_read_entries")
    note(checkpoint.reader, "_read_header")
    found = Checkpoint.open(folder)
    assert not opened and Checkpoint.open(found) is found
    assert checkpoint_kind(found) == "univision" and stored_quantization(found) is None
    sizes = [checkpoint_bytes(found, kind, torch.float32) for kind in ("mingtok", "univision")]
    model, mingtok = load_univision(found), load_mingtok(found)
    assert opened == ["config.json", "model.safetensors"]
    assert sizes == [sum(p.nbytes for p in part.parameters()) for part in (mingtok, model.network)]
    assert (model.fingerprint, mingtok.fingerprint) == (found.fingerprint, model.mingtok.fingerprint)


def test_loading_holds_the_model_and_no_second_copy(folder, tensors_alive):
    """No more than one tensor is read before the one before it has found its place."""
    load_univision(folder, dtype=torch.bfloat16)
    read, most = tensors_alive
    assert read > 100 and most == 1


# --- what is refused ----------------------------------------------------------------------------------------------


def refused(folder, *words, loader=load_univision):
    with pytest.raises(CheckpointError) as error:
        loader(folder)
    message = str(error.value)
    assert str(folder) in message
    for word in words:
        assert word in message, message


def test_a_missing_tensor_is_named_with_its_shape(folder):
    tensors = tensors_of(folder)
    del tensors["model.model.norm.weight"]
    rewrite(folder, tensors)
    refused(folder, "model.model.norm.weight [64] is missing", "download")


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    rewrite(folder, tensors_of(folder) | {"linear_proj.0.bias": torch.zeros(7)})
    refused(folder, "linear_proj.0.bias is [7], expected [64]", "config.json")


def test_a_tensor_of_whole_numbers_is_named(folder):
    rewrite(folder, tensors_of(folder) | {"linear_proj.0.bias": torch.zeros(64, dtype=torch.int8)})
    refused(folder, "linear_proj.0.bias is stored as I8", "bf16")


def test_a_file_that_is_cut_off_is_named_with_the_tensor_and_the_sizes(folder):
    path = folder / "model.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    refused(folder, "cut off in tensor", f"{whole - 1000} bytes of {whole}", "download")


@pytest.mark.parametrize("content", [b"", b"abc", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_a_file_that_is_no_safetensors_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors", "download")


def test_what_is_no_readable_file_is_named(folder):
    (folder / "config.json").rename(folder / "away")
    (folder / "config.json").mkdir()
    refused(folder, "config.json is a folder, not a file")
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").mkdir()
    refused(folder, "model-00002-of-00003.safetensors is a folder, not a file")


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors is missing")


def test_shards_without_their_index_and_an_index_that_lies_are_refused(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first, *_ = content["weight_map"]
    content["weight_map"]["not.there"] = content["weight_map"][first]
    index.write_text(json.dumps(content))
    refused(folder, "lacks not.there")
    for outside in ("../other.safetensors", "..", ""):
        content["weight_map"]["not.there"] = outside
        index.write_text(json.dumps(content))
        refused(folder, "outside the folder")
    index.write_text("{")
    refused(folder, "model.safetensors.index.json is not valid JSON")
    index.write_text("{}")
    refused(folder, "model.safetensors.index.json is damaged (it has no weight_map")
    index.unlink()
    refused(folder, "index.json is missing beside 3 shards")


def test_a_pickle_file_is_refused_and_never_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(folder, "pytorch_model.bin is a pickle file", "safetensors")


def test_a_folder_without_weights_or_tokenizer_or_config_is_refused(folder):
    (folder / "tokenizer.json").rename(folder / "away")
    refused(folder, "tokenizer.json is missing")
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json cannot be used")
    (folder / "away").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors is missing")
    (folder / "config.json").unlink()
    refused(folder)
    refused(folder / "nowhere", "no such folder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"llm_config__hidden_act": "gelu"}, ["hidden_act is 'gelu'", "'silu'"]),
        ({"llm_config__num_experts_per_tok": 99}, ["num_experts_per_tok is 99"]),
        ({"llm_config__hidden_size": "wide"}, ["llm_config.hidden_size is 'wide'"]),
        ({"llm_config__hidden_size": float("inf")}, ["llm_config.hidden_size is inf"]),
        ({"mingtok_config__mean": float("nan")}, ["mingtok_config.mean is nan", "finite"]),
        ({"llm_config__rope_scaling": {"type": "yarn"}}, ["rope_scaling", "yarn"]),
        ({"llm_config__eos_token_id": 12}, ["eos_token_id is 12", "tokenizer.json says 90"]),
        ({"llm_config__num_image_tokens_for_gen": 15}, ["is 15: it must be a square number"]),
        ({"llm_config__num_image_tokens_for_gen": -4}, ["num_image_tokens_for_gen is -4: it must be at least 1"]),
        ({"llm_config__num_key_value_heads": 0}, ["num_key_value_heads is 0: it must be at least 1"]),
        ({"llm_config__hidden_size": -8}, ["hidden_size is -8: it must be at least 1"]),
        ({"mlp_depth": 0}, ["mlp_depth is 0: it must be at least 1"]),
        ({"llm_config__num_hidden_layers": 10**30}, ["num_hidden_layers is 1", "must be at most 1000"]),
        ({"llm_config__hidden_size": 1e12}, ["hidden_size is 1000000000000: it must be at most"]),
        ({"mingtok_config__scaling_factor": 0}, ["scaling_factor is 0"]),
        ({"vishead_diffloss_config__num_sampling_steps": "many"}, ["num_sampling_steps is 'many'"]),
        ({"vishead_diffloss_config__num_sampling_steps": "1" + 20 * "0"}, ["must be a whole number from 1 to 1000"]),
        ({"llm_config__hidden_size": 32}, ["expected [", "by config.json"]),
        ({"llm_config": ...}, ["no llm_config"]),
    ],
)
def test_a_wrong_config_value_is_named(folder, change, words):
    edit_config(folder, **change)
    refused(folder, "config.json", *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{nope", "config.json is not valid JSON"), ("[" * 100_000, "config.json is nested more than 64 levels deep")],
)
def test_a_config_that_is_no_json_is_named(folder, content, words):
    (folder / "config.json").write_text(content)
    assert checkpoint_kind(folder) is None
    refused(folder, words)


def test_a_flow_head_of_more_blocks_than_can_be_meant_is_refused_at_once(folder):
    tensors = tensors_of(folder)
    tensors["model.diffloss.net.res_blocks.99999999.mlp.w12.weight"] = torch.zeros(1)
    rewrite(folder, tensors)
    refused(folder, "diffloss_d is 100000000: it must be at most 1000")


def test_a_failed_load_leaves_nothing_and_the_folder_loads_once_it_is_mended(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    refused(folder)
    (folder / "model.safetensors").write_bytes(whole)
    assert draw(load_univision(folder)).batch == 1


def test_config_defaults_are_the_published_sizes_and_errors_name_the_entry():
    config = UniVisionConfig()
    assert (config.llm_config.num_hidden_layers, config.llm_config.num_experts) == (28, 64)
    assert config.drawing_grid == (16, 16) and config.vishead_diffloss_config.steps == 16
    with pytest.raises(ConfigError, match=r"low_level_encoder\.depth is True, not int"):
        read_config(MingTokConfig, {"low_level_encoder": {"depth": True}})
    with pytest.raises(ConfigError, match="out_dim 16 differs"):
        MingTok(read_config(MingTokConfig, {"low_level_encoder": {"out_dim": 16}}), device="meta")
