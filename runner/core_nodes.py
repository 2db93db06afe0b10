"""The ComfyUI core nodes that this pack's workflows use, for runs without ComfyUI: LoadImage, SaveImage, PreviewImage,
PreviewAny, LatentBlend and ImageScale. Those on masks are in core_masks.py.

They are never registered in ComfyUI. Ids, sockets, widgets and visible results are those of ComfyUI 0.33. There are
three differences: LoadImage also accepts the absolute path of a file, and decodes it with Pillow, as ComfyUI did before
(it may differ by one step of 255 in a JPEG); and PreviewImage saves to `output/temp/`.

An IMAGE is float32 [B, H, W, 3] in 0..1, a MASK is float32 [B, H, W] with 1 where the image is transparent.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ..ming_core.files import draft_in
from ..nodes import host
from ..nodes.filenames import give_number, numbered_path, validate_prefix
from . import core_masks
from .core_masks import MAX_SIDE

MAX_PIXELS = 110_000_000  # of a file, all frames together: more than the largest cameras have; 1.3 GB as IMAGE
TEMP_FOLDER = "temp"  # inside the output folder
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_DAMAGED = (OSError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error)  # what Pillow raises
_NO_ALPHA_SIDE = 64  # the MASK of an image without transparency is 64x64 zeros, as in ComfyUI


def shown_file(entry: dict[str, str]) -> Path:
    """The file of one entry {"filename", "subfolder", "type"} in the `ui` of a node that saves."""
    root = Path(host.output_directory())
    if entry.get("type") == "temp":
        root /= TEMP_FOLDER
    return root / entry.get("subfolder", "") / entry["filename"]


class LoadImage:
    """Loads an image file as IMAGE and MASK. The frames of an animation become a batch."""

    @classmethod
    def INPUT_TYPES(cls):
        folder = Path(host.input_directory())
        files = sorted(f.name for f in folder.iterdir() if is_image_file(f)) if folder.is_dir() else []
        return {"required": {"image": (files, {"image_upload": True})}}

    RETURN_TYPES = ("IMAGE", "MASK")
    FUNCTION = "load_image"
    CATEGORY = "image"

    @classmethod
    def VALIDATE_INPUTS(cls, image):
        path = _image_path(image)
        try:
            with _opened(path):
                return True
        except ValueError as error:
            return str(error)

    @classmethod
    def IS_CHANGED(cls, image):
        return hashlib.sha256(_image_path(image).read_bytes()).hexdigest()

    def load_image(self, image: str) -> tuple[torch.Tensor, torch.Tensor]:
        path = _image_path(image)
        images: list[torch.Tensor] = []
        masks: list[torch.Tensor] = []
        with _opened(path) as file:
            try:
                for number, frame in enumerate(ImageSequence.Iterator(file), start=1):
                    _check_size(path, frame, number)
                    pixels, mask = _tensors(ImageOps.exif_transpose(frame))
                    if not images or pixels.shape == images[0].shape:
                        images.append(pixels)
                        masks.append(mask)
                    if file.format == "MPO":  # the other frames are a second camera's view, or a preview
                        break
            except _DAMAGED as error:
                raise ValueError(f"{path} is damaged ({error}): replace the file") from error
        if len(images) == 1:  # not copied: a photograph takes a lot of memory
            return images[0][None], masks[0][None]
        return torch.stack(images), torch.stack(masks)


class _ImageWriter:
    """Writes PNG files: what SaveImage and PreviewImage have in common."""

    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    FUNCTION = "save_images"
    OUTPUT_NODE = True
    CATEGORY = "image"

    kind = "output"
    compress_level = 4

    def _root(self) -> Path:
        return Path(os.path.normpath(host.output_directory()))

    def _save(self, images, filename_prefix: str, prompt: Any, extra_pnginfo: dict[str, Any] | None) -> dict[str, Any]:
        """Saves every image of a batch, with the workflow in the text chunk "prompt"."""
        root = self._root()
        folder, name, number = numbered_path(filename_prefix, root, images.shape[2], images.shape[1])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"cannot make the folder {folder} ({error.strerror}): choose another output folder"
            ) from error
        metadata = PngInfo()
        for key, value in {"prompt": prompt, **(extra_pnginfo or {})}.items():
            if value is not None:
                metadata.add_text(key, json.dumps(value))
        subfolder = folder.relative_to(root).as_posix()
        entries = []
        for index, image in enumerate(images):
            buffer = io.BytesIO()
            _to_pil(image).save(buffer, "PNG", pnginfo=metadata, compress_level=self.compress_level)
            with draft_in(folder) as draft:
                draft.write_bytes(buffer.getbuffer())
                path, number = give_number(draft, folder, name.replace("%batch_num%", str(index)), number, ".png")
            number += 1
            entries.append(
                {"filename": path.name, "subfolder": "" if subfolder == "." else subfolder, "type": self.kind}
            )
        return {"ui": {"images": entries}, "result": (images,)}


class SaveImage(_ImageWriter):
    """Saves every image of a batch as PNG in the output folder, with the workflow inside."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"images": ("IMAGE",), "filename_prefix": ("STRING", {"default": "ComfyUI"})},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, filename_prefix=None):
        return validate_prefix(filename_prefix, Path(host.output_directory()))

    def save_images(self, images, filename_prefix="ComfyUI", prompt=None, extra_pnginfo=None) -> dict[str, Any]:
        return self._save(images, filename_prefix, prompt, extra_pnginfo)


