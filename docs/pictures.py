"""Makes the pictures of the README and the templates' thumbnails anew, from what the built-in model really gives.

docs/graph.png, a screenshot of the page, is the one that it does not make.

    python docs/pictures.py [NAME ...]

NAME: "reconstruction", "rounds", "examination", or a workflow; all of them by default. A thumbnail shows the scene that
a workflow starts from, what each of its drawing nodes drew (decoded for the thumbnail alone), and what was answered.
"""

from __future__ import annotations

import functools
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = ROOT / "workflows"
SIDE, GAP, LINE = 512, 8, 26  # of a thumbnail, between pictures, and of a line of text, in pixels
GROUND, INK = (32, 35, 39), (255, 255, 255)
SCENES = (3, 5, 8, 12, 13, 21, 34)  # seeds of unseen scenes for the reconstructions
DRAWING = ("MingGenerate", "MingEdit")


@functools.cache
def pack() -> Any:
    """This folder, imported as a package as quickstart.py does it."""
    sys.path.insert(0, str(ROOT))
    import quickstart

    quickstart.load_pack()
    from ming_univision.nodes import headless, headless_workflow

    return headless, headless_workflow


def results(name: str) -> tuple[list[Image.Image], list[str], list[str]]:
    """Pictures in their order (the scene first, if any), the drawing nodes' titles, and the answers."""
    headless, reader = pack()
    workflow = reader.read_workflow(WORKFLOWS / "api" / f"{name}.json")
    found = headless.run_workflow(workflow, output_dir=ROOT / "output", input_dir=ROOT / "input")
    pictures, titles, answers = [], [], []
    for node, result in found.items():
        kind, outputs = workflow[node]["class_type"], result.outputs
        if kind == "MingExampleScene":
            pictures.append(picture(outputs[0][0]))
        elif kind in DRAWING:
            loaded = next(
                r.outputs[1][0] for n, r in found.items() if workflow[n]["class_type"] == "MingUniVisionLoader"
            )
            pictures += [decoded(loaded.model, features) for features in outputs[0]]
            titles += [words(workflow, found, node)] * len(outputs[0])
        elif kind == "MingUnderstand":
            answers.append(outputs[0][0])
        elif kind == "MingTokDecode" and name == "reconstruct":
            pictures.append(picture(outputs[0][0]))
    return pictures, titles, answers


def words(workflow: dict, found: dict, node: str) -> str:
    """What a drawing node was told."""
    told = workflow[node]["inputs"].get("instruction", workflow[node]["inputs"].get("prompt"))
    return found[told[0]].outputs[told[1]][0] if isinstance(told, list) else told


def picture(image: torch.Tensor) -> Image.Image:
    """The first of an IMAGE."""
    from ming_univision.ming_core.images import to_uint8

    return Image.fromarray(to_uint8(image[0]))


@torch.no_grad()
def decoded(mingtok: Any, features: Any) -> Image.Image:
    from ming_univision.ming_core.images import to_images

    return picture(to_images(mingtok.decode(features)))


def row(pictures: list[Image.Image], side: int, ground: tuple = GROUND) -> Image.Image:
    canvas = Image.new("RGB", (len(pictures) * (side + GAP) - GAP, side), ground)
    for i, each in enumerate(pictures):
        canvas.paste(each.resize((side, side), Image.Resampling.LANCZOS), (i * (side + GAP), 0))
    return canvas


