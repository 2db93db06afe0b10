"""What a LoRA is trained on: a folder of pictures with texts, as people have it.

    name.png, name.txt                          drawing; the text is the prompt
    name_before.png, name_after.png, name.txt   editing
    name.jsonl, name.png                        questions about the picture; {"question": ..., "answer": ...} a line
    name.jsonl                                  questions without a picture

Pictures may have any format that Pillow reads, and may be in folders inside the folder. Whatever cannot be used is left
out, with the reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files import FileError
from ..images import check_images

BEFORE, AFTER = "_before", "_after"
SHOWN = 20  # files that are left out and named in the report
KINDS = ("drawings", "edits", "questions")


@dataclass(frozen=True)
class Sample:
    """One thing to learn, of one of the `KINDS`.

    source     the picture that a prompt comes with, if any
    target     the picture to draw; None for questions
    questions  (question, answer) pairs about the source
    """

    name: str
    prompt: str = ""
    source: Path | None = None
    target: Path | None = None
    questions: tuple[tuple[str, str], ...] = ()

    @property
    def kind(self) -> str:
        return "questions" if self.questions else "edits" if self.source else "drawings"

    @property
    def texts(self) -> list[str]:
        """All that is said in it."""
        return [self.prompt] if self.prompt else [text for pair in self.questions for text in pair]

    @property
    def pictures(self) -> list[Path]:
        return [path for path in (self.source, self.target) if path is not None]


@dataclass
class Found:
    """What a folder has: samples by name, and files that are left out with the reason."""

    folder: Path
    samples: list[Sample] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def report(self) -> list[str]:
        """Lines for people."""
        counts = Counter(sample.kind for sample in self.samples)
        found = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) or "nothing"
        lines = [f"{self.folder}: {found}; {len(self.left_out)} files left out"]
        lines += [f"  left out: {name}: {why}" for name, why in list(self.left_out.items())[:SHOWN]]
        if len(self.left_out) > SHOWN:
            lines.append(f"  and {len(self.left_out) - SHOWN} more")
        return lines


def read_folder(folder: str | Path, side: int, fit: str, count: Callable[[str], int], most: int) -> Found:
    """Find the samples of a folder, in the order of their names.

    side, fit  as in `images.to_pixels`
    count      tokens of a text
    most       tokens that the texts of a sample may take
    Raises FileError for a folder that does not exist or of which nothing can be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder: give --data the folder with the pictures and their texts")
    reader = _Reader(folder, side, fit, count, most)
    for path in reader.texts:
        reader.read(path)
    for path in reader.pictures.values():
        if path not in reader.used:
            reader.leave_out(path, f"no text goes with it ({path.stem}.txt or {path.stem}.jsonl)")
    found = Found(folder, reader.samples, dict(sorted(reader.left_out.items())))
    if not found.samples:
        raise FileError("\n".join([*found.report(), "nothing to train on: put pictures and texts of one name there"]))
    return found


class _Unusable(Exception):
    """Why a sample is left out."""


class _Reader:
    def __init__(self, folder: Path, side: int, fit: str, count: Callable[[str], int], most: int) -> None:
        self.folder, self.side, self.fit, self.count, self.most = folder, side, fit, count, most
        self.samples: list[Sample] = []
        self.left_out: dict[str, str] = {}
        self.used: set[Path] = set()
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path, folder)]
        formats = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
        self.texts = [path for path in files if path.suffix.lower() in (".txt", ".jsonl")]
        self.pictures: dict[Path, Path] = {}  # by their names without the ending
        for path in files:
            if path.suffix.lower() not in formats:
                if path not in self.texts:
                    self.leave_out(path, "neither a picture nor .txt or .jsonl")
            elif self.pictures.setdefault(path.with_suffix(""), path) != path:
                self.used.add(path)
                self.leave_out(path, f"{self.pictures[path.with_suffix('')].name} has the same name")

    def leave_out(self, path: Path, why: str) -> None:
        self.left_out[path.relative_to(self.folder).as_posix()] = why

    def read(self, path: Path) -> None:
        try:
            sample = self._questions(path) if path.suffix.lower() == ".jsonl" else self._drawing(path)
            if (tokens := sum(map(self.count, sample.texts))) > self.most:
                raise _Unusable(f"its text takes {tokens} tokens, and {self.most} are left beside the pictures")
            self.samples.append(sample)
        except _Unusable as error:
            self.leave_out(path, str(error))

    def _drawing(self, path: Path) -> Sample:
        stem, name = path.with_suffix(""), self._name(path)
        before, after = (self.pictures.get(stem.with_name(stem.name + end)) for end in (BEFORE, AFTER))
        alone = self.pictures.get(stem)
        self.used |= {picture for picture in (before, after, alone) if picture}
        prompt = _text(path).strip()
        if not prompt:
            raise _Unusable("it is empty")
        if before and after:
            return Sample(name, prompt, self._checked(before), self._checked(after))
        if before or after:
            raise _Unusable(f"{stem.name}{AFTER if before else BEFORE} is missing")
        if not alone:
            raise _Unusable(f"no picture goes with it ({stem.name}.png, or {stem.name}{BEFORE} and {stem.name}{AFTER})")
        return Sample(name, prompt, target=self._checked(alone))

    def _questions(self, path: Path) -> Sample:
        picture = self.pictures.get(path.with_suffix(""))
        self.used |= {picture} if picture else set()
        lines = enumerate(_text(path).splitlines(), 1)
        pairs = [_pair(line, number) for number, line in lines if line.strip()]
        if not pairs:
            raise _Unusable("it is empty")
        return Sample(self._name(path), source=self._checked(picture) if picture else None, questions=tuple(pairs))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _checked(self, path: Path) -> Path:
        try:
            image = read_image(path)
            check_images(image, self.side, self.fit)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise _Unusable(f"{path.name} cannot be used: {error}") from None
        return path


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _Unusable(f"it cannot be read as UTF-8 text: {error}") from None


def _pair(line: str, number: int) -> tuple[str, str]:
    """A question and its answer."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"line {number} is not JSON: {error}") from None
    texts = [found.get(key) for key in ("question", "answer")] if isinstance(found, dict) else []
    said = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if len(said) != 2:
        raise _Unusable(f'line {number} must be {{"question": "...", "answer": "..."}}')
    return said[0], said[1]


def read_image(path: Path) -> Tensor:
    """A picture file as float32 [1, H, W, 3], 0..1, turned as its camera says."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).float().div(255)[None]


def pictures_of(samples: list[Sample]) -> Iterator[Path]:
    """Every picture once."""
    return iter(dict.fromkeys(path for sample in samples for path in sample.pictures))
