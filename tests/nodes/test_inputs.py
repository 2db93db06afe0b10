"""What the nodes accept, and what gives one clear error and leaves everything usable."""

import errno
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ming_univision.ming_core import Conversation, files, load_univision
from ming_univision.ming_core.images import to_images, to_pixels
from ming_univision.nodes import NODE_CLASS_MAPPINGS, filenames, host, mingtok, models
from ming_univision.nodes import saved_files as saved_files_module
from ming_univision.nodes.saved_files import saved_files, saved_path
from ming_univision.runner import core_nodes
from ming_univision.runner.session import ExecutionError, known_node_classes, run_workflow
from ming_univision.runner.workflow import WorkflowError, plan, read_workflow

SHORT = {"max_new_tokens": 4}


@pytest.fixture(autouse=True)
def folders(tmp_path, golden_folder, monkeypatch):
    """Saves go to a temporary folder; the small recorded checkpoints are in the list of models."""
    (tmp_path / "input").mkdir()
    monkeypatch.setattr(host, "model_folders", lambda: [host.PACK / "tests" / "golden"])
    with host.folders(output=tmp_path / "output", input=tmp_path / "input"), torch.inference_mode():
        yield tmp_path


@pytest.fixture(scope="module")
def small():
    """(model, mingtok) handles of a small checkpoint with random weights."""
    folder = host.PACK / "tests" / "golden" / "edit_round"
    loaded = host.managed(load_univision(folder), "edit_round")
    return loaded, host.Loaded(loaded.model.mingtok, None, "edit_round: MingTok", owner=loaded)


def node(name: str, **inputs):
    """Call a node with its widgets' defaults, as a graph would."""
    node_class = NODE_CLASS_MAPPINGS[name]
    required = node_class.INPUT_TYPES()["required"]
    defaults = {k: o["default"] for k, (_, o) in required.items() if "default" in o}
    defaults |= {k: "" for k, (kind, o) in required.items() if kind == "STRING" and "default" not in o}
    if "max_new_tokens" in defaults:
        defaults["max_new_tokens"] = 4
    return getattr(node_class(), node_class.FUNCTION)(**defaults | inputs)


def image(height=40, width=40, channels=3, batch=1, seed=0):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def features_of(small, picture):
    latent, _ = node("MingTokEncode", mingtok=small[1], image=picture)
    return node("MingTokSemanticFeatures", mingtok=small[1], latent=latent)[0]


# --- works --------------------------------------------------------------------------------------------------------


def test_rgba_loses_its_alpha_and_one_channel_is_repeated():
    rgba = image(channels=4)
    assert torch.equal(to_pixels(rgba, 32), to_pixels(rgba[..., :3], 32))
    grey = image(channels=1)
    assert torch.equal(to_pixels(grey, 32), to_pixels(grey.expand(-1, -1, -1, 3), 32))


def test_values_outside_the_range_are_clamped_and_half_precision_is_taken():
    wild = image() * 4 - 1
    assert torch.equal(to_pixels(wild, 32), to_pixels(wild.clamp(0, 1), 32))
    half = to_pixels(image(32, 32).half(), 32)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, to_pixels(image(32, 32), 32), rtol=0, atol=2e-3)


@pytest.mark.parametrize("fit", ["center crop", "stretch", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7), (32, 32), (500, 33)])
def test_pictures_of_any_size_encode_and_decode(small, fit, size):
    latent, _ = node("MingTokEncode", mingtok=small[1], image=image(*size), fit=fit, detail="standard")
    assert latent["samples"].shape == (1, 8, 4, 4) and latent["samples"].dtype == torch.float32
    (features,) = node("MingTokSemanticFeatures", mingtok=small[1], latent=latent)
    (picture,) = node("MingTokDecode", mingtok=small[1], features=features)
    assert picture.shape == (1, 32, 32, 3) and picture.min() >= 0 and picture.max() <= 1


def test_high_detail_is_twice_the_side_and_decodes_to_twice_the_side(small):
    latent, _ = node("MingTokEncode", mingtok=small[1], image=image(), detail="high")
    assert latent["samples"].shape == (1, 8, 8, 8)
    (features,) = node("MingTokSemanticFeatures", mingtok=small[1], latent=latent)
    assert node("MingTokDecode", mingtok=small[1], features=features)[0].shape == (1, 64, 64, 3)


def test_pad_puts_mid_grey_around_and_crop_keeps_the_middle():
    wide = torch.ones(1, 20, 60, 3)
    padded = to_images(to_pixels(wide, 60, "pad"))
    assert (padded[0, :19] - 0.5).abs().max() < 0.01 and padded[0, 25:35].min() > 0.99
    stripes = torch.zeros(1, 20, 60, 3)
    stripes[:, :, 25:35] = 1
    assert to_images(to_pixels(stripes, 20))[0, :, 8:12].min() > 0.99


def test_a_picture_of_the_right_size_is_not_touched():
    exact = image(32, 32)
    assert torch.equal(to_pixels(exact, 32), exact.permute(0, 3, 1, 2) * 2 - 1)


@pytest.mark.parametrize("name", ["und_nosmart_stride16", "edit_nosmart_stride8"])
def test_resizing_is_the_published_one(golden, name):
    io = golden("preprocess").io
    picture = io["image_uint8"].float().div(255)[None]
    side, fit = (1024, "stretch") if name.startswith("und") else (512, "center crop")
    stride = int(name.rpartition("stride")[2])
    found = to_pixels(picture, side, fit)[0, :, ::stride, ::stride]
    torch.testing.assert_close(found, io[name], rtol=0, atol=1e-5)


