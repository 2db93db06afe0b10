"""The device a model computes on, and how much memory a round asks for beside the weights."""

import ast
import weakref
from collections import Counter

import pytest
import torch
from ming_univision.ming_core import (
    Conversation,
    DrawRequest,
    Guidance,
    ImageOptions,
    Sampling,
    Solver,
    TextOptions,
    UniVision,
    load_conversation,
    load_univision,
    save_conversation,
)
from ming_univision.ming_core.config import LanguageModelConfig
from ming_univision.ming_core.experts import ExpertPerRow, Experts, OneExpert, SortedRows
from ming_univision.ming_core.images import psnr, ssim, to_images
from ming_univision.ming_core.kv_cache import DecodeCache, LayerCache, PrefillCache
from ming_univision.ming_core.language_model import LanguageModel
from ming_univision.ming_core.quantization import QuantizedStackedLinear, kernels
from ming_univision.nodes.host import PACK
from ming_univision.tests.kernels import grouped_product, int4_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def test_a_model_computes_where_its_weights_are_until_it_is_told_otherwise(model):
    network = model.network
    assert model.device == model.mingtok.device == network.language_model.device == torch.device("cpu")
    network.compute_on(torch.device("meta"))
    assert model.device == model.mingtok.device == network.language_model.device == torch.device("meta")
    assert model.dtype == model.mingtok.dtype == torch.float32


@pytest.fixture
def meta_by_default():
    """As another pack may have set it."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)  # no device at all: setting the CPU would leave a mode on


def everything(model, mask):
    """One of all that a model does, as tensors and lists."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3), device="cpu") * 2 - 1
    with torch.no_grad():
        seen = model.mingtok.semantic_features(model.mingtok.encode(pixels))
        image = model.mingtok.decode(seen)
    sampling = Sampling(temperature=1.0)
    said = model.understand(Conversation(), "Hello.", features=seen, max_new_tokens=4, sampling=sampling)
    drawn = model.generate_images(said.conversation, "A cat.", seeds=[1, 2], solver=Solver(2), max_new_tokens=4)
    edit = model.generate_image(
        drawn[0].conversation, "Red.", mask=mask, guidance=Guidance(4.0, 2.0), solver=Solver(2), max_new_tokens=4
    )
    requests = [DrawRequest(text, 3) for text in ("A cat.", "A longer text.")]
    batch = model.generate_batch(requests, ImageOptions(solver=Solver(2), max_new_tokens=2))
    pictures = [r.features.latents for r in (*drawn, edit, *batch)]
    metrics = [measure(to_images(image), to_images(pixels)) for measure in (psnr, ssim)]
    return [seen.latents, image, *pictures, *metrics, said.token_ids, edit.token_ids]


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_a_default_device_changes_nothing(checkpoint_folder, quantization, tmp_path, request):
    dtype = torch.bfloat16 if quantization else torch.float32
    mask = torch.arange(32 * 32).view(1, 32, 32) % 32 > 11

    def run(folder):
        model = load_univision(checkpoint_folder, dtype=dtype, quantization=quantization)
        found = everything(model, mask)
        conversation = model.understand(Conversation(), "Hello.", max_new_tokens=2).conversation
        save_conversation(conversation, folder)
        return [*found, load_conversation(folder, model) == conversation]

    expected = run(tmp_path / "before.safetensors")
    for cached in (kernels.kernel_works, kernels._scales_of_halves, kernels._cpu_block, kernels._origins):
        cached.cache_clear()
    request.getfixturevalue("meta_by_default")
    found = run(tmp_path / "after.safetensors")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


MAKERS = {
    "arange",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "tensor",
    "zeros",
}


