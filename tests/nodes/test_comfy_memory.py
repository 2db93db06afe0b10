"""The model in ComfyUI's own memory management: loaded whole, in part, not at all, and unloaded.

Runs where ComfyUI can be imported, that is, with its Python and from its folder:
`PYTHONPATH=. python -m pytest PACK/tests/nodes/test_comfy_memory.py`. It needs no GPU: a far device is faked.
The memory functions of newer versions' dynamic VRAM need a GPU and are replaced; its patcher and layers are the real
ones.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ming_univision.ming_core import (
    Conversation,
    Engine,
    ImageOptions,
    Sampling,
    Solver,
    UniVision,
    attention,
    load_mingtok,
    load_univision,
)
from ming_univision.ming_core.experts import StackedWeight
from ming_univision.nodes import host
from ming_univision.tests.far_device import FarDevice, near_first, outside
from ming_univision.tests.loras import write_lora

comfy = pytest.importorskip("comfy", reason="ComfyUI is not on the path")
management = comfy.model_management

TOLERANCE = 3e-4  # as between any two ways of computing one result
FAR = FarDevice.device
EMBEDDING = "language_model.model.word_embeddings.weight"


@pytest.fixture(autouse=True)
def nothing_loaded():
    management.current_loaded_models.clear()
    yield
    management.unload_all_models()
    management.current_loaded_models.clear()


@pytest.fixture
def far(monkeypatch):
    """A far device with `far.free` bytes, where ComfyUI computes."""
    device = FarDevice()
    device.free = 1 << 40
    monkeypatch.setattr(host, "device", lambda: FAR)
    monkeypatch.setattr(management, "get_torch_device", lambda: FAR)
    # 0.3.64 brings over 128 MiB at least, which is more than the small model
    monkeypatch.setattr(management, "max", lambda *of: max(n for n in of if n != 128 << 20), raising=False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)

    def free(_=None, torch_free_too=False):
        left = device.free - sum(m.model_loaded_memory() for m in management.current_loaded_models)
        return (left, left) if torch_free_too else left

    monkeypatch.setattr(torch, "tensor", near_first(torch.tensor))
    monkeypatch.setattr(attention, "causal_lower_right", outside(attention.causal_lower_right))
    monkeypatch.setattr(management, "get_free_memory", free)
    with device:
        yield device


@pytest.fixture
def two_streams(monkeypatch):
    """As on NVIDIA and AMD: ComfyUI keeps room free for the layers that it copies ahead. 0.3.64 does not."""
    monkeypatch.setattr(management, "NUM_STREAMS", 2, raising=False)


def load(folder, loader=load_univision) -> host.Loaded:
    return host.managed(loader(folder, device=host.offload_device(), operations=host.operations()), "small")


def size(loaded: host.Loaded) -> int:
    """Bytes of all that a GPU may hold: everything but the word embedding."""
    return sum(p.nbytes for name, p in network(loaded).named_parameters() if name != EMBEDDING)


def network(loaded: host.Loaded) -> torch.nn.Module:
    """What holds the weights: of a Ming-UniVision the network of its engine."""
    return getattr(loaded.model, "network", loaded.model)


def a_round(model):
    """A picture that is seen, an answer and an edit: latents and token ids."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        features = model.mingtok.semantic_features(model.mingtok.encode(pixels))
        seen = model.understand(Conversation(), "What is it?", features=features, max_new_tokens=6, sampling=Sampling())
        drawn = model.generate_image(seen.conversation, "Make it red.", solver=Solver(2), max_new_tokens=4)
        picture = model.mingtok.decode(drawn.features)
    return features.latents, drawn.features.latents, picture.cpu(), seen.token_ids, drawn.token_ids


@pytest.fixture(scope="module")
def expected(checkpoint_folder):
    """The same round by torch.nn alone."""
    return a_round(load_univision(checkpoint_folder))


def check(found, expected):
    for one, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
    assert found[3:] == expected[3:]


