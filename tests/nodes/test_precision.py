"""The precision widget of the loaders: what it loads, and the error when the machine is too small."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from ming_univision.ming_core import Conversation, load_univision, save_univision
from ming_univision.ming_core.checkpoint import checkpoint_bytes
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host, models


@pytest.fixture
def folder(tmp_path, monkeypatch, checkpoint_folder):
    """models/mine, a small checkpoint, on a machine whose memory a test may choose."""
    monkeypatch.setattr(host, "model_folders", lambda: [tmp_path / "models"])
    monkeypatch.setattr(host, "device", lambda: torch.device("cpu"))
    return shutil.copytree(checkpoint_folder, tmp_path / "models" / "mine")


@pytest.fixture
def quantized(folder):
    model = load_univision(folder, quantization="int4")
    save_univision(model, folder.parent / "small", {"tokenizer.json": (folder / "tokenizer.json").read_text()})
    return folder.parent / "small"


def load(name, precision):
    return NODE_CLASS_MAPPINGS["MingUniVisionLoader"]().load(model_name=name, precision=precision)[0].model


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_precision_loads_and_draws(folder, precision):
    model = load("mine", precision)
    assert (model.network.quantization, model.dtype) == (precision, torch.bfloat16)
    assert model.generate_image(Conversation(), "A cat.", max_new_tokens=1).features.latents.isfinite().all()


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp32", "int4"])
def test_a_quantized_folder_is_taken_as_it_is(quantized, precision):
    model = load("small", precision)
    assert model.network.quantization == "int4"
    assert model.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16)


def test_a_quantized_folder_is_not_quantized_to_another_format(quantized):
    with pytest.raises(ValueError, match="quantized to int4 already"):
        load("small", "int8")


def test_a_quantized_folder_is_loaded_once_whatever_the_precision_is_called(quantized):
    loaded = {models.load("univision", "small", name, load_univision) for name in ("auto", "int4", "bf16", "auto")}
    assert len(loaded) == 1


@pytest.mark.parametrize("precision", ["auto", "int8", "int4"])
def test_a_cpu_in_comfyui_computes_in_bf16_what_is_not_exact(folder, monkeypatch, precision):
    cpu = torch.device("cpu")
    management = SimpleNamespace(should_use_bf16=lambda on: False, unet_offload_device=lambda: cpu, total_ram=1 << 20)
    monkeypatch.setattr(host, "comfy", SimpleNamespace(model_management=management))
    monkeypatch.setattr(models, "checkpoint_bytes", lambda folder, kind, dtype, *_: 1 << 39)  # half the memory
    quantization = precision if precision != "auto" else None
    assert models.choose_precision(precision, "univision", folder) == (torch.bfloat16, quantization)


@pytest.mark.parametrize("kind", ["xpu", "npu", "mlu", "cuda"])
def test_the_memory_that_counts_is_that_of_the_device_whatever_it_is(monkeypatch, kind):
    on = SimpleNamespace(type=kind)
    management = SimpleNamespace(get_total_memory=lambda device: 24 << 30 if device is on else 0, total_ram=128 << 10)
    monkeypatch.setattr(host, "comfy", SimpleNamespace(model_management=management))
    assert host.total_memory(on) == 24 << 30
    assert host.total_memory(torch.device("cpu")) == host.total_memory(torch.device("mps")) == 128 << 30


def test_a_model_that_is_loaded_straight_to_a_device_is_refused_by_the_memory_of_that_device(folder, monkeypatch):
    xpu, needed = torch.device("xpu"), checkpoint_bytes(folder, "univision", torch.bfloat16)
    management = SimpleNamespace(
        unet_offload_device=lambda: xpu, get_total_memory=lambda on: needed - 1, should_use_bf16=lambda on: True
    )
    monkeypatch.setattr(host, "comfy", SimpleNamespace(model_management=management))
    monkeypatch.setattr(host, "device", lambda: xpu)
    with pytest.raises(ValueError, match=r"the GPU \(xpu\) has"):
        models.choose_precision("auto", "univision", folder)


def test_auto_is_exact_only_where_the_real_size_is_under_a_quarter_of_the_memory(folder, monkeypatch):
    size = checkpoint_bytes(folder, "univision", torch.float32)
    for memory, dtype in ((4 * size + 4, torch.float32), (4 * size, torch.bfloat16)):
        monkeypatch.setattr(host, "total_memory", lambda on, memory=memory: memory)
        assert models.choose_precision("auto", "univision", folder) == (dtype, None)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_what_does_not_fit_is_refused_by_its_real_size(folder, monkeypatch, precision):
    quantization = precision if precision.startswith("int") else None
    needed = checkpoint_bytes(folder, "univision", torch.bfloat16, quantization)
    monkeypatch.setattr(models, "GB", 1e5)
    for memory in (needed, needed - 1):
        monkeypatch.setattr(host, "total_memory", lambda on, memory=memory: memory)
        if memory == needed:
            assert models.choose_precision(precision, "univision", folder) == (torch.bfloat16, quantization)
            continue
        with pytest.raises(ValueError, match="choose a smaller precision") as error:
            models.choose_precision(precision, "univision", folder)
        assert f"takes {needed / 1e5:.1f} GB at {quantization or 'bfloat16'}" in str(error.value)
