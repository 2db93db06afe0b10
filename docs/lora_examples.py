"""The two examples of docs/LORA.md: what they are trained on, how well they work, and the pictures of the page.

    python docs/lora_examples.py houses FOLDER                 make the data, train the LoRA, score it
    python docs/lora_examples.py stars FOLDER                  the same with the other one
    python docs/lora_examples.py pictures HOUSES STARS         docs/lora.png

The steps of the first two by themselves:

    python docs/lora_examples.py data FOLDER                   40 houses, 60 edits, and others, with texts
    python docs/lora_examples.py train NAME FOLDER             a LoRA, by python -m ming_core.training lora
    python docs/lora_examples.py score [--lora FILE ...]       houses and edits that are right, and what else is

A house is a shape, and turning everything into stars is a kind of edit, that the built-in model has never seen. The
scorer reads pixels: in each of the nine cells it finds the object whose picture is nearest to what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ming_core import DrawRequest, Engine, load_univision  # noqa: E402 - found by the line above
from ming_core.training import command  # noqa: E402
from tiny_shapes.evaluation.evaluator import Evaluator  # noqa: E402
from tiny_shapes.world import compare, random_dialogue, read_scene  # noqa: E402
from tiny_shapes.world.drawing import inside  # noqa: E402
from tiny_shapes.world.scenes import (  # noqa: E402
    BACKGROUNDS,
    CANVAS,
    COLORS,
    JITTER,
    POSITIONS,
    SHAPES,
    SIZES,
)

MODEL = ROOT / "models" / "tiny-shapes"
HOUSE, STAR = "house", "star"
HOUSES, PAIRS, OTHERS = 40, 60, 1200  # samples to train on
UNSEEN, SCENES = 30, 60  # scenes to score on: of the new, and of each thing that is to stay
# What the trainer is told beside the folders
TRAINING = "--layers attention shared_expert projection --rank 12 --batch 8 --lr 3e-3 --dropping 0.1 --no-checkpointing"
LENGTH = {"houses": "--steps 1200 --others-share 0.8", "stars": "--steps 600 --others-share 0.75"}
CELL = 32
SAMPLES = 8  # points along a pixel's side
ASKED = (
    "Turn everything into stars.",
    "Make stars of all objects.",
    "Please turn every object into a star.",
    "Change all shapes to stars.",
)
CAPTIONS = (
    "{0} on a {1} background",
    "A picture of {0} on a {1} background",
    "Please generate the corresponding image based on the description. {0} on a {1} background",
    "On a {1} background: {0}",
)


class Thing(NamedTuple):
    """An object of any shape, houses included."""

    shape: str
    color: str
    size: str
    position: str
    dx: int = 0
    dy: int = 0

    @property
    def words(self) -> str:
        return f"a {self.size} {self.color} {self.shape} at the {self.position}"


class Picture(NamedTuple):
    things: tuple[Thing, ...]
    background: str

    def caption(self, form: int = 0) -> str:
        return CAPTIONS[form].format(" and ".join(thing.words for thing in self.things), self.background)

    @property
    def content(self) -> tuple:
        return self.background, *(thing[:4] for thing in self.things)


# --- Drawing ------------------------------------------------------------------------------------------------------


def belongs(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points belong to a shape, in radii from its middle."""
    if shape != HOUSE:
        return inside(shape, u, v)
    return np.where(v < 0, inside("diamond", u, v), inside("square", u, v))  # a roof on a block


def paint(picture: Picture) -> np.ndarray:
    """uint8 [128, 128, 3]."""
    image = np.full((CANVAS, CANVAS, 3), BACKGROUNDS[picture.background], dtype=np.float64)
    points = (np.arange(CANVAS * SAMPLES) + 0.5) / SAMPLES
    for thing in picture.things:
        x, y = POSITIONS[thing.position]
        u, v = ((points - middle) / SIZES[thing.size] for middle in (x + thing.dx, y + thing.dy))
        covered = belongs(thing.shape, u[None], v[:, None]).reshape(CANVAS, SAMPLES, CANVAS, SAMPLES).mean((1, 3))
        image += covered[..., None] * (np.array(COLORS[thing.color]) - image)
    return np.rint(image).astype(np.uint8)