@pytest.mark.parametrize("room", ["ming_core", "nodes"])
def test_every_tensor_that_is_made_names_its_device(room):
    bare = []
    command = PACK / "ming_core" / "training"  # a program of its own, in which no other pack sets a device
    for file in sorted(set((PACK / room).rglob("*.py")) - set(command.rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}:
                names = {keyword.arg for keyword in node.keywords}
                if not names & {"device", None}:  # None: **options
                    bare.append(f"{file.name}:{node.lineno}")
    assert not bare


# --- keys and values ----------------------------------------------------------------------------------------------


@pytest.fixture
def allocated(monkeypatch):
    """Bytes of keys and values that were allocated."""
    total = [0]
    for cls in (PrefillCache, LayerCache):
        make = cls.__init__

        def counted(self, *args, make=make, **kwargs):
            make(self, *args, **kwargs)
            total[0] += self.keys.nbytes + self.values.nbytes

        monkeypatch.setattr(cls, "__init__", counted)
    return total


@pytest.mark.parametrize("images", [1, 3])
def test_a_drawing_round_asks_for_its_keys_and_values(model, picture, allocated, images):
    def asked(seeds):
        return model.plan(said, "Draw it.", ImageOptions(tuple(range(seeds)), max_new_tokens=8), picture).working_memory

    said = model.understand(Conversation(), "Hello.", max_new_tokens=8).conversation
    allocated[0] = 0
    options = {"features": picture, "max_new_tokens": 8}
    model.generate_images(said, "Draw it.", seeds=list(range(images)), solver=Solver(1), **options)
    assert allocated[0] <= asked(images)
    assert asked(images) > images / 2 * asked(1)


def test_an_answer_asks_for_its_keys_and_values(model, picture, allocated):
    def asked(tokens):
        return model.plan(Conversation(), "What is it?", TextOptions(tokens), picture).working_memory

    model.understand(Conversation(), "What is it?", features=picture, max_new_tokens=64)
    assert allocated[0] <= asked(64)
    assert asked(128) > asked(64)


def test_the_published_model_takes_57_kb_a_position_in_bf16():
    language_model = UniVision(device="meta", dtype=torch.bfloat16).language_model
    positions = language_model.working_memory(0, 1, 1001) - language_model.working_memory(0, 1, 1)
    assert positions == 57_344 * 1000


# --- what is computed at once -------------------------------------------------------------------------------------


class MemoryPeak(TorchDispatchMode):
    """The most bytes that were alive at once of what was allocated while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._tensors: Counter[int] = Counter()  # alive, by the address of their memory
        self._refs: dict[int, weakref.ref] = {}  # by their own ids: tensors do not compare to True or False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, given)
        return out

    def _note(self, tensor, given):
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not address or (address in given and not self._tensors[address]):
            return  # a view of something that was there before

        def gone(ref):
            del self._refs[id(ref)]
            self._tensors[address] -= 1
            self.now -= size * (not self._tensors[address])

        self.now += size * (not self._tensors[address])
        self._tensors[address] += 1
        ref = weakref.ref(tensor, gone)
        self._refs[id(ref)] = ref
        self.most = max(self.most, self.now)


def language_model(dtype, width=128):
    """One layer in which little but the experts takes memory; with a small width of experts, not their weights."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    experts = {"num_experts": 8, "num_experts_per_tok": 4, "num_shared_experts": 1, "moe_intermediate_size": width}
    ids = {"eos_token_id": 0, "image_patch_token": 1, "image_start_token": 2}
    config = LanguageModelConfig(**sizes, **experts, **ids, head_dim=8, vocab_size=8)
    model = LanguageModel(config, dtype=dtype).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(
    ("route", "tokens", "width", "dtype"),
    [
        (OneExpert, 512, 8, torch.float32),
        (OneExpert, 1200, 8, torch.bfloat16),
        pytest.param(SortedRows, 512, 8, torch.bfloat16, marks=grouped_product),
        (ExpertPerRow, 12, 128, torch.float32),
        (ExpertPerRow, 12, 128, torch.bfloat16),
    ],
)
@torch.no_grad()
def test_a_prompt_asks_for_what_its_experts_take(route, tokens, width, dtype, monkeypatch):
    monkeypatch.setattr(Experts, "dispatch", lambda *_: route)
    model = language_model(dtype, width)
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    with MemoryPeak() as memory:
        model.prefill(x, model.new_cache(tokens))
    asked = model.working_memory(tokens, 1, 1)
    assert asked / 4 < memory.most <= asked


@int4_kernel
@pytest.mark.parametrize("quantised", [None, "int8", "int4"])
@torch.no_grad()
def test_a_step_asks_for_the_weights_that_a_gpu_copies(quantised, request, monkeypatch):
    if quantised:
        request.getfixturevalue("quantised_as_on_a_gpu")
    monkeypatch.setattr(Experts, "dispatch", lambda *_: ExpertPerRow)
    model, rows = language_model(torch.bfloat16), 8
    experts = model.model.layers[0].mlp.experts
    if quantised:
        experts.gate_up = QuantizedStackedLinear(experts.gate_up, quantised)
        experts.down = QuantizedStackedLinear(experts.down, quantised)
    x = torch.randn(rows, 1, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    prefix = model.new_cache(1)
    model.prefill(x[0], prefix)  # packs the weights
    with MemoryPeak() as memory:
        model.decode(x, DecodeCache(prefix, 1, rows))
    asked = model.working_memory(1, rows, 1)
    assert asked / 4 < memory.most <= asked
