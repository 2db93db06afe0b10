"""What the published release may hold, and what else lands in its folder: it works, or is named as what it is."""

import json
import os
import shutil
import time

import pytest
import torch
from ming_univision.ming_core import CheckpointError, Conversation, load_mingtok, load_univision, save_mingtok
from ming_univision.ming_core.checkpoint import checkpoint_bytes, tokenizer_files
from ming_univision.ming_core.prompts import ChatFormat
from ming_univision.ming_core.text_tokenizer import SOURCE
from safetensors.torch import load_file, save_file

SPECIAL = ["<|endoftext|>", "<role>", "</role>", "<imagePatch>", "<image>", "</image>"]
needs_links = pytest.mark.skipif(os.name == "nt", reason="making links takes a right that few users have there")
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    """A copy of the small checkpoint, to be changed."""
    return shutil.copytree(checkpoint_folder, tmp_path / "model", ignore=shutil.ignore_patterns("io.safetensors"))


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def latents(model):
    return model.generate_image(Conversation(), "A cat.", max_new_tokens=4).features.latents


def refusal(folder, loader=load_univision, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        loader(folder, **options)
    assert str(folder) in str(error.value)
    return str(error.value)


# --- Tensors that the model does not ask for ----------------------------------------------------------------------

LEFTOVERS = {
    "a mask token": ["vision.mask_token"],
    "audio": ["audio.encoder.layers.0.weight", "linear_proj_audio.0.weight", "model.audio_head.weight"],
    "LoRA leftovers": [
        "model.model.layers.0.attention.dense.lora_A.weight",
        "model.model.layers.0.attention.dense.lora_B.weight",
    ],
    "optimizer state": [f"optimizer.state.{i}.exp_avg" for i in range(50)],
}


@pytest.mark.parametrize("what", LEFTOVERS)
def test_tensors_that_no_part_asks_for_are_one_line_in_the_log_and_change_nothing(
    folder, checkpoint_folder, caplog, what
):
    keys = LEFTOVERS[what]
    rewrite(folder, tensors_of(folder) | {key: torch.full((2, 3), float("nan")) for key in keys})
    with caplog.at_level("WARNING"):
        model = load_univision(folder)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{len(keys)} tensors are of no part of the model" in line and keys[0] in line and len(line) < 500
    assert torch.equal(latents(model), latents(load_univision(checkpoint_folder)))


def test_a_mask_token_in_a_mingtok_is_a_line_in_the_log_too(folder, tmp_path, caplog):
    save_mingtok(load_mingtok(folder), tmp_path / "MingTok")
    rewrite(tmp_path / "MingTok", tensors_of(tmp_path / "MingTok") | {"mask_token": torch.zeros(1, 1, 64)})
    with caplog.at_level("WARNING"):
        assert load_mingtok(tmp_path / "MingTok").fingerprint == load_mingtok(folder).fingerprint
    assert [
        r for r in caplog.records if "1 tensors are of no part of the model, and not loaded: mask_token" in r.message
    ]


@pytest.mark.parametrize("entry", ["num_hidden_layers", "num_experts"])
@pytest.mark.parametrize("change", [-1, 1, 500])
def test_layers_and_experts_that_config_json_does_not_count_are_not_taken_for_leftovers(folder, entry, change):
    def edit(config):
        config["llm_config"][entry] += change
        config["llm_config"]["num_experts_per_tok"] = 1

    before = json.loads((folder / "config.json").read_text())["llm_config"][entry]
    edit_json(folder / "config.json", edit)
    message = refusal(folder)
    assert f"llm_config.{entry} is {before + change}, but the weights have {before}" in message


def test_blocks_of_mingtok_that_config_json_does_not_count_are_not_taken_for_leftovers(folder):
    edit_json(folder / "config.json", lambda c: c["mingtok_config"]["semantic_decoder"].update(decoder_depth=1))
    for loader in (load_univision, load_mingtok):
        assert "semantic_decoder.decoder_depth is 1, but the weights have 2" in refusal(folder, loader)


# --- What is in the way, named as what it is ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "scaled_fp8",
        "model.model.layers.0.attention.dense.scale_weight",
        "model.model.layers.0.attention.dense.scale_input",
        "model.model.layers.0.attention.dense.weight_scale",
        "model.model.layers.0.attention.dense.weight_scale_inv",
    ],
)
def test_a_scaled_fp8_file_is_named_as_one(folder, key):
    tensors = tensors_of(folder)
    wide = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in tensors.items()}
    rewrite(folder, wide | {key: torch.ones(1)})
    message = refusal(folder)
    assert f"is a scaled fp8 file (it has {key})" in message and "bf16" in message and "download" not in message
    assert "is a scaled fp8 file" in refusal(folder, load_mingtok)


