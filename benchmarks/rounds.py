"""What rounds cost: five in a row, and the step between two of them against going through pixels.

    python benchmarks/rounds.py [--tokens 256] [--repeats 3] [--threads 1] [--rounds 5]

On a model of the published proportions with the published number of tokens (reduced.py). The step between two rounds is
what lies between the last token of one picture and the moment the next can begin: to prefill the new prompt onto what
is known, or else to decode the picture, encode it, expand it, and prefill it anew with the prompt. Operations are
counted, not timed: they are the same on every machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
from reduced import reduced_model
from timing import clock, machine, medians
from torch.utils.flop_counter import FlopCounterMode

from ming_core import Conversation, Solver, Turn, UniVision
from ming_core.conversation import segment_keys
from ming_core.prefix_cache import PrefixCache

WORDS = "Refine the image for better clarity."
SHORT = {"max_new_tokens": 1, "solver": Solver(1)}  # how well it draws plays no part here


def chain(model: UniVision, rounds: int) -> Iterator[Turn]:
    """A picture, edited in round after round."""
    conversation = Conversation()
    for _ in range(rounds):
        turn = model.generate_image(conversation, WORDS, **SHORT)
        yield turn
        conversation = turn.conversation


def next_round(model: UniVision, before: Turn) -> None:
    """The step between two rounds, from features to features."""
    model.understand(before.conversation, WORDS, max_new_tokens=1)


@torch.no_grad()
def through_pixels(model: UniVision, before: Turn) -> None:
    """The same step with the picture decoded, encoded, and put into a new conversation."""
    pixels = model.mingtok.decode(before.features)
    features = model.mingtok.semantic_features(model.mingtok.encode(pixels))
    model.understand(Conversation(), WORDS, features=features, max_new_tokens=1)


def as_new(model: UniVision, step: Callable[[UniVision, Turn], None], before: Turn) -> Callable[[], None]:
    """The step as if for the first time: of what the prefix cache knows, only the rounds before are left."""
    keys = segment_keys(before.conversation.segments)

    def run() -> None:
        known = PrefixCache()
        known.store(keys, model.prefix_cache.lookup(keys))
        model.prefix_cache = known
        step(model, before)

    return run


def operations(run: Callable[[], None]) -> int:
    """Floating point operations of all matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, help="of a picture, a square number (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = reduced_model(options.tokens)
    print(f"{machine()}; {options.tokens} tokens a picture\n")

    seconds: list[list[float]] = [[] for _ in range(options.rounds)]
    for _ in range(options.repeats):
        model.prefix_cache.clear()
        turns, started = [], clock()
        for times, turn in zip(seconds, chain(model, options.rounds), strict=True):
            times.append(clock() - started)
            turns.append(turn)
            started = clock()
    print("| round | positions known | prefilled | seconds, one step of the solver a token |\n|---|---|---|---|")
    for k, (turn, times) in enumerate(zip(turns, seconds, strict=True)):
        known = turns[k - 1].conversation.length if k else 0
        print(f"| {k + 1} | {known} | {turn.prefilled} | {statistics.median(times):.2f} |")

    ways = {
        name: as_new(model, step, turns[0])
        for name, step in (("features", next_round), ("through pixels", through_pixels))
    }
    times, counts = medians(ways, options.repeats), {name: operations(run) for name, run in ways.items()}
    print("\n| between two rounds | seconds | operations, 1e9 |\n|---|---|---|")
    for name in ways:
        print(f"| {name} | {times[name]:.3f} | {counts[name] / 1e9:.2f} |")
    print("| ratio | {:.2f} | {:.2f} |".format(*(x["features"] / x["through pixels"] for x in (times, counts))))


if __name__ == "__main__":
    main()
