"""What staying out of pixels, the prefix cache and batches save: ratios measured in one run on this machine.

    python benchmarks/rounds.py [--model FOLDER] [--repeats N]

Machines differ and are noisy; the ratios of one run are what to look at. Every figure is the median of the repeats,
with the two sides of a ratio measured in turn.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ming_core  # noqa: E402 - found through the line above

SHORT = {"max_new_tokens": 1}


def compare(name: str, ours: Callable[[], object], other: Callable[[], object], repeats: int) -> str:
    """One row: seconds of both sides and how much longer the other one takes."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for side, run in zip(times, (ours, other), strict=True):
            started = time.perf_counter()
            run()
            side.append(time.perf_counter() - started)
    a, b = (statistics.median(side[1:]) for side in times)  # the first round warms up
    return f"| {name} | {a:.3f} | {b:.3f} | {b / a:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "tiny-shapes"))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    model = ming_core.load_univision(options.model)
    start = model.generate_image(ming_core.Conversation(), "a large red circle on a white background", **SHORT)
    for words in ("Make it blue.", "Move it to the left.", "Make the background navy."):
        start = model.generate_image(start.conversation, words, **SHORT)

    def edit(conversation: ming_core.Conversation, features: ming_core.Features | None = None) -> ming_core.Turn:
        return model.generate_image(conversation, "Refine the image.", features=features, **SHORT)

    def without_cache() -> None:
        model.prefix_cache.clear()
        edit(start.conversation)

    def next_round() -> None:
        """What lies between two rounds: the new prompt is prefilled on the cached ones."""
        model.understand(start.conversation, "Refine the image.", **SHORT)

    def through_pixels() -> None:
        """The same step with the picture decoded, encoded and put into a new conversation."""
        with torch.no_grad():
            pixels = model.mingtok.decode(start.features)
            features = model.mingtok.semantic_features(model.mingtok.encode(pixels))
        model.prefix_cache.clear()
        model.understand(ming_core.Conversation(), "Refine the image.", features=features, **SHORT)

    def four_at_once() -> None:
        model.generate_images(start.conversation, "Refine the image.", seeds=[0, 1, 2, 3], **SHORT)

    def four_times_one() -> None:
        for seed in range(4):
            model.generate_image(start.conversation, "Refine the image.", seed=seed, **SHORT)

    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {options.model}\n")
    print("| what | ours, s | the other, s | ratio |\n|---|---|---|---|")
    rows = [
        ("an edit in round 5: prefix cache / none", lambda: edit(start.conversation), without_cache),
        ("the step between two rounds: features / through pixels", next_round, through_pixels),
        ("four pictures: in one pass / one by one", four_at_once, four_times_one),
    ]
    for name, ours, other in rows:
        print(compare(name, ours, other, options.repeats), flush=True)


if __name__ == "__main__":
    main()
