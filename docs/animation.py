"""Make the moving picture of the README: a chain of rounds as the built-in model draws it, token by token.

python docs/animation.py
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ming_core import Conversation, Engine, Progress, load_univision  # noqa: E402  (after the path is set)
from ming_core.images import to_images, to_uint8  # noqa: E402

ROUNDS = (
    "Draw a large red circle at the left and a small blue star at the right on a white background.",
    "Change the color of the circle to yellow.",
    "Move the star to the top right.",
    "Make the background navy.",
)
SEED = 3
SIDE, GAP, TEXT = 170, 14, 84  # pixels: a picture, the space around it, the words above
TOKENS_A_FRAME = 4
FRAME, PAUSE = 90, 900  # milliseconds: a frame, and the last one of a round
PAPER, INK = (250, 249, 246), (32, 33, 36)


def drawn(engine: Engine) -> tuple[list[list[Image.Image]], list[Image.Image]]:
    """For every round the picture as it grows, and as it is decoded."""
    conversation, growing, decoded = Conversation(), [], []
    for prompt in ROUNDS:
        frames: list[Image.Image] = []

        def on_token(progress: Progress, frames: list[Image.Image] = frames) -> None:
            if progress.kind == "image" and progress.done % TOKENS_A_FRAME == 0:
                frames.append(image(engine.mingtok.preview(progress.tokens, engine.config.drawing_grid)))

        result = engine.generate_image(conversation, prompt, seed=SEED, on_token=on_token)
        conversation = result.conversation
        growing.append(frames)
        with torch.no_grad():
            decoded.append(image(engine.mingtok.decode(result.features)))
    return growing, decoded


def image(pixels: torch.Tensor) -> Image.Image:
    """Pixels [1, 3, H, W], -1..1, as large as in the animation."""
    small = Image.fromarray(to_uint8(to_images(pixels)[0]))
    return small.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def sheet(pictures: list[Image.Image]) -> Image.Image:
    """The rounds so far beside each other, with their words above."""
    canvas = Image.new("RGB", (len(ROUNDS) * (SIDE + GAP) + GAP, TEXT + SIDE + 2 * GAP), PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for i, picture in enumerate(pictures):
        left = GAP + i * (SIDE + GAP)
        pen.multiline_text((left, GAP), textwrap.fill(ROUNDS[i], 23), fill=INK, font=font, spacing=3)
        canvas.paste(picture, (left, TEXT + GAP))
        pen.rectangle((left - 1, TEXT + GAP - 1, left + SIDE, TEXT + GAP + SIDE), outline=(200, 200, 200))
    return canvas


def main() -> None:
    torch.set_grad_enabled(False)
    growing, decoded = drawn(load_univision(ROOT / "models" / "tiny-shapes"))
    frames, times = [], []
    for i, states in enumerate(growing):
        frames += [sheet([*decoded[:i], state]) for state in states]
        times += [FRAME] * len(states)
        frames.append(sheet(decoded[: i + 1]))
        times.append(PAUSE)
    times[-1] *= 3
    palette = frames[-1].quantize(96)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    target = ROOT / "docs" / "chain.gif"
    first.save(target, save_all=True, append_images=others, duration=times, loop=0, optimize=True)
    print(f"{target}: {len(frames)} frames, {target.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