def test_comfyuis_layers_give_the_very_same_numbers(checkpoint_folder, expected):
    loaded = load(checkpoint_folder)
    found = a_round(host.load_to_gpu(loaded))
    assert all(torch.equal(one, other) for one, other in zip(found[:3], expected[:3], strict=True))
    assert found[3:] == expected[3:]
    assert any(type(m).__module__.endswith("host") for m in network(loaded).modules())


def test_dynamic_vram_leaves_the_layers_for_the_loader_to_fill(checkpoint_folder, expected, monkeypatch):
    """Newer versions with it make layers without weights, which only their own loader of state dicts knows to fill."""
    memory = pytest.importorskip("comfy.memory_management", reason="an older version")
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    model = load_univision(checkpoint_folder, operations=host.operations())
    assert torch.equal(a_round(model)[1], expected[1])


def test_each_model_gets_the_patcher_that_can_leave_parts_of_it_behind(checkpoint_folder, monkeypatch):
    dynamic = type("ModelPatcherDynamic", (comfy.model_patcher.ModelPatcher,), {})
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", dynamic, raising=False)
    assert type(load(checkpoint_folder, load_mingtok).patcher) is dynamic
    patcher = load(checkpoint_folder).patcher
    assert isinstance(patcher, comfy.model_patcher.ModelPatcher) and not isinstance(patcher, dynamic)


class FakeVbar:
    """Of dynamic VRAM's address space for a model, the first `room` bytes find memory; the rest is streamed."""

    room = 0

    def __init__(self, size: int, index: int | None) -> None:
        self.end, self.memory = 0, {}

    def alloc(self, size: int) -> tuple:
        self.end += size
        return self, self.end - size, size

    def prioritize(self) -> None: ...

    def loaded_size(self) -> int:
        return sum(tensor.nbytes for tensor in self.memory.values())

    def free_memory(self, size: int) -> int:
        freed = self.loaded_size()
        self.memory.clear()
        return freed


@pytest.fixture
def dynamic(far, monkeypatch):
    """Newer versions' dynamic VRAM, whose own memory functions need a GPU and are replaced here."""
    pytest.importorskip("comfy.memory_management", reason="an older version")
    vbar, hosts = comfy.ops.comfy_aimdo.model_vbar, comfy.model_patcher.comfy_aimdo.host_buffer

    def fault(place):
        _, begin, size = place
        return (begin,) if begin + size <= FakeVbar.room else None

    def memory(place, device):
        model, begin, size = place
        return model.memory.setdefault(begin, torch.empty(size, dtype=torch.uint8, device=device))

    listed = comfy.model_patcher.ModelPatcher._load_list

    def load_list(self, for_dynamic=False, default_device=None):
        """It moves parameters of modules that have parts by their `data`, which knows of no far tensors."""
        for module in self.model.modules() if for_dynamic else ():
            if list(module.children()):
                for name, p in module.named_parameters(recurse=False):
                    setattr(module, name, torch.nn.Parameter(p.to(default_device), requires_grad=False))
        return listed(self, for_dynamic)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "_load_list", load_list)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    monkeypatch.setattr(vbar, "ModelVBAR", FakeVbar)
    monkeypatch.setattr(vbar, "vbar_fault", fault)
    monkeypatch.setattr(vbar, "vbar_signature_compare", lambda a, b: a is not None and a == b)
    monkeypatch.setattr(vbar, "vbar_unpin", lambda place: None)
    monkeypatch.setattr(comfy.ops.comfy_aimdo.torch, "aimdo_to_tensor", memory)
    monkeypatch.setattr(hosts, "HostBuffer", lambda *_: SimpleNamespace(size=0, truncate=lambda *_, **__: None))
    monkeypatch.setattr(comfy.pinned_memory, "pin_memory", lambda *_, **__: False)
    return FakeVbar


