"""How well a model of the shapes world sees, draws and edits, on scenes it was never shown.

    python -m ming_core.training.evaluation [--model FOLDER] [--scenes 300] [--only NAME ...] [--out docs/evaluation]
                                            [--photographs FOLDER]

Every question, description and picture is judged by the scorer, which reads pixels alone; settings are the nodes'
defaults, seeds are the scenes' numbers. Writes a table (evaluation.md, with 95 % confidence intervals), the raw figures
(evaluation.json), and a plot of the five-round chains where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import Conversation, Features, Solver, Turn, UniVision, load_univision
from ..features import CHANGED, change
from ..images import psnr, to_images, to_pixels
from ..shapes import (
    Dialogue,
    FoundThing,
    Round,
    Thing,
    compare,
    draw,
    parse_scene,
    random_dialogue,
    read_region,
    read_scene,
)
from .many import Wish, draw_many

log = logging.getLogger(__name__)

CHAIN_ROUNDS = 5
CELL_CHANGED = 0.25  # share of a token's pixels from which on the token counts as changed
PIXEL_CHANGED = 24  # levels of 255
TRIES = 20  # dialogues made for each that is wanted, at most
SHOWN = 48  # pictures between two lines of progress


@dataclass
class Score:
    """One row of the table: a share (0..1) or a mean, with its 95 % confidence interval."""

    name: str
    value: float
    low: float
    high: float
    count: int
    aim: str
    unit: str = "%"

    def row(self) -> str:
        scale, form = (100, ".1f") if self.unit == "%" else (1, ".2f")
        value, low, high = (format(scale * x, form) for x in (self.value, self.low, self.high))
        return f"| {self.name} | {self.aim} | {value} {self.unit} | {low} to {high} | {self.count} |"


def share(name: str, hits: list[bool], aim: str) -> Score:
    """Wilson's interval, which is right near 0 and 1 as well."""
    n, z = len(hits), 1.96
    p = sum(hits) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))  # rounding must not leave p out
    return Score(name, p, low, high, n, aim)


def mean(name: str, values: list[float], aim: str, unit: str) -> Score:
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    middle = statistics.fmean(values)
    return Score(name, middle, middle - half, middle + half, len(values), aim, unit)


@dataclass
class Examiner:
    """A model, and the steps that every examination is made of."""

    model: UniVision
    scenes: int
    things: tuple[int, int] = (1, 3)
    seed: int = 20_260_101
    solver: Solver = field(default_factory=Solver)

    def dialogues(self, tasks: list[str], rounds: int = 1, things: tuple[int, int] | None = None) -> list[Dialogue]:
        """Unseen ones, the same at every call, no two alike."""
        rng = np.random.default_rng([self.seed, *map(ord, "/".join(tasks))])
        found: dict[tuple, Dialogue] = {}
        for _ in range(TRIES * self.scenes):
            if len(found) == self.scenes:
                break
            dialogue = random_dialogue(rng, tasks, things or self.things, "eval", rounds)
            found.setdefault(_asked(dialogue), dialogue)
        return list(found.values())

    def rounds(self, tasks: list[str], things: tuple[int, int] | None = None) -> list[Round]:
        """The rounds of dialogues of one round."""
        return [dialogue.rounds[0] for dialogue in self.dialogues(tasks, things=things)]

    @torch.no_grad()
    def features(self, pixels: np.ndarray) -> Features:
        """Of a picture uint8 [H, W, 3], as MingTokEncode and MingTokSemanticFeatures make them."""
        tok = self.model.mingtok
        images = torch.from_numpy(pixels).float().div(255)[None]
        return tok.semantic_features(tok.encode(to_pixels(images, tok.native_side)))

    @torch.no_grad()
    def pixels(self, features: Features) -> np.ndarray:
        """float32 [H, W, 3], 0..1, as MingTokDecode makes them."""
        return to_images(self.model.mingtok.decode(features))[0].numpy()

    def answer(self, turn: Round) -> str:
        attached = None if turn.attached is None else self.features(turn.attached)
        said = self.model.understand(Conversation(), turn.prompt, features=attached, max_new_tokens=128)
        return said.text.strip()

    def drawn(
        self, turns: list[Round], before: list[Turn] | None = None, noises: list[Tensor] | None = None
    ) -> list[Turn]:
        """The rounds' pictures, each with its number as the seed; `before`: the turns that they follow."""
        wishes = [
            Wish(
                turn.prompt,
                seed,
                before[seed].conversation if before else Conversation(),
                None if turn.attached is None else self.features(turn.attached),
                noises[seed] if noises else None,
            )
            for seed, turn in enumerate(turns)
        ]
        return self.draw(wishes)

    def draw(self, wishes: list[Wish]) -> list[Turn]:
        done: list[Turn] = []
        while len(done) < len(wishes):
            done += draw_many(self.model, wishes[len(done) : len(done) + SHOWN], self.solver)
            log.info("  %d of %d drawn", len(done), len(wishes))
        return done


