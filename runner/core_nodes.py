"""The few ComfyUI core nodes that the pack's workflows use, for running them without ComfyUI.

Written for the headless runner, never registered in ComfyUI. Ids, sockets, widgets and what a user sees of the results
are those of ComfyUI 0.33: LoadImage, SaveImage, PreviewImage, PreviewAny, LatentBlend, ImageScale. Two differences:
LoadImage also takes the absolute path of a file anywhere, and PreviewImage saves to `temp/` in the output folder.

An IMAGE is float32 [B, H, W, 3] in 0..1, a MASK float32 [B, H, W] with 1 where the picture is transparent.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..nodes import host
from ..nodes.filenames import numbered_path, prefix_verdict

TEMP_FOLDER = "temp"  # inside the output folder
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_MAX_SIDE = 16384
_NO_ALPHA_SIDE = 64  # core's MASK of a picture without transparency is 64x64 zeros


def shown_file(entry: dict[str, str]) -> Path:
    """The file of one entry {"filename", "subfolder", "type"} of what a saving node shows."""
    root = Path(host.output_directory())
    if entry.get("type") == "temp":
        root /= TEMP_FOLDER
    return root / entry.get("subfolder", "") / entry["filename"]


class LoadImage:
    """A picture file as IMAGE and MASK; an animation becomes a batch."""

    @classmethod
    def INPUT_TYPES(cls):
        folder = Path(host.input_directory())
        files = sorted(f.name for f in folder.iterdir() if _is_picture(f)) if folder.is_dir() else []
        return {"required": {"image": (files, {"image_upload": True})}}

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"
    CATEGORY = "image"

    @classmethod
    def VALIDATE_INPUTS(cls, image):
        path = _picture_path(image)
        if not path.is_file():
            return f"there is no picture file {path}"
        try:
            with Image.open(path):
                return True
        except UnidentifiedImageError:
            return f"{path} is no picture in a format that can be read"
        except OSError as error:
            return f"{path} cannot be read: {error}"

    def load_image(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, masks = [], []
        with Image.open(_picture_path(image)) as file:
            for frame in ImageSequence.Iterator(file):
                pixels, mask = _tensors(ImageOps.exif_transpose(frame))
                if not images or pixels.shape == images[0].shape:
                    images.append(pixels)
                    masks.append(mask)
                if file.format == "MPO":  # what follows is the same view from another eye, or a preview
                    break
        return torch.stack(images), torch.stack(masks)


class SaveImage:
    """Saves every picture of a batch as PNG in the output folder, with the workflow in its text chunk "prompt"."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "image"

    kind = "output"
    compress_level = 4

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix=None):
        return prefix_verdict(filename_prefix, Path(host.output_directory()))

    def save_images(self, images, filename_prefix="ComfyUI", prompt=None, extra_pnginfo=None) -> dict[str, Any]:
        root = self.root()
        folder, name, number = numbered_path(filename_prefix, root, images.shape[2], images.shape[1])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"cannot make the folder {folder} ({error.strerror}): choose another output folder"
            ) from error
        notes = PngInfo()
        for key, value in {"prompt": prompt, **(extra_pnginfo or {})}.items():
            if value is not None:
                notes.add_text(key, json.dumps(value))
        subfolder = folder.relative_to(root).as_posix()
        entries = []
        for index, image in enumerate(images):
            filename = f"{name.replace('%batch_num%', str(index))}_{number + index:05}_.png"
            _to_pil(image).save(folder / filename, pnginfo=notes, compress_level=self.compress_level)
            entries.append(
                {"filename": filename, "subfolder": "" if subfolder == "." else subfolder, "type": self.kind}
            )
        return {"ui": {"images": entries}, "result": (images,)}

    def root(self) -> Path:
        return Path(os.path.normpath(host.output_directory()))


class PreviewImage(SaveImage):
    """Saves a batch where nobody needs to keep it: `temp/` in the output folder."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"images": ("IMAGE",)},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    kind = "temp"
    compress_level = 1

    def save_images(self, images, prompt=None, extra_pnginfo=None) -> dict[str, Any]:
        return super().save_images(images, "preview", prompt, extra_pnginfo)

    def root(self) -> Path:
        return super().root() / TEMP_FOLDER


class PreviewAny:
    """Any value as text."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("*", {})}}

    RETURN_TYPES = ("STRING",)
    FUNCTION = "show"
    OUTPUT_NODE = True
    CATEGORY = "utilities"

    def show(self, source=None) -> dict[str, Any]:
        if isinstance(source, (str, int, float)) or source is None:
            text = str(source)
        else:
            try:
                text = json.dumps(source, indent=4, ensure_ascii=False)
            except (TypeError, ValueError):
                text = str(source)
        return {"ui": {"text": (text,)}, "result": (text,)}


