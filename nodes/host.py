"""The only file that imports ComfyUI: devices, memory, progress, interruption, folders.

Everything here also works without ComfyUI: models then stay on the device they were loaded to, progress goes to a
listener (`listen`), and files go to the folders given by `folders`.
"""

from __future__ import annotations

import contextlib
import functools
import html
import logging
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..ming_core import Engine, MingTok, UniVision
from ..ming_core.experts import StackedWeight
from ..ming_core.json_files import printable
from ..ming_core.quantization import packed_state_dict


def _import_comfyui() -> tuple[Any, Any, Any]:
    """ComfyUI's modules comfy, comfy_execution and folder_paths, or three times None where it is not installed."""
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
        if "comfy" in sys.modules:  # an incomplete ComfyUI should say what it lacks, not be treated as absent
            raise
        return None, None, None
    return comfy, comfy_execution, folder_paths


comfy, comfy_execution, folder_paths = _import_comfyui()

log = logging.getLogger(__name__)

PACK = Path(__file__).resolve().parent.parent
MODEL_FOLDER = "ming"  # the category in ComfyUI's models/
LORA_FOLDER = "loras"  # core's own category
PACK_LORAS = PACK / "models" / LORA_FOLDER  # those that come with the pack

Model = TypeVar("Model", Engine, MingTok)
Listener = Callable[[int, int, "str | None"], None]
_listener: ContextVar[Listener | None] = ContextVar("ming_listener", default=None)
_folders: ContextVar[tuple[Path, Path]] = ContextVar("ming_folders", default=(PACK / "output", PACK / "input"))


# --- Devices and dtypes -------------------------------------------------------------------------------------------

SHARES_RAM = ("cpu", "mps", "privateuseone")  # the last is DirectML, which does not tell how much memory it has


def device() -> torch.device:
    """The device that models compute on."""
    if comfy:
        return comfy.model_management.get_torch_device()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def offload_device() -> torch.device:
    """The device that a freshly loaded model is on, before it computes."""
    return comfy.model_management.unet_offload_device() if comfy else device()


def images_device() -> torch.device:
    """The device for IMAGE and MASK outputs: the GPU when ComfyUI is started with --gpu-only."""
    return comfy.model_management.intermediate_device() if comfy else torch.device("cpu")


def half_dtype(on: torch.device) -> torch.dtype:
    """The best 16-bit dtype on a device: bf16, else fp16; float32 where ComfyUI recommends neither."""
    if on.type == "cpu":
        return torch.bfloat16  # works on every CPU; ComfyUI says no, because it is slow on many
    if comfy:
        if comfy.model_management.should_use_bf16(on):
            return torch.bfloat16
        return torch.float16 if comfy.model_management.should_use_fp16(on) else torch.float32
    ampere = on.type != "cuda" or torch.cuda.get_device_capability(on)[0] >= 8
    return torch.bfloat16 if ampere else torch.float16


def total_memory(on: torch.device) -> int:
    """Total bytes of a device's memory, including what ComfyUI could free; of the RAM where the device shares it."""
    if on.type in SHARES_RAM:
        return host_memory()
    if comfy:
        return int(comfy.model_management.get_total_memory(on))
    return torch.cuda.get_device_properties(on).total_memory


def host_memory() -> int:
    """Total bytes of RAM."""
    if comfy:
        return int(comfy.model_management.total_ram) << 20  # ComfyUI counts in MiB
    return psutil.virtual_memory().total


# --- Models under ComfyUI's memory management ---------------------------------------------------------------------


@dataclass(eq=False)  # compared by identity, so that it can be a weak reference's target
class Loaded(Generic[Model]):
    """A loaded model as it travels between nodes.

    patcher  ComfyUI's handle for moving the network between devices; None without ComfyUI
    owner    the Ming-UniVision that this MingTok is a part of, or that this one has in common with others but its LoRAs
    """

    model: Model
    patcher: Any
    name: str
    owner: Loaded[Engine] | None = None

    def __repr__(self) -> str:
        return f"{type(_network(self.model)).__name__}({self.name})"


