"""The cost of an edit that is limited to a mask, against an edit of the whole image.

    python benchmarks/masks.py [--tokens 256] [--repeats 2] [--threads 1]

Measured on the reduced model (reduced.py): an edit of an image with three guidance rows and the published number of
steps, whole and with a block of tokens open. The whole round counts, the prompt with its image included; the prefix
cache is empty. Kept tokens go through the language model in runs and never through the flow head.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from reduced import reduced_model
from timing import machine, medians
from torch import Tensor

from ming_core import Conversation, Engine, Features

PROMPT = "Change the color of the circle to blue."
SHARES = (0.5, 0.25, 0.1)


def block(side: int, share: float) -> Tensor:
    """A mask with a block in the middle that opens this share of side * side tokens, as nearly as whole rows allow."""
    width = round(side * share**0.5)
    height = round(side * side * share / width)
    top, left = (side - height) // 2, (side - width) // 2
    mask = torch.zeros(side, side)
    mask[top : top + height, left : left + width] = 1
    return mask


def edit(engine: Engine, source: Features, mask: Tensor | None) -> None:
    engine.prefix_cache.clear()
    engine.generate_image(Conversation(), PROMPT, features=source, mask=mask, max_new_tokens=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an image, a square number")
    parser.add_argument("--repeats", type=int, default=2, help="measured rounds of each way; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = reduced_model(options.tokens)
    side = int(options.tokens**0.5)
    latents = torch.randn(1, engine.network.flow_head.net.channels, side, side)
    with torch.no_grad():
        source = engine.mingtok.semantic_features(latents)
    masks = {f"{share:.0%} open": block(side, share) for share in SHARES}
    ways = {"whole": partial(edit, engine, source, None)}
    ways |= {name: partial(edit, engine, source, mask) for name, mask in masks.items()}
    seconds = medians(ways, options.repeats)
    print(machine())
    print("| edit | tokens drawn | seconds | of the whole edit |\n|---|---|---|---|")
    for name, value in seconds.items():
        drawn = int(masks[name].sum()) if name in masks else options.tokens
        print(f"| {name} | {drawn} | {value:.1f} | {value / seconds['whole']:.0%} |")


if __name__ == "__main__":
    main()