class PreviewImage(_ImageWriter):
    """Saves a batch of images to `temp/` in the output folder."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"images": ("IMAGE",)},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        }

    kind = "temp"
    compress_level = 1

    def save_images(self, images, prompt=None, extra_pnginfo=None) -> dict[str, Any]:
        return self._save(images, "preview", prompt, extra_pnginfo)

    def _root(self) -> Path:
        return super()._root() / TEMP_FOLDER


host.preview_node = PreviewImage


class PreviewAny:
    """Shows any value as text."""

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
    """Blends two latents: `blend_factor` of the first, the rest of the second, which is resized to the first."""

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
    """Resizes images. A side of 0 keeps the aspect ratio, and two sides of 0 keep the image as it is."""

    @classmethod
    def INPUT_TYPES(cls):
        side = {"default": 512, "min": 0, "max": MAX_SIDE, "step": 1}
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
    **{node.__name__: node for node in (LoadImage, SaveImage, PreviewImage, PreviewAny, LatentBlend, ImageScale)},
    **core_masks.NODE_CLASS_MAPPINGS,
}


def is_image_file(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()


def _image_path(name: str) -> Path:
    """The file that LoadImage's widget names: an absolute path, or a name in a folder, "x.png" or "x.png [output]"."""
    match = re.fullmatch(r"(.*) \[(input|output|temp)\]", name)
    name, kind = match.groups() if match else (name, "input")
    if kind == "input":
        return Path(host.input_directory(), name)
    return shown_file({"filename": name, "type": kind})


def _opened(path: Path) -> Image.Image:
    """The picture file with nothing but its header read. Raises ValueError; a pipe or a device is not opened."""
    if not os.path.isfile(path):
        raise ValueError(f"there is no picture file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
            image = Image.open(path)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a picture in a format that can be read") from None
    except Image.DecompressionBombError:
        raise ValueError(_too_large(path, "")) from None
    except Exception as error:  # whatever Pillow's many readers raise for a damaged header
        raise ValueError(f"{path} cannot be read: {error}") from error
    _check_size(path, image)
    return image


def _check_size(path: Path, image: Image.Image, frames: int = 1) -> None:
    width, height = image.size
    if width * height * frames > MAX_PIXELS:
        raise ValueError(_too_large(path, f" ({width}x{height}{f', {frames} frames' if frames > 1 else ''})"))


def _too_large(path: Path, size: str) -> str:
    return (
        f"{path} has more than {MAX_PIXELS // 10**6} million pixels{size}, and would take more than "
        f"{12 * MAX_PIXELS / 1e9:.1f} GB of memory: scale it down first"
    )


def _tensors(frame: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns one frame as [H, W, 3] in 0..1, and the mask of its transparency."""
    if frame.mode.startswith("I"):  # 16 bits per pixel, which PIL's own conversion would clip at 255
        grey = torch.from_numpy(np.asarray(frame).astype(np.float32) / 65535.0).clamp(0.0, 1.0)
        return grey[..., None].expand(-1, -1, 3).contiguous(), _opaque()
    if "A" in frame.getbands() or "transparency" in frame.info:
        rgba = _from_pil(frame.convert("RGBA"))
        return rgba[..., :3].contiguous(), 1.0 - rgba[..., 3]
    return _from_pil(frame.convert("RGB")), _opaque()


def _opaque() -> torch.Tensor:
    """The mask of a frame without transparency, in host memory whatever the default device is."""
    return torch.zeros(_NO_ALPHA_SIDE, _NO_ALPHA_SIDE, device="cpu")


def _from_pil(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image).astype(np.float32)
    pixels /= 255.0  # in place: a photograph takes a lot of memory
    return torch.from_numpy(pixels)


def _to_pil(image: torch.Tensor) -> Image.Image:
    """Converts [H, W, 3] in 0..1 to an 8-bit image. ComfyUI truncates rather than rounds."""
    return Image.fromarray(np.clip(255.0 * image.float().cpu().numpy(), 0, 255).astype(np.uint8))


def _resized(samples: torch.Tensor, width: int, height: int, method: str, crop: str) -> torch.Tensor:
    """Resizes [B, C, h, w] to [B, C, height, width]. Crop "center" first cuts the image to the new aspect ratio."""
    if crop == "center":
        old_height, old_width = samples.shape[-2:]
        old_ratio, ratio = old_width / old_height, width / height
        x = round((old_width - old_width * (ratio / old_ratio)) / 2) if old_ratio > ratio else 0
        y = round((old_height - old_height * (old_ratio / ratio)) / 2) if old_ratio < ratio else 0
        samples = samples[..., y : old_height - y, x : old_width - x]
        if not samples.numel():
            raise ValueError(
                f"the picture of {old_width}x{old_height} is too narrow to be cropped to the shape of "
                f"{width}x{height}: choose another size, or no crop"
            )
    if method == "lanczos":
        images = [_to_pil(image).resize((width, height), Image.Resampling.LANCZOS) for image in samples.movedim(1, -1)]
        return torch.stack([_from_pil(image) for image in images]).movedim(-1, 1).to(samples)
    return F.interpolate(samples, size=(height, width), mode=method)
