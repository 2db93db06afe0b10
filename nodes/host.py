"""The only file that knows ComfyUI: devices, memory, progress, interruption, folders.

The same interface serves without it: then models stay where they were loaded, progress goes to whoever listens
(`listen`), and files go to the folders of `folders`.
"""

from __future__ import annotations

import contextlib
import functools
import html
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

try:
    import comfy.cli_args
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops
    import comfy.patcher_extension
    import comfy.utils
    import comfy_execution.utils
    import folder_paths
except ImportError:
    if "comfy" in sys.modules:  # a ComfyUI that lacks one of these: it reports which, rather than being worked around
        raise
    comfy = comfy_execution = folder_paths = None

PACK = Path(__file__).resolve().parent.parent
MODEL_FOLDER = "ming"  # the category below ComfyUI's models/

Listener = Callable[[int, int, "str | None"], None]
_listener: ContextVar[Listener | None] = ContextVar("ming_listener", default=None)
_folders: ContextVar[tuple[Path, Path]] = ContextVar("ming_folders", default=(PACK / "output", PACK / "input"))


# --- Devices and memory -------------------------------------------------------------------------------------------


class ManagedModel(nn.Module):
    """What a patcher manages. ComfyUI writes attributes such as `device` on it, which a model of ours computes."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device = device


@dataclass(eq=False)  # compared by identity, and able to be referenced weakly
class Loaded:
    """A loaded model as it travels between nodes. `patcher` is None without ComfyUI."""

    model: Any  # ming_core.MingTok or ming_core.Engine
    patcher: Any
    name: str
    owner: Loaded | None = None  # the Ming-UniVision that this MingTok is a part of

    def __repr__(self) -> str:
        return f"{type(self.model).__name__}({self.name})"


def device() -> torch.device:
    """Where models compute."""
    if comfy:
        return comfy.model_management.get_torch_device()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pictures_device() -> torch.device:
    """Where IMAGE and MASK belong: ComfyUI keeps them on the GPU when it is started with --gpu-only."""
    return comfy.model_management.intermediate_device() if comfy else torch.device("cpu")


def resting_device() -> torch.device:
    """Where a freshly loaded model is put, before it computes."""
    return comfy.model_management.unet_offload_device() if comfy else device()


def half(on: torch.device) -> torch.dtype:
    """The 16 bit format that a device computes in: bf16, else fp16, and float32 where neither is any good."""
    if on.type == "cpu":
        return torch.bfloat16  # every CPU does, though ComfyUI, which thinks of speed, answers no for it
    if comfy:
        if comfy.model_management.should_use_bf16(on):
            return torch.bfloat16
        return torch.float16 if comfy.model_management.should_use_fp16(on) else torch.float32
    ampere = on.type != "cuda" or torch.cuda.get_device_capability(on)[0] >= 8
    return torch.bfloat16 if ampere else torch.float16


def total_memory(on: torch.device) -> int:
    """Bytes of a GPU, or of the host, in all: what ComfyUI could free is counted in."""
    if on.type == "cuda":
        return torch.cuda.get_device_properties(on).total_memory
    return host_memory()


def host_memory() -> int:
    """Bytes of RAM in this machine."""
    if comfy:
        return int(comfy.model_management.total_ram) << 20  # ComfyUI counts in MiB
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import ctypes  # Windows has no sysconf

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", "_1", "_2", "_3", "_4", "_5")),
        )

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.total


@functools.cache
def operations() -> Any:
    """The layers to build models of: ComfyUI's own, which it can leave in host memory and bring over when they run."""
    if not comfy:
        return nn

    class Operations(comfy.ops.disable_weight_init):
        """Weights rest in the dtype that is computed in, so a layer casts only when ComfyUI tells it to."""

        class Linear(comfy.ops.disable_weight_init.Linear):
            def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
                """Its being here makes newer versions create the parameters at once, for our loader to fill."""
                super()._load_from_state_dict(*args, **kwargs)

        class Embedding(comfy.ops.disable_weight_init.Embedding):
            def forward(self, ids: Tensor) -> Tensor:
                """Looked up where the table rests: a few rows travel rather than all of it."""
                return F.embedding(ids.to(self.weight.device), self.weight).to(ids.device)

    return Operations


