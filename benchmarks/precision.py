"""The cost of fewer bits: bf16, int8 and int4 against float32, on recorded cases and by the built-in model's scorer.

    python benchmarks/precision.py [--model FOLDER] [--scenes N] [--golden FOLDER] [--only NAME ...]

The first table has each recorded round that draws, with its own noise: the cosine similarity of its latents to the
recorded ones, and the PSNR of the decoded image. The recorded models have random weights and routers, so these figures
show the arithmetic: which of two equally likely experts is chosen matters here far more than in a trained model. The
second table has measurements from docs/TRAINING.md with a few scenes each. Both are printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from project import BUILT_IN, ROOT
from safetensors.torch import load_file

from ming_core import Conversation, Engine, RoundResult, load_univision
from ming_core.images import psnr, to_images
from tiny_shapes.evaluation.evaluator import Evaluator
from tiny_shapes.evaluation.suite import SUITE

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quantization": "int8"},
    "int4": {"dtype": torch.bfloat16, "quantization": "int4"},
}


@torch.no_grad()
def recorded_rounds(folder: Path, engine: Engine) -> list[tuple[str, float, float]]:
    """The drawing rounds of a recorded case: name, cosine similarity of the latents, PSNR of the image in dB."""
    tensors, found = load_file(folder / "io.safetensors"), []
    conversation = Conversation()
    for recorded in json.loads((folder / "case.json").read_text())["rounds"]:
        prefix = recorded["prefix"]
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        options = {"max_new_tokens": recorded["max_new_tokens"]}
        if recorded["picture"]:
            options["features"] = engine.mingtok.semantic_features(engine.mingtok.encode(own["pixel_values"]))
        result: RoundResult
        if recorded["op"] == "understand":
            result = engine.understand(conversation, recorded["prompt"], **options)
        else:
            result = engine.generate_image(conversation, recorded["prompt"], noise=own["img_noise"], **options)
            latents = result.features.latents[0].flatten(1).T
            similarity = torch.cosine_similarity(
                latents.flatten(), own["img_latents"][0, : len(latents)].flatten(), dim=0
            )
            images = (to_images(engine.mingtok.decode(result.features)), to_images(own["img_image"][:1]))
            found.append((f"{folder.name} {prefix}".rstrip(" _"), float(similarity), psnr(*images)))
        conversation = result.conversation
    return found


def recorded_table(golden: Path) -> str:
    """The recorded rounds in every precision, as Markdown."""
    folders = [case.parent for case in sorted(golden.glob("*/case.json"))]
    rows: dict[str, list[str]] = {}
    for options in PRECISIONS.values():
        for folder in folders:
            for name, similarity, quality in recorded_rounds(folder, load_univision(folder, **options)):
                rows.setdefault(name, []).append(f"{similarity:.4f}, {quality:.1f} dB")
    return _markdown("recorded round", rows)


def scored_table(folder: Path, scenes: int, names: list[str]) -> str:
    """The measurements of these names in every precision, as Markdown."""
    rows: dict[str, list[str]] = {}
    for options in PRECISIONS.values():
        evaluator = Evaluator(load_univision(folder, **options), scenes)
        for name in names:
            for score in SUITE[name](evaluator):
                rows.setdefault(score.name, []).append(score.figure())
    return _markdown(f"{scenes} scenes", rows)


def _markdown(title: str, rows: dict[str, list[str]]) -> str:
    lines = [f"| {title} | {' | '.join(PRECISIONS)} |", "|---" * (len(PRECISIONS) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUILT_IN, help="checkpoint folder (default: the built-in model)")
    parser.add_argument("--golden", type=Path, default=ROOT / "tests" / "golden", help="folder of the recorded cases")
    parser.add_argument("--scenes", type=int, default=100, help="scenes of each measurement; 0: none (%(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=list(SUITE), default=["questions", "drawings", "edits"], help="what to measure"
    )
    options = parser.parse_args()
    print(recorded_table(options.golden), flush=True)
    if options.scenes:
        print("\n" + scored_table(options.model, options.scenes, options.only))


if __name__ == "__main__":
    main()
