"""Features and conversations as files: one safetensors file each, written whole or not at all.

A features file holds tokens and latents, so that no model is needed to read it. A conversation file holds token ids and
latents only, a few kilobytes; loading one expands the latents again, once an image. Both carry a digest of their
content (files.py); what is read is checked all the same, since older files have none, and anyone can write a digest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import MAX_DEPTH
from .conversation import ANSWER, MARK, PROMPT, ROLE, Conversation, Image, Part, Segment, Text
from .engine import Engine
from .features import Features
from .files import FileError, read_tensors, write_tensors

FEATURES_FORMAT = "ming features 1"
CONVERSATION_FORMAT = "ming conversation 1"
MAX_VALUE = 65504.0  # the largest float16: what is beyond it overflows in a model of that precision
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Damaged(Exception):
    """What is wrong in a file, in words."""


def save_features(features: Features, path: str | Path) -> None:
    """Write one safetensors file, whole or not at all. Tokens are kept too, so that no model is needed to read it.

    Raises FileError, and ValueError for values that no picture has.
    """
    tensors = {"tokens": features.tokens, "latents": features.latents}
    _check_savable(tensors)
    write_tensors(
        path,
        tensors,
        {"format": FEATURES_FORMAT, "tokenizer": features.tokenizer, "depth": features.depth},
    )


def load_features(path: str | Path) -> Features:
    """Read what `save_features` wrote. Raises FileError for a file that is damaged or of another kind."""
    tensors, about = read_tensors(path, FEATURES_FORMAT)
    try:
        _require(set(tensors) == {"tokens", "latents"}, "it must have tokens and latents, and nothing else")
        tokens, latents = _values("tokens", tensors["tokens"], 3), _values("latents", tensors["latents"], 4)
        (b, n, _), (b2, _, h, w) = tokens.shape, latents.shape
        _require((b, n) == (b2, h * w), f"tokens {tuple(tokens.shape)} do not belong to latents {tuple(latents.shape)}")
        tokenizer = about.get("tokenizer")
        _require(isinstance(tokenizer, str), "it does not name its tokenizer")
        return Features(tokens, latents, (h, w), str(tokenizer), _depth(about))
    except _Damaged as error:
        raise FileError(f"{path}: not a whole features file ({error}); save the features again") from None


def _check_savable(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for values that loading would refuse."""
    for name, tensor in tensors.items():
        largest = tensor.abs().max().item()
        if not largest <= MAX_VALUE:
            raise ValueError(
                f"{name} hold values up to {largest:g}, which no picture has, so nothing was saved: draw it again, "
                "with lower guidance and temperature if they are extreme"
            )


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise _Damaged(message)


def _values(name: str, tensor: Tensor, axes: int) -> Tensor:
    """The tensor in float32. It must have this many axes, none of them empty, and plausible values."""
    _require(
        tensor.dtype in FLOATS and tensor.ndim == axes and tensor.numel() > 0,
        f"{name} are {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}",
    )
    largest = tensor.abs().max().item()  # nan where one of them is
    _require(largest <= MAX_VALUE, f"{name} hold values that cannot be meant, up to {largest:g}")
    return tensor.float()


def _depth(about: dict[str, Any]) -> int:
    depth = about.get("depth")
    if type(depth) is not int or not 0 <= depth <= MAX_DEPTH:
        raise _Damaged(f"the depth is {str(depth)[:40]}, where it is from 0 to {MAX_DEPTH}")
    return depth


def save_conversation(conversation: Conversation, path: str | Path) -> None:
    """Write one small safetensors file, whole or not at all: token ids and latents, never features.

    Raises FileError, and ValueError for values that no picture has.
    """
    images = conversation.images
    ids = [i for s in conversation.segments if isinstance(s, Text) for i in s.ids]
    tensors = {f"latents.{i}": p.features.latents[0] for i, p in enumerate(images)}
    _check_savable(tensors)
    tensors["ids"] = torch.tensor(ids, dtype=torch.int32, device="cpu")
    parts = [{"generated": p.generated, "segments": [_about(s) for s in p.segments]} for p in conversation.parts]
    write_tensors(path, tensors, {"format": CONVERSATION_FORMAT, "model": conversation.model, "parts": parts})