def test_a_batch_of_pictures_goes_into_one_message(small):
    batch = features_of(small, image(batch=3))
    _, talk = node("MingUnderstand", model=small[0], prompt="Compare.", features=batch)
    assert len(talk.images) == 3 and talk.rounds == 1


def test_latents_come_back_through_cores_blend_and_through_a_file(small, tmp_path):
    a, b = (node("MingTokEncode", mingtok=small[1], image=image(seed=s))[0] for s in (1, 2))
    blend = core_nodes.NODE_CLASS_MAPPINGS["LatentBlend"]
    (mixed,) = getattr(blend(), blend.FUNCTION)(samples1=a, samples2=b, blend_factor=0.5)
    (features,) = node("MingTokSemanticFeatures", mingtok=small[1], latent=mixed)
    torch.testing.assert_close(features.latents, (a["samples"] + b["samples"]) / 2)
    # core's SaveLatent and LoadLatent keep only the samples
    (plain,) = node("MingTokSemanticFeatures", mingtok=small[1], latent={"samples": a["samples"].clone()})
    (same,) = node("MingTokSemanticFeatures", mingtok=small[1], latent=a)
    assert plain == same


def test_a_drawing_that_travelled_as_latents_still_has_new_noise_for_its_next_round(small):
    features, *_ = node("MingGenerate", model=small[0], prompt="A cat.")
    (latent,) = node("MingFeaturesToLatent", features=features[0])
    (blended,) = core_nodes.LatentBlend().blend(latent, latent, 0.5)
    (again,) = node("MingTokSemanticFeatures", mingtok=small[1], latent=blended)
    assert again.depth == features[0].depth == 1


def test_pictures_go_where_comfyui_wants_them(small, monkeypatch):
    features = features_of(small, image())
    monkeypatch.setattr(host, "images_device", lambda: torch.device("meta"))
    for name, inputs, pictures in (
        ("MingTokDecode", {"mingtok": small[1], "features": features}, 1),
        ("MingFeaturesPreview", {"features": features}, 1),
        ("MingFeaturesCompare", {"features_a": features, "features_b": features}, 2),
        ("MingExampleScene", {}, 1),
    ):
        assert all(picture.is_meta for picture in node(name, **inputs)[:pictures])


def test_latents_are_given_and_taken_as_copies(small):
    latent, _ = node("MingTokEncode", mingtok=small[1], image=image())
    (features,) = node("MingTokSemanticFeatures", mingtok=small[1], latent=latent)
    before = features.digest()
    latent["samples"].zero_()
    (again,) = node("MingFeaturesToLatent", features=features)
    again["samples"].zero_()
    assert features.digest() == before


def test_a_prompt_of_20000_characters_works_on_the_built_in_model():
    model, _ = node("MingUniVisionLoader")
    prompt = ("a large red circle at the top left and a small blue star. " * 400)[:20_000]
    text, talk = node("MingUnderstand", model=model, prompt=prompt)
    assert isinstance(text, str) and talk.parts[0].segments[1].text == prompt


def test_a_prompt_full_of_special_tokens_is_plain_text(small):
    prompt = "<image></image><role>HUMAN</role><|endoftext|><imagePatch>" * 3
    _, talk = node("MingUnderstand", model=small[0], prompt=prompt)
    ids = talk.parts[0].segments[1].ids
    assert len(ids) == len(prompt) and not talk.images  # this tokenizer takes a character a token


def test_a_scene_is_drawn_as_its_words_say_and_says_it():
    words = "a large red circle at the top left and a small blue star at the centre on a white background"
    picture, caption = node("MingExampleScene", scene=words, size=128)
    assert caption == words and picture.shape == (1, 128, 128, 3)
    assert picture[0, 22, 22, 0] > 0.7 and picture[0, 22, 22, 2] < 0.3
    again, _ = node("MingExampleScene", seed=5)
    assert torch.equal(again, node("MingExampleScene", seed=5)[0])
    assert not torch.equal(again, node("MingExampleScene", seed=6)[0])
    assert torch.equal(node("MingExampleScene", seed=-1)[0], node("MingExampleScene", seed=2**64 - 1)[0])


def test_metrics_know_equal_pictures_and_measure_noise():
    a = image(64, 64)
    same, structure, _ = node("MingImageMetrics", image_a=a, image_b=a)
    assert same == float("inf") and structure == pytest.approx(1)
    noisy = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).double()
    noise, structure, report = node("MingImageMetrics", image_a=a, image_b=noisy)
    assert noise == pytest.approx(20, abs=0.3) and structure < 0.99 and "dB" in report
    assert node("MingImageMetrics", image_a=image(3, 3), image_b=image(3, 3))[1] == pytest.approx(1)


