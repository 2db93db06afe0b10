"""The cost of rounds: five in a row, and the step between two rounds against a detour through pixels.

    python benchmarks/rounds.py [--tokens 256] [--repeats 3] [--threads 1] [--rounds 5]

Measured on the reduced model (reduced.py) with the published number of tokens. The step between two rounds is what lies
between the last token of one image and the first of the next. From features to features, only the new prompt is
prefilled. Through pixels, the image is decoded, encoded, expanded, and prefilled again with the prompt. Operations are
counted, not timed, so they are the same on every machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
from reduced import reduced_model
from timing import clock, machine, medians
from torch.utils.flop_counter import FlopCounterMode

from ming_core import Conversation, Engine, ImageResult, Solver
from ming_core.conversation import segment_keys
from ming_core.prefix_cache import PrefixCache

PROMPT = "Refine the image for better clarity."
FAST_SOLVER = Solver(1)  # the quality of the images does not matter here


def chain(engine: Engine, rounds: int) -> Iterator[ImageResult]:
    """Draw an image, then edit it round after round."""
    conversation = Conversation()
    for _ in range(rounds):
        result = engine.generate_image(conversation, PROMPT, max_new_tokens=1, solver=FAST_SOLVER)
        yield result
        conversation = result.conversation


def through_features(engine: Engine, previous: ImageResult) -> None:
    """The step between two rounds, from features to features."""
    engine.understand(previous.conversation, PROMPT, max_new_tokens=1)


@torch.no_grad()
def through_pixels(engine: Engine, previous: ImageResult) -> None:
    """The same step with the image decoded, encoded, and attached to a new conversation."""
    pixels = engine.mingtok.decode(previous.features)
    features = engine.mingtok.semantic_features(engine.mingtok.encode(pixels))
    engine.understand(Conversation(), PROMPT, features=features, max_new_tokens=1)


def first_time(
    engine: Engine, step: Callable[[Engine, ImageResult], None], previous: ImageResult
) -> Callable[[], None]:
    """The step as if for the first time: the prefix cache has the rounds before it and nothing else."""
    keys = segment_keys(previous.conversation.segments, engine.weights_key())

    def run() -> None:
        cache = PrefixCache()
        cache.store(keys, engine.prefix_cache.lookup(keys))
        engine.prefix_cache = cache
        step(engine, previous)

    return run


def operations(run: Callable[[], None]) -> int:
    """Floating point operations of all matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="tokens per image, a square number (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds in a row (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each way (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = reduced_model(options.tokens)
    print(f"{machine()}; {options.tokens} tokens per image\n")

    seconds: list[list[float]] = [[] for _ in range(options.rounds)]
    for _ in range(options.repeats):
        engine.prefix_cache.clear()
        results, started = [], clock()
        for times, result in zip(seconds, chain(engine, options.rounds), strict=True):
            times.append(clock() - started)
            results.append(result)
            started = clock()
    print("| round | positions known | prefilled | seconds, one solver step per token |\n|---|---|---|---|")
    for k, (result, times) in enumerate(zip(results, seconds, strict=True)):
        known = results[k - 1].conversation.length if k else 0
        print(f"| {k + 1} | {known} | {result.prefilled} | {statistics.median(times):.2f} |")

    ways = {
        name: first_time(engine, step, results[0])
        for name, step in (("features", through_features), ("through pixels", through_pixels))
    }
    between, counts = medians(ways, options.repeats), {name: operations(run) for name, run in ways.items()}
    print("\n| between two rounds | seconds | operations, 1e9 |\n|---|---|---|")
    for name in ways:
        print(f"| {name} | {between[name]:.3f} | {counts[name] / 1e9:.2f} |")
    print("| ratio | {:.2f} | {:.2f} |".format(*(x["features"] / x["through pixels"] for x in (between, counts))))


if __name__ == "__main__":
    main()