@pytest.mark.parametrize(
    "keys",
    [
        ["model.model.layers.0.attention.dense.lora_A.weight", "model.model.layers.0.attention.dense.lora_B.weight"],
        ["base_model.model.x.lora_A.default.weight", "base_model.model.x.lora_B.default.weight"],
        ["lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight", "lora_unet_x.alpha"],
    ],
)
def test_a_lora_in_place_of_a_model_is_named_as_one(folder, keys):
    rewrite(folder, {key: torch.zeros(2, 2) for key in keys})
    message = refusal(folder)
    assert "holds a LoRA" in message and "Ming LoRA" in message and "merge" in message and "download" not in message


def test_an_index_of_shards_beside_a_whole_file_is_to_be_removed_and_then_the_file_loads(folder, checkpoint_folder):
    index = folder / "model.safetensors.index.json"
    keys = sorted(tensors_of(folder))
    weight_map = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(keys)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    message = refusal(folder)
    assert "names model-00001-of-00002.safetensors (and 1 more), which is not there" in message
    assert f"model.safetensors holds the whole model: remove {index.name}" in message and "download" not in message
    index.unlink()
    assert torch.equal(latents(load_univision(folder)), latents(load_univision(checkpoint_folder)))


def test_an_index_that_names_the_single_file_is_read(folder, checkpoint_folder):
    weight_map = dict.fromkeys(tensors_of(folder), "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert load_univision(folder).fingerprint == load_univision(checkpoint_folder).fingerprint


def test_a_missing_shard_beside_a_file_that_is_not_the_whole_model_is_to_be_downloaded(folder):
    keys = sorted(tensors_of(folder))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(keys, "a.safetensors")})
    )
    assert "a.safetensors is missing: download this file again" in refusal(folder)


def test_hidden_files_that_macos_leaves_beside_the_weights_are_passed_over(folder, checkpoint_folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "._weights.safetensors").write_bytes(b"\0\5\26\7")
    assert load_univision(folder).fingerprint == load_univision(checkpoint_folder).fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_weight_that_is_not_finite_is_named(folder, value, dtype, quantization):
    tensors = {key: t.to(dtype) for key, t in tensors_of(folder).items()}
    key = "model.model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[key].view(-1)[-1] = value
    rewrite(folder, tensors)
    message = refusal(folder, quantization=quantization)
    assert f"model.safetensors: tensor {key} holds NaN or infinite values: download this file again" in message


# --- Other forms of the same weights ------------------------------------------------------------------------------


def in_dtype(folder, dtype):
    rewrite(folder, {key: t.to(dtype) for key, t in tensors_of(folder).items()})


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_weights_in_float64_are_the_same_weights(folder, checkpoint_folder, quantization):
    in_dtype(folder, torch.float64)
    wide, plain = (load_univision(f, quantization=quantization) for f in (folder, checkpoint_folder))
    assert torch.equal(latents(wide), latents(plain))
    sizes = [checkpoint_bytes(f, "univision", torch.float32, quantization) for f in (folder, checkpoint_folder)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_weights_in_fp8_without_scales_are_read_as_the_values_that_they_are(folder, tmp_path, dtype, quantization):
    in_dtype(folder, dtype)
    rounded = shutil.copytree(folder, tmp_path / "rounded")
    in_dtype(rounded, torch.float32)
    narrow, plain = (load_univision(f, quantization=quantization) for f in (folder, rounded))
    assert torch.equal(latents(narrow), latents(plain)) and torch.isfinite(latents(narrow)).all()


@needs_links
def test_a_snapshot_in_the_cache_of_the_hub_loads_through_its_links(folder, checkpoint_folder, tmp_path):
    blobs, snapshot = tmp_path / "models--x--y" / "blobs", tmp_path / "models--x--y" / "snapshots" / ("5" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{i:064}")
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", f"{i:064}"))
    assert torch.equal(latents(load_univision(snapshot)), latents(load_univision(checkpoint_folder)))
    os.path.realpath(snapshot / "model.safetensors")
    (blobs / os.path.basename(os.readlink(snapshot / "model.safetensors"))).unlink()
    message = refusal(snapshot)
    assert "model.safetensors is a link to " in message and "not there: download this file again" in message


# --- The tokenizer ------------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer_says_which_two_files_to_copy_from_where(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    message = refusal(folder)
    assert "tokenizer.json is missing" in message and "quickstart.py download" in message
    assert f"copy tokenizer.json and tokenizer_config.json from {SOURCE}" in message


def move_special_tokens(folder, ids=None, keep=()):
    """Move the special tokens from tokenizer.json to tokenizer_config.json, under these ids or their own."""
    moved = {}

    def take(tokenizer):
        for token in [t for t in tokenizer["added_tokens"] if t["content"] not in keep]:
            tokenizer["added_tokens"].remove(token)
            tokenizer["model"]["vocab"].pop(token["content"], None)
            i = token.pop("id")
            moved[str((ids or {}).get(token["content"], i))] = token

    edit_json(folder / "tokenizer.json", take)
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=moved))