@pytest.mark.parametrize("room", [1.0, 0.5, 0.0])
def test_a_mingtok_alone_computes_the_same_under_dynamic_vram(dynamic, checkpoint_folder, expected, monkeypatch, room):
    loaded = load(checkpoint_folder, load_mingtok)
    assert loaded.patcher.is_dynamic()
    monkeypatch.setattr(dynamic, "room", int(room * 2 * size(loaded)))
    for _ in range(2):  # what has found memory is found again
        tok = host.load_to_gpu(loaded)
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
        with torch.no_grad():
            latents = tok.encode(pixels)
            picture = tok.decode(tok.semantic_features(expected[0]))
        torch.testing.assert_close(latents.cpu(), expected[0], rtol=0, atol=TOLERANCE)
    assert torch.isfinite(picture.cpu()).all()
    assert (loaded.patcher.loaded_size() > loaded.patcher.model.model_loaded_weight_memory) == (room > 0)


def test_a_model_with_experts_is_loaded_in_part_beside_dynamic_vram(dynamic, far, checkpoint_folder, expected):
    tok, loaded = load(checkpoint_folder, load_mingtok), load(checkpoint_folder)
    assert tok.patcher.is_dynamic() and not loaded.patcher.is_dynamic()
    host.load_to_gpu(tok)
    far.free = size(loaded) // 2
    check(a_round(host.load_to_gpu(loaded)), expected)
    assert 0 < loaded.patcher.loaded_size() < size(loaded)
    with torch.no_grad():
        tok = host.load_to_gpu(tok)
        assert torch.isfinite(tok.decode(tok.semantic_features(expected[0])).cpu()).all()


@pytest.mark.parametrize("part", [1.5, 0.8, 0.5, 0.1, 0.0])
def test_a_model_that_fits_in_part_computes_the_same(far, checkpoint_folder, expected, part):
    loaded = load(checkpoint_folder)
    far.free = int(part * size(loaded))
    model = host.load_to_gpu(loaded)
    on_far = {name for name, p in model.network.named_parameters() if p.device == FAR}
    everything = {name for name, _ in model.network.named_parameters()} - {EMBEDDING}
    assert (on_far == everything) == (part > 1) and bool(on_far) == (part > 0)
    assert sum(dict(model.network.named_parameters())[name].nbytes for name in on_far) <= far.free
    assert model.device == model.mingtok.device == FAR and model.dtype == torch.float32
    check(a_round(model), expected)


def test_the_experts_are_what_is_left_behind_and_only_the_routed_ones_travel(far, checkpoint_folder):
    loaded = load(checkpoint_folder)
    stacks = [p for m in network(loaded).modules() if isinstance(m, StackedWeight) for p in m.parameters()]
    far.free = size(loaded) - sum(p.nbytes for p in stacks) // 2
    model = host.load_to_gpu(loaded)
    left = [m for m in model.network.modules() if any(p.device != FAR for p in m.parameters(recurse=False))]
    left.remove(model.network.language_model.model.word_embeddings)
    assert any(isinstance(m, StackedWeight) for m in left)
    assert all(isinstance(m, StackedWeight) or not hasattr(m, "comfy_cast_weights") for m in left)
    far.brought.clear()
    a_round(model)
    shapes = {tuple(p.shape) for p in stacks}
    assert far.brought and not shapes & set(far.brought)
    assert {shape[1:] for shape in shapes} <= set(far.brought)


def stacks_of(loaded: host.Loaded) -> list[StackedWeight]:
    return [module for module in network(loaded).modules() if isinstance(module, StackedWeight)]


def is_far(module: torch.nn.Module) -> bool:
    return all(p.device == FAR for p in module.parameters())


def far_bytes(loaded: host.Loaded) -> int:
    return sum(p.nbytes for p in network(loaded).parameters() if p.device == FAR)


@pytest.fixture
def five_layers(checkpoint_folder, tmp_path):
    """A model of five layers of large experts."""
    config = load_univision(checkpoint_folder).config
    config = replace(config, llm_config=replace(config.llm_config, num_hidden_layers=5, moe_intermediate_size=64))
    model = UniVision(config, operations=host.operations()).requires_grad_(False).eval()
    for weight in model.parameters():
        weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return host.managed(Engine(model), "five layers")


