"""Progress of a round on its node: the bar, the text as it is written, the picture as it is drawn."""

from __future__ import annotations

from PIL import Image, ImageDraw

from ..ming_core import Engine, Progress
from ..ming_core.images import to_images, to_uint8
from . import host, typesetting

MARK = "preview"
PREVIEWS = 4  # while a picture is drawn; each costs up to one pixel decoding


class WritingProgress:
    """`on_token` for a round that answers in text.

    While a long prompt is read the bar stands still, but Interrupt works.
    """

    def __init__(self, node_class: str, expected_tokens: int) -> None:
        self.report = host.progress(expected_tokens, node_class)
        self.done, self.expected = 0, expected_tokens

    def __call__(self, progress: Progress) -> None:
        if progress.kind != "prompt":
            self.done += 1
        self.report(self.done, progress.text or None, total=max(self.done, self.expected), image=self.preview(progress))

    def preview(self, progress: Progress) -> Image.Image | None:
        return None


class DrawingProgress(WritingProgress):
    """`on_token` for a round that draws. Of several pictures, the first is previewed."""

    def __init__(self, node_class: str, expected_tokens: int, engine: Engine) -> None:
        super().__init__(node_class, expected_tokens)
        self.engine, self.previewing = engine, host.previews_wanted()

    def __call__(self, progress: Progress) -> None:
        if progress.kind == "image":
            # Now the number is known, except for text after the picture: what came before, the picture, one end token.
            self.expected = (self.done + 1 - progress.done) + progress.total + 1
        super().__call__(progress)

    def preview(self, progress: Progress) -> Image.Image | None:
        interval = -(-progress.total // PREVIEWS)
        if not self.previewing or progress.tokens is None or progress.done % interval:
            return None
        pixels = self.engine.mingtok.preview(progress.tokens[:1], self.engine.config.drawing_grid)
        return marked(Image.fromarray(to_uint8(to_images(pixels)[0])))


def marked(image: Image.Image) -> Image.Image:
    """The image with the word "preview" in its lower left corner: it stays on the node when the round has ended."""
    size = max(8, image.height // 14)
    edge, width = size // 3, typesetting.length(MARK, size)
    canvas = ImageDraw.Draw(image, "RGBA")
    canvas.rectangle((0, image.height - size - 2 * edge, width + 2 * edge, image.height), fill=(0, 0, 0, 150))
    typesetting.write(canvas, (edge, image.height - 1.6 * edge), MARK, size, (255, 255, 255))
    return image
