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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ming_core import load_univision
from ming_core.features import CHANGED, change
from ming_core.images import psnr, to_images, to_pixels

from ..world import FoundThing, Round, Thing, compare, draw, parse_scene, read_region, read_scene
from .chains import CHAIN_ROUNDS, Chain, chains, plot
from .examiner import Examiner

log = logging.getLogger(__name__)

CELL_CHANGED = 0.25  # share of a token's pixels from which on the token counts as changed
PIXEL_CHANGED = 24  # levels of 255


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

    def figure(self) -> str:
        return f"{self._written(self.value)} {self.unit}".strip()

    def row(self) -> str:
        span = f"{self._written(self.low)} to {self._written(self.high)}"
        return f"| {self.name} | {self.aim} | {self.figure()} | {span} | {self.count} |"

    def _written(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.unit == "%" else f"{value:.2f}"


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
    """The files of a folder that Pillow can read, judged by their names."""
    known = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
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
        for turn, result in zip(asked, examiner.draw_rounds(asked), strict=True):
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


def few_words(examiner: Examiner) -> Iterator[Score]:
    """ "a red circle and a star": pictures from words that leave most of it open."""
    asked = examiner.in_few_words()
    drawn = (read_scene(examiner.pixels(result.features)) for result in examiner.draw_rounds(asked))
    right = [compare(reading, turn.target_scene).things_right for reading, turn in zip(drawn, asked, strict=True)]
    yield share("drawings asked for in few words", right, "90 %")


def edits(examiner: Examiner) -> Iterator[Score]:
    """Edits of an attached picture, and what MingFeaturesCompare reads off them."""
    done, kept, masks = [], [], []
    asked = examiner.rounds(["edit"])
    for turn, result in zip(asked, examiner.draw_rounds(asked), strict=True):
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
        for turn, result in zip(asked, examiner.draw_rounds(asked), strict=True)
    ]
    yield mean("drawn region, intersection over union", values, "0.7", "")


def enhancements(examiner: Examiner) -> Iterator[Score]:
    for task in ("super-resolution", "denoise", "colorize"):
        gains = []
        asked = examiner.rounds([task])
        for turn, result in zip(asked, examiner.draw_rounds(asked), strict=True):
            target = torch.from_numpy(turn.target / 255.0)
            before = psnr(torch.from_numpy(turn.attached / 255.0), target)
            after = psnr(torch.from_numpy(examiner.pixels(result.features)), target)
            gains.append(after - before)
        yield mean(f"{task}, PSNR gained over the input", gains, "3 dB", "dB")


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
    "few words": few_words,
    "edits": edits,
    "regions": regions,
    "enhancements": enhancements,
}


def report(scores: list[Score], results: list[Chain]) -> str:
    lines = ["| what | aim | found | 95 % interval | scenes |", "|---|---|---|---|---|", *(s.row() for s in scores)]
    for title, key, form in (
        ("Rounds done right", "right", "{:.0%}"),
        ("PSNR of the untouched area, dB", "untouched", "{:.1f}"),
    ):
        if results:
            lines += ["", f"| {title}, by round | " + " | ".join(str(k + 1) for k in range(CHAIN_ROUNDS)) + " |"]
            lines += ["|---" * (CHAIN_ROUNDS + 1) + "|"]
        for chain in results:
            lines.append(f"| {chain.name} | " + " | ".join(form.format(x) for x in chain.table()[key]) + " |")
    return "\n".join(lines) + "\n"


def write(folder: Path, scores: list[Score], results: list[Chain]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.md").write_text(report(scores, results), encoding="utf-8")
    figures = {"scores": [asdict(s) for s in scores], "chains": {c.name: c.table() for c in results}}
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if results:
        plot(results, folder / "chains.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m ming_core.training.evaluation", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/tiny-shapes"))
    parser.add_argument("--scenes", type=int, default=300, help="of each examination (%(default)s)")
    parser.add_argument("--chains", type=int, default=60, help="five-round chains each way (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=[*EXAMINATIONS, "chains"], help="some of it; default: all")
    parser.add_argument("--things", type=int, nargs=2, default=(1, 3), metavar=("FEWEST", "MOST"))
    parser.add_argument("--photographs", type=Path, help="folder of pictures to reconstruct as well")
    parser.add_argument("--out", type=Path, help="folder to write evaluation.md, .json and chains.png to")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if min(options.scenes, options.chains) < 1:
        parser.error("--scenes and --chains: give 1 or more")
    if options.photographs and not (options.photographs.is_dir() and pictures_in(options.photographs)):
        parser.error(f"--photographs: there are no pictures in {options.photographs}")

    model = load_univision(options.model)
    examiner = Examiner(model, options.scenes, tuple(options.things))
    names = options.only or [*EXAMINATIONS, "chains"]
    scores = [photographs(examiner, options.photographs)] if options.photographs else []
    results: list[Chain] = []
    for name in names:
        log.info("%s", name)
        if name == "chains":
            results = chains(Examiner(model, options.chains, examiner.things))
        else:
            for score in EXAMINATIONS[name](examiner):
                log.info("%s", score.row())
                scores.append(score)
        model.prefix_cache.clear()
        if options.out:
            write(options.out, scores, results)
    log.info("\n%s", report(scores, results))


if __name__ == "__main__":
    main()