def _asked(dialogue: Dialogue) -> tuple:
    """What a dialogue is about, jitter and wording aside."""
    scenes = [(turn.source_scene, turn.target_scene) for turn in dialogue.rounds]
    contents = tuple(tuple(scene and scene.content for scene in pair) for pair in scenes)
    return contents, tuple((turn.task, turn.answer) for turn in dialogue.rounds)


def reconstruction(examiner: Examiner) -> Iterator[Score]:
    values = []
    for turn in examiner.rounds(["describe"]):
        found = examiner.pixels(examiner.features(turn.attached))
        values.append(psnr(torch.from_numpy(found), torch.from_numpy(turn.attached / 255.0)))
    yield mean("reconstruction, PSNR", values, "32 dB", "dB")


def photographs(examiner: Examiner, folder: Path) -> Score:
    """What the tokenizer makes of pictures of another world: the middle square of each, at the model's size."""
    values = []
    for path in pictures_in(folder):
        with Image.open(path) as file:
            image = torch.from_numpy(np.array(file.convert("RGB"))).float().div(255)[None]
        seen = to_images(to_pixels(image, examiner.model.mingtok.native_side))[0].numpy()
        found = examiner.pixels(examiner.features(np.rint(seen * 255).astype(np.uint8)))
        values.append(psnr(torch.from_numpy(found), torch.from_numpy(seen)))
    return mean("reconstruction of photographs, PSNR", values, "report", "dB")


def pictures_in(folder: Path) -> list[Path]:
    """The files of a folder that Pillow takes for pictures by their names."""
    known = Image.registered_extensions()
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in known)


def questions(examiner: Examiner) -> Iterator[Score]:
    hits = [examiner.answer(turn) == turn.answer for turn in examiner.rounds(["question"])]
    yield share("questions answered exactly", hits, "95 %")


def descriptions(examiner: Examiner) -> Iterator[Score]:
    hits = [_things(examiner.answer(turn)) == _things(turn.answer) for turn in examiner.rounds(["describe"])]
    yield share("descriptions with every object right", hits, "85 %")


def drawings(examiner: Examiner) -> Iterator[Score]:
    """Pictures from words; then the model's own description of each, asked in the same conversation."""
    for name, things, aim in (("drawings", examiner.things, "90 %"), ("drawings of one object", (1, 1), "95 %")):
        right, agrees = [], []
        asked = examiner.rounds(["generate"], things=things)
        for turn, result in zip(asked, examiner.drawn(asked), strict=True):
            reading = read_scene(examiner.pixels(result.features))
            right.append(compare(reading, turn.target_scene).things_right)
            if things == examiner.things:
                said = examiner.model.understand(
                    result.conversation, "Please describe the picture in detail.", max_new_tokens=128
                )
                agrees.append(_things(said.text) == {_looks(thing) for thing in reading.things})
        yield share(f"{name} with every asked object right", right, aim)
        if agrees:
            yield share("own description of what was drawn agrees with the scorer", agrees, "85 %")


def edits(examiner: Examiner) -> Iterator[Score]:
    """Edits of an attached picture, and what MingFeaturesCompare reads off them."""
    done, kept, masks = [], [], []
    asked = examiner.rounds(["edit"])
    for turn, result in zip(asked, examiner.drawn(asked), strict=True):
        reading = read_scene(examiner.pixels(result.features))
        seen = compare(reading, turn.target_scene)
        untouched = [thing in turn.source_scene.things for thing in turn.target_scene.things]
        changed = [ok for ok, same in zip(seen.right, untouched, strict=True) if not same]
        gone = {_looks(thing) for thing in turn.source_scene.things if thing not in turn.target_scene.things}
        as_many = len(reading.things) == len(turn.target_scene.things)
        left = gone & {_looks(thing) for thing in reading.things}
        done.append(all(changed) and as_many and not left and seen.background)
        if any(untouched):
            kept.append(all(ok for ok, same in zip(seen.right, untouched, strict=True) if same))
        source = examiner.features(turn.attached)
        found = change(source, result.features)[0, 0].numpy() > CHANGED
        masks.append(_overlap(found, _changed_cells(turn, source.grid)))
    yield share("edits done as asked", done, "88 %")
    if kept:  # there may be no other thing in a few scenes
        yield share("objects not mentioned unchanged", kept, "95 %")
    yield mean("MingFeaturesCompare mask, intersection over union", masks, "0.7", "")