def _network(model: Engine | MingTok) -> UniVision | MingTok:
    return model.network if isinstance(model, Engine) else model


class ManagedModel(nn.Module):
    """The module given to a patcher. ComfyUI sets attributes such as `device` on it, which our networks compute."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.device = device
        self.patched_by: Any = None  # identifies the patches under which it was loaded last


def managed(model: Model, name: str) -> Loaded[Model]:
    """Hand a loaded Engine or MingTok to ComfyUI's memory management."""
    if not comfy:
        return Loaded(model, None, name)
    network = _network(model)
    network.compute_on(device())
    has_experts = any(isinstance(module, StackedWeight) for module in network.modules())
    patcher = _patcher_class(has_experts)(ManagedModel(network, offload_device()), device(), offload_device())
    if isinstance(model, Engine):
        # ComfyUI 0.3.64 has no graphs of its own, and so no switch for them
        model.network.language_model.cuda_graphs = not getattr(comfy.cli_args.args, "disable_cuda_graphs", True)
        _clear_cache_on_unload(patcher, model)
    return Loaded(model, patcher, name)


def _clear_cache_on_unload(patcher: Any, engine: Engine) -> None:
    """When ComfyUI unloads a model, free its prefix cache too."""

    def on_detach(patcher: Any, unloaded: bool = True) -> None:
        if unloaded:  # ComfyUI also calls this, with False, whenever it loads the model again
            engine.prefix_cache.clear()

    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_DETACH, on_detach)


def load_to_gpu(loaded: Loaded[Model], memory: int = 0) -> Model:
    """The model, ready to compute, with `memory` bytes left free beside its weights. ComfyUI may load only a part."""
    if loaded.patcher is not None:
        _check_patches(loaded.patcher)
        comfy.model_management.load_models_gpu([loaded.patcher], memory_required=memory)
        _forget_other_patches(loaded.owner or loaded)
        retain(loaded.owner or loaded)
    return loaded.model


def _check_patches(patcher: Any) -> None:
    """Raises ValueError for changes that another pack made to a patcher and that would have no effect here.

    ComfyUI itself applies patches to the weights of its own layers. Those of our layers (norms, quantized layers,
    experts, the word embedding) it would apply in part or not at all, and the others are meant for its samplers.
    """
    keys = [*patcher.patches, *patcher.weight_wrapper_patches]
    unfit = [f"patches of {key}" for key in keys if not _is_patchable(patcher.model, key)]
    if any(patcher.hook_patches.values()) or patcher.forced_hooks:
        unfit.append("hooks")
    unfit += [f"wrappers for {kind}" for kind, wrappers in patcher.wrappers.items() if any(wrappers.values())]
    options = {**patcher.model_options, **patcher.model_options.get("transformer_options", {})}
    unfit += [f"the option {name}" for name in options if name != "transformer_options"]
    if "manual_cast_dtype" in patcher.object_patches:
        unfit.append("another dtype to compute in")
    if unfit:
        more = f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
        raise ValueError(
            f"another node changed this model in a way that has no effect on it: {unfit[0]}{more}. Remove that node; "
            "only weights and biases of linear and normalization layers that are not quantized can be patched"
        )


def _is_patchable(model: nn.Module, key: str) -> bool:
    """Whether ComfyUI applies patches of this weight, wherever the weight is: true of its own layers."""
    name, _, parameter = key.rpartition(".")
    module = model.get_submodule(name)
    return hasattr(module, "comfy_cast_weights") and parameter in ("weight", "bias") and not _rests(module)


def _forget_other_patches(loaded: Loaded[Any]) -> None:
    """Clear the prefix cache when the weights are patched in another way than in the last round."""
    managed_model, patches = loaded.patcher.model, loaded.patcher.patches_uuid
    if isinstance(loaded.model, Engine) and managed_model.patched_by not in (None, patches):
        loaded.model.prefix_cache.clear()
    managed_model.patched_by = patches


