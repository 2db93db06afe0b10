"""LoRA files: reading those of several trainers, matched with the layers of a model, and writing our own.

    ours    <layer>.lora_A [r, K], <layer>.lora_B [N, r], <layer>.alpha; layers by their published names
    PEFT's  base_model.model.<layer>.lora_A.weight, ...lora_B.weight; alpha in adapter_config.json beside the file
    kohya's lora_unet_<layer, with _ for .>.lora_down.weight, ...lora_up.weight, ...alpha

A layer may be any linear layer of the language model but its routers, of the projection and of the flow head. Experts,
which are stacked in the model, are one by one in a file.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .adapters import Lora, LowRank
from .checkpoint.keys import SAFETENSORS_DTYPES, published_name
from .checks import described
from .experts import StackedWeight
from .files import TensorInfo, read_header, write_whole
from .json_files import FileError, read_json
from .quantization import QuantizedWeight
from .quantization.formats import width_of
from .univision import UniVision

log = logging.getLogger(__name__)

ADAPTED = ("language_model.", "linear_proj.", "flow_head.")  # beginnings of the names of layers that may have a branch
ROUTERS = re.compile(r"\.(gate|image_gate)$")
EXPERT_PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}  # rows of a stacked weight, in this order
PEFT_PREFIX = "base_model.model."
PREFIXES = (
    "",
    PEFT_PREFIX,
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
GET_AGAIN = "get it again"
ALPHA_DTYPES = (*SAFETENSORS_DTYPES, "F64", "I64", "I32", "I16", "I8", "U8")
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
    stored, _ = read_header(path, remedy=GET_AGAIN)
    _refuse_other_kinds(path, stored)
    by_layer, layers = _by_layer(path, stored), targets(network)
    found = _matched(path, by_layer, layers)
    peft = _peft_config(path)
    pairs: dict[str, Pair] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            for name, given in found.items():
                # cloned: a mapped tensor would keep the file open, and change when the file does
                tensors = {part: file.get_tensor(info.key).clone() for part, info in by_layer[given].items()}
                pairs[name] = _pair(path, given, tensors, peft)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} cannot be read ({error}): {GET_AGAIN}") from error
    return Lora(path.name, _by_module(pairs, layers, network))


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that `read_lora` reads: this one, and what PEFT writes beside it, which need not be there."""
    return (path, path.parent / PEFT_CONFIG) if path.name == PEFT_FILE else (path,)


def _refuse_other_kinds(path: Path, keys: Iterable[str]) -> None:
    for key in keys:
        for part, kind in OTHER_KINDS.items():
            if part in key:
                raise FileError(f"{path} is {kind} (it has {key}), and only plain LoRA can be used: get it as one")