def regions(examiner: Examiner) -> Iterator[Score]:
    asked = examiner.rounds(["identify region"])
    values = [
        _overlap(read_region(examiner.pixels(result.features)), read_region(turn.target))
        for turn, result in zip(asked, examiner.drawn(asked), strict=True)
    ]
    yield mean("drawn region, intersection over union", values, "0.7", "")


def enhancements(examiner: Examiner) -> Iterator[Score]:
    for task in ("super-resolution", "denoise", "colorize"):
        gains = []
        asked = examiner.rounds([task])
        for turn, result in zip(asked, examiner.drawn(asked), strict=True):
            target = torch.from_numpy(turn.target / 255.0)
            before = psnr(torch.from_numpy(turn.attached / 255.0), target)
            after = psnr(torch.from_numpy(examiner.pixels(result.features)), target)
            gains.append(after - before)
        yield mean(f"{task}, PSNR gained over the input", gains, "3 dB", "dB")


@dataclass
class Chain:
    """Five-round chains of edits, one way: by round the share done right, the PSNR where nothing changed, seconds."""

    name: str
    right: list[list[bool]] = field(default_factory=lambda: [[] for _ in range(CHAIN_ROUNDS)])
    untouched: list[list[float]] = field(default_factory=lambda: [[] for _ in range(CHAIN_ROUNDS)])
    seconds: list[float] = field(default_factory=list)  # a picture, drawn side by side with those of the other chains

    def table(self) -> dict[str, list[float]]:
        return {
            "right": [statistics.fmean(r) for r in self.right],
            "untouched": [statistics.fmean(r) if r else math.nan for r in self.untouched],
            "seconds": self.seconds,
        }


Way = Callable[[Examiner, list[Round], "list[Turn] | None"], "list[Turn]"]


def chains(examiner: Examiner) -> list[Chain]:
    """The same chains feature to feature, through pixels between the rounds, and with one noise in every round."""
    dialogues = examiner.dialogues(["edit"], rounds=CHAIN_ROUNDS)
    results = []
    for name, step in WAYS.items():
        log.info("chains: %s", name)
        chain, turns = Chain(name), None
        for k in range(CHAIN_ROUNDS):
            asked = [dialogue.rounds[k] for dialogue in dialogues]
            started = time.perf_counter()
            turns = step(examiner, asked, turns)
            chain.seconds.append((time.perf_counter() - started) / len(turns))
            for dialogue, turn, result in zip(dialogues, asked, turns, strict=True):
                picture = examiner.pixels(result.features)
                chain.right[k].append(compare(read_scene(picture), turn.target_scene).all_right)
                same = (dialogue.rounds[0].attached == turn.target).all(-1)
                if same.any():  # a new background leaves nothing untouched
                    error = np.square(picture - turn.target / 255.0)[same].mean()
                    chain.untouched[k].append(-10 * math.log10(max(error, 1e-10)))
        results.append(chain)
    return results


def _by_features(examiner: Examiner, asked: list[Round], before: list[Turn] | None) -> list[Turn]:
    return examiner.drawn(asked, before)


def _through_pixels(examiner: Examiner, asked: list[Round], before: list[Turn] | None) -> list[Turn]:
    """Every round begins a new conversation, with the picture of the one before decoded and encoded again."""
    if before is None:
        return examiner.drawn(asked)
    wishes = []
    for seed, (turn, result) in enumerate(zip(asked, before, strict=True)):
        picture = np.rint(examiner.pixels(result.features) * 255).astype(np.uint8)
        features = examiner.features(picture)._replace(depth=result.features.depth)
        wishes.append(Wish(turn.prompt, seed, features=features))
    return examiner.draw(wishes)


def _with_one_noise(examiner: Examiner, asked: list[Round], before: list[Turn] | None) -> list[Turn]:
    shape = (examiner.model.config.llm_config.num_image_tokens_for_gen, examiner.model.flow_head.net.channels)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(len(asked))]
    return examiner.drawn(asked, before, noises)