RETAINED_SHARE = 0.25  # of the RAM, for models that no current workflow uses


def retain(loaded: Loaded[Any]) -> None:
    """Keep a model alive while ComfyUI has it loaded, as long as the RAM is not needed for other models.

    When another workflow runs, ComfyUI's cache drops the loader's output. A model that nothing else refers to would
    then have to be read from disk again when the user comes back. So ComfyUI's own entry for a loaded model, which
    lives until the model is unloaded, holds the reference. The most recently used models are kept, as many as fit
    into RETAINED_SHARE of the RAM.
    """
    for entry in _loaded_entries():
        if entry.model is loaded.patcher:
            entry.ming_model = loaded
    make_room(0)


def make_room(incoming: int) -> None:
    """Release retained models until those left fit into RETAINED_SHARE of the RAM together with `incoming` bytes."""
    left = RETAINED_SHARE * host_memory() - incoming
    for entry in _loaded_entries():  # most recently used first
        if hasattr(entry, "ming_model"):
            patcher = entry.ming_model.patcher
            shares_ram = patcher.load_device.type in SHARES_RAM
            left -= patcher.model_size() - (0 if shares_ram else patcher.loaded_size())
            if left < 0:
                del entry.ming_model


def _loaded_entries() -> list[Any]:
    """ComfyUI's entries for the models that it has loaded."""
    return list(getattr(comfy.model_management, "current_loaded_models", ())) if comfy else []


# --- Layers and patchers ------------------------------------------------------------------------------------------


@functools.cache
def operations() -> Any:
    """The layer classes to build models from: ComfyUI's own, which can stay in RAM and stream to the GPU on use."""
    if not comfy:
        return nn
    base: Any = comfy.ops.disable_weight_init
    base_linear: Any = base.Linear
    base_embedding: Any = base.Embedding

    class Operations(base):
        """Weights are stored in the compute dtype, so a layer casts only when ComfyUI tells it to."""

        class Linear(base_linear):
            def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
                """Overridden so that newer versions create the parameters at once, for our loader to fill."""
                super()._load_from_state_dict(*args, **kwargs)

        class Embedding(base_embedding):
            """A table that stays where it was loaded to, and is looked up there (`LanguageModel.embed`)."""

            rests = True  # our patcher neither counts it nor moves it
            weight: Tensor

            def forward(self, ids: Tensor) -> Tensor:
                """Overridden so that the table is never copied as a whole."""
                return F.embedding(ids, self.weight)

            def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
                """Follow a change of the dtype, but not to another device."""
                return super()._apply(lambda weight: weight.to(fn(weight.new_empty(0)).dtype), recurse)

    return Operations