def managed(model: Any, name: str) -> Loaded:
    """Hand a loaded Engine or MingTok to ComfyUI's memory management."""
    if not comfy:
        return Loaded(model, None, name)
    network: nn.Module = getattr(model, "network", model)
    fetching = [module for module in network.modules() if getattr(module, "fetches_weights", False)]
    for module in fetching:
        _may_be_left_behind(module)
    network.compute_on(device())
    patcher = _patcher_class(bool(fetching))(ManagedModel(network, resting_device()), device(), resting_device())
    if hasattr(model, "prefix_cache"):

        def forget(patcher: Any, unloaded: bool = True) -> None:
            """When ComfyUI unloads a model, what it remembers of past rounds is freed too.

            ComfyUI also calls this without unloading, whenever the model is loaded again.
            """
            if unloaded:
                model.prefix_cache.clear()

        patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_DETACH, forget)
    return Loaded(model, patcher, name)


def _may_be_left_behind(module: nn.Module) -> None:
    """Give a module that fetches its weights itself what ComfyUI looks for on a layer that it may leave offloaded."""
    module.comfy_cast_weights = False
    module.weight = module.bias = None
    module.weight_function, module.bias_function = [], []


def _patcher_class(has_experts: bool) -> type:
    """ComfyUI's patcher, looked up late, since it is exchanged when the server starts.

    The one for dynamic VRAM brings over whole every parameter that is not some layer's `weight` or `bias`. Stacked
    experts are such, and the larger part of the model, so a model that has some gets the one that moves layer by layer.
    """
    core = comfy.model_patcher
    if not has_experts:
        return getattr(core, "CoreModelPatcher", core.ModelPatcher)

    class DenseFirst(core.ModelPatcher):
        def _load_list(self, *args: Any, **kwargs: Any) -> list:
            return _DenseFirst(super()._load_list(*args, **kwargs))

    return DenseFirst


class _DenseFirst(list):
    """ComfyUI's list of modules, each (sizes..., name, module, parameters), which it sorts by size.

    It loads from the large end as long as there is room, and unloads from the small one. The largest are the experts.
    But a token passes all of every other layer, of the flow head even once a step, and only a few experts: they are the
    ones to leave behind, so they go to the end that is loaded last and unloaded first.
    """

    def sort(self, *, reverse: bool = False) -> None:
        super().sort(key=lambda item: (not getattr(item[-2], "fetches_weights", False), *item[:-2]), reverse=reverse)


def ready(loaded: Loaded, memory: int = 0) -> Any:
    """The model, ready to compute, with `memory` bytes left free beside its weights. ComfyUI may load it in part."""
    if loaded.patcher is not None:
        comfy.model_management.load_models_gpu([loaded.patcher], memory_required=memory)
        keep(loaded.owner or loaded)
    return loaded.model


KEPT_SHARE = 0.25  # of the RAM, for models that no workflow uses at the moment


def keep(loaded: Loaded) -> None:
    """Keep a model alive for as long as ComfyUI's manager has it loaded, and the RAM is not wanted for others.

    Any other workflow makes ComfyUI's cache drop the loader's output, and a model that nobody holds would have to be
    read again when the user comes back. So the manager's own entry, which lives until the model is unloaded, holds it.
    Those that ran last are kept, as many as take KEPT_SHARE of the RAM together.
    """
    for entry in _entries():
        if entry.model is loaded.patcher:
            entry.ming_model = loaded
    make_room(0)


def make_room(coming: int) -> None:
    """Let go of kept models that KEPT_SHARE of the RAM does not hold beside `coming` bytes."""
    left = KEPT_SHARE * host_memory() - coming
    for entry in _entries():  # the one that ran last is the first
        if hasattr(entry, "ming_model"):
            patcher = entry.ming_model.patcher
            shares_ram = patcher.load_device.type in ("cpu", "mps")
            left -= patcher.model_size() - (0 if shares_ram else patcher.loaded_size())
            if left < 0:
                del entry.ming_model


def _entries() -> list[Any]:
    """What ComfyUI's manager has loaded."""
    return list(getattr(comfy.model_management, "current_loaded_models", ())) if comfy else []


# --- While a node runs --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Without ComfyUI: call listener(value, total, text) for every token of the node that runs."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