def special_ids(folder) -> dict[str, int]:
    return dict(ChatFormat.from_folder(folder)._special_ids)


def test_special_tokens_that_stand_in_tokenizer_config_only_have_the_ids_that_it_states(folder, checkpoint_folder):
    move_special_tokens(folder)
    assert special_ids(folder) == special_ids(checkpoint_folder)
    assert torch.equal(latents(load_univision(folder)), latents(load_univision(checkpoint_folder)))
    again = tokenizer_files(folder)
    assert set(again) == {"tokenizer.json", "tokenizer_config.json"}


def test_ids_with_gaps_between_them_are_kept(folder):
    ids = {token: 100 + 3 * i for i, token in enumerate(SPECIAL)}
    move_special_tokens(folder, ids)
    chat = ChatFormat.from_folder(folder)
    assert {token: chat._special_ids[token] for token in SPECIAL} == ids
    for token in SPECIAL:
        assert not set(chat.encode(f"a {token} b")) & set(ids.values())


def test_special_tokens_that_stand_nowhere_are_named_with_the_file_that_is_missing(folder):
    move_special_tokens(folder)
    (folder / "tokenizer_config.json").unlink()
    message = refusal(folder)
    assert "no special token <|endoftext|>" in message and "tokenizer_config.json is missing" in message
    assert SOURCE in message


def test_two_files_that_give_a_token_two_ids_or_two_tokens_one_are_refused(folder):
    image = {"content": "<image>", "special": True}
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"120": image}))
    assert "gives the token <image> the id 120, but tokenizer.json gives it the id 99" in refusal(folder)
    new = {"content": "<new>", "special": True}
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"99": new}))
    assert "gives the token <new> the id 99, but tokenizer.json gives that id to <image>" in refusal(folder)
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder={"99": image}))
    assert special_ids(folder)["<image>"] == 99


@pytest.mark.parametrize("decoder", [[5], {"x": {"content": "a"}}, {"-1": {"content": "a"}}, {"1": "a"}, {"1": {}}])
def test_a_list_of_special_tokens_that_is_none_is_refused(folder, decoder):
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder))
    assert "added_tokens_decoder is not a list of tokens by id" in refusal(folder)


def test_a_token_beyond_the_embeddings_is_refused(folder):
    edit_json(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update(A=5000))
    assert "the token 'A' has the id 5000, but vocab_size in config.json is 128" in refusal(folder)


def test_a_tokenizer_that_makes_special_tokens_of_what_a_user_types_is_refused(folder):
    def as_words(tokenizer):
        tokenizer["pre_tokenizer"] = None
        tokenizer["model"] |= {"ignore_merges": True}
        tokenizer["model"]["vocab"] |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}

    edit_json(folder / "tokenizer.json", as_words)
    assert "makes the special token" in refusal(folder)


@pytest.mark.parametrize("i", [1 << 32, (1 << 32) - 1, -1, 1.5, "1", None])
def test_an_id_that_would_take_all_memory_or_is_none_is_refused_before_the_library_sees_it(folder, i):
    edit_json(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update(A=i))
    assert f"the token A has the id {i}" in refusal(folder)


@pytest.mark.parametrize("table", ["////////////", "AAAABA==", 5, [], "x"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_table_of_characters_that_says_to_be_longer_than_it_is_does_not_end_the_process(folder, table, nested):
    normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    if nested:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "NFC"}, normalizer]}
    edit_json(folder / "tokenizer.json", lambda t: t.update(normalizer=normalizer))
    assert "tokenizer.json" in refusal(folder)