def test_experts_need_no_buffer_so_as_many_layers_are_loaded_as_have_room(far, two_streams, five_layers):
    stacks = stacks_of(five_layers)
    layer = sum(p.nbytes for stack in stacks[:2] for p in stack.parameters())
    # what ComfyUI asks for between two layers of its own, the smallest of all, and for being larger than, not equal to
    slack = 4096
    far.free = size(five_layers) - 5 * layer + int(4.8 * layer) + slack
    host.load_to_gpu(five_layers)
    # of a layer two thirds are gate and up; 0.8 layers have room for them
    assert [is_far(stack) for stack in stacks] == 4 * [True, True] + [True, False]
    assert five_layers.patcher.loaded_size() == far_bytes(five_layers)


def test_of_the_experts_no_more_are_unloaded_than_is_asked_for(far, two_streams, five_layers):
    stacks = stacks_of(five_layers)
    down = sum(p.nbytes for p in stacks[1].parameters())
    host.load_to_gpu(five_layers)
    assert all(map(is_far, stacks)) and five_layers.patcher.loaded_size() == size(five_layers)
    far.free = size(five_layers)
    for asked, left in ((down, 1), (2 * down, 2), (3 * down, 4)):  # in thirds of a layer: 1, 2 and 1 + 2
        management.free_memory(asked, FAR)
        assert [is_far(stack) for stack in stacks] == (10 - left) * [True] + left * [False]
        far.free = five_layers.patcher.loaded_size()
    far.free = 10 * size(five_layers)
    host.load_to_gpu(five_layers)
    assert all(map(is_far, stacks)) and five_layers.patcher.loaded_size() == size(five_layers)


def test_what_is_not_experts_is_unloaded_after_them(far, two_streams, five_layers):
    host.load_to_gpu(five_layers)
    stacks = stacks_of(five_layers)
    experts = sum(p.nbytes for stack in stacks for p in stack.parameters())
    far.free = size(five_layers)
    management.free_memory(experts + 1, FAR)
    assert not any(map(is_far, stacks))
    assert 0 < far_bytes(five_layers) < size(five_layers) - experts
    assert five_layers.patcher.loaded_size() == far_bytes(five_layers)


def test_experts_that_are_left_behind_are_pinned_where_comfyui_pins(far, five_layers, monkeypatch):
    if not hasattr(management, "pin_memory"):
        pytest.skip("an older version")
    pinned = set()
    monkeypatch.setattr(management, "pin_memory", lambda weight: not pinned.add(weight))
    monkeypatch.setattr(management, "unpin_memory", pinned.discard)
    far.free = 0
    host.load_to_gpu(five_layers)
    assert {p for stack in stacks_of(five_layers) for p in stack.parameters()} <= pinned
    far.free = 10 * size(five_layers)
    host.load_to_gpu(five_layers)
    assert not pinned


@pytest.mark.parametrize("part", [10, 0.5])
def test_the_word_embedding_takes_no_memory_of_the_gpu(far, two_streams, checkpoint_folder, expected, part):
    loaded = load(checkpoint_folder)
    table = network(loaded).get_parameter(EMBEDDING)
    far.free = int(part * size(loaded))
    assert loaded.patcher.model_size() == size(loaded)
    model = host.load_to_gpu(loaded)
    assert loaded.patcher.loaded_size() == far_bytes(loaded)
    far.brought.clear()
    check(a_round(model), expected)
    assert network(loaded).get_parameter(EMBEDDING) is table and table.device.type == "cpu"
    assert part < 1 or tuple(table.shape) not in far.brought  # lm_head has its shape, and may be left behind
    management.unload_all_models()
    assert network(loaded).get_parameter(EMBEDDING) is table


def test_the_word_embedding_follows_a_change_of_dtype(checkpoint_folder):
    model = network(load(checkpoint_folder)).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# --- Changes that other packs make --------------------------------------------------------------------------------

PATCHED = (
    "language_model.lm_head.weight",
    "language_model.model.layers.1.attention.dense.weight",
    "flow_head.vis_head.1.bias",
)


def patched(loaded: host.Loaded, *names: str) -> host.Loaded:
    """As another pack would do it: a clone with other weights."""
    patcher = loaded.patcher.clone()
    patches = {f"network.{name}": ("diff", (difference(network(loaded).get_parameter(name)),)) for name in names}
    assert set(patcher.add_patches(patches)) == set(patches)
    return replace(loaded, patcher=patcher)


