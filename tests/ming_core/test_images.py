"""Resize rules for pictures, where a pixel more or less would not be seen by eye."""

import pytest
import torch
from ming_univision.ming_core.images import to_images, to_pixels

SIDE = 32


def columns(width: int) -> torch.Tensor:
    """An IMAGE whose columns are told apart by their grey level: 0, 4, 8 ... of 255."""
    return (torch.arange(width) * 4 / 255).expand(1, SIDE, width)[..., None].repeat(1, 1, 1, 3)


@pytest.mark.parametrize(
    ("width", "first"),
    # half a pixel is rounded to the even one, as torchvision's center crop does, which published preprocessing uses
    [(33, 0), (34, 1), (35, 2), (36, 2), (37, 2), (39, 4), (41, 4)],
)
@pytest.mark.parametrize("upright", [False, True])
def test_a_center_crop_takes_the_published_columns_and_rows(width, first, upright):
    image = columns(width)
    expected = image[:, :, first : first + SIDE]
    if upright:
        image, expected = image.transpose(1, 2), expected.transpose(1, 2)
    found = to_images(to_pixels(image, SIDE, "center crop"))
    assert torch.equal((found * 255).round(), (expected * 255).round())