def _by_layer(path: Path, stored: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors "down", "up" and perhaps "alpha" of every layer, by the names that the file gives them."""
    by_layer: dict[str, dict[str, TensorInfo]] = {}
    for key, info in stored.items():
        if match := KEY.fullmatch(key):
            by_layer.setdefault(match["layer"], {})[PARTS[match["part"]]] = info
    by_layer = {layer: parts for layer, parts in by_layer.items() if set(parts) != {"alpha"}}
    if not by_layer:
        raise FileError(
            f"{path} is not a LoRA: it has no lora_A and lora_B, nor lora_down and lora_up; choose another file"
        )
    for layer, parts in by_layer.items():
        for part, names in (("down", "lora_A or lora_down"), ("up", "lora_B or lora_up")):
            if part not in parts:
                raise FileError(f"{path}: {layer} has no {names}: the file is incomplete, {GET_AGAIN}")
            if parts[part].dtype not in SAFETENSORS_DTYPES:
                raise FileError(
                    f"{path}: {parts[part].key} is stored as {parts[part].dtype}, and a LoRA must be stored as one of "
                    f"{', '.join(SAFETENSORS_DTYPES)}: get it as one of these"
                )
        alpha = parts.get("alpha")
        if alpha and (math.prod(alpha.shape) != 1 or alpha.dtype not in ALPHA_DTYPES):
            raise FileError(
                f"{path}: {alpha.key} is {alpha.dtype} {list(alpha.shape)}, and an alpha is one number: the file is "
                f"damaged, {GET_AGAIN}"
            )
    return by_layer


def _matched(
    path: Path, by_layer: Mapping[str, Mapping[str, TensorInfo]], layers: Mapping[str, Target]
) -> dict[str, str]:
    """Published names of layers -> the names that the file gives them. Raises FileError; see `read_lora`."""
    names, found, unknown = _Names(layers), dict[str, str](), list[str]()
    for given, parts in by_layer.items():
        name = names.find(given)
        if name is None:
            unknown.append(given)
            continue
        if name in found:
            raise FileError(f"{path}: it has {name} twice, as {found[name]} and as {given}: {GET_AGAIN}")
        (rows, width), down, up = layers[name].shape, parts["down"].shape, parts["up"].shape
        if len(down) != 2 or len(up) != 2 or not down[0] or (up[0], down[1]) != (rows, width) or down[0] != up[1]:
            raise FileError(
                f"{path}: {given} is {list(up)} by {list(down)}, and that layer of this model is [{rows}, {width}]: "
                "the LoRA belongs to another model, choose another file"
            )
        found[name] = given
    if not found:
        example = next(name for name in layers if ".attention." in name)
        raise FileError(
            f"{path}: nothing in this LoRA fits this model. It is for {len(unknown)} layers such as {unknown[0]}, and "
            f"this model has layers such as {example}: it belongs to another model, choose another file"
        )
    if unknown:
        named = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        log.warning("%s: %d of %d layers fit, left out are %s", path.name, len(found), len(by_layer), named)
    else:
        log.info("%s: all of its %d layers fit", path.name, len(found))
    return found


def _pair(path: Path, given: str, tensors: Mapping[str, Tensor], peft: Mapping[str, Any]) -> Pair:
    down, up = tensors["down"], tensors["up"]
    rank = len(down)
    scale = float(tensors["alpha"]) / rank if "alpha" in tensors else _peft_scale(peft, given, rank)
    if not (down.isfinite().all() and up.isfinite().all() and math.isfinite(scale)):
        raise FileError(f"{path}: {given} holds NaN or infinite values: the file is damaged, {GET_AGAIN}")
    return Pair(down, up, scale)


def _peft_config(path: Path) -> Mapping[str, Any]:
    """What PEFT wrote beside the file, where alphas are; empty for a file of another kind."""
    config = path.parent / PEFT_CONFIG
    if path.name != PEFT_FILE or not config.is_file():
        return {}
    found = read_json(config, remedy=GET_AGAIN)
    if not isinstance(found, dict):
        raise FileError(f"{config} is not a JSON object: {GET_AGAIN}")
    patterns = found.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise FileError(f"{config}: alpha_pattern is {described(patterns)}, and it must be an object: {GET_AGAIN}")
    for alpha in (found.get("lora_alpha", 1), *patterns.values()):
        if type(alpha) not in (int, float):
            raise FileError(f"{config}: an alpha is {described(alpha)}, and it must be a number: {GET_AGAIN}")
    for pattern in patterns:
        try:
            _peft_pattern(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise FileError(
                f"{config}: in alpha_pattern, {described(pattern)} is no regular expression ({error}): {GET_AGAIN}"
            ) from None
    return found


def _peft_scale(peft: Mapping[str, Any], layer: str, rank: int) -> float:
    """alpha / rank of a layer without an alpha of its own; 1 where nothing tells it."""
    layer = layer.removeprefix(PEFT_PREFIX)
    patterns = (peft.get("alpha_pattern") or {}).items()
    matched = (value for pattern, value in patterns if _peft_pattern(pattern).match(layer))
    alpha = next(matched, peft.get("lora_alpha", rank))
    return float(alpha) / (rank**0.5 if peft.get("use_rslora") else rank)


def _peft_pattern(pattern: str) -> re.Pattern[str]:
    """A key of `alpha_pattern`, as PEFT reads it: a regular expression for the end of a name; the first counts."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _by_module(pairs: Mapping[str, Pair], layers: Mapping[str, Target], network: UniVision) -> dict[str, LowRank]:
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
    scale = next((pair.scale for _, pair in parts if pair.scale), 0.0)
    for target, pair in parts:
        assert target.expert is not None
        place = slice(filled[target.expert], filled[target.expert] + len(pair.down))
        filled[target.expert] = place.stop
        down[target.expert, place] = pair.down
        # as a rule all experts share a scale; another one is multiplied in
        up[target.expert, target.rows, place] = pair.up * (pair.scale / scale if scale else 0.0)
    return LowRank(down, up, scale)


# --- Writing ------------------------------------------------------------------------------------------------------


def save_lora(
    path: str | Path, layers: Mapping[str, LowRank], network: UniVision, *, dtype: torch.dtype | None = None
) -> None:
    """Write branches, by the names of the network's modules, as a file that `read_lora` reads. Raises FileError.

    dtype: to round them to; None keeps what they have
    """
    tensors: dict[str, Tensor] = {}
    for name, target in targets(network).items():
        layer = layers.get(target.module)
        if layer is None:
            continue
        down = layer.down if target.expert is None else layer.down[target.expert]
        up = (layer.up if target.expert is None else layer.up[target.expert])[target.rows]
        down, up = down.to(dtype or down.dtype), up.to(dtype or up.dtype)
        alpha = torch.tensor(layer.scale * len(down), dtype=torch.float32, device="cpu")
        for part, tensor in (("lora_A", down), ("lora_B", up), ("alpha", alpha)):
            tensors[f"{name}.{part}"] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    write_whole(path, save(tensors))