TEXT_EVERY = 0.1  # seconds: each text that is shown is sent whole


def progress(total: int, speaker: str = "") -> Callable[..., None]:
    """A function (value, text=None, *, total=..., picture=None) to call after every token; made as a node begins.

    It raises when the user has interrupted. `text` is all that was written so far, `picture` what was drawn so far.
    `speaker`: the class of a node that may show a text; what it showed in an earlier run is cleared.
    """
    if comfy:
        bar = comfy.utils.ProgressBar(total)
        _clear_text(speaker)
        shown = float("-inf")

        def report(
            value: int, text: str | None = None, *, total: int = total, picture: Image.Image | None = None
        ) -> None:
            nonlocal shown
            comfy.model_management.throw_exception_if_processing_interrupted()
            preview = ("JPEG", picture, comfy.cli_args.args.preview_size) if picture else None
            bar.update_absolute(value, total, preview)
            if text and time.monotonic() - shown > TEXT_EVERY:
                show_text(text, speaker)
                shown = time.monotonic()

        return report
    listener = _listener.get()

    def tell(value: int, text: str | None = None, *, total: int = total, picture: Image.Image | None = None) -> None:
        if listener:
            listener(value, total, text)

    return tell


def previews_wanted() -> bool:
    """Whether anybody looks on and has previews switched on; newer versions set the option for every prompt."""
    if not comfy or comfy.cli_args.args.preview_method == comfy.cli_args.LatentPreviewMethod.NoPreviews:
        return False
    return _watching() is not None


_has_text: set[tuple[str, str]] = set()  # (id, class) of nodes that show a text; ids are the same in many workflows


def show_text(text: str | None, speaker: str = "") -> None:
    """Show a text on the node that runs, as it is: the page would take markup in it for its own.

    `speaker`: its class, if a later run may have no text to show.
    """
    if not comfy or not text:
        return
    client, context = _watching(), comfy_execution.utils.get_executing_context()
    if client is not None and context is not None:
        _server().send_progress_text(html.escape(text, quote=False), context.node_id, client)
        if speaker:
            _has_text.add((context.node_id, speaker))


def _clear_text(speaker: str) -> None:
    """Take the text of an earlier run off the node that runs: this one may have nothing to say."""
    context = comfy_execution.utils.get_executing_context()
    if context is not None and (context.node_id, speaker) in _has_text:
        show_text(" ")  # the page ignores an empty one
        _has_text.discard((context.node_id, speaker))


def _watching() -> str | None:
    """The client that queued what runs, if it is still connected."""
    client = getattr(_server(), "client_id", None)
    return client if client in getattr(_server(), "sockets", ()) else None


def _server() -> Any:
    """ComfyUI's server, which is up before any pack is loaded; None where only its library is used."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


# --- Folders ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folders(*, output: str | Path, input: str | Path) -> Iterator[None]:
    """Without ComfyUI: where files are written and looked up."""
    token = _folders.set((Path(output), Path(input)))
    try:
        yield
    finally:
        _folders.reset(token)


def output_directory() -> Path:
    return Path(folder_paths.get_output_directory()) if folder_paths else _folders.get()[0]


def input_directory() -> Path:
    return Path(folder_paths.get_input_directory()) if folder_paths else _folders.get()[1]


def register_model_folder() -> None:
    """Add the category to ComfyUI's model folders, beside what extra_model_paths.yaml has put there."""
    if folder_paths:
        ours = os.path.join(folder_paths.models_dir, MODEL_FOLDER)
        paths, extensions = folder_paths.folder_names_and_paths.get(MODEL_FOLDER, ([], set()))
        if ours not in paths:
            paths = [*paths, ours]
        folder_paths.folder_names_and_paths[MODEL_FOLDER] = (paths, set(extensions) | {".safetensors"})


def model_folders() -> list[Path]:
    """Where checkpoint folders belong."""
    if folder_paths:
        return [Path(p) for p in folder_paths.get_folder_paths(MODEL_FOLDER)]
    return [own_model_folder()]


def own_model_folder() -> Path:
    """Where checkpoints go without ComfyUI: its models/ming if the pack lies in its custom_nodes, else models/ here."""
    if PACK.parent.name == "custom_nodes":
        return PACK.parent.parent / "models" / MODEL_FOLDER
    return PACK / "models"