def _patcher_class(has_experts: bool) -> Any:
    """ComfyUI's patcher class, looked up late because the server replaces it when it starts.

    The patcher for dynamic VRAM moves every parameter whole that is not a layer's `weight` or `bias`. Stacked experts
    are such parameters, and the larger part of the model, so a model with experts gets the patcher that moves layer by
    layer.
    """
    patcher: Any = comfy.model_patcher.ModelPatcher
    if not has_experts:
        return getattr(comfy.model_patcher, "CoreModelPatcher", patcher)

    class ExpertsPatcher(patcher):
        """Loads the experts itself, into the room that all other layers leave, and leaves them behind first.

        A token passes through all of every other layer (through the flow head once a step) and through a few experts
        only, so the experts are the ones to leave behind. ComfyUI would keep room free for streaming them whole, up to
        three layers of them; but experts that are left behind fetch only what is routed to, and need no such buffer.
        """

        size: int

        def model_size(self) -> int:
            """Bytes that a GPU holds when all is loaded."""
            if self.size <= 0:
                with packed_state_dict():
                    resting = sum(_parameter_bytes(module) for module in self.model.modules() if _rests(module))
                    self.size = super().model_size() - resting
            return self.size

        def _load_list(self, *args: Any, **kwargs: Any) -> list:
            """The modules that ComfyUI loads, as (sizes..., name, module, parameters)."""
            with packed_state_dict():  # it counts the bytes of every layer; none is unpacked for that
                listed = super()._load_list(*args, **kwargs)
            return [entry for entry in listed if not (_is_stacked(entry[-2]) or _rests(entry[-2]))]

        def load(
            self,
            device_to: Any = None,
            lowvram_model_memory: float = 0,
            force_patch_weights: bool = False,
            full_load: bool = False,
        ) -> None:
            experts, state = self._experts(), self.model
            if full_load:  # then ComfyUI moves and counts everything
                for name, stack in experts:
                    self._load_stack(name, stack, device_to)
            room = lowvram_model_memory - sum(_parameter_bytes(stack) for _, stack in experts if _is_loaded(stack))
            super().load(device_to, room, force_patch_weights, full_load)
            if full_load:
                return
            # what ComfyUI has counted is the other layers, and it keeps a buffer for those that it left behind
            room = lowvram_model_memory - getattr(state, "model_offload_buffer_memory", 0)
            for name, stack in experts:
                size = _parameter_bytes(stack)
                if _is_loaded(stack) or state.model_loaded_weight_memory + size < room:
                    state.model_loaded_weight_memory += size
                    self._load_stack(name, stack, device_to)
                else:
                    state.model_lowvram = True  # there is more to load when room comes
                    self._each_weight("pin_weight_to_device", name, stack)
            loaded = sum(_is_loaded(stack) for _, stack in experts)
            log.info("experts: %d of %d stacks are loaded, the rest is fetched by need", loaded, len(experts))

        def partially_unload(self, device_to: Any, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> float:
            freed = 0
            for name, stack in reversed(self._experts()):
                if freed < memory_to_free and _is_loaded(stack):
                    freed += _parameter_bytes(stack)
                    stack.to(device_to)
                    stack.comfy_patched_weights = False
                    self._each_weight("pin_weight_to_device", name, stack)
            self.model.model_loaded_weight_memory -= freed
            self.model.model_lowvram = True
            if freed >= memory_to_free:
                return freed
            return freed + super().partially_unload(device_to, memory_to_free - freed, *args, **kwargs)

        def _load_stack(self, name: str, stack: StackedWeight, device_to: Any) -> None:
            if not _is_loaded(stack):
                self._each_weight("unpin_weight", name, stack)
                stack.to(device_to)
                stack.comfy_patched_weights = True

        def _each_weight(self, method: str, name: str, stack: StackedWeight) -> None:
            """Call a method that newer patchers have for every weight of these experts."""
            for parameter, _ in stack.named_parameters(recurse=False):
                getattr(self, method, lambda key: None)(f"{name}.{parameter}")

        def _experts(self) -> list[tuple[str, StackedWeight]]:
            """The stacks of experts, layer by layer: a layer is fast only when both of its stacks are loaded."""
            return [(name, module) for name, module in self.model.named_modules() if _is_stacked(module)]

    return ExpertsPatcher


def _is_stacked(module: nn.Module) -> bool:
    return isinstance(module, StackedWeight)


def _rests(module: nn.Module) -> bool:
    return getattr(module, "rests", False)


def _is_loaded(stack: StackedWeight) -> bool:
    """Whether it has ComfyUI's mark of a loaded module, which ComfyUI takes off when it unloads the model."""
    return getattr(stack, "comfy_patched_weights", False)


def _parameter_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


# --- While a node runs --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Without ComfyUI: call listener(value, total, text) for every token of the running node."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


TEXT_INTERVAL = 0.1  # seconds between two updates of a growing text, each of which sends all of it


def progress(total: int, node_class: str = "") -> Callable[..., None]:
    """Start a node's progress bar. Returns report(value, text=None, *, total=..., image=None) for every token.

    text        all that was written so far
    image       what was drawn so far
    node_class  of a node that may show text; the text of its earlier run is cleared

    The report raises when the user has interrupted.
    """
    return _comfyui_progress(total, node_class) if comfy else _listener_progress(total)


def _comfyui_progress(total: int, node_class: str) -> Callable[..., None]:
    bar = comfy.utils.ProgressBar(total)
    _clear_text(node_class)
    last_shown = float("-inf")

    def report(value: int, text: str | None = None, *, total: int = total, image: Image.Image | None = None) -> None:
        nonlocal last_shown
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = ("JPEG", image, comfy.cli_args.args.preview_size) if image else None
        bar.update_absolute(value, total, preview)
        if text and time.monotonic() - last_shown > TEXT_INTERVAL:
            show_text(text, node_class)
            last_shown = time.monotonic()

    return report


def _listener_progress(total: int) -> Callable[..., None]:
    listener = _listener.get()

    def report(value: int, text: str | None = None, *, total: int = total, image: Image.Image | None = None) -> None:
        if listener:
            listener(value, total, text)

    return report


def previews_wanted() -> bool:
    """Whether previews are switched on and a client is connected. Newer versions set the option for every prompt."""
    if not comfy or comfy.cli_args.args.preview_method == comfy.cli_args.LatentPreviewMethod.NoPreviews:
        return False
    return _client() is not None


# (id, class) of nodes that show text. The class is needed too: ids repeat across workflows.
_nodes_with_text: set[tuple[str, str]] = set()


def show_text(text: str | None, node_class: str = "") -> None:
    """Show plain text on the running node; markup is escaped, because the page would interpret it.

    node_class: the node's class, if a later run of it may have no text to show.
    """
    if not comfy or not text:
        return
    client, context = _client(), comfy_execution.utils.get_executing_context()
    if client is not None and context is not None:
        _server().send_progress_text(html.escape(text, quote=False), context.node_id, client)
        if node_class:
            _nodes_with_text.add((context.node_id, node_class))


def _clear_text(node_class: str) -> None:
    """Remove the text of an earlier run from the running node, because this run may have none."""
    context = comfy_execution.utils.get_executing_context()
    if context is not None and (context.node_id, node_class) in _nodes_with_text:
        show_text(" ")  # the page ignores an empty text
        _nodes_with_text.discard((context.node_id, node_class))


# A node class like core's PreviewImage, for images that nodes show without ComfyUI. None: they show nothing.
preview_node: Any = None


def preview(images: Tensor) -> dict:
    """What an output node returns as "ui", so that images [B, H, W, 3] are shown on it."""
    core_nodes: Any = sys.modules.get("nodes") if comfy else None
    shows = getattr(core_nodes, "PreviewImage", None) if comfy else preview_node
    return shows().save_images(images)["ui"] if shows else {}


LANGUAGE_ROUTE = "/ming_univision/language"  # web/page_language.js posts to it
MAX_PAGES = 1000  # whose languages are kept

_page_languages: OrderedDict[str, str] = OrderedDict()  # client id -> code, such as zh
_prompting_client: ContextVar[str | None] = ContextVar("ming_prompting_client")  # set where a prompt is received


def follow_page_languages() -> None:
    """Learn the language of every page, which tells it when it connects, and which page a prompt comes from."""
    server = _server()
    if server is None:
        return
    server.routes.post(LANGUAGE_ROUTE)(_note_page_language)
    server.add_on_prompt_handler(_note_prompting_client)


def page_language() -> str:
    """The language of the page whose prompt is checked or runs; "" for programs that use the API."""
    client = _prompting_client.get(_client())
    return _page_languages.get(client, "") if client else ""


async def _note_page_language(request: Any) -> Any:
    from aiohttp import web  # comes with ComfyUI

    try:
        told = await request.json()
        client, language = told["client"], told["language"]
    except (ValueError, TypeError, KeyError):
        return web.Response(status=400, text='post {"client": id of the page, "language": its code}')
    if isinstance(client, str) and isinstance(language, str) and len(client) <= 100 and len(language) <= 20:
        _page_languages[client] = language
        _page_languages.move_to_end(client)
        while len(_page_languages) > MAX_PAGES:
            _page_languages.popitem(last=False)
    return web.Response(status=204)


def _note_prompting_client(prompt: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a prompt are checked in the task that receives it, before it becomes the server's current one."""
    client = prompt.get("client_id")
    _prompting_client.set(client if isinstance(client, str) else None)
    return prompt


def _client() -> str | None:
    """The client that queued the running prompt, if it is still connected."""
    client = getattr(_server(), "client_id", None)
    return client if client in getattr(_server(), "sockets", ()) else None


def _server() -> Any:
    """ComfyUI's server, which starts before packs are loaded; None where ComfyUI is used as a library."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


# --- Folders ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def folders(*, output: str | Path, input: str | Path) -> Iterator[None]:
    """Without ComfyUI: the folders that files are written to and read from."""
    token = _folders.set((Path(output), Path(input)))
    try:
        yield
    finally:
        _folders.reset(token)


def output_directory() -> Path:
    return Path(folder_paths.get_output_directory()) if folder_paths else _folders.get()[0]


def input_directory() -> Path:
    return Path(folder_paths.get_input_directory()) if folder_paths else _folders.get()[1]


def register_model_folders() -> None:
    """Add models/ming to ComfyUI's model folders, beside those from extra_model_paths.yaml, and the pack's LoRAs.

    The pack's folder for LoRAs is the last one: people's own files come first, and other packs save into the first.
    """
    if folder_paths:
        ours = os.path.join(folder_paths.models_dir, MODEL_FOLDER)
        paths, extensions = folder_paths.folder_names_and_paths.get(MODEL_FOLDER, ([], set()))
        if ours not in paths:
            paths = [*paths, ours]
        folder_paths.folder_names_and_paths[MODEL_FOLDER] = (paths, set(extensions) | {".safetensors"})
        folder_paths.add_model_folder_path(LORA_FOLDER, str(PACK_LORAS))


def model_folders() -> list[Path]:
    """The folders that checkpoint folders are looked for in."""
    if folder_paths:
        return [Path(p) for p in folder_paths.get_folder_paths(MODEL_FOLDER)]
    return [own_model_folder()]


def own_model_folder() -> Path:
    """The model folder without ComfyUI: models/ming of the ComfyUI around the pack, else models/ of the pack."""
    return _own_models() / MODEL_FOLDER if _in_comfyui() else _own_models()


def lora_files() -> dict[str, Path]:
    """The safetensors files in the folders for LoRAs, by the names in lists: cats/first.safetensors."""
    if folder_paths:
        names = folder_paths.get_filename_list(LORA_FOLDER)  # core remembers it until a folder changes
        found = {name.replace(os.sep, "/"): Path(folder_paths.get_full_path(LORA_FOLDER, name) or "") for name in names}
    else:
        found = {}
        for folder in dict.fromkeys((own_lora_folder(), PACK_LORAS)):
            for path in sorted(folder.rglob("*")):
                found.setdefault(path.relative_to(folder).as_posix(), path)
    return {name: path for name, path in found.items() if path.suffix == ".safetensors" and name == printable(name)}


def lora_folder() -> Path:
    """Where people put their LoRAs: the first of ComfyUI's folders for them, or the own one without ComfyUI."""
    return Path(folder_paths.get_folder_paths(LORA_FOLDER)[0]) if folder_paths else own_lora_folder()


def own_lora_folder() -> Path:
    """The folder for LoRAs without ComfyUI: models/loras of the ComfyUI around the pack, else of the pack."""
    return _own_models() / LORA_FOLDER


def _own_models() -> Path:
    return (PACK.parent.parent if _in_comfyui() else PACK) / "models"


def _in_comfyui() -> bool:
    return PACK.parent.name == "custom_nodes"