def thumbnail(name: str) -> None:
    pictures, _, answers = results(name)
    canvas = Image.new("RGB", (SIDE, SIDE), GROUND)
    across = 1 if len(pictures) == 1 else 2
    side = (SIDE - (across + 1) * GAP) // across
    lines = [line for answer in answers for line in textwrap.wrap(answer, 46)]
    down = -(-len(pictures) // across)
    if lines and down * (side + GAP) + len(lines) * LINE > SIDE:
        side = (SIDE - len(lines) * LINE - (down + 2) * GAP) // down
    height = down * (side + GAP) + len(lines) * LINE
    top = (SIDE - height) // 2
    for i in range(0, len(pictures), across):
        strip = row(pictures[i : i + across], side)
        canvas.paste(strip, ((SIDE - strip.width) // 2, top))
        top += side + GAP
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=19)
    for line in lines:
        pen.text((2 * GAP, top), line, fill=INK, font=font)
        top += LINE
    canvas.save(WORKFLOWS / f"{name}.jpg", quality=88)


def stacked(rows: list[Image.Image]) -> Image.Image:
    """One below the other, all of one width."""
    canvas = Image.new("RGB", (rows[0].width, sum(each.height + GAP for each in rows) - GAP), INK)
    top = 0
    for each in rows:
        canvas.paste(each, (0, top))
        top += each.height + GAP
    return canvas


def captioned(strips: list[list[Image.Image]], titles: list[str], side: int, size: int) -> Image.Image:
    """Strips of pictures one below the other, and below each column its title, in letters of `size` pixels."""
    rows = [row(pictures, side, INK) for pictures in strips]
    wrapped = [textwrap.wrap(title, side // (size // 2 + 1)) for title in titles]
    font, line = ImageFont.load_default(size=size), size + 7
    caption = Image.new("RGB", (rows[0].width, max(map(len, wrapped)) * line + GAP), INK)
    pen = ImageDraw.Draw(caption)
    for i, texts in enumerate(wrapped):
        for k, text in enumerate(texts):
            pen.text((i * (side + GAP) + GAP, k * line), text, fill=(0, 0, 0), font=font)
    return stacked([*rows, caption])


def rounds() -> None:
    """The demo's rounds, with what was said."""
    pictures, titles, answers = results("multi_round_edit")
    canvas = captioned([pictures], [f'The scene. "{answers[0]}"', *titles], 384, 19)
    canvas.save(ROOT / "docs" / "rounds.png", optimize=True)


def examination() -> None:
    """The first scenes of the examination, as they come: drawings from words, and edits with the picture before."""
    pack()
    from ming_univision.ming_core import load_univision

    from tiny_shapes.training.examiner import Examiner

    examiner = Examiner(load_univision(ROOT / "models" / "tiny-shapes"), scenes=6)
    parts = []
    for task in ("generate", "edit"):
        asked = examiner.rounds([task])
        after = [decoded(examiner.model.mingtok, turn.features) for turn in examiner.draw_rounds(asked)]
        before = [Image.fromarray(turn.attached) for turn in asked if turn.attached is not None]
        parts.append(captioned([before, after] if before else [after], [turn.prompt for turn in asked], 224, 15))
    stacked(parts).save(ROOT / "docs" / "examination.png", optimize=True)


def reconstruction() -> None:
    """Unseen scenes above, what comes back from the tokenizer below."""
    pack()
    from ming_univision.ming_core import load_mingtok

    from tiny_shapes.world import draw, scene_from_seed

    mingtok = load_mingtok(ROOT / "models" / "tiny-shapes")
    above = [draw(scene_from_seed(seed, split="eval")) for seed in SCENES]
    pixels = torch.from_numpy(np.stack(above)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        features = mingtok.semantic_features(mingtok.encode(pixels))
    below = [decoded(mingtok, each) for each in features.pictures()]
    strips = [row(pictures, 160, INK) for pictures in ([Image.fromarray(a) for a in above], below)]
    stacked(strips).save(ROOT / "docs" / "reconstruction.png", optimize=True)


OTHERS = {"reconstruction": reconstruction, "rounds": rounds, "examination": examination}


def main(names: list[str]) -> None:
    workflows = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    for name in names or [*OTHERS, *workflows]:
        print(name, flush=True)
        OTHERS.get(name, lambda name=name: thumbnail(name))()


if __name__ == "__main__":
    main(sys.argv[1:])
