"""Resize rules for pictures, where a pixel more or less would not be seen by eye."""

import pytest
import torch
from ming_univision.ming_core.images import enlarged, to_images, to_pixels

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


def test_a_smaller_image_is_enlarged_in_its_proportions_and_a_larger_one_stays():
    flat = torch.full((2, 16, 8, 3), 0.25)
    assert enlarged(flat, 64).shape == (2, 64, 32, 3)
    torch.testing.assert_close(enlarged(flat, 64), torch.full((2, 64, 32, 3), 0.25))
    for side in (0, 8, 16):
        assert enlarged(flat, side) is flat
    edge = torch.zeros(1, 8, 8, 3)
    edge[:, :, 4:] = 1
    large = enlarged(edge, 32)
    assert (large[:, :, :12] < 0.2).all() and (large[:, :, 20:] > 0.8).all()
    assert large.min() == 0 and large.max() == 1, "a bicubic curve overshoots, an image does not"
