"""Our versions of ComfyUI's core nodes: what a user of the real ones would see."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from ming_univision.nodes import host
from ming_univision.nodes.filenames import numbered_path
from ming_univision.runner import core_nodes
from ming_univision.runner.core_nodes import (
    ImageScale,
    LatentBlend,
    LoadImage,
    PreviewAny,
    PreviewImage,
    SaveImage,
)
from ming_univision.runner.session import ExecutionError, run_workflow
from ming_univision.runner.workflow import WorkflowError
from PIL import Image


@pytest.fixture(autouse=True)
def folders(tmp_path):
    (tmp_path / "input").mkdir()
    with host.folders(output=tmp_path / "output", input=tmp_path / "input"):
        yield


def ramp(height=4, width=6) -> np.ndarray:
    return (np.arange(height * width * 3).reshape(height, width, 3) * 3 % 256).astype(np.uint8)


def batch(count=1, height=4, width=6) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(5))


# --- LoadImage ----------------------------------------------------------------------------------------------------


def load(path) -> tuple[torch.Tensor, torch.Tensor]:
    assert LoadImage.VALIDATE_INPUTS(str(path)) is True
    return LoadImage().load_image(str(path))


def test_a_picture_of_the_input_folder_or_anywhere_comes_as_0_to_1(tmp_path):
    for path in (tmp_path / "input" / "a.png", tmp_path / "b.png"):
        Image.fromarray(ramp()).save(path)
    image, mask = load("a.png")
    assert torch.equal(image, torch.from_numpy(ramp()).float()[None] / 255)
    assert torch.equal(mask, torch.zeros(1, 64, 64))
    assert torch.equal(load(tmp_path / "b.png")[0], image)
    assert LoadImage.INPUT_TYPES()["required"]["image"][0] == ["a.png"]


def test_transparency_becomes_the_mask(tmp_path):
    alpha = np.full((4, 6, 1), 51, np.uint8)
    Image.fromarray(np.concatenate([ramp(), alpha], -1)).save(tmp_path / "a.png")
    image, mask = load(tmp_path / "a.png")
    assert torch.equal(image[0], torch.from_numpy(ramp()).float() / 255)
    assert torch.allclose(mask, torch.full((1, 4, 6), 0.8))


def test_a_palette_colour_that_is_transparent_is_masked(tmp_path):
    palette = Image.fromarray(np.eye(4, dtype=np.uint8), mode="L").convert("P")
    palette.save(tmp_path / "a.png", transparency=1)
    assert torch.equal(load(tmp_path / "a.png")[1][0], torch.eye(4))


def test_the_cameras_orientation_is_obeyed(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(ramp(4, 6)).save(tmp_path / "a.png", exif=exif)
    image, _ = load(tmp_path / "a.png")
    assert torch.equal(image[0], torch.from_numpy(np.rot90(ramp(4, 6), -1).copy()).float() / 255)


def test_an_animation_becomes_a_batch(tmp_path):
    frames = [Image.fromarray(np.full((4, 6, 3), level, np.uint8)) for level in (0, 128, 255)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    image, mask = load(tmp_path / "a.webp")
    assert torch.allclose(image.mean((1, 2, 3)), torch.tensor([0, 128 / 255, 1.0]), atol=1e-3)
    assert mask.shape[0] == 3


def test_of_a_camera_file_of_several_views_the_first_is_taken(tmp_path):
    views = [Image.fromarray(ramp(32, 32) + np.uint8(k)) for k in (0, 9)]
    views[0].save(tmp_path / "input" / "both.jpg", format="MPO", save_all=True, append_images=views[1:])
    pictures, masks = load("both.jpg")
    assert pictures.shape == (1, 32, 32, 3) and len(masks) == 1


def test_sixteen_bit_and_grey_pictures_keep_their_range(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "b.png")
    assert torch.allclose(load(tmp_path / "a.png")[0][0, 0, :, 1], torch.tensor([0.0, 0.5, 1.0]), atol=1e-4)
    assert torch.allclose(load(tmp_path / "b.png")[0][0, 0, :, 2], torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize("kind", ["RGB", "I;16"])
def test_pictures_and_their_masks_are_in_host_memory_whatever_the_default_device_is(tmp_path, kind):
    Image.new(kind, (6, 4)).save(tmp_path / "a.png")
    torch.set_default_device("meta")
    try:
        image, mask = load(tmp_path / "a.png")
    finally:
        torch.set_default_device(None)
    assert image.device == mask.device == torch.device("cpu") and image.shape == (1, 4, 6, 3)


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "a.png").write_text("words")
    assert "not a picture" in LoadImage.VALIDATE_INPUTS(str(tmp_path / "a.png"))
    assert "absent.png" in LoadImage.VALIDATE_INPUTS("absent.png")


def test_a_photograph_for_printing_is_converted(tmp_path):
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "a.tiff")
    image, mask = load(tmp_path / "a.tiff")
    assert torch.equal(image, torch.tensor([1.0, 0.0, 0.0]).expand(1, 4, 6, 3)) and mask.shape == (1, 64, 64)


def png_header(path, width: int, height: int) -> None:
    """A PNG file that claims a size."""
    Image.fromarray(ramp()).save(path)
    whole = path.read_bytes()
    header = whole[12:16] + struct.pack(">II", width, height) + whole[24:29]
    path.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])


@pytest.mark.parametrize("side", [60_000, 13_000, 10_500])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    png_header(tmp_path / "a.png", side, side)
    message = LoadImage.VALIDATE_INPUTS(str(tmp_path / "a.png"))
    assert "a.png has more than 110 million pixels" in message and "scale it down first" in message
    with pytest.raises(ValueError, match="110 million pixels"):
        LoadImage().load_image(str(tmp_path / "a.png"))


def test_an_animation_of_too_many_pixels_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(core_nodes, "MAX_PIXELS", 4 * 6 * 2)
    frames = [Image.fromarray(np.full((4, 6, 3), level, np.uint8)) for level in (0, 128, 255)]
    for count in (2, 3):
        frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:count], lossless=True)
        if count == 2:
            assert len(load(tmp_path / "a.webp")[0]) == 2
        else:
            with pytest.raises(ValueError, match=r"\(6x4, 3 frames\)"):
                load(tmp_path / "a.webp")


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.jpg", "a.gif", "a.webp", "a.tiff"])
def test_a_damaged_picture_is_named(tmp_path, name):
    Image.fromarray(ramp(40, 60)).save(tmp_path / "whole.png")
    Image.fromarray(ramp(40, 60)).save(tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-200])
    verdict = LoadImage.VALIDATE_INPUTS(str(tmp_path / name))
    if verdict is True:  # the header is whole
        with pytest.raises(ValueError, match=rf"{name} is damaged .*: replace the file"):
            LoadImage().load_image(str(tmp_path / name))
    else:
        assert name in verdict


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_a_folder_and_a_link_in_a_circle_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for somebody who writes
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    for name in ("pipe.png", "folder.png", "circle.png", "x" * 300 + ".png", "a\0.png", "\ud800.png"):
        assert LoadImage.VALIDATE_INPUTS(f"{tmp_path}/{name}").startswith("there is no picture file")


# --- SaveImage, PreviewImage, PreviewAny --------------------------------------------------------------------------


def test_saved_pictures_are_counted_on_and_carry_their_workflow(tmp_path):
    images, graph = batch(2), {"1": {"class_type": "SaveImage"}}
    for _ in range(2):
        shown = SaveImage().save_images(images, "sub/pic", prompt=graph, extra_pnginfo={"workflow": {"a": 1}})["ui"]
    files = sorted(path.name for path in (tmp_path / "output" / "sub").iterdir())
    assert files == [f"pic_0000{i}_.png" for i in (1, 2, 3, 4)]
    assert shown["images"][1] == {"filename": "pic_00004_.png", "subfolder": "sub", "type": "output"}
    with Image.open(tmp_path / "output" / "sub" / "pic_00003_.png") as file:
        assert json.loads(file.text["prompt"]) == graph
        assert json.loads(file.text["workflow"]) == {"a": 1}
        assert np.array_equal(np.asarray(file), (images[0].numpy() * 255).astype(np.uint8))


def save_four(folder) -> None:
    with host.folders(output=folder, input=folder):
        SaveImage().save_images(batch(4), "together")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="other processes would start slowly")
def test_eight_processes_that_save_at_the_same_time_leave_every_picture(tmp_path):
    processes = [multiprocessing.get_context("fork").Process(target=save_four, args=(tmp_path,)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    files = sorted(tmp_path.glob("together_*.png"))
    assert [file.name for file in files] == [f"together_{number:05}_.png" for number in range(1, 33)]
    for file in files:
        with Image.open(file) as image:
            image.load()


def test_a_picture_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        SaveImage().save_images(batch(), "x")
    assert not list((tmp_path / "output").iterdir())


def test_pixels_out_of_range_are_clamped(tmp_path):
    SaveImage().save_images(torch.tensor([-1.0, 0.5, 2.0]).expand(1, 2, 2, 3), "x")
    with Image.open(tmp_path / "output" / "x_00001_.png") as file:
        assert file.getpixel((0, 0)) == (0, 127, 255)


def test_the_counter_looks_only_at_files_of_that_name(tmp_path):
    for name in ("a_00007_.png", "a_b_00050_.png", "ab_00099_.png", "a.png", "a_x.png"):
        (tmp_path / name).write_text("")
    assert numbered_path("a", tmp_path) == (tmp_path, "a", 8)
    (tmp_path / "a_12_00004_.png").write_text("")
    assert numbered_path("a_%batch_num%", tmp_path) == (tmp_path, "a_%batch_num%", 5)
    assert numbered_path("%width%x%height%", tmp_path, 6, 4) == (tmp_path, "6x4", 1)


@pytest.mark.parametrize("prefix", ["../x", "a/../../x", "/x", "", ".", "a/.."])
def test_a_name_that_climbs_out_of_the_output_folder_is_refused_before_anything_runs(prefix, tmp_path):
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": str(tmp_path / "a.png")}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    with pytest.raises(WorkflowError, match="filename_prefix"):
        run_workflow(graph, output_dir=tmp_path / "output")
    with pytest.raises(ValueError, match="leads out of"):
        SaveImage().save_images(batch(), prefix)
    assert not (tmp_path / "output").exists()


UNUSABLE = {
    "a\nb": "contains a line break: remove it",
    "cats/a\u2028b": "contains a line break: remove it",
    "a\tb": "contains a control character: remove it",
    "a\0b": "contains a control character: remove it",
    "\ud800": "contains half a character",
    "x" * 300: "is too long .*: use at most 236",
    "x" * 300 + "/x": "is too long .*: use at most 255",
    "a/" * 20_000 + "x": "is too long .*: use at most [0-9]{3}",
}


@pytest.mark.parametrize(("prefix", "words"), UNUSABLE.items(), ids=range(len(UNUSABLE)))
def test_a_name_that_no_file_can_have_is_refused_before_anything_runs(prefix, words, tmp_path):
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": str(tmp_path / "a.png")}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    with pytest.raises(WorkflowError, match=words):
        run_workflow(graph, output_dir=tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("prefix", ["x" * 236, "cats/first", "Ärger 猫 👍", "x.", "-rf", ".hidden"])
def test_names_that_a_file_can_have_are_taken(prefix, tmp_path):
    SaveImage().save_images(batch(), prefix)
    assert (tmp_path / "output" / f"{prefix}_00001_.png").is_file()


def test_a_folder_that_is_a_link_to_nowhere_is_said_before_anything_runs(tmp_path):
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": str(tmp_path / "a.png")}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "cats/x"}},
    }
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cats").symlink_to(tmp_path / "absent")
    for folder in (tmp_path / "dangling", tmp_path / "dangling" / "below", tmp_path / "out"):
        with pytest.raises(WorkflowError, match=r"is a link to .*absent, which is not there: make that folder"):
            run_workflow(graph, output_dir=folder)
    (tmp_path / "absent").mkdir()
    run_workflow(graph, output_dir=tmp_path / "dangling" / "below")
    assert (tmp_path / "absent" / "below" / "cats" / "x_00001_.png").is_file()


def test_pictures_saved_before_a_failure_stay(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    Image.fromarray(ramp(40, 60)).save(tmp_path / "whole.bmp")
    (tmp_path / "cut.bmp").write_bytes((tmp_path / "whole.bmp").read_bytes()[:4000])
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": str(tmp_path / "a.png")}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "kept"}},
        "3": {"class_type": "LoadImage", "inputs": {"image": str(tmp_path / "cut.bmp")}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
    }
    with pytest.raises(ExecutionError, match="node 3"):
        run_workflow(graph, output_dir=tmp_path / "output")
    assert (tmp_path / "output" / "kept_00001_.png").is_file()


def test_a_folder_that_cannot_be_made_is_named_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "ming").write_text("in the way")
    with pytest.raises(ValueError, match="ming is a file, and a folder is needed there"):
        SaveImage().save_images(batch(), "ming/x")

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(OSError, match="choose another output folder"):
        SaveImage().save_images(batch(), "cats/x")


def test_previews_go_to_a_folder_of_their_own(tmp_path):
    shown = PreviewImage().save_images(batch())["ui"]["images"]
    assert shown == [{"filename": "preview_00001_.png", "subfolder": "", "type": "temp"}]
    assert (tmp_path / "output" / "temp" / "preview_00001_.png").is_file()


@pytest.mark.parametrize(
    ("value", "text"),
    [("红", "红"), (3, "3"), (0.5, "0.5"), (True, "True"), (None, "None"), (["红"], '[\n    "红"\n]'), ({1}, "{1}")],
)
def test_any_value_is_shown_as_text(value, text):
    assert PreviewAny().show(value) == {"ui": {"text": (text,)}, "result": (text,)}


# --- ImageScale, LatentBlend --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nearest-exact", "bilinear", "area", "bicubic", "lanczos"])
def test_every_method_gives_the_size_asked_for(method):
    (scaled,) = ImageScale().upscale(batch(2), method, 9, 8, "disabled")
    assert scaled.shape == (2, 8, 9, 3)
    assert abs(scaled.mean() - batch(2).mean()) < 0.05


@pytest.mark.parametrize(
    ("width", "height", "shape"), [(12, 0, (8, 12)), (0, 2, (2, 3)), (0, 0, (4, 6)), (1, 0, (1, 1))]
)
def test_a_side_of_zero_follows_from_the_other(width, height, shape):
    (scaled,) = ImageScale().upscale(batch(), "bilinear", width, height, "disabled")
    assert scaled.shape[1:3] == shape


def test_a_picture_too_narrow_for_a_centre_crop_is_said():
    with pytest.raises(ValueError, match="3000x1 is too narrow to be cropped"):
        ImageScale().upscale(batch(1, 1, 3000), "area", 1, 3000, "center")


def test_a_centre_crop_keeps_the_middle():
    image = batch(1, 4, 8)
    (square,) = ImageScale().upscale(image, "nearest-exact", 4, 4, "center")
    assert torch.equal(square, image[:, :, 2:6])
    (flat,) = ImageScale().upscale(image, "nearest-exact", 8, 2, "center")
    assert torch.equal(flat, image[:, 1:3])


def test_latents_are_blended_and_what_else_they_carry_is_kept():
    first, second = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    (blend,) = LatentBlend().blend({"samples": first, "type": "mingtok"}, {"samples": second}, 0.25)
    assert torch.equal(blend["samples"], torch.full_like(first, 0.25)) and blend["type"] == "mingtok"


def test_the_second_latent_is_resized_to_the_first():
    (blend,) = LatentBlend().blend({"samples": torch.zeros(1, 4, 2, 4)}, {"samples": torch.ones(1, 4, 6, 6)}, 0.5)
    assert torch.allclose(blend["samples"], torch.full((1, 4, 2, 4), 0.5))