def load_conversation(
    path: str | Path,
    model: Engine,
    on_ready: Callable[[int], None] | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Conversation:
    """Read what `save_conversation` wrote; the images' features are made anew, once an image.

    `on_ready` is called with the tokens of the largest image, if there is one, when the file is found to be of this
    model and MingTok is about to compute; `on_image`, after every image, with how many are done and how many there
    are, and it may raise to stop. Raises FileError for a damaged file, and ValueError for one of another model.
    """
    tensors, about = read_tensors(path, CONVERSATION_FORMAT)
    other = about.get("model")
    if isinstance(other, str) and other not in ("", model.fingerprint):
        raise ValueError(
            f"{path} was saved with another model ({other[:12]}) than this one ({model.fingerprint[:12]}): "
            "load that model to go on with it, or begin a conversation under another name"
        )
    try:
        bare = _parse(tensors, about, model)
    except _Damaged as error:
        raise FileError(f"{path}: not a whole conversation file ({error}); save the conversation again") from None
    images = bare.images
    if on_ready and images:
        on_ready(max(image.length for image in images))
    expanded = []
    for image in images:
        with torch.no_grad():
            features = model.mingtok.semantic_features(image.features.latents)
        expanded.append(Image(features._replace(depth=image.features.depth), image.drawn))
        if on_image:
            on_image(len(expanded), len(images))
    whole = iter(expanded)
    parts = [
        part._replace(segments=tuple(next(whole) if isinstance(s, Image) else s for s in part.segments))
        for part in bare.parts
    ]
    return bare._replace(parts=tuple(parts))


def _parse(tensors: dict[str, Tensor], about: dict[str, Any], model: Engine) -> Conversation:
    """The conversation of a file, its images' features without tokens yet. Raises _Damaged."""
    _require(isinstance(about.get("model"), str), "it does not name its model")
    ids = _token_ids(tensors, model.config.llm_config.vocab_size)
    images = 0
    parts = []
    for part in _objects(about, "parts"):
        segments: list[Segment] = []
        for entry in _objects(part, "segments"):
            if "kind" in entry:
                segments.append(_text(entry, ids))
                del ids[: segments[-1].length]
            else:
                segments.append(_image(entry, tensors.get(f"latents.{images}"), model))
                images += 1
        _require(isinstance(part.get("generated"), bool), "a part does not say whether it was generated")
        parts.append(Part(part["generated"], tuple(segments)))
    left = len(tensors) - 1 - images
    _require(not ids and not left, f"{len(ids)} tokens and {left} images are of no part")
    return Conversation(tuple(parts), about["model"])


def _objects(entries: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = entries.get(name)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise _Damaged(f"{name} is not a list of objects")
    return found


def _token_ids(tensors: dict[str, Tensor], vocabulary: int) -> list[int]:
    tensor = tensors.get("ids")
    if tensor is None or tensor.ndim != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise _Damaged("it has no list of token ids")
    ids = tensor.tolist()
    beyond = next((i for i in ids if not 0 <= i < vocabulary), None)
    _require(beyond is None, f"token {beyond} is not in the vocabulary of {vocabulary}")
    return ids


def _text(entry: dict[str, Any], ids: list[int]) -> Text:
    """A run of text: the first of these token ids."""
    kind, length, text = entry["kind"], entry.get("length"), entry.get("text")
    known = isinstance(kind, str) and kind in (ROLE, MARK, PROMPT, ANSWER)
    least = 0 if kind == ANSWER else 1  # an answer of one token, which is never forwarded, has its text alone
    if not known or not isinstance(text, str) or type(length) is not int or not least <= length <= len(ids):
        raise _Damaged(f"{str(length)[:40]} tokens of kind {str(kind)[:40]}, where {len(ids)} are left")
    return Text(tuple(ids[:length]), kind, text)


def _image(entry: dict[str, Any], latents: Tensor | None, model: Engine) -> Image:
    if latents is None:
        raise _Damaged("the latents of an image are missing")
    latents = _values("latents", latents, 3)[None]
    try:
        model.mingtok.check_latents(latents)
    except ValueError as error:
        raise _Damaged(str(error)) from None
    _require(isinstance(entry.get("drawn"), bool), "an image does not say whether it was drawn")
    grid = (latents.shape[2], latents.shape[3])
    return Image(Features(latents[:, 0, :0], latents, grid, model.mingtok.fingerprint, _depth(entry)), entry["drawn"])


def _about(segment: Segment) -> dict:
    if isinstance(segment, Text):
        return {"kind": segment.kind, "length": segment.length, "text": segment.text}
    return {"drawn": segment.drawn, "depth": segment.features.depth}
