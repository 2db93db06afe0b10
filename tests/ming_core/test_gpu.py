"""The library on a GPU: the one that is here, else a far device, which shows all but kernels, speed and streams."""

from __future__ import annotations

import gc
from typing import NamedTuple

import pytest
import torch
from ming_univision.ming_core import (
    Conversation,
    Engine,
    Guidance,
    Solver,
    attention,
    cuda_graphs,
    experts,
    load_univision,
)
from ming_univision.ming_core.quantization.kernels import kernel_works
from ming_univision.ming_core.quantization.layers import FORMATS, QuantizedLinear
from ming_univision.nodes.host import PACK
from ming_univision.tests.far_device import FarDevice, bring, near_first, outside
from ming_univision.tests.loras import write_lora
from torch import Tensor

REAL = torch.cuda.is_available()
on_a_real_one = pytest.mark.skipif(not REAL, reason="there is no GPU")
BUILT_IN = PACK / "models" / "tiny-shapes"
STEPS = 4  # of the solver
PRECISIONS = {
    "fp32": {"dtype": torch.float32},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"dtype": torch.bfloat16, "quantization": "int8"},
    "int4": {"dtype": torch.bfloat16, "quantization": "int4"},
}
CLOSEST = {"fp32": 0.99999, "bf16": 0.99, "int8": 0.99, "int4": 0.98}  # cosine similarity of features


class Gpu:
    def __init__(self, far: FarDevice | None) -> None:
        self.far = far
        self.device = far.device if far else torch.device("cuda", torch.cuda.current_device())

    def load(self, precision: str) -> Engine:
        if not self.far:
            return load_univision(BUILT_IN, device=self.device, **PRECISIONS[precision])
        model = load_univision(BUILT_IN, **PRECISIONS[precision])
        bring(model.network, self.far)
        return model

    def never_waits(self, model: Engine):
        """For `on_token`: from the first image token to the last nothing is read from the device, nor copied to it."""
        last, before = model.config.llm_config.num_image_tokens_for_gen, None

        def on_token(progress):
            nonlocal before
            if progress.kind != "image" or progress.done not in (1, last):
                return
            if not self.far:
                torch.cuda.set_sync_debug_mode("error" if progress.done == 1 else "default")
            elif progress.done == 1:
                before = self.far.waits, len(self.far.brought)
            else:
                assert (self.far.waits, len(self.far.brought)) == before

        return on_token