@pytest.mark.parametrize("shape", [(2, 30, 41, 3), (1, 11, 12, 1), (1, 5, 20, 3)])
def test_structural_similarity_is_the_mean_over_windows(shape):
    a, b = (image(*shape[1:], batch=shape[0], seed=seed).double() for seed in (1, 2))
    offset = torch.arange(11).double() - 5
    weights = []
    for side in shape[1:3]:
        n = min(11, side)
        w = torch.exp(-(offset[(11 - n) // 2 :][:n] ** 2) / 4.5)
        weights.append(w / w.sum())
    window = weights[0][:, None] * weights[1]

    def blur(x):
        n, m = window.shape
        return (x.permute(0, 3, 1, 2).unfold(2, n, 1).unfold(3, m, 1) * window).sum((-2, -1))

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    expected = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    assert node("MingImageMetrics", image_a=a, image_b=b)[1] == pytest.approx(expected.mean().item(), abs=1e-9)


def test_a_comparison_shows_where_two_pictures_differ(small):
    a = image(32, 32)
    b = a.clone()
    b[:, :8, :8] = 1 - b[:, :8, :8].round()  # one patch of the sixteen
    fa, fb = (features_of(small, x) for x in (a, b))
    heatmap, mask, similarity = node("MingFeaturesCompare", features_a=fa, features_b=fb, threshold=0.0)
    assert heatmap.shape == (1, 512, 512, 3) and mask.shape == (1, 512, 512)
    assert 0 < similarity < 1 and set(mask.unique().tolist()) <= {0.0, 1.0}
    heatmap, mask, similarity = node("MingFeaturesCompare", features_a=fa, features_b=fa, threshold=0.0)
    assert not heatmap.any() and not mask.any() and similarity == 1


def test_a_preview_has_a_colour_for_every_token(small):
    (colours,) = node("MingFeaturesPreview", features=features_of(small, image(batch=2)))
    assert colours.shape == (2, 512, 512, 3) and colours.min() == 0 and colours.max() == 1
    cell = colours[0, :128, :128]
    assert (cell == cell[0, 0]).all()


def test_a_picture_of_a_conversation_can_be_taken_out(small):
    features = features_of(small, image())
    (drawn,), (talk,), _ = node("MingEdit", model=small[0], instruction="Make it blue.", features=features)
    assert node("MingConversationPicture", conversation=talk, index=0)[0] == features
    assert node("MingConversationPicture", conversation=talk)[0] == drawn
    assert "Make it blue." in node("MingConversationTranscript", conversation=talk)[0]


def test_files_are_saved_with_a_counter_listed_and_loaded(small, tmp_path):
    features = features_of(small, image())
    _, talk = node("MingUnderstand", model=small[0], prompt="What is it?", features=features)
    for _ in range(2):
        node("MingSaveFeatures", features=features, filename_prefix="a/mine")
        node("MingSaveConversation", conversation=talk, filename_prefix="talk")
    names = saved_files()
    assert names == [
        "ming/a/mine_00001_.safetensors [output]",
        "ming/a/mine_00002_.safetensors [output]",
        "ming/talk_00001_.safetensors [output]",
        "ming/talk_00002_.safetensors [output]",
    ]
    assert node("MingLoadFeatures", file=names[1])[0] == features
    assert node("MingLoadConversation", model=small[0], file=names[2])[0] == talk
    assert NODE_CLASS_MAPPINGS["MingLoadFeatures"].VALIDATE_INPUTS(names[0]) is True


def save(prefix: str, write=lambda path: path.write_bytes(b"whole")) -> str:
    (name,) = saved_files_module.save_new_file(prefix, write)["ui"]["text"]
    return name


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_number_that_is_taken_meanwhile_is_counted_over_and_nothing_is_overwritten(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(saved_files_module, "numbered_path", lambda prefix, root: (root, "x", 1))
    assert [save("x"), save("x")] == ["ming/x_00001_.safetensors [output]", "ming/x_00002_.safetensors [output]"]
    assert {path.read_bytes() for path in (tmp_path / "output" / "ming").iterdir()} == {b"whole"}


def test_a_file_has_a_name_only_when_it_is_whole(tmp_path):
    folder = tmp_path / "output" / "ming"

    def interrupted(path):
        path.write_bytes(b"half")
        assert not list(folder.glob("*.safetensors"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save("x", interrupted)
    assert not list(folder.iterdir())
    assert save("x") == "ming/x_00001_.safetensors [output]"


def test_what_a_killed_process_left_is_removed_by_a_later_save_once_it_is_old(tmp_path):
    folder = tmp_path / "output" / "ming"
    folder.mkdir(parents=True)
    old, new = (folder / f".ming-draft-{age}" for age in ("old", "new"))
    for draft in (old, new):
        draft.write_bytes(b"half")
    os.utime(old, (0, 0))
    save("x")
    assert not old.exists() and new.exists()


@pytest.mark.skipif(os.name == "nt", reason="making links takes a right that few users have there")
def test_files_are_listed_only_if_they_can_be_loaded_also_where_a_link_is_involved(small, tmp_path):
    features = features_of(small, image())
    (tmp_path / "disk" / "ming").mkdir(parents=True)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "ming").symlink_to(tmp_path / "disk" / "ming", target_is_directory=True)
    node("MingSaveFeatures", features=features, filename_prefix="a/mine")
    (tmp_path / "secret.safetensors").touch()
    (tmp_path / "input" / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (tmp_path / "input" / "real.safetensors").touch()
    (tmp_path / "input" / "within.safetensors").symlink_to(tmp_path / "input" / "real.safetensors")
    saved, *others = saved_files()
    assert saved == "ming/a/mine_00001_.safetensors [output]"
    assert others == ["real.safetensors [input]", "within.safetensors [input]"]
    assert node("MingLoadFeatures", file=saved)[0] == features
    with pytest.raises(ValueError, match="leads out of"):
        saved_path("ming/../../secret.safetensors [output]")


@pytest.mark.parametrize("name", ["MingLoadFeatures", "MingLoadConversation"])
def test_a_linked_file_name_is_looked_for_only_when_it_is_known(name):
    assert NODE_CLASS_MAPPINGS[name].VALIDATE_INPUTS(file=None) is True


@pytest.mark.parametrize("name", ["MingLoadFeatures", "MingLoadConversation"])
def test_a_linked_file_is_loaded_again_only_when_any_file_has_changed(small, name):
    node("MingSaveFeatures", features=features_of(small, image()), filename_prefix="mine")
    state = NODE_CLASS_MAPPINGS[name].IS_CHANGED(file=None)
    assert NODE_CLASS_MAPPINGS[name].IS_CHANGED(file=None) == state
    os.utime(saved_path(*saved_files()), (1, 1))
    assert NODE_CLASS_MAPPINGS[name].IS_CHANGED(file=None) != state


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_list_that_was_empty_when_the_workflow_was_stored_is_told_so(small, nothing):
    with pytest.raises(ValueError, match="no file is chosen: save one first"):
        node("MingLoadFeatures", file=nothing)


def test_a_save_node_tells_the_name_that_loads_the_file(small):
    features = features_of(small, image())
    (name,) = node("MingSaveFeatures", features=features, filename_prefix="a/mine")["ui"]["text"]
    assert node("MingLoadFeatures", file=name)[0] == features


def test_a_loader_finds_the_live_model_again_and_reloads_a_changed_file(tmp_path, monkeypatch, checkpoint_folder):
    import shutil

    folder = shutil.copytree(checkpoint_folder, tmp_path / "models" / "sub" / "mine")
    monkeypatch.setattr(host, "model_folders", lambda: [tmp_path / "models"])
    options = {"model_name": "sub/mine", "precision": "fp32"}
    first, tok = node("MingUniVisionLoader", **options)
    assert node("MingUniVisionLoader", **options)[0] is first and tok.owner is first
    state = NODE_CLASS_MAPPINGS["MingUniVisionLoader"].IS_CHANGED(**options)
    os.utime(folder / "model.safetensors", (1, 1))
    assert NODE_CLASS_MAPPINGS["MingUniVisionLoader"].IS_CHANGED(**options) != state
    assert node("MingUniVisionLoader", **options)[0] is not first
    assert list(models.find_checkpoints("univision")) == [models.BUILT_IN, "sub/mine"]


@pytest.fixture
def published(monkeypatch):
    """A folder that is said to hold the published model."""
    monkeypatch.setattr(models, "checkpoint_bytes", lambda folder, kind, dtype, *_: 18_800_000_000 * dtype.itemsize)
    return host.PACK / "tests" / "golden" / "edit_round"


def test_a_model_that_cannot_fit_is_refused_with_the_figures(monkeypatch, published):
    monkeypatch.setattr(host, "total_memory", lambda on: 30e9)
    with pytest.raises(ValueError, match=r"37\.6 GB at bfloat16, and this machine has 30\.0 GB: choose a smaller"):
        models.choose_precision("bf16", "univision", published)


def test_a_model_larger_than_the_gpu_is_taken_where_the_ram_holds_it(monkeypatch, published):
    sizes = {"cuda": 24e9, "cpu": 64e9}
    monkeypatch.setattr(host, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(host, "half_dtype", lambda on: torch.bfloat16)
    monkeypatch.setattr(host, "total_memory", lambda on: sizes[on.type])
    with pytest.raises(ValueError, match=r"the GPU \(cuda\) has 24\.0 GB"):  # without ComfyUI it all lies there
        models.choose_precision("auto", "univision", published)
    monkeypatch.setattr(host, "offload_device", lambda: torch.device("cpu"))
    assert models.choose_precision("auto", "univision", published) == (torch.bfloat16, None)


def test_a_gpu_that_is_slow_in_16_bits_computes_in_them_where_32_do_not_fit(monkeypatch, published):
    monkeypatch.setattr(host, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(host, "half_dtype", lambda on: torch.float32)
    for memory, chosen in ((80e9, torch.float32), (64e9, torch.float16)):
        monkeypatch.setattr(host, "total_memory", lambda on, memory=memory: memory)
        assert models.choose_precision("auto", "univision", published) == (chosen, None)
    with pytest.raises(ValueError, match="choose a smaller precision"):
        models.choose_precision("fp32", "univision", published)


@pytest.mark.parametrize("gpu", ["cuda", "xpu"])
def test_a_gpu_that_would_hold_what_the_ram_does_not_is_pointed_out(monkeypatch, published, gpu):
    sizes = {gpu: 80e9, "cpu": 32e9}
    monkeypatch.setattr(host, "device", lambda: torch.device(gpu))
    monkeypatch.setattr(host, "offload_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(host, "half_dtype", lambda on: torch.bfloat16)
    monkeypatch.setattr(host, "total_memory", lambda on: sizes[on.type])
    with pytest.raises(ValueError, match=r"this machine has 32\.0 GB: .* or start ComfyUI with --highvram"):
        models.choose_precision("auto", "univision", published)


def test_no_gpu_is_pointed_out_where_it_shares_the_ram(monkeypatch, published):
    monkeypatch.setattr(host, "device", lambda: torch.device("mps"))
    monkeypatch.setattr(host, "offload_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(host, "half_dtype", lambda on: torch.bfloat16)
    monkeypatch.setattr(host, "total_memory", lambda on: 80e9 if on.type == "mps" else 32e9)
    with pytest.raises(ValueError, match=r"choose a smaller precision, or a smaller model$"):
        models.choose_precision("auto", "univision", published)


def test_unloading_a_model_frees_what_it_remembers_of_past_rounds(small, monkeypatch):
    model = small[0].model
    node("MingUnderstand", model=small[0], prompt="Hello.")
    assert model.prefix_cache.bytes > 0
    callbacks = []
    patcher = SimpleNamespace(add_callback=lambda kind, callback: callbacks.append((kind, callback)))
    extension = SimpleNamespace(CallbacksMP=SimpleNamespace(ON_DETACH="on_detach"))
    monkeypatch.setattr(host, "comfy", SimpleNamespace(patcher_extension=extension))
    host._clear_cache_on_unload(patcher, model)
    ((kind, on_detach),) = callbacks
    assert kind == "on_detach"
    on_detach(patcher, False)  # as ComfyUI calls it when it loads the model again
    assert model.prefix_cache.bytes > 0
    on_detach(patcher, True)
    assert model.prefix_cache.bytes == 0 and len(model.prefix_cache) == 0


# --- gives a clear error, and everything stays usable -------------------------------------------------------------


@pytest.fixture
def unharmed(small, tmp_path):
    """After the error in the test the model draws what it drew before, and no file was written."""

    def drawn():
        small[0].model.prefix_cache.clear()
        return node("MingGenerate", model=small[0], prompt="A cat.")[0][0].latents

    before = drawn()
    yield
    assert torch.equal(before, drawn())
    assert not [p for p in (tmp_path / "output").rglob("*") if p.is_file()]


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
@pytest.mark.parametrize("name", ["MingUnderstand", "MingGenerate", "MingEdit"])
def test_an_empty_or_blank_prompt(small, unharmed, name, prompt):
    inputs = (
        {"instruction": prompt, "features": features_of(small, image())} if name == "MingEdit" else {"prompt": prompt}
    )
    with pytest.raises(ValueError, match="the prompt is empty"):
        node(name, model=small[0], **inputs)


@pytest.mark.parametrize(
    ("name", "words"), [("MingUnderstand", "prompt"), ("MingGenerate", "prompt"), ("MingEdit", "instruction")]
)
def test_a_blank_prompt_that_is_not_linked_is_refused_before_the_run_in_the_models_words(small, name, words):
    validate = NODE_CLASS_MAPPINGS[name].VALIDATE_INPUTS
    for text in ("", " \n\t"):
        with pytest.raises(ValueError) as error:
            small[0].model.understand(Conversation(), text)
        assert validate(**{words: text}) == str(error.value)
    for text in (None, "Draw."):  # None: linked
        assert validate(**{words: text}) is True


@pytest.mark.parametrize("name", ["MingUnderstand", "MingGenerate"])
def test_a_transcript_that_outgrows_the_positions_is_refused_with_the_figures(small, unharmed, name):
    with pytest.raises(ValueError, match=r"this model has 512 positions"):
        node(name, model=small[0], prompt="x" * 400, max_new_tokens=200)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinite_pixels(small, unharmed, value):
    bad = image()
    bad[0, 3, 4, 1] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        node("MingTokEncode", mingtok=small[1], image=bad)


def test_an_empty_batch_and_a_tensor_that_is_no_picture(small, unharmed):
    with pytest.raises(ValueError, match="no picture in this batch"):
        node("MingTokEncode", mingtok=small[1], image=image(batch=0))
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        node("MingTokEncode", mingtok=small[1], image=image(channels=2))


def test_a_picture_too_long_for_a_crop_names_stretch_and_pad(small, unharmed):
    with pytest.raises(ValueError, match=r'"stretch" or "pad"'):
        node("MingTokEncode", mingtok=small[1], image=image(10, 171), fit="center crop")
    node("MingTokEncode", mingtok=small[1], image=image(10, 160), fit="center crop")


def test_features_of_another_tokenizer(small, unharmed):
    alien = features_of(small, image())._replace(tokenizer="f" * 64)
    for name, inputs in (
        ("MingTokDecode", {"mingtok": small[1]}),
        ("MingUnderstand", {"model": small[0], "prompt": "What is it?"}),
        ("MingEdit", {"model": small[0], "instruction": "Make it blue."}),
    ):
        with pytest.raises(ValueError, match="another tokenizer"):
            node(name, features=alien, **inputs)


def test_features_of_another_tokenizer_or_grid_or_number_are_not_compared(small, unharmed):
    a = features_of(small, image())
    high = node("MingTokEncode", mingtok=small[1], image=image(), detail="high")[0]
    for b, word in (
        (a._replace(tokenizer="f" * 64), "tokenizer"),
        (node("MingTokSemanticFeatures", mingtok=small[1], latent=high)[0], "grid"),
        (features_of(small, image(batch=2)), "number of images"),
    ):
        with pytest.raises(ValueError, match=f"their {word} differs"):
            node("MingFeaturesCompare", features_a=a, features_b=b)


@pytest.mark.parametrize(
    ("latent", "words"),
    [
        ({"samples": torch.zeros(1, 4, 4, 4)}, "8 channels"),
        ({"samples": torch.zeros(1, 8, 4, 4), "type": "audio"}, "of type 'audio'"),
        ({"samples": SimpleNamespace(is_nested=True), "type": "audio"}, "of type 'audio'"),
        ({"samples": SimpleNamespace(is_nested=True)}, "holds SimpleNamespace, not images"),
        ({"samples": torch.zeros(1, 8, 3, 4, 4)}, r"holds \[1, 8, 3, 4, 4\], not images .* from MingTok Encode"),
        ({"samples": torch.zeros(1, 8, 9, 4)}, "from 1 to 8"),
        ({"samples": torch.full((1, 8, 4, 4), float("nan"))}, "NaN"),
        ({"samples": torch.zeros(0, 8, 4, 4)}, "B at least 1"),
    ],
)
def test_latents_of_another_tokenizer(small, unharmed, latent, words):
    with pytest.raises(ValueError, match=words):
        node("MingTokSemanticFeatures", mingtok=small[1], latent=latent)


def test_a_conversation_of_another_model(small, unharmed):
    _, talk = node("MingUnderstand", model=small[0], prompt="Hello.")
    for name, inputs in (("MingUnderstand", {"prompt": "On."}), ("MingGenerate", {"prompt": "On."})):
        with pytest.raises(ValueError, match="belongs to another model"):
            node(name, model=small[0], conversation=talk._replace(model="f" * 64), **inputs)


def test_what_cannot_be_is_refused_before_the_model_is_brought_to_the_gpu(small, monkeypatch):
    features, (_, talk) = features_of(small, image()), node("MingUnderstand", model=small[0], prompt="Hello.")
    monkeypatch.setattr(host, "load_to_gpu", lambda *_: pytest.fail("the model was loaded to the GPU"))
    strange, strangers = features._replace(tokenizer="f" * 64), talk._replace(model="f" * 64)
    for name, inputs in (
        ("MingUnderstand", {"prompt": "On.", "conversation": strangers}),
        ("MingUnderstand", {"prompt": "What is it?", "features": strange}),
        ("MingGenerate", {"prompt": "word " * 3000, "conversation": talk}),
        ("MingEdit", {"instruction": "Make it blue.", "features": strange}),
    ):
        with pytest.raises(ValueError, match=r"another|too long"):
            node(name, model=small[0], **inputs)
    for name, inputs in (
        ("MingTokSemanticFeatures", {"latent": {"samples": torch.zeros(1, 5, 4, 4)}}),
        ("MingTokDecode", {"features": strange}),
        ("MingTokDecode", {"features": features._replace(tokens=features.tokens[:0], latents=features.latents[:0])}),
    ):
        with pytest.raises(ValueError, match=r"another|no picture"):
            node(name, mingtok=small[1], **inputs)


def test_a_list_of_saved_files_offers_what_its_node_loads(small, tmp_path):
    features = features_of(small, image())
    _, talk = node("MingUnderstand", model=small[0], prompt="What is it?", features=features)
    node("MingSaveConversation", conversation=talk, filename_prefix="a talk")
    node("MingSaveFeatures", features=features, filename_prefix="b picture")
    (tmp_path / "input" / "lora.safetensors").write_bytes(b"something else")

    def offered(name):
        return NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]["file"][0]

    assert offered("MingLoadConversation") == ["ming/a talk_00001_.safetensors [output]"]
    assert offered("MingLoadFeatures") == ["ming/b picture_00001_.safetensors [output]"]
    path = saved_path(*offered("MingLoadFeatures"))
    path.write_bytes(b"damaged since")
    assert offered("MingLoadFeatures") == []


def test_a_saved_file_that_could_not_be_read_for_a_moment_is_listed_again(small, monkeypatch):
    node("MingSaveFeatures", features=features_of(small, image()))
    offered = NODE_CLASS_MAPPINGS["MingLoadFeatures"].INPUT_TYPES
    with monkeypatch.context() as patch:
        patch.setattr(files, "safe_open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "in use")))
        assert offered()["required"]["file"][0] == []
    assert offered()["required"]["file"][0] == ["ming/features_00001_.safetensors [output]"]


@pytest.mark.parametrize("name", [5, ["x"], "x\0y.safetensors [output]"])
def test_a_linked_file_name_that_is_none_is_refused(small, name):
    with pytest.raises(ValueError, match=r"is not a file name: choose a file from the list"):
        node("MingLoadFeatures", file=name)


def test_a_linked_choice_that_is_not_offered_is_named(small):
    with pytest.raises(ValueError, match=r"detail is 'ultra': choose one of \('standard', 'high'\)"):
        node("MingTokEncode", mingtok=small[1], image=image(), detail="ultra")
    with pytest.raises(ValueError, match=r"degrade is 'blurred': choose one of \('none', "):
        node("MingExampleScene", degrade="blurred")


def test_a_batch_of_pictures_is_resized_a_few_at_a_time(small, monkeypatch):
    resized, exact = [], mingtok.to_pixels
    monkeypatch.setattr(mingtok, "to_pixels", lambda some, *how: resized.append(len(some)) or exact(some, *how))
    frames = torch.rand(mingtok.AT_ONCE + 3, 40, 50, 3, generator=torch.Generator().manual_seed(1))
    latent, _ = node("MingTokEncode", mingtok=small[1], image=frames)
    assert resized == [mingtok.AT_ONCE, 3]
    last, _ = node("MingTokEncode", mingtok=small[1], image=frames[-1:])
    torch.testing.assert_close(latent["samples"][-1:], last["samples"], rtol=1e-4, atol=1e-4)


def test_a_file_of_another_kind_or_model_is_refused_before_the_model_is_brought_to_the_gpu(small, monkeypatch):
    features = features_of(small, image())
    _, talk = node("MingUnderstand", model=small[0], prompt="What is it?", features=features)
    node("MingSaveConversation", conversation=talk, filename_prefix="own")
    node("MingSaveConversation", conversation=talk._replace(model="f" * 64), filename_prefix="strange")
    node("MingSaveFeatures", features=features, filename_prefix="picture")
    own, picture, strange = saved_files()
    asked, load_to_gpu = [], host.load_to_gpu
    monkeypatch.setattr(host, "load_to_gpu", lambda *given: asked.append(given) or load_to_gpu(*given))
    for name, right, wrong in (
        ("MingLoadConversation", own, picture),
        ("MingLoadFeatures", picture, own),
    ):
        assert NODE_CLASS_MAPPINGS[name].VALIDATE_INPUTS(right) is True
        assert "choose another file" in NODE_CLASS_MAPPINGS[name].VALIDATE_INPUTS(wrong)
    for name in (strange, picture):
        with pytest.raises(ValueError, match=r"another"):
            node("MingLoadConversation", model=small[0], file=name)
    assert not asked
    (loaded,) = node("MingLoadConversation", model=small[0], file=own)
    assert loaded == talk and asked == [(small[0], small[0].model.mingtok.working_memory(1, 16))]


def test_an_edit_with_no_picture_anywhere_names_the_node_that_draws(small, unharmed):
    _, talk = node("MingUnderstand", model=small[0], prompt="Hello.")
    for conversation in (None, Conversation(), talk):
        with pytest.raises(ValueError, match="MingGenerate"):
            node("MingEdit", model=small[0], instruction="Make it blue.", conversation=conversation)


def test_a_picture_that_the_conversation_does_not_have(small, unharmed):
    _, talk = node("MingUnderstand", model=small[0], prompt="What is it?", features=features_of(small, image()))
    for index in (1, -2):
        with pytest.raises(ValueError, match=r"1 picture \(0 to 0, "):
            node("MingConversationPicture", conversation=talk, index=index)
    with pytest.raises(ValueError, match="no picture"):
        node("MingConversationPicture", conversation=Conversation(), index=-1)


def test_words_that_are_no_scene_and_pictures_of_two_sizes(unharmed):
    with pytest.raises(ValueError, match="elephant"):
        node("MingExampleScene", scene="a large red elephant at the top left")
    with pytest.raises(ValueError, match="resize them to one size"):
        node("MingImageMetrics", image_a=image(), image_b=image(20, 20))


def test_an_absent_model_is_named_with_where_to_get_it_and_where_to_put_it():
    for name, repository in (("MingTokLoader", "MingTok-Vision"), ("MingUniVisionLoader", "Ming-UniVision-16B-A3B")):
        message = NODE_CLASS_MAPPINGS[name].VALIDATE_INPUTS("not/there")
        for word in (
            "not/there",
            f"huggingface.co/inclusionAI/{repository}",
            "modelscope.cn",
            str(host.model_folders()[0]),
        ):
            assert word in message
        assert NODE_CLASS_MAPPINGS[name].VALIDATE_INPUTS(models.BUILT_IN) is True


@pytest.mark.parametrize("prefix", ["../out", "a/../../../b", "/etc/x", "", "..", "C:\\x", "\\\\server\\x"])
def test_a_file_name_that_climbs_out_of_its_folder(small, tmp_path, unharmed, prefix):
    features = features_of(small, image())
    if prefix == "C:\\x" and os.name != "nt":
        pytest.skip("a drive is a plain name here")
    with pytest.raises(ValueError, match="leads out of"):
        node("MingSaveFeatures", features=features, filename_prefix=prefix)


def test_a_file_name_that_windows_cannot_have_is_refused_there_before_the_run(monkeypatch):
    monkeypatch.setattr(filenames, "FORBIDDEN", set('<>:"|?*'))
    validate = NODE_CLASS_MAPPINGS["MingSaveConversation"].VALIDATE_INPUTS
    assert validate("chats/%year%-%month%") is True
    assert "contains : ?, which Windows" in validate("what?/%date:yyyy%")


def test_the_longest_name_that_a_file_can_have_is_saved_and_loaded(small, tmp_path):
    features = features_of(small, image())
    for prefix in ("x" * 236, "cats/" + "y" * 236):
        (name,) = node("MingSaveFeatures", features=features, filename_prefix=prefix)["ui"]["text"]
        assert node("MingLoadFeatures", file=name) == (features,)
    talk = Conversation()
    node("MingSaveConversation", conversation=talk, filename_prefix="z" * 236, overwrite=True)
    node("MingSaveConversation", conversation=talk, filename_prefix="z" * 236, overwrite=True)
    assert (tmp_path / "output" / "ming" / f"{'z' * 236}.safetensors").is_file()


@pytest.mark.parametrize("prefix", ["x" * 237, "x" * 300 + "/x", "a/" * 20_000 + "x", "\ud800", "a/\udcff/b"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_linked_file_name_that_no_file_can_have_is_refused_in_words(small, tmp_path, unharmed, prefix, overwrite):
    assert isinstance(NODE_CLASS_MAPPINGS["MingSaveConversation"].VALIDATE_INPUTS(prefix), str)
    with pytest.raises(ValueError, match=r"too long .*: use at most|half a character .*: type it again") as error:
        node("MingSaveConversation", conversation=Conversation(), filename_prefix=prefix, overwrite=overwrite)
    assert len(str(error.value)) < 300
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_conversation_is_not_saved_where_a_file_is_in_the_way_of_its_folder(tmp_path, overwrite):
    (tmp_path / "output").mkdir(exist_ok=True)
    (tmp_path / "output" / "ming").write_text("in the way")
    with pytest.raises(ValueError, match=r"ming is a file, and a folder is needed there"):
        node("MingSaveConversation", conversation=Conversation(), filename_prefix="x", overwrite=overwrite)


def test_a_prefix_that_leads_through_a_file_is_refused_before_the_run(tmp_path):
    (tmp_path / "output" / "ming").mkdir(parents=True)
    (tmp_path / "output" / "ming" / "cats").write_text("in the way")
    assert "cats is a file" in NODE_CLASS_MAPPINGS["MingSaveFeatures"].VALIDATE_INPUTS("cats/first")


def test_a_prefix_with_a_way_back_makes_no_folder_for_it(tmp_path):
    shown = node("MingSaveConversation", conversation=Conversation(), filename_prefix="x/../y", overwrite=True)
    assert shown["ui"]["text"] == ["ming/y.safetensors [output]"]
    assert [path.name for path in (tmp_path / "output" / "ming").iterdir()] == ["y.safetensors"]


def test_a_full_disk_is_named_with_what_helps(small, tmp_path, monkeypatch, unharmed):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    features = features_of(small, image())
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"ming: No space left on device; free space on its disk"):
        node("MingSaveFeatures", features=features, filename_prefix="x")


def test_an_optional_widget_that_is_none_has_its_default(small):
    features = features_of(small, image())
    (expected,) = node("MingTokDecode", mingtok=small[1], features=features)
    assert torch.equal(node("MingTokDecode", mingtok=small[1], features=features, enlarge_to=None)[0], expected)


@pytest.mark.parametrize("text", ["", "  ", "."])
def test_the_region_of_an_edit_that_is_not_named_is_refused(text):
    with pytest.raises(ValueError, match='text is empty, and the task "identify region" needs it'):
        node("MingInstruction", task="identify region", text=text)


@pytest.mark.parametrize(
    "name", ["../x.safetensors [output]", "/etc/passwd [input]", "a/../../x [input]", "gone [output]"]
)
def test_a_file_to_load_that_is_absent_or_outside_is_refused_before_the_run(name):
    for node_id in ("MingLoadFeatures", "MingLoadConversation"):
        message = NODE_CLASS_MAPPINGS[node_id].VALIDATE_INPUTS(name)
        assert "leads out of" in message or "there is no file" in message


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom a folder's rights bind")
def test_an_unwritable_output_folder(small, tmp_path, unharmed):
    (tmp_path / "output").mkdir(exist_ok=True)
    os.chmod(tmp_path / "output", stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(ValueError, match="cannot write"):
            node("MingSaveFeatures", features=features_of(small, image()), filename_prefix="x")
    finally:
        os.chmod(tmp_path / "output", stat.S_IRWXU)


def test_an_output_folder_that_is_a_file(small, tmp_path):
    (tmp_path / "output").write_text("in the way")
    with pytest.raises(ValueError, match="output is a file"):
        node("MingSaveFeatures", features=features_of(small, image()), filename_prefix="x")
    workflow = read_workflow(host.PACK / "workflows" / "api" / "text_chat.json")
    with pytest.raises(WorkflowError, match="is a file"):
        run_workflow(workflow, output_dir=tmp_path / "output")


def test_a_damaged_file_names_itself(small, tmp_path):
    node("MingSaveFeatures", features=features_of(small, image()), filename_prefix="x")
    (name,) = saved_files()
    path = saved_path(name)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"x_00001_\.safetensors.*save it again"):
        node("MingLoadFeatures", file=name)


# --- widgets and workflows, refused before anything runs ----------------------------------------------------------


def widgets():
    for node_id, node_class in NODE_CLASS_MAPPINGS.items():
        for name, (kind, options) in node_class.INPUT_TYPES()["required"].items():
            if kind in ("INT", "FLOAT"):
                step = 1 if kind == "INT" else 0.01
                yield node_id, name, options["min"] - step
                yield node_id, name, options["max"] + step
                yield node_id, name, "many"
            elif isinstance(kind, list) and name not in ("file", "lora_name"):  # files have tests of their own
                yield node_id, name, "no such choice"


@pytest.mark.parametrize(("node_id", "name", "value"), list(widgets()))
def test_every_widget_out_of_range_is_refused_by_name(node_id, name, value):
    required = NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["required"]
    inputs = {k: o["default"] for k, (kind, o) in required.items() if "default" in o}
    workflow = {
        "1": {"class_type": node_id, "inputs": inputs | {name: value}},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
    }
    if not NODE_CLASS_MAPPINGS[node_id].RETURN_TYPES:
        del workflow["2"]
    with pytest.raises(WorkflowError) as error:
        plan(workflow, known_node_classes())
    about = [p for p in error.value.problems if f"{name}" in p and str(value) in p]
    assert about and all("node 1" in p for p in about), error.value.problems


def good() -> dict:
    return read_workflow(host.PACK / "workflows" / "api" / "multi_round_edit.json")


def refused(workflow: dict, *words: str) -> None:
    with pytest.raises(WorkflowError) as error:
        run_workflow(workflow)
    for word in words:
        assert word in str(error.value)


def test_a_workflow_with_an_unknown_node_a_missing_link_or_a_cycle(tmp_path):
    unknown = good()
    unknown["3"]["class_type"] = "MingTokEncod"
    refused(unknown, "MingTokEncod", "MingTokEncode")
    missing = good()
    missing["4"]["inputs"]["latent"] = ["99", 0]
    refused(missing, "99")
    unlinked = good()
    del unlinked["4"]["inputs"]["latent"]
    refused(unlinked, "latent")
    wrong = good()
    wrong["4"]["inputs"]["latent"] = ["2", 0]
    refused(wrong, "IMAGE", "LATENT")
    circle = good()
    first_edit = next(i for i, n in circle.items() if n["class_type"] == "MingEdit")
    circle[first_edit]["inputs"]["conversation"] = [first_edit, 1]
    refused(circle, "cycle")
    assert not (tmp_path / "output").exists()


def test_a_workflow_file_that_is_no_json_or_of_the_other_format(tmp_path):
    path = tmp_path / "w.json"
    for content, word in (("{", "JSON"), (json.dumps({"nodes": [], "links": []}), "API"), ("[]", "object")):
        path.write_text(content)
        with pytest.raises(WorkflowError, match=word):
            read_workflow(path)


def test_a_node_that_fails_is_named_and_what_was_saved_before_stays(small, tmp_path):
    workflow = read_workflow(host.PACK / "workflows" / "api" / "branch_edits.json")
    for n in workflow.values():
        if n["class_type"] == "MingUniVisionLoader":
            n["inputs"]["model_name"] = "edit_round"
        n["inputs"] |= {k: 4 for k in ("max_new_tokens",) if k in n["inputs"]}
        if n["_meta"]["title"] == "Ming Edit: branch B":
            n["inputs"]["instruction"] = ["blank", 0]
    workflow["blank"] = {"class_type": "MingInstruction", "inputs": {"task": "edit", "text": " "}}
    with pytest.raises(ExecutionError, match=r"branch B.*the prompt is empty"):
        run_workflow(workflow, output_dir=tmp_path / "output")


def test_a_warning_free_numpy_picture_is_what_saving_gets(small):
    picture = node("MingTokDecode", mingtok=small[1], features=features_of(small, image()))[0]
    assert picture.device.type == "cpu" and picture.is_contiguous() and np.asarray(picture).dtype == np.float32