@needs_pipes
def test_the_tokenizer_library_is_handed_no_file_but_the_two_and_those_must_be_files(folder, checkpoint_folder):
    for name in ("chat_template.jinja", "vocab.json", "merges.txt"):
        os.mkfifo(folder / name)
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(tokenizer_file="/dev/zero", vocab_file="/dev/zero"))
    assert special_ids(folder) == special_ids(checkpoint_folder)
    for name in ("special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        assert f"{name} is a pipe, not a file" in refusal(folder)
        (folder / name).unlink()
        shutil.copy(checkpoint_folder / "tokenizer_config.json", folder / name)


# --- Hostile headers and configs ----------------------------------------------------------------------------------


def write_header(folder, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + data)


def entry(dtype="F32", shape=(2,), data_offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **more}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([], "not a JSON object"),
        ({"a": 5}, "the entry of a is not"),
        ({"a": {"dtype": "F32"}}, "the entry of a is not"),
        ({"a": entry(more=1)}, "the entry of a is not"),
        ({"a": entry(dtype=5)}, "the dtype of a is '5'"),
        ({"a": entry(dtype="F99")}, "the dtype of a is 'F99'"),
        ({"a": entry(shape="ab")}, "the shape of a is ab"),
        ({"a": entry(shape=[2.0])}, "the shape of a"),
        ({"a": entry(shape=[True, 2])}, "the shape of a"),
        ({"a": entry(shape=[-2])}, "the shape of a is [-2]"),
        ({"a": entry(shape=[1 << 62])}, "the shape of a"),
        ({"a": entry(shape=[1 << 40, 1 << 40])}, "the shape of a"),
        ({"a": entry(shape=[1] * 100_000)}, "the shape of a"),
        ({"a": entry(data_offsets=[8, 0])}, "the data_offsets of a are [8, 0]"),
        ({"a": entry(data_offsets=[-8, 0])}, "the data_offsets of a are [-8, 0]"),
        ({"a": entry(data_offsets=[0])}, "the data_offsets of a"),
        ({"a": entry(data_offsets=[0, 4])}, "a is F32 [2] in 4 bytes"),
        ({"a": entry(), "b": entry()}, "tensor b overlaps a"),
        ({"a": entry(), "b": entry(data_offsets=[4, 12])}, "tensor b overlaps a"),
        ({"a": entry(data_offsets=[4, 12])}, "tensor a leaves a gap behind the header"),
        ({"a": entry(shape=[1], data_offsets=[0, 4])}, "12 bytes at the end belong to no tensor"),
        ({"a": entry(data_offsets=[16, 24])}, "cut off in tensor a"),
        ({"\ud800": entry()}, "a tensor is called '\\ud800'"),
        ({"a": entry(), "__metadata__": []}, "its metadata are not an object of texts"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "its metadata are not an object of texts"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1e999]}}', "a.data_offsets[1] is inf"),
        (b'{"a":' * 100_000, "nested more than 64 levels deep"),
        (b'{"a":' + b"[]," * 30_000_000, "its header is too long"),
        (b" " * (95 << 20), "its header is too long"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_header_that_is_not_the_formats_is_refused_in_under_a_second(folder, header, words):
    write_header(folder, header, bytes(16))
    start = time.monotonic()
    message = refusal(folder)
    assert time.monotonic() - start < 1
    assert words in message and len(message) < 1000


@pytest.mark.parametrize("length", [3, 1 << 20, 1 << 63, (1 << 64) - 1])
def test_a_header_longer_than_its_file_or_cut_is_refused(folder, length):
    write_header(folder, {"a": entry()}, bytes(8), length)
    assert "model.safetensors" in refusal(folder)


ABSURD = {
    "layers and experts": {"llm_config": {"num_hidden_layers": 1000, "num_experts": 1000}},
    "sizes": {"llm_config": {"hidden_size": 1 << 28, "vocab_size": 1 << 28, "moe_intermediate_size": 1 << 28}},
    "a depth": {"mingtok_config": {"semantic_decoder": {"decoder_depth": 1000}}},
    "a side": {"mingtok_config": {"low_level_encoder": {"img_size": 1 << 28}}},
    "tokens of a picture": {"llm_config": {"num_image_tokens_for_gen": 16384}},
    "rope": {"llm_config": {"rope_theta": 0}},
    "epsilon": {"llm_config": {"rms_norm_eps": -1}},
    "dense layers": {"llm_config": {"first_k_dense_replace": -3}},
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_entries_of_config_json_are_refused_in_under_a_second(folder, what):
    def merge(into, new):
        for key, value in new.items():
            merge(into[key], value) if isinstance(value, dict) else into.update({key: value})

    edit_json(folder / "config.json", lambda config: merge(config, ABSURD[what]))
    start = time.monotonic()
    assert "config.json" in refusal(folder)
    assert time.monotonic() - start < 1
    start = time.monotonic()
    try:
        assert checkpoint_bytes(folder, "univision", torch.float32) > 1 << 50  # which no machine has, and nodes say so
    except CheckpointError as error:
        assert "config.json" in str(error)
    assert time.monotonic() - start < 1


@needs_pipes
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json"])
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused_at_once(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name} is a pipe, not a file: put the file in its place" in refusal(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{name} is a device, not a file" in refusal(folder)
