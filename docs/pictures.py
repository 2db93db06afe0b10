"""Make docs/examination.png and the thumbnails of the templates, from what the built-in model really draws.

    python docs/pictures.py [NAME ...]

NAME: "examination", or a workflow; all of them by default. A thumbnail shows the scene that
a workflow starts from, the image of each of its drawing nodes (decoded for the thumbnail alone), and the answers; or
the nodes of SHOWN. The page has no slider for the thumbnails of a node pack, so before and after stand side by side.
Of the README's other pictures, animation.py makes docs/chain.gif, benchmarks/steps.py and benchmarks/speed.py their
plots; docs/graph.png is a screenshot.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-shapes"
WORKFLOWS = ROOT / "workflows"
SIDE, GAP, LINE = 512, 8, 26  # side of a thumbnail, gap between images, height of a line of text, in pixels
DARK, WHITE = (32, 35, 39), (255, 255, 255)
DRAWING = ("MingGenerate", "MingEdit")
SHOWN = {  # the nodes whose images a thumbnail shows, where they are not the scene and all that is drawn
    "reconstruct": ("10", "5"),
    "edit_inside_mask": ("2", "10"),
    "region_then_edit_inside": ("2", "11", "7"),
    "extend_picture": ("4", "7"),
    "edit_photograph": ("2", "11"),
    "super_resolution_then_colorize": ("4", "8", "10"),
    "enhance_chain": ("4", "8", "10", "12"),
    "chat": ("5",),
}

Color = tuple[int, int, int]


@functools.cache
def runner() -> tuple[Any, Any]:
    """The modules session.py and workflow.py of the runner; this folder is imported as a package, as in ComfyUI."""
    spec = importlib.util.spec_from_file_location(
        "ming_univision", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} cannot be imported as a package")
    pack = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pack
    spec.loader.exec_module(pack)
    return importlib.import_module("ming_univision.runner.session"), importlib.import_module(
        "ming_univision.runner.workflow"
    )


def results(name: str) -> tuple[list[Image.Image], list[str]]:
    """The images of a workflow (what it starts from first), and the answers."""
    run, reader = runner()
    workflow = reader.read_workflow(WORKFLOWS / "api" / f"{name}.json")
    with tempfile.TemporaryDirectory() as folder:  # empty, or a chat would go on where it was
        found = run.run_workflow(workflow, output_dir=folder, input_dir=ROOT / "input")
    images: list[Image.Image] = []
    shown = SHOWN.get(name, [n for n in found if workflow[n]["class_type"] in ("MingExampleScene", *DRAWING)])
    for node in shown:
        kind, (first, *_) = workflow[node]["class_type"], found[node].outputs
        if kind in DRAWING:
            images += [decoded(tokenizer(workflow, found), features) for features in first]
        else:
            images.append(first_image(first[0]))
    answers = [found[n].outputs[0][0] for n in found if workflow[n]["class_type"] == "MingUnderstand"]
    return images, answers


def tokenizer(workflow: dict, found: dict) -> Any:
    """The MingTok that a workflow loads."""
    return next(found[n].outputs[1][0].model for n in found if workflow[n]["class_type"] == "MingUniVisionLoader")


def first_image(images: torch.Tensor) -> Image.Image:
    """The first image of an IMAGE."""
    return Image.fromarray((images[0].clamp(0, 1) * 255).round().byte().numpy())


@torch.no_grad()
def decoded(mingtok: Any, features: Any) -> Image.Image:
    """The first image of features."""
    return first_image((mingtok.decode(features) / 2 + 0.5).permute(0, 2, 3, 1))


def row(images: list[Image.Image], side: int, background: Color = DARK) -> Image.Image:
    """Images in a row, each of this side."""
    canvas = Image.new("RGB", (len(images) * (side + GAP) - GAP, side), background)
    for i, image in enumerate(images):
        square = ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color=background)
        canvas.paste(square, (i * (side + GAP), 0))
    return canvas


def thumbnail(name: str) -> None:
    """Write the thumbnail of a workflow: its images in two columns, and the answers below."""
    images, answers = results(name)
    canvas = Image.new("RGB", (SIDE, SIDE), DARK)
    columns = 1 if len(images) == 1 else 2
    side = (SIDE - (columns + 1) * GAP) // columns
    lines = [line for answer in answers for line in textwrap.wrap(answer, 46)]
    rows = -(-len(images) // columns)
    if lines and rows * (side + GAP) + len(lines) * LINE > SIDE:
        side = (SIDE - len(lines) * LINE - (rows + 2) * GAP) // rows
    height = rows * (side + GAP) + len(lines) * LINE
    top = (SIDE - height) // 2
    for i in range(0, len(images), columns):
        strip = row(images[i : i + columns], side)
        canvas.paste(strip, ((SIDE - strip.width) // 2, top))
        top += side + GAP
    if len(images) == 2 and not lines:
        arrow(canvas, (SIDE // 2, top - GAP - side // 6))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=19)
    for line in lines:
        pen.text((2 * GAP, top), line, fill=WHITE, font=font)
        top += LINE
    canvas.save(WORKFLOWS / f"{name}.jpg", quality=88)


def arrow(canvas: Image.Image, center: tuple[int, int]) -> None:
    """Draw a disc with an arrow to the right: what is on its left becomes what is on its right."""
    x, y = center
    pen = ImageDraw.Draw(canvas)
    pen.ellipse((x - 22, y - 22, x + 22, y + 22), fill=WHITE, outline=DARK, width=3)
    pen.polygon([(x - 7, y - 11), (x + 12, y), (x - 7, y + 11)], fill=DARK)


def stacked(rows: list[Image.Image]) -> Image.Image:
    """Images of one width, one below the other."""
    canvas = Image.new("RGB", (rows[0].width, sum(image.height + GAP for image in rows) - GAP), WHITE)
    top = 0
    for image in rows:
        canvas.paste(image, (0, top))
        top += image.height + GAP
    return canvas


def captioned(rows: list[list[Image.Image]], captions: list[str], side: int, size: int) -> Image.Image:
    """Rows of images one below the other, and below each column its caption, in letters of `size` pixels."""
    strips = [row(images, side, WHITE) for images in rows]
    wrapped = [textwrap.wrap(caption, side // (size // 2 + 1)) for caption in captions]
    font, line = ImageFont.load_default(size=size), size + 7
    text = Image.new("RGB", (strips[0].width, max(map(len, wrapped)) * line + GAP), WHITE)
    pen = ImageDraw.Draw(text)
    for i, lines in enumerate(wrapped):
        for k, words in enumerate(lines):
            pen.text((i * (side + GAP) + GAP, k * line), words, fill=(0, 0, 0), font=font)
    return stacked([*strips, text])


def examination() -> None:
    """Write docs/examination.png: the first scenes of the evaluation, drawn from text, and edited."""
    sys.path.insert(0, str(ROOT))
    from ming_core import load_univision
    from tiny_shapes.evaluation.evaluator import Evaluator

    evaluator = Evaluator(load_univision(MODEL), scenes=6)
    parts = []
    for name in ("generate", "edit"):
        tasks = evaluator.tasks([name])
        after = [decoded(evaluator.engine.mingtok, result.features) for result in evaluator.draw(tasks)]
        before = [Image.fromarray(task.attached) for task in tasks if task.attached is not None]
        parts.append(captioned([before, after] if before else [after], [task.prompt for task in tasks], 224, 15))
    stacked(parts).save(ROOT / "docs" / "examination.png", optimize=True)


def main(names: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    workflows = sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    for name in names or ["examination", *workflows]:
        log.info("%s", name)
        examination() if name == "examination" else thumbnail(name)


if __name__ == "__main__":
    main(sys.argv[1:])