@pytest.fixture
def gpu(request, monkeypatch):
    """A real one, or a far one of the compute capability that the test gives."""
    if REAL:
        yield Gpu(None)
        torch.cuda.set_sync_debug_mode("default")
        return
    capability = getattr(request, "param", (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch, "tensor", near_first(torch.tensor))
    monkeypatch.setattr(attention, "causal_lower_right", outside(attention.causal_lower_right))
    experts._grouped_product_works.cache_clear()
    with FarDevice() as far:
        yield Gpu(far)
    experts._grouped_product_works.cache_clear()


class Found(NamedTuple):
    said: str
    drawn: Tensor
    shown: Tensor


def rounds(model: Engine, pixels: Tensor, **options) -> Found:
    """A picture is looked at, then edited, then shown."""
    with torch.no_grad():
        features = model.mingtok.semantic_features(model.mingtok.encode(pixels))
        seen = model.understand(Conversation(), "Describe the picture.", features=features, max_new_tokens=8)
        asked = "Make the background black."
        options = {"seed": 1, "solver": Solver(STEPS), "max_new_tokens": 2, **options}
        drawn = model.generate_image(seen.conversation, asked, **options)
        return Found(seen.text, drawn.features.tokens, model.mingtok.decode(drawn.features).cpu())


@pytest.fixture(scope="module")
def scene() -> Tensor:
    """Pixels of a picture that the built-in model draws."""
    model = load_univision(BUILT_IN)
    with torch.no_grad():
        drawn = model.generate_image(Conversation(), "Draw a red circle.", solver=Solver(STEPS), max_new_tokens=1)
        return model.mingtok.decode(drawn.features)


def few_bits_work() -> bool:
    return REAL and all(kernel_works(kind, torch.device("cuda"), torch.bfloat16) for kind in ("int4", "int8 halves"))


@pytest.mark.parametrize(
    ("precision", "gpu"),
    [("fp32", (9, 0)), ("bf16", (9, 0)), *([("int8", ())] if REAL else [("bf16", (8, 0))]), ("int4", (9, 0))],
    indirect=["gpu"],
)
def test_a_gpu_gives_what_the_cpu_gives_and_draws_without_waiting(gpu, scene, precision):
    expected = rounds(load_univision(BUILT_IN, **PRECISIONS[precision]), scene)
    model = gpu.load(precision)
    first = torch.zeros(3, model.config.llm_config.hidden_size, dtype=model.dtype, device=gpu.device)
    waits = model.network.language_model.synchronizes(first)
    found = rounds(model, scene, on_token=None if waits else gpu.never_waits(model))
    assert not waits or (precision in ("int8", "int4") and not few_bits_work())
    assert found.said == expected.said or (REAL and precision != "fp32")
    assert torch.cosine_similarity(found.drawn.flatten(), expected.drawn.flatten(), dim=0) > CLOSEST[precision]
    assert (found.shown - expected.shown).abs().mean() < 0.05


def test_a_lora_on_a_gpu_gives_what_it_gives_on_the_cpu_and_draws_without_waiting(gpu, tmp_path):
    near = load_univision(BUILT_IN, **PRECISIONS["bf16"])
    file, model = write_lora(tmp_path / "lora.safetensors", near.network, size=0.4), gpu.load("bf16")

    def draw(engine: Engine, **options) -> Tensor:
        options = {"guidance": Guidance(1.0, 1.0), "solver": Solver(1), "max_new_tokens": 1, **options}
        return engine.generate_image(Conversation(), "Draw a red circle.", **options).features.latents.flatten()

    plain, expected = draw(near), draw(near.with_lora(file))
    found = draw(model.with_lora(file), on_token=gpu.never_waits(model))
    like = torch.nn.CosineSimilarity(dim=0)
    assert like(found, expected) > CLOSEST["bf16"] > like(plain, expected)


@on_a_real_one
@pytest.mark.parametrize("guidance", [Guidance(1.0, 1.0), Guidance()])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_graphs_draw_the_same(gpu, scene, precision, guidance, captured_steps, monkeypatch):
    model = gpu.load(precision)
    model.network.language_model.cuda_graphs = False
    plain = rounds(model, scene, guidance=guidance)
    if "quantization" in PRECISIONS[precision] and not few_bits_work():
        pytest.skip("this GPU has no kernel for few bits")
    monkeypatch.setattr(cuda_graphs.Recorder, "failed", False)
    model.network.language_model.cuda_graphs = True
    model.prefix_cache.clear()
    found = rounds(model, scene, guidance=guidance)
    replayed = {name: step.replaying for name, step in captured_steps.items()}
    assert replayed == {"condition": True, "flow": True, "expand": True}
    assert torch.cosine_similarity(found.drawn.flatten(), plain.drawn.flatten(), dim=0) > CLOSEST[precision]


@on_a_real_one
def test_the_kernels_for_few_bits_work_on_ampere_and_newer():
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has none")
    assert few_bits_work()


@on_a_real_one
@pytest.mark.parametrize("back", ["cuda", "cpu"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_order_of_the_kernels_is_undone_exactly(kind, back):
    layer = QuantizedLinear(torch.nn.Linear(256, 192, dtype=torch.bfloat16), kind).cuda()
    values, x = layer.values.clone(), torch.randn(3, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        found = layer(x)
        assert layer.order == "cuda" or not few_bits_work()
        layer.to(back)
        torch.testing.assert_close(layer(x.to(back)), found.to(back), rtol=0.02, atol=0.02)
        layer.arrange("plain")
    assert torch.equal(layer.values, values.to(back))


@on_a_real_one
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_that_is_gone_leaves_nothing_on_the_gpu(gpu, scene, precision):
    def allocated():
        model = gpu.load(precision)
        rounds(model, scene)
        del model
        gc.collect()
        return torch.cuda.memory_allocated()

    assert allocated() >= allocated()  # what libraries and shapes need once is there after the first