class LatentBlend:
    """blend_factor of the first latent and the rest of the second, which is resized to the first if need be."""

    @classmethod
    def INPUT_TYPES(cls):
        factor = {"default": 0.5, "min": 0, "max": 1, "step": 0.01}
        required = {"samples1": ("LATENT",), "samples2": ("LATENT",), "blend_factor": ("FLOAT", factor)}
        return {"required": required}

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "blend"
    CATEGORY = "experimental"

    def blend(self, samples1, samples2, blend_factor: float) -> tuple[dict[str, Any]]:
        first, second = samples1["samples"], samples2["samples"]
        if first.shape != second.shape:
            second = _resized(second, first.shape[3], first.shape[2], "bicubic", "center")
        return ({**samples1, "samples": first * blend_factor + second * (1 - blend_factor)},)


class ImageScale:
    """Resizes pictures; a side of 0 follows from the other one, and both 0 leave the picture as it is."""

    @classmethod
    def INPUT_TYPES(cls):
        side = {"default": 512, "min": 0, "max": _MAX_SIDE, "step": 1}
        return {
            "required": {
                "image": ("IMAGE",),
                "upscale_method": (["nearest-exact", "bilinear", "area", "bicubic", "lanczos"],),
                "width": ("INT", side),
                "height": ("INT", side),
                "crop": (["disabled", "center"],),
            }
        }

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    CATEGORY = "image/upscaling"

    def upscale(self, image, upscale_method, width: int, height: int, crop: str) -> tuple[torch.Tensor]:
        if width == 0 and height == 0:
            return (image,)
        old_height, old_width = image.shape[1:3]
        width = width or max(1, round(old_width * height / old_height))
        height = height or max(1, round(old_height * width / old_width))
        return (_resized(image.movedim(-1, 1), width, height, upscale_method, crop).movedim(1, -1),)


NODE_CLASS_MAPPINGS = {
    node.__name__: node for node in (LoadImage, SaveImage, PreviewImage, PreviewAny, LatentBlend, ImageScale)
}


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()


def _picture_path(name: str) -> Path:
    """The file of LoadImage's widget: an absolute path, or a name in the input folder ("x [output]": in the output)."""
    match = re.fullmatch(r"(.*) \[(input|output|temp)\]", name)
    name, kind = match.groups() if match else (name, "input")
    if kind == "input":
        return Path(host.input_directory(), name)
    return shown_file({"filename": name, "type": kind})


def _tensors(frame: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """One frame as [H, W, 3] in 0..1 and the mask of its transparency."""
    if frame.mode.startswith("I"):  # 16 bits a pixel; PIL's own conversion would clip them at 255
        grey = torch.from_numpy(np.asarray(frame).astype(np.float32) / 65535.0).clamp(0.0, 1.0)
        return grey[..., None].expand(-1, -1, 3).contiguous(), torch.zeros(_NO_ALPHA_SIDE, _NO_ALPHA_SIDE)
    if "A" in frame.getbands() or "transparency" in frame.info:
        rgba = _from_pil(frame.convert("RGBA"))
        return rgba[..., :3].contiguous(), 1.0 - rgba[..., 3]
    return _from_pil(frame.convert("RGB")), torch.zeros(_NO_ALPHA_SIDE, _NO_ALPHA_SIDE)


def _from_pil(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).astype(np.float32) / 255.0)


def _to_pil(image: torch.Tensor) -> Image.Image:
    """[H, W, 3] in 0..1 as 8-bit picture; core cuts the fraction off rather than rounding."""
    return Image.fromarray(np.clip(255.0 * image.float().cpu().numpy(), 0, 255).astype(np.uint8))


def _resized(samples: torch.Tensor, width: int, height: int, method: str, crop: str) -> torch.Tensor:
    """[B, C, h, w] -> [B, C, height, width]; crop "center" first cuts the longer side to the new side ratio."""
    if crop == "center":
        old_height, old_width = samples.shape[-2:]
        old_ratio, ratio = old_width / old_height, width / height
        x = round((old_width - old_width * (ratio / old_ratio)) / 2) if old_ratio > ratio else 0
        y = round((old_height - old_height * (old_ratio / ratio)) / 2) if old_ratio < ratio else 0
        samples = samples[..., y : old_height - y, x : old_width - x]
    if method == "lanczos":
        images = [_to_pil(image).resize((width, height), Image.Resampling.LANCZOS) for image in samples.movedim(1, -1)]
        return torch.stack([_from_pil(image) for image in images]).movedim(-1, 1).to(samples)
    return F.interpolate(samples, size=(height, width), mode=method)