WAYS: dict[str, Way] = {
    "feature to feature": _by_features,
    "through pixels": _through_pixels,
    "one noise in every round": _with_one_noise,
}


def _things(description: str) -> set[tuple[str, str, str]] | None:
    """(shape, colour, position) of each thing described; None for words that describe no scene."""
    try:
        return {_looks(thing) for thing in parse_scene(description).things}
    except ValueError:
        return None


def _looks(thing: Thing | FoundThing) -> tuple:
    """What makes a thing the right one."""
    return thing.shape, thing.color, thing.position


def _overlap(found: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union; 1 for two empty regions."""
    union = (found | true).sum()
    return float((found & true).sum() / union) if union else 1.0


def _changed_cells(turn: Round, grid: tuple[int, int]) -> np.ndarray:
    """bool [h, w]: tokens of whose pixels the edit changes at least CELL_CHANGED."""
    before, after = (draw(scene).astype(int) for scene in (turn.source_scene, turn.target_scene))
    changed = np.abs(before - after).max(-1) > PIXEL_CHANGED
    cells = changed.reshape(grid[0], changed.shape[0] // grid[0], grid[1], changed.shape[1] // grid[1])
    return cells.mean((1, 3)) >= CELL_CHANGED


EXAMINATIONS: dict[str, Callable[[Examiner], Iterator[Score]]] = {
    "reconstruction": reconstruction,
    "questions": questions,
    "descriptions": descriptions,
    "drawings": drawings,
    "edits": edits,
    "regions": regions,
    "enhancements": enhancements,
}


def report(scores: list[Score], results: list[Chain]) -> str:
    lines = ["| what | aim | found | 95 % interval | scenes |", "|---|---|---|---|---|", *(s.row() for s in scores)]
    for title, key, form in (
        ("Rounds done right", "right", "{:.0%}"),
        ("PSNR of the untouched area, dB", "untouched", "{:.1f}"),
        ("Seconds", "seconds", "{:.2f}"),
    ):
        if results:
            lines += ["", f"| {title}, by round | " + " | ".join(str(k + 1) for k in range(CHAIN_ROUNDS)) + " |"]
            lines += ["|---" * (CHAIN_ROUNDS + 1) + "|"]
        for chain in results:
            lines.append(f"| {chain.name} | " + " | ".join(form.format(x) for x in chain.table()[key]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[Chain], path: Path) -> None:
    """Quality and time by round, all ways; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.info("matplotlib is not installed: no plot")
        return
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    titles = {"right": "rounds done right", "untouched": "PSNR where nothing changed, dB", "seconds": "seconds a round"}
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for chain in results:
            axes.plot(range(1, CHAIN_ROUNDS + 1), chain.table()[key], marker="o", label=chain.name)
        axes.set(title=title, xlabel="round", xticks=range(1, CHAIN_ROUNDS + 1))
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax)
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m ming_core.training.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/tiny-shapes"))
    parser.add_argument("--scenes", type=int, default=300, help="of each examination (%(default)s)")
    parser.add_argument("--chains", type=int, default=60, help="five-round chains each way; 0: none (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(EXAMINATIONS), help="some examinations; default: all")
    parser.add_argument("--things", type=int, nargs=2, default=(1, 3), metavar=("FEWEST", "MOST"))
    parser.add_argument("--photographs", type=Path, help="folder of pictures to reconstruct as well")
    parser.add_argument("--out", type=Path, help="folder to write evaluation.md, .json and chains.png to")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.scenes < 1:
        parser.error("--scenes: give 1 or more")
    if options.photographs and not (options.photographs.is_dir() and pictures_in(options.photographs)):
        parser.error(f"--photographs: there are no pictures in {options.photographs}")

    model = load_univision(options.model)
    examiner = Examiner(model, options.scenes, tuple(options.things))
    scores: list[Score] = []
    for name in options.only or EXAMINATIONS:
        log.info("%s", name)
        for score in EXAMINATIONS[name](examiner):
            log.info("%s", score.row())
            scores.append(score)
            model.prefix_cache.clear()
    if options.photographs:
        scores.append(photographs(examiner, options.photographs))
    results = chains(Examiner(model, options.chains, examiner.things)) if options.chains else []
    log.info("\n%s", report(scores, results))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "evaluation.md").write_text(report(scores, results), encoding="utf-8")
        figures = {"scores": [asdict(s) for s in scores], "chains": {c.name: c.table() for c in results}}
        (options.out / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        if results:
            plot(results, options.out / "chains.png")


if __name__ == "__main__":
    main()