def difference(weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).to(weight.dtype)


@pytest.mark.parametrize("part", [10, 0.8, 0.0])
def test_patches_of_weights_are_applied_wherever_the_weights_are(far, checkpoint_folder, part):
    by_hand = load_univision(checkpoint_folder)
    for name in PATCHED:
        weight = by_hand.network.get_parameter(name)
        weight.data += difference(weight)
    expected = a_round(by_hand)
    loaded = load(checkpoint_folder)
    far.free = int(part * size(loaded))
    plain = a_round(host.load_to_gpu(loaded))
    check(a_round(host.load_to_gpu(patched(loaded, *PATCHED))), expected)
    found = a_round(host.load_to_gpu(loaded))  # and taken away again
    check(found, plain)
    assert found[3] != expected[3]


UNFIT = [EMBEDDING, "language_model.model.norm.weight", "language_model.model.layers.0.mlp.experts.down.values"]


@pytest.mark.parametrize("name", UNFIT)
def test_a_patch_that_would_have_no_effect_is_refused(checkpoint_folder, name):
    loaded = load(checkpoint_folder)
    with pytest.raises(ValueError, match="another node changed this model") as error:
        host.load_to_gpu(patched(loaded, name))
    assert name in str(error.value)
    host.load_to_gpu(loaded)


def test_a_patch_of_a_quantized_weight_is_refused(checkpoint_folder):
    model = load_univision(checkpoint_folder, quantization="int8", operations=host.operations())
    with pytest.raises(ValueError, match="quantized"):
        host.load_to_gpu(patched(host.managed(model, "int8"), "language_model.lm_head.values"))


def nothing(*_): ...


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p.set_model_attn1_patch(nothing), "patches"),
        (lambda p: p.set_model_sampler_cfg_function(nothing), "sampler_cfg_function"),
        (lambda p: p.set_model_unet_function_wrapper(nothing), "model_function_wrapper"),
        (lambda p: p.add_wrapper("diffusion_model", nothing), "wrappers for diffusion_model"),
        (lambda p: p.set_model_compute_dtype(torch.float16), "dtype"),
        (
            lambda p: p.add_hook_patches(comfy.hooks.WeightHook(), {"network.language_model.lm_head.weight": ()}),
            "hooks",
        ),
    ],
    ids=["patch", "sampler", "unet", "wrapper", "dtype", "hook"],
)
def test_a_change_that_is_meant_for_comfyuis_samplers_is_refused(checkpoint_folder, change, named):
    loaded = load(checkpoint_folder)
    patcher = loaded.patcher.clone()
    change(patcher)
    with pytest.raises(ValueError, match=f"another node changed this model.*{named}"):
        host.load_to_gpu(replace(loaded, patcher=patcher))


# --- LoRAs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora_file(checkpoint_folder, tmp_path):
    return write_lora(tmp_path / "lora.safetensors", load_univision(checkpoint_folder).network, size=0.1)


@pytest.mark.parametrize(("part", "quantization"), [(10, None), (0.6, "int8"), (0.0, None)])
def test_a_lora_has_the_same_effect_wherever_the_weights_are(far, checkpoint_folder, lora_file, part, quantization):
    near = load_univision(checkpoint_folder, quantization=quantization)
    plain, expected = a_round(near), a_round(near.with_lora(lora_file))
    engine = load_univision(checkpoint_folder, quantization=quantization, operations=host.operations())
    loaded = host.managed(engine, "small")
    tuned = replace(loaded, model=engine.with_lora(lora_file), owner=loaded)
    far.free = int(part * size(loaded))
    for one, result in ((tuned, expected), (loaded, plain), (tuned, expected)):  # two branches of a graph, in turns
        check(a_round(host.load_to_gpu(one)), result)
    assert len(management.current_loaded_models) == 1
    assert loaded.patcher.loaded_size() == far_bytes(loaded)  # the branches were freed, and never counted as weights
    with pytest.raises(AssertionError):
        check(plain, expected)


