"""LoRA files: reading those of several trainers, matched with the layers of a model, and writing our own.

    ours    <layer>.lora_A [r, K], <layer>.lora_B [N, r], <layer>.alpha; layers by their published names
    PEFT's  base_model.model.<layer>.lora_A.weight, ...lora_B.weight; alpha in adapter_config.json beside the file
    kohya's lora_unet_<layer, with _ for .>.lora_down.weight, ...lora_up.weight, ...alpha

A layer may be any linear layer of the language model but its routers, of the projection and of the flow head. Experts,
which are stacked in the model, are one by one in a file.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .adapters import Lora, LowRank
from .checkpoint.keys import published_name
from .experts import StackedWeight
from .files import FileError, write_whole
from .quantization import QuantizedWeight
from .quantization.formats import width_of
from .univision import UniVision

log = logging.getLogger(__name__)

ADAPTED = ("language_model.", "linear_proj.", "flow_head.")  # beginnings of the names of layers that may have a branch
ROUTERS = re.compile(r"\.(gate|image_gate)$")
EXPERT_PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}  # rows of a stacked weight, in this order
PREFIXES = (
    "",
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "lora_unet_",
    "lora_transformer_",
    "lora_te_",
    "lycoris_",
)
KEY = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A|lora_B|lora_down|lora_up|alpha)(\.\w+)??(\.weight)?")
PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "alpha": "alpha"}
OTHER_KINDS = {  # parts of keys -> kinds of files whose change is not up @ down
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "lora_mid": "LoCon with a core tensor",
    "oft_": "OFT",
    "lora_embedding_": "a LoRA of the word embedding",
    "lora_B.bias": "a LoRA with biases",
    "lora_up.bias": "a LoRA with biases",
}
PEFT_CONFIG = "adapter_config.json"
PEFT_FILE = "adapter_model.safetensors"


class Target(NamedTuple):
    """A linear layer that may have a branch, or that of one expert: some rows of a slice of a stacked weight."""

    module: str  # its name in the network
    expert: int | None
    rows: slice
    shape: tuple[int, int]  # [N, K] of the layer itself


class Pair(NamedTuple):
    """What a file has for a layer."""

    down: Tensor  # [r, K]
    up: Tensor  # [N, r]
    scale: float


# --- Layers -------------------------------------------------------------------------------------------------------


def targets(network: UniVision) -> dict[str, Target]:
    """The layers that may have a branch, by their published names."""
    found: dict[str, Target] = {}
    for name, module in network.named_modules():
        if not name.startswith(ADAPTED) or ROUTERS.search(name):
            continue
        if isinstance(module, StackedWeight):
            found.update(_experts(name, module))
        elif isinstance(module, (nn.Linear, QuantizedWeight)):
            shape = _shape(module)
            found[published_name(name)] = Target(name, None, slice(0, shape[0]), shape)
    return found


def _experts(name: str, module: StackedWeight) -> Iterable[tuple[str, Target]]:
    parent, _, stack = name.rpartition(".")
    rows, width = _shape(module)
    parts = EXPERT_PARTS[stack]
    height = rows // len(parts)
    for expert in range(len(_values(module))):
        for i, part in enumerate(parts):
            place = slice(i * height, (i + 1) * height)
            yield f"{published_name(parent)}.{expert}.{part}", Target(name, expert, place, (height, width))


def _values(module: nn.Module) -> Tensor:
    values = module.weight if isinstance(module, nn.Linear) else module.values
    assert isinstance(values, Tensor)
    return values


def _shape(module: nn.Module) -> tuple[int, int]:
    """[N, K] of a linear layer, or of each of stacked ones."""
    values = _values(module)
    return values.shape[-2], width_of(values) if isinstance(module, QuantizedWeight) else values.shape[-1]


class _Names:
    """Finds a layer by the name that a file gives it."""

    def __init__(self, layers: Mapping[str, Target]) -> None:
        self.layers, self._spellings = layers, dict[str, str]()
        for name, target in layers.items():
            own = target.module
            if target.expert is not None:  # as in a file: ....experts.17.up_proj
                own = f"{own.rpartition('.')[0]}.{target.expert}.{name.rpartition('.')[2]}"
            # the whole model or its language model may have been what was trained
            for spelling in (name, own, name.removeprefix("model."), own.removeprefix("language_model.")):
                self._spellings.setdefault(spelling, name)
                self._spellings.setdefault(spelling.replace(".", "_"), name)

    def find(self, given: str) -> str | None:
        """The published name of a layer; None: this model has no such layer."""
        for prefix in PREFIXES:
            if given.startswith(prefix) and given.removeprefix(prefix) in self._spellings:
                return self._spellings[given.removeprefix(prefix)]
        return None


# --- Reading ------------------------------------------------------------------------------------------------------


def read_lora(path: str | Path, network: UniVision) -> Lora:
    """Read a LoRA for this network.

    Layers that the network does not have are left out, with a line in the log. Raises FileError for a file that is not
    a LoRA, of which nothing fits, or in which a layer has another shape than in the network.
    """
    path = Path(path)
    tensors = _read(path)
    _refuse_other_kinds(path, tensors)
    by_layer = _by_layer(path, tensors)
    layers, names = targets(network), _Names(targets(network))
    scale_of = _peft_scale(path)
    fitting: dict[str, Pair] = {}
    unknown: list[str] = []
    for given, parts in by_layer.items():
        name = names.find(given)
        if name is None:
            unknown.append(given)
        elif name in fitting:
            raise FileError(f"{path}: the layer {name} is in it twice, the second time as {given}: get another file")
        else:
            fitting[name] = _pair(path, given, parts, layers[name], scale_of)
    if not fitting:
        raise FileError(
            f"{path}: nothing in this LoRA fits this model. It is for {len(unknown)} layers such as {unknown[0]}, and "
            f"this model has layers such as {next(iter(layers))}: it belongs to another model, choose another file"
        )
    if unknown:
        log.warning(
            "%s: %d of %d layers fit this model; left out: %s",
            path.name,
            len(fitting),
            len(by_layer),
            ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""),
        )
    else:
        log.info("%s: all %d layers fit", path.name, len(fitting))
    return Lora(path.name, _stacked(fitting, layers, network))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            # cloned: a mapped tensor would keep the file open, and change when the file does
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path}: damaged or not a safetensors file ({error}); get it again") from None


def _refuse_other_kinds(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        for part, kind in OTHER_KINDS.items():
            if part in key:
                raise FileError(
                    f"{path}: this is {kind} (it has {key}), and only plain LoRA can be used: lora_A, lora_B"
                )


def _by_layer(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors "down", "up" and perhaps "alpha" of every layer, by the names that the file gives them."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            continue
        if not tensor.is_floating_point() and match["part"] != "alpha":
            raise FileError(f"{path}: {key} holds {tensor.dtype}, and a LoRA is of floating-point numbers")
        by_layer.setdefault(match["layer"], {})[PARTS[match["part"]]] = tensor
    by_layer = {layer: parts for layer, parts in by_layer.items() if set(parts) != {"alpha"}}
    if not by_layer:
        raise FileError(f"{path}: this is not a LoRA: it has no lora_A and lora_B, nor lora_down and lora_up")
    for layer, parts in by_layer.items():
        for part, other in (("down", "lora_A"), ("up", "lora_B")):
            if part not in parts:
                raise FileError(f"{path}: {layer} has no {other} ({part}): the file is incomplete, get it again")
    return by_layer


def _pair(path: Path, given: str, parts: Mapping[str, Tensor], target: Target, scale_of: Any) -> Pair:
    """The tensors of one layer, checked."""
    down, up = parts["down"], parts["up"]
    rows, width = target.shape
    if down.ndim != 2 or up.ndim != 2 or down.shape[1] != width or up.shape[0] != rows or down.shape[0] != up.shape[1]:
        raise FileError(
            f"{path}: {given} is {list(up.shape)} by {list(down.shape)}, and that layer of this model is "
            f"[{rows}, {width}]: the LoRA belongs to another model, choose another file"
        )
    rank = down.shape[0]
    if rank == 0 or not (down.isfinite().all() and up.isfinite().all()):
        raise FileError(f"{path}: {given} holds NaN, infinite values or nothing: the file is damaged, get it again")
    scale = float(parts["alpha"]) / rank if "alpha" in parts else scale_of(given, rank)
    return Pair(down, up, scale)


def _peft_scale(path: Path) -> Any:
    """scale(layer, rank) of a file without alphas: from PEFT's config beside it; 1 without one."""
    config: dict[str, Any] = {}
    if path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():
        try:
            config = json.loads((path.parent / PEFT_CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileError(f"{path.parent / PEFT_CONFIG}: cannot be read ({error}); get it again") from None

    def scale(layer: str, rank: int) -> float:
        alpha = config.get("lora_alpha", rank)
        for pattern, value in config.get("alpha_pattern", {}).items():
            if re.fullmatch(rf"(.*\.)?{pattern}", layer):
                alpha = value
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    return scale


def _stacked(pairs: Mapping[str, Pair], layers: Mapping[str, Target], network: UniVision) -> dict[str, LowRank]:
    """Branches by the names of modules; those of stacked experts are stacked too."""
    found: dict[str, LowRank] = {}
    stacks: dict[str, list[tuple[Target, Pair]]] = {}
    for name, pair in pairs.items():
        target = layers[name]
        if target.expert is None:
            found[target.module] = LowRank(*pair)
        else:
            stacks.setdefault(target.module, []).append((target, pair))
    for module, parts in stacks.items():
        found[module] = _stack(parts, network.get_submodule(module))
    return found


def _stack(parts: list[tuple[Target, Pair]], module: nn.Module) -> LowRank:
    """The branches of experts in one; what an expert has no branch for is zeros."""
    count, (rows, width) = len(_values(module)), _shape(module)
    ranks = [0] * count
    for target, pair in parts:
        assert target.expert is not None
        ranks[target.expert] += len(pair.down)  # gate and up are rows of one weight: their ranks side by side
    down = torch.zeros(count, max(ranks), width, dtype=parts[0][1].down.dtype, device="cpu")
    up = torch.zeros(count, rows, max(ranks), dtype=parts[0][1].up.dtype, device="cpu")
    filled = [0] * count
    scale = parts[0][1].scale
    for target, pair in parts:
        assert target.expert is not None
        place = slice(filled[target.expert], filled[target.expert] + len(pair.down))
        filled[target.expert] = place.stop
        down[target.expert, place] = pair.down
        # as a rule all experts share a scale; another one is multiplied in
        up[target.expert, target.rows, place] = pair.up * (pair.scale / scale if scale else 0.0)
    return LowRank(down, up, scale)


# --- Writing ------------------------------------------------------------------------------------------------------


def save_lora(path: str | Path, layers: Mapping[str, LowRank], network: UniVision) -> None:
    """Write branches, by the names of the network's modules, as a file that `read_lora` reads. Raises FileError."""
    tensors: dict[str, Tensor] = {}
    for name, target in targets(network).items():
        layer = layers.get(target.module)
        if layer is None:
            continue
        own = () if target.expert is None else (target.expert,)  # the slice of a stack that is this expert's
        down, up = layer.down[own], layer.up[(*own, target.rows)]
        alpha = torch.tensor(layer.scale * len(down), dtype=torch.float32, device="cpu")
        for part, tensor in (("lora_A", down), ("lora_B", up), ("alpha", alpha)):
            tensors[f"{name}.{part}"] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    write_whole(path, save(tensors))