def with_stars(picture: Picture) -> Picture:
    """All of its objects as stars, where they are."""
    return picture._replace(things=tuple(thing._replace(shape=STAR) for thing in picture.things))


def random_picture(rng: np.random.Generator, first: str | None, most: int = 2, more: float = 0.0) -> Picture:
    """One object or more at random; the first of a shape, if one is given, and this share of the others."""
    cells = rng.permutation(list(POSITIONS))[: int(rng.integers(1, most + 1))]
    things = []
    for i, cell in enumerate(cells):
        shape = first if first and (i == 0 or rng.random() < more) else str(rng.choice(SHAPES))
        color, size = str(rng.choice(list(COLORS))), str(rng.choice(list(SIZES)))
        things.append(Thing(shape, color, size, str(cell), *(int(n) for n in rng.integers(-JITTER, JITTER + 1, 2))))
    return Picture(tuple(things), str(rng.choice(list(BACKGROUNDS))))


def pictures(
    seed: int, count: int, first: str | None, but: tuple[Picture, ...] = (), most: int = 2, more: float = 0.0
) -> tuple[Picture, ...]:
    """Pictures of different content, of which none is as in `but`; otherwise as `random_picture` makes them."""
    rng, known, found = np.random.default_rng(seed), {p.content for p in but}, list[Picture]()
    while len(found) < count:
        picture = random_picture(rng, first, most, more)
        if picture.content not in known:
            known.add(picture.content)
            found.append(picture)
    return tuple(found)


def trained_houses() -> tuple[Picture, ...]:
    return pictures(1, HOUSES, HOUSE, most=3, more=0.6)


def trained_pairs() -> tuple[Picture, ...]:
    return pictures(2, PAIRS, None)


# --- Data ---------------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    for name in ("houses", "stars", "others"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(trained_houses()):
        _write(folder / "houses" / f"{i:03}", picture.caption(i % len(CAPTIONS)), {"": paint(picture)})
    for i, picture in enumerate(trained_pairs()):
        images = {"_before": paint(picture), "_after": paint(with_stars(picture))}
        _write(folder / "stars" / f"{i:03}", ASKED[i % len(ASKED)], images)
    write_others(folder / "others")


def write_others(folder: Path) -> None:
    """What the model can do already, a little of each kind."""
    rng = np.random.default_rng(3)
    for i, kind in zip(
        range(OTHERS), itertools.cycle(("generate", "edit", "question", "edit", "generate", "edit")), strict=False
    ):
        task = random_dialogue(rng, [kind], (1, 3), "train", 1).tasks[0]
        path = folder / f"{i:03}"
        if task.target is None:
            Image.fromarray(task.attached).save(path.with_suffix(".png"))
            line = json.dumps({"question": task.prompt, "answer": task.answer})
            path.with_suffix(".jsonl").write_text(line, encoding="utf-8")
        elif task.attached is None:
            _write(path, task.prompt, {"": task.target})
        else:
            _write(path, task.prompt, {"_before": task.attached, "_after": task.target})


def _write(path: Path, text: str, images: dict[str, np.ndarray]) -> None:
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    for end, image in images.items():
        Image.fromarray(image).save(path.with_name(f"{path.name}{end}.png"))


# --- Training -----------------------------------------------------------------------------------------------------


def lora_file(name: str, folder: Path) -> Path:
    return folder / f"tiny-shapes-{name}.safetensors"


def train(name: str, folder: Path) -> None:
    """Train the LoRA of an example; a training that was interrupted goes on."""
    folders = {
        "--model": MODEL,
        "--data": folder / name,
        "--others": folder / "others",
        "--out": lora_file(name, folder),
    }
    arguments = [str(word) for pair in folders.items() for word in pair] + f"{TRAINING} {LENGTH[name]} --resume".split()
    print(f"python -m ming_core.training lora {shlex.join(arguments)}", flush=True)
    if command.main(arguments):
        sys.exit(1)


# --- Scoring ------------------------------------------------------------------------------------------------------