def test_a_model_whose_lora_ran_last_is_held_for_the_next_workflow(checkpoint_folder, lora_file):
    loaded = load(checkpoint_folder)
    tuned = replace(loaded, model=loaded.model.with_lora(lora_file), owner=loaded)
    host.load_to_gpu(tuned)
    base = weakref.ref(loaded)
    del loaded, tuned
    gc.collect()
    assert base() is not None
    management.unload_all_models()
    gc.collect()
    assert base() is None


def test_more_is_loaded_when_there_is_room_and_some_given_back_when_there_is_not(far, checkpoint_folder, expected):
    loaded = load(checkpoint_folder)
    far.free = size(loaded) // 2
    host.load_to_gpu(loaded)
    half = loaded.patcher.loaded_size()
    far.free = 10 * size(loaded)
    host.load_to_gpu(loaded)
    assert loaded.patcher.loaded_size() > half
    far.free = size(loaded)
    management.free_memory(size(loaded) // 2, FAR)
    assert 0 < loaded.patcher.loaded_size() < size(loaded)
    check(a_round(loaded.model), expected)


def test_the_memory_that_a_round_asks_for_is_left_free(far, checkpoint_folder):
    loaded = load(checkpoint_folder)
    needed = loaded.model.plan(Conversation(), "Hello", ImageOptions(seeds=(0, 1))).working_memory
    far.free = needed + size(loaded) // 2
    host.load_to_gpu(loaded, needed)
    assert 0 < loaded.patcher.loaded_size() <= size(loaded) // 2
    host.load_to_gpu(loaded)
    assert loaded.patcher.loaded_size() > size(loaded) // 2


def test_unloading_brings_all_back_and_frees_what_was_remembered(far, checkpoint_folder):
    loaded = load(checkpoint_folder)
    a_round(host.load_to_gpu(loaded))
    remembered = loaded.model.prefix_cache.bytes
    assert remembered > 0
    host.load_to_gpu(loaded)
    assert loaded.model.prefix_cache.bytes == remembered
    management.unload_all_models()
    assert loaded.model.prefix_cache.bytes == 0
    assert all(p.device.type == "cpu" for p in network(loaded).parameters())
    assert not management.current_loaded_models


def test_the_tokenizer_inside_a_model_is_not_counted_twice(far, checkpoint_folder):
    loaded = load(checkpoint_folder)
    tok = host.Loaded(loaded.model.mingtok, loaded.patcher, "tok", owner=loaded)
    host.load_to_gpu(tok)
    host.load_to_gpu(loaded)
    assert [m.model_loaded_memory() for m in management.current_loaded_models] == [size(loaded)]


def test_a_mingtok_alone_is_moved_and_encodes(far, checkpoint_folder, expected):
    loaded = load(checkpoint_folder, load_mingtok)
    far.free = size(loaded) // 2
    tok = host.load_to_gpu(loaded)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(tok.encode(pixels).cpu(), expected[0], rtol=0, atol=TOLERANCE)


def test_the_model_that_ran_last_is_held_until_comfyui_unloads_it(checkpoint_folder):
    loaded = load(checkpoint_folder)
    a_round(host.load_to_gpu(loaded))
    model = weakref.ref(loaded.model)
    del loaded
    gc.collect()
    assert model() is not None
    management.unload_all_models()
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("models", [2, 1])
def test_the_models_that_ran_last_are_held_as_far_as_a_share_of_the_ram_goes(checkpoint_folder, monkeypatch, models):
    loaded = load(checkpoint_folder)
    share = int((models + 0.5) * size(loaded))
    monkeypatch.setattr(host, "host_memory", lambda: share / host.RETAINED_SHARE)
    host.load_to_gpu(loaded)
    first = weakref.ref(loaded.model)
    loaded = load(checkpoint_folder)
    host.load_to_gpu(loaded)
    second = weakref.ref(loaded.model)
    del loaded
    gc.collect()
    assert second() is not None and (first() is not None) == (models == 2)
    host.make_room(share)  # another one is about to be read
    gc.collect()
    assert first() is None and second() is None
