"""Features and conversations as files: one safetensors file each, written whole or not at all.

A features file holds tokens and latents, so that no model is needed to read it. A conversation file holds token ids and
latents only, a few kilobytes; loading one expands the latents again, once an image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .conversation import ANSWER, MARK, PROMPT, ROLE, Conversation, Image, Part, Segment, Text
from .engine import Engine
from .features import Features
from .files import FileError, read_tensors, write_tensors

FEATURES_FORMAT = "ming features 1"
CONVERSATION_FORMAT = "ming conversation 1"


def save_features(features: Features, path: str | Path) -> None:
    """Write one safetensors file, whole or not at all. Tokens are kept too, so that no model is needed to read it."""
    write_tensors(
        path,
        {"tokens": features.tokens, "latents": features.latents},
        {"format": FEATURES_FORMAT, "tokenizer": features.tokenizer, "depth": features.depth},
    )


def load_features(path: str | Path) -> Features:
    """Read what `save_features` wrote. Raises FileError for a file that is damaged or of another kind."""
    tensors, about = read_tensors(path, FEATURES_FORMAT)
    try:
        tokens, latents = tensors["tokens"].float(), tensors["latents"].float()
        (b, n, _), (b2, _, h, w) = tokens.shape, latents.shape
        if (b, n) != (b2, h * w) or not (torch.isfinite(tokens).all() and torch.isfinite(latents).all()):
            raise ValueError(f"tokens {tuple(tokens.shape)} do not belong to latents {tuple(latents.shape)}")
        return Features(tokens, latents, (h, w), str(about["tokenizer"]), int(about["depth"]))
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise FileError(f"{path}: not a whole features file ({error}); save the features again") from None


def save_conversation(conversation: Conversation, path: str | Path) -> None:
    """Write one small safetensors file, whole or not at all: token ids and latents, never features."""
    images = conversation.images
    ids = [i for s in conversation.segments if isinstance(s, Text) for i in s.ids]
    tensors = {f"latents.{i}": p.features.latents[0] for i, p in enumerate(images)}
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
    other = about.get("model", "")
    if other not in ("", model.fingerprint):
        raise ValueError(
            f"{path} was saved with another model ({str(other)[:12]}) than this one ({model.fingerprint[:12]}): "
            "load that model to go on with it"
        )
    try:
        bare = _parse(tensors, about, model)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise FileError(f"{path}: not a whole conversation file ({what}); save the conversation again") from None
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


def _parse(tensors: dict[str, Tensor], about: dict, model: Engine) -> Conversation:
    """The conversation of a file, its images' features without tokens yet."""
    ids, vocabulary, done = tensors["ids"].tolist(), model.config.llm_config.vocab_size, 0
    for i in ids:
        if not (isinstance(i, int) and 0 <= i < vocabulary):
            raise ValueError(f"token {i} is not in the vocabulary of {vocabulary}")
    parts = []
    for part in about["parts"]:
        segments: list[Segment] = []
        for entry in part["segments"]:
            if "kind" in entry:
                n = entry["length"]
                known = entry["kind"] in (ROLE, MARK, PROMPT, ANSWER) and isinstance(entry["text"], str)
                if not (known and 0 < n <= len(ids)):
                    raise ValueError(f"{n} tokens of {entry['kind']!r}, where {len(ids)} are left")
                segments.append(Text(tuple(ids[:n]), entry["kind"], entry["text"]))
                del ids[:n]
            else:
                latents = tensors[f"latents.{done}"][None]
                model.mingtok.check_latents(latents)
                grid, depth = (latents.shape[2], latents.shape[3]), int(entry["depth"])
                features = Features(latents[:, 0, :0], latents, grid, model.mingtok.fingerprint, depth)
                segments.append(Image(features, bool(entry["drawn"])))
                done += 1
        parts.append(Part(bool(part["generated"]), tuple(segments)))
    if ids or done < len(tensors) - 1:
        raise ValueError(f"{len(ids)} tokens and {len(tensors) - 1 - done} images are of no part")
    return Conversation(tuple(parts), about["model"])


def _about(segment: Segment) -> dict:
    if isinstance(segment, Text):
        return {"kind": segment.kind, "length": segment.length, "text": segment.text}
    return {"drawn": segment.drawn, "depth": segment.features.depth}
