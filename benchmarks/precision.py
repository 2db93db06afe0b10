"""What fewer bits cost: bf16, int8 and int4 against float32, on recorded cases and by the built-in model's scorer.

    python benchmarks/precision.py [--model FOLDER] [--scenes N] [--golden FOLDER] [--only NAME ...]

First table: each recorded round that draws, played with its own noise; the latents' cosine similarity to the recorded
ones and the PSNR of the decoded picture. The recorded models have random weights and routers, so that these figures
are of the arithmetic: which of two equally likely experts is chosen is felt here far more than in a trained model.
Second table: the same examinations as docs/TRAINING.md has, few scenes each. Both print as markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from here import BUILT_IN, ROOT
from safetensors.torch import load_file

from ming_core import Conversation, UniVision, load_univision
from ming_core.images import psnr, to_images
from tiny_shapes.training.evaluation import EXAMINATIONS
from tiny_shapes.training.examiner import Examiner

PRECISIONS = {
    "float32": {},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quantization": "int8"},
    "int4": {"dtype": torch.bfloat16, "quantization": "int4"},
}


@torch.no_grad()
def recorded_rounds(folder: Path, model: UniVision) -> list[tuple[str, float, float]]:
    """(round, cosine similarity of the latents, PSNR of the picture in dB) of a recorded case's drawing rounds."""
    io, found = load_file(folder / "io.safetensors"), []
    conversation = Conversation()
    for recorded in json.loads((folder / "case.json").read_text())["rounds"]:
        own = {k.removeprefix(recorded["prefix"]): v for k, v in io.items() if k.startswith(recorded["prefix"])}
        options = {"max_new_tokens": recorded["max_new_tokens"]}
        if recorded["picture"]:
            options["features"] = model.mingtok.semantic_features(model.mingtok.encode(own["pixel_values"]))
        if recorded["op"] == "understand":
            turn = model.understand(conversation, recorded["prompt"], **options)
        else:
            turn = model.generate_image(conversation, recorded["prompt"], noise=own["img_noise"], **options)
            latents = turn.features.latents[0].flatten(1).T
            same = torch.cosine_similarity(latents.flatten(), own["img_latents"][0, : len(latents)].flatten(), dim=0)
            pictures = (to_images(model.mingtok.decode(turn.features)), to_images(own["img_image"][:1]))
            found.append((f"{folder.name} {recorded['prefix']}".rstrip(" _"), float(same), psnr(*pictures)))
        conversation = turn.conversation
    return found


def recorded_table(golden: Path) -> str:
    folders = [case.parent for case in sorted(golden.glob("*/case.json"))]
    rows: dict[str, list[str]] = {}
    for options in PRECISIONS.values():
        for folder in folders:
            for name, same, quality in recorded_rounds(folder, load_univision(folder, **options)):
                rows.setdefault(name, []).append(f"{same:.4f}, {quality:.1f} dB")
    lines = [f"| recorded round | {' | '.join(PRECISIONS)} |", "|---" * (len(PRECISIONS) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def scored_table(folder: Path, scenes: int, names: list[str]) -> str:
    rows: dict[str, list[str]] = {}
    for options in PRECISIONS.values():
        examiner = Examiner(load_univision(folder, **options), scenes)
        for name in names:
            for score in EXAMINATIONS[name](examiner):
                rows.setdefault(score.name, []).append(score.figure())
    lines = [f"| {scenes} scenes | {' | '.join(PRECISIONS)} |", "|---" * (len(PRECISIONS) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUILT_IN)
    parser.add_argument("--golden", type=Path, default=ROOT / "tests" / "golden")
    parser.add_argument("--scenes", type=int, default=100, help="of each examination; 0: none (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(EXAMINATIONS), default=["questions", "drawings", "edits"])
    options = parser.parse_args()
    print(recorded_table(options.golden), flush=True)
    if options.scenes:
        print("\n" + scored_table(options.model, options.scenes, options.only))


if __name__ == "__main__":
    main()