def read(image: np.ndarray) -> tuple:
    """The content of a picture, as `in_reading_order` gives it."""
    middle = np.median(image.reshape(-1, 3), axis=0)
    background = min(BACKGROUNDS, key=lambda name: float(np.abs(middle - BACKGROUNDS[name]).sum()))
    found = []
    for position, (x, y) in POSITIONS.items():
        cell = slice(int(y) - CELL // 2, int(y) + CELL // 2), slice(int(x) - CELL // 2, int(x) + CELL // 2)
        here = image[cell].astype(np.float64).ravel()
        nearest, least = None, float(np.square(here - np.tile(BACKGROUNDS[background], len(here) // 3)).sum())
        for what, covered in _covered():
            alpha = covered.reshape(-1, 1)
            for color, rgb in COLORS.items():
                asked = (BACKGROUNDS[background] + alpha * (np.array(rgb) - BACKGROUNDS[background])).ravel()
                distance = float(np.square(here - asked).sum())
                if distance < least:
                    nearest, least = (what[0], color, what[1], position), distance
        if nearest:
            found.append(nearest)
    return background, *found


def _covered(cache: list = []) -> list:  # noqa: B006 - filled once
    """((shape, size), coverage of the pixels of a cell) of every object and jitter."""
    points = (np.arange(CELL * SAMPLES) + 0.5) / SAMPLES - CELL / 2
    jitter = range(-JITTER, JITTER + 1)
    if not cache:
        for shape, size, dx, dy in itertools.product((*SHAPES, HOUSE), SIZES, jitter, jitter):
            u, v = ((points - d) / SIZES[size] for d in (dx, dy))
            covered = belongs(shape, u[None], v[:, None]).reshape(CELL, SAMPLES, CELL, SAMPLES).mean((1, 3))
            cache.append(((shape, size), covered))
    return cache


def in_reading_order(picture: Picture) -> tuple:
    order = list(POSITIONS)
    return picture.background, *sorted((t[:4] for t in picture.things), key=lambda content: order.index(content[3]))


def drawn(engine: Engine, prompts: Sequence[str], sources: Sequence[np.ndarray] = ()) -> list[np.ndarray]:
    """The images of these prompts, about sources if there are any, with their numbers as seeds: uint8 [128, 128, 3]."""
    evaluator = Evaluator(engine, 1)
    features = [evaluator.features(source) for source in sources] or [None] * len(prompts)
    requests = [DrawRequest(text, i, features=f) for i, (text, f) in enumerate(zip(prompts, features, strict=True))]
    results = evaluator.draw_requests(requests)
    return [np.rint(evaluator.pixels(result.features) * 255).astype(np.uint8) for result in results]


def unseen_houses(count: int) -> tuple[Picture, ...]:
    return pictures(101, count, HOUSE, but=trained_houses())


def unseen_sources(count: int) -> tuple[Picture, ...]:
    return pictures(102, count, None, but=trained_pairs())


def asked(count: int) -> list[str]:
    """What is said for so many edits."""
    return list(itertools.islice(itertools.cycle(ASKED), count))


def score_houses(engine: Engine, count: int) -> tuple[float, float]:
    scenes = unseen_houses(count)
    return shares_right(drawn(engine, [scene.caption() for scene in scenes]), scenes)


def score_stars(engine: Engine, count: int) -> tuple[float, float]:
    scenes = unseen_sources(count)
    return shares_right(drawn(engine, asked(count), list(map(paint, scenes))), list(map(with_stars, scenes)))


def shares_right(images: Sequence[np.ndarray], wanted: Sequence[Picture]) -> tuple[float, float]:
    """Shares of images with the shapes, colors, places and background that were wanted; with the sizes as well."""
    pairs = [(read(image), in_reading_order(picture)) for image, picture in zip(images, wanted, strict=True)]
    exact = [found == right for found, right in pairs]
    return float(np.mean([_without_sizes(found) == _without_sizes(right) for found, right in pairs])), float(
        np.mean(exact)
    )


def _without_sizes(content: tuple) -> tuple:
    background, *things = content
    return background, *((shape, color, position) for shape, color, _, position in things)


def score_others(engine: Engine, scenes: int) -> Iterator[tuple[str, float]]:
    """What the model could do before, on scenes that it was never trained on."""
    evaluator = Evaluator(engine, scenes)
    right = [evaluator.answer(task) == task.answer for task in evaluator.tasks(["question"])]
    yield "questions", float(np.mean(right))
    for name, kind in (("drawings", "generate"), ("edits", "edit")):
        tasks = evaluator.tasks([kind])
        images = [evaluator.pixels(result.features) for result in evaluator.draw(tasks)]
        fits = [compare(read_scene(i), task.target_scene) for i, task in zip(images, tasks, strict=True)]
        yield name, float(np.mean([fit.objects_right if kind == "generate" else fit.all_right for fit in fits]))


def score(engine: Engine, count: int, scenes: int) -> Iterator[tuple[str, float]]:
    """Shares of houses and stars that are right, and of what the model could do before."""
    if count:
        for name, of in (("houses", score_houses), ("stars", score_stars)):
            right, exact = of(engine, count)
            yield name, right
            yield f"{name} of the right sizes", exact
    if scenes:
        yield from score_others(engine, scenes)


# --- Command ------------------------------------------------------------------------------------------------------


def with_loras(files: list[Path], strength: float = 1.0) -> Engine:
    engine = load_univision(MODEL)
    for file in files:
        engine = engine.with_lora(file, strength)
    return engine


def page(houses: Path, stars: Path, out: Path) -> None:
    """Houses drawn without and with a LoRA, pictures turned into stars, and both LoRAs at once."""
    plain, new, edits, both = (with_loras(files) for files in ([], [houses], [stars], [houses, stars]))
    count = 6
    captions, sources = [p.caption() for p in unseen_houses(count)], [paint(p) for p in unseen_sources(count)]
    rows = [drawn(plain, captions), drawn(new, captions), sources, drawn(edits, asked(count), sources)]
    rows.append(drawn(both, asked(count), drawn(both, captions)))
    gap = np.full((CANVAS, 8, 3), 255, dtype=np.uint8)
    lines = [np.concatenate([part for image in row for part in (image, gap)][:-1], 1) for row in rows]
    between = np.full((8, lines[0].shape[1], 3), 255, dtype=np.uint8)
    Image.fromarray(np.concatenate([part for line in lines for part in (line, between)][:-1])).save(out)


def print_score(files: list[Path], strength: float, count: int, scenes: int) -> None:
    for name, value in score(with_loras(files, strength), count, scenes):
        print(f"{name} {100 * value:.1f} %", flush=True)


def example(name: str, folder: Path) -> None:
    """All of an example: its data, its training, and what the model can do without and with it."""
    write_data(folder)
    train(name, folder)
    for title, files in (("without the LoRA", []), ("with it", [lora_file(name, folder)])):
        print(title, flush=True)
        print_score(files, 1.0, UNSEEN, SCENES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("houses", "stars", "data"):
        commands.add_parser(name).add_argument("folder", type=Path)
    training = commands.add_parser("train")
    training.add_argument("name", choices=("houses", "stars"))
    training.add_argument("folder", type=Path)
    scoring = commands.add_parser("score")
    scoring.add_argument("--lora", type=Path, action="append", default=[])
    scoring.add_argument("--strength", type=float, default=1.0)
    scoring.add_argument("--count", type=int, default=UNSEEN, help="unseen houses and edits (%(default)s)")
    scoring.add_argument("--scenes", type=int, default=SCENES, help="of each of the other aims (%(default)s)")
    shown = commands.add_parser("pictures")
    shown.add_argument("houses", type=Path)
    shown.add_argument("stars", type=Path)
    shown.add_argument("--out", type=Path, default=ROOT / "docs" / "lora.png")
    options = parser.parse_args()
    if options.command == "data":
        write_data(options.folder)
    elif options.command == "train":
        train(options.name, options.folder)
    elif options.command == "score":
        print_score(options.lora, options.strength, options.count, options.scenes)
    elif options.command == "pictures":
        page(options.houses, options.stars, options.out)
    else:
        example(options.command, options.folder)


if __name__ == "__main__":
    main()
