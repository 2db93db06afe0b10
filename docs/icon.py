"""Draw icon.png, the pack's icon in the registry: a scene of the built-in model's world, half of it still tokens.

python docs/icon.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIDE, TOKENS, SCALE = 400, 8, 2  # pixels and tokens along a side; drawn SCALE times as large, for smooth corners
ZOOM = 3
SCENE = "a large yellow star at the centre on a navy background"


def icon() -> Image.Image:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tiny_shapes.world import draw, parse_scene

    side = SIDE * SCALE
    scene = Image.fromarray(draw(parse_scene(SCENE), ZOOM * side))
    margin = (ZOOM - 1) * side // 2
    image = scene.crop((margin, margin, margin + side, margin + side))
    tokens = np.asarray(image.resize((TOKENS, TOKENS), Image.Resampling.BOX))
    pen = ImageDraw.Draw(image)
    cell, gap = side // TOKENS, side // 100
    for row in range(TOKENS):
        for column in range(TOKENS - row):  # above the diagonal
            x, y = column * cell, row * cell
            pen.rectangle((x, y, x + cell, y + cell), fill=(16, 20, 44))
            box = (x + gap, y + gap, x + cell - gap, y + cell - gap)
            pen.rounded_rectangle(box, radius=2 * gap, fill=tuple(int(v) for v in tokens[row, column]))
    corners = Image.new("L", (side, side))
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, side - 1, side - 1), radius=side // 8, fill=255)
    image.putalpha(corners)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    icon().save(Path(__file__).with_name("icon.png"), optimize=True)
