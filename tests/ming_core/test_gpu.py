"""The library on a GPU: the one that is here, else a far device, which shows all but kernels, speed and streams."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from ming_univision.ming_core import Conversation, UniVision, experts, load_univision
from ming_univision.nodes.host import PACK
from ming_univision.tests.far_device import FarDevice, bring, near_first
from torch import Tensor

REAL = torch.cuda.is_available()
on_a_real_one = pytest.mark.skipif(not REAL, reason="there is no GPU")
BUILT_IN = PACK / "models" / "tiny-shapes"
PRECISIONS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quantization": "int8"},
    "int4": {"dtype": torch.bfloat16, "quantization": "int4"},
}


class Gpu:
    def __init__(self, far: FarDevice | None) -> None:
        self.far = far
        self.device = far.device if far else torch.device("cuda", torch.cuda.current_device())

    def load(self, **options) -> UniVision:
        if not self.far:
            return load_univision(BUILT_IN, device=self.device, **options)
        model = load_univision(BUILT_IN, **options)
        bring(model, self.far)
        return model


@pytest.fixture(params=[9, 8][: 1 if REAL else 2])
def gpu(request, monkeypatch):
    """The real one, or far ones of two compute capabilities, which multiply experts in different ways."""
    if REAL:
        yield Gpu(None)
        return
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (request.param, 0))
    monkeypatch.setattr(torch, "tensor", near_first(torch.tensor))
    experts._grouped_product_works.cache_clear()
    with FarDevice() as far:
        yield Gpu(far)
    experts._grouped_product_works.cache_clear()


class Found(NamedTuple):
    said: str
    pictures: list[Tensor]
    pixels: Tensor


def rounds(model: UniVision, pixels: Tensor, on_token=None) -> Found:
    """A picture is looked at and edited twice, in two pictures at once; all of it in host memory."""
    with torch.no_grad():
        features = model.mingtok.semantic_features(model.mingtok.encode(pixels))
        seen = model.understand(Conversation(), "Describe this image.", features=features, max_new_tokens=30)
        asked = "Make the background blue."
        drawn = model.generate_images(seen.conversation, asked, seeds=[1, 2], max_new_tokens=2, on_token=on_token)
        shown = model.mingtok.decode(drawn[1].features).cpu()
    return Found(seen.text, [turn.features.tokens for turn in drawn], shown)


@pytest.fixture(scope="module")
def scene() -> Tensor:
    """Pixels of a picture that the built-in model draws."""
    model = load_univision(BUILT_IN)
    prompt = (
        "Please generate the corresponding image based on the description. A large red circle on a white background."
    )
    with torch.no_grad():
        return model.mingtok.decode(model.generate_image(Conversation(), prompt, max_new_tokens=1).features)


@pytest.fixture(scope="module")
def on_the_cpu(scene):
    return {name: rounds(load_univision(BUILT_IN, **options), scene) for name, options in PRECISIONS.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_gpu_gives_what_the_cpu_gives(gpu, scene, on_the_cpu, precision):
    found, expected = rounds(gpu.load(**PRECISIONS[precision]), scene), on_the_cpu[precision]
    print(precision, found.said, expected.said)
    for one, other in zip(found.pictures, expected.pictures, strict=True):
        print(torch.cosine_similarity(one.flatten(), other.flatten(), dim=0), (one - other).abs().max())
    print((found.pixels - expected.pixels).abs().mean())
