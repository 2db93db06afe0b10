"""The entries of a checkpoint's config.json, as frozen dataclasses.

The defaults are the published sizes of MingTok-Vision and Ming-UniVision-16B-A3B, under the published field names,
so that `UniVisionConfig()` describes the full model and a test writes down only what it makes smaller. Entries that
only training or the original code's plumbing needs are ignored. A value that would change the mathematics to
something not implemented here is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .json_files import shown

HEAD_DIM = 64  # of every attention in MingTok; the checkpoints do not state it
MAX_SIZE = 1 << 28  # a config with a larger size is damaged, and its model would only take long to fail
MAX_COUNT = 1000  # of layers, and of experts in a layer
COUNTS = (
    "depth",
    "decoder_depth",
    "mlp_depth",
    "num_hidden_layers",
    "num_experts",
    "num_shared_experts",
    "diffloss_d",
)


class ConfigError(ValueError):
    """Invalid config.json: the message names the entry, its value and what is allowed."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _require_sizes(config: Any, *others: str) -> None:
    """Check that every whole number is a plausible size, but for those named `others`."""
    for name, value in vars(config).items():
        if type(value) is int and name not in others:
            _require(value >= 1, f"{name} is {value}: it must be at least 1")
            most = MAX_COUNT if name in COUNTS else MAX_SIZE
            _require(value <= most, f"{name} is {value}: it must be at most {most}")


def _require_multiple(name: str, value: int, of: int, of_name: str = "") -> None:
    _require(value % of == 0, f"{name} is {value}: it must be a multiple of {of_name}{' ' if of_name else ''}{of}")


@dataclass(frozen=True)
class LowLevelEncoderConfig:
    img_size: int = 512
    patch_size: int = 32
    depth: int = 12
    embed_dim: int = 768
    ffn_layer: str = "swiglufused"
    out_dim: int = 32

    def __post_init__(self) -> None:
        _require_sizes(self)
        _require_multiple("img_size", self.img_size, self.patch_size, "patch_size")
        _require_multiple("embed_dim", self.embed_dim, HEAD_DIM)
        _require_multiple("embed_dim", self.embed_dim, self.out_dim, "out_dim")
        _require_swiglu(self.ffn_layer)

    @property
    def grid(self) -> int:
        """Patches along one side at the native size."""
        return self.img_size // self.patch_size


@dataclass(frozen=True)
class SemanticDecoderConfig:
    in_dim: int = 32
    patch_size: int = 32
    embed_dim: int = 1024
    decoder_depth: int = 24
    ffn_layer: str = "swiglufused"

    def __post_init__(self) -> None:
        _require_sizes(self)
        _require_multiple("embed_dim", self.embed_dim, HEAD_DIM)
        _require_multiple("embed_dim", self.embed_dim, self.in_dim, "in_dim")
        _require_swiglu(self.ffn_layer)


@dataclass(frozen=True)
class PixelDecoderConfig:
    patch_size: int = 16
    decoder_depth: int = 24
    embed_dim: int = 1024

    def __post_init__(self) -> None:
        _require_sizes(self)
        _require_multiple("embed_dim", self.embed_dim, HEAD_DIM)


@dataclass(frozen=True)
class MingTokConfig:
    """The config.json of a MingTok checkpoint, or `mingtok_config` in that of a Ming-UniVision one."""

    low_level_encoder: LowLevelEncoderConfig = field(default_factory=LowLevelEncoderConfig)
    semantic_decoder: SemanticDecoderConfig = field(default_factory=SemanticDecoderConfig)
    pixel_decoder: PixelDecoderConfig = field(default_factory=PixelDecoderConfig)
    scaling_factor: float = 8.09449291
    mean: float = 1.46817409

    def __post_init__(self) -> None:
        encoder, semantic, pixel = self.low_level_encoder, self.semantic_decoder, self.pixel_decoder
        _require(
            encoder.out_dim == semantic.in_dim,
            f"low_level_encoder.out_dim {encoder.out_dim} differs from semantic_decoder.in_dim {semantic.in_dim}",
        )
        _require(
            encoder.patch_size == semantic.patch_size,
            f"low_level_encoder.patch_size {encoder.patch_size} differs from semantic_decoder.patch_size "
            f"{semantic.patch_size}",
        )
        _require_multiple(
            "semantic_decoder.patch_size", semantic.patch_size, pixel.patch_size, "pixel_decoder.patch_size"
        )
        _require(self.scaling_factor > 0, f"scaling_factor is {self.scaling_factor}: it must be more than 0")


@dataclass(frozen=True)
class LanguageModelConfig:
    """`llm_config`: the sizes of the decoder-only language model with its experts."""

    vocab_size: int = 126464
    hidden_size: int = 2048
    intermediate_size: int = 5632  # of the dense layers, of which there are first_k_dense_replace
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    num_experts: int = 64
    num_experts_per_tok: int = 6
    num_shared_experts: int = 2
    moe_intermediate_size: int = 1408
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = True
    multi_gate: bool = True
    rms_norm_eps: float = 1e-5
    rope_theta: float = 600000.0
    rope_scaling: dict | None = None
    max_position_embeddings: int = 32768
    eos_token_id: int = 126081
    image_patch_token: int = 126346
    image_start_token: int = 126347
    num_image_tokens_for_gen: int = 256
    # Stated by every checkpoint, and implemented for these values only:
    hidden_act: str = "silu"
    use_bias: bool = False
    use_qkv_bias: bool = False
    norm_head: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        ids = ("eos_token_id", "image_patch_token", "image_start_token")
        _require_sizes(self, "first_k_dense_replace", *ids)
        for name, only in (
            ("hidden_act", "silu"),
            ("use_bias", False),
            ("use_qkv_bias", False),
            ("norm_head", False),
            ("tie_word_embeddings", False),
            ("norm_topk_prob", True),
            ("multi_gate", True),
        ):
            value = getattr(self, name)
            _require(value == only, f"{name} is {shown(value)}: only {only!r} is supported")
        # Both published spellings of the position encoding are plain 1-D rope (three equal rows of the 3-D one
        # give the same bits).
        scaling = self.rope_scaling
        kind = None if scaling is None else scaling.get("type", scaling.get("rope_type"))
        _require(
            kind in (None, "3D", "default"),
            f'rope_scaling is {shown(scaling)}: only null and {{"type": "3D"}} are supported',
        )
        layers = self.num_hidden_layers
        _require(
            0 <= self.first_k_dense_replace <= layers,
            f"first_k_dense_replace is {self.first_k_dense_replace}: it must be from 0 to num_hidden_layers, {layers}",
        )
        for name in ("rms_norm_eps", "rope_theta"):
            _require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}: it must be more than 0")
        _require_multiple(
            "num_attention_heads", self.num_attention_heads, self.num_key_value_heads, "num_key_value_heads"
        )
        _require(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}: it must be even")
        _require(
            self.num_experts_per_tok <= self.num_experts,
            f"num_experts_per_tok is {self.num_experts_per_tok}: it must be at most num_experts, {self.num_experts}",
        )
        for name in ids:
            value = getattr(self, name)
            _require(
                0 <= value < self.vocab_size,
                f"{name} is {value}: it must be an id of the vocabulary, 0 to {self.vocab_size - 1}",
            )


@dataclass(frozen=True)
class FlowHeadConfig:
    """`vishead_diffloss_config`: the flow head. Loading takes its width and depth from the checkpoint's tensors."""

    diffloss_w: int = 3072
    diffloss_d: int = 12
    num_sampling_steps: str = "16"  # a string in the published config
    gen_method: str = "flow_matching_swiglu-4"
    vis_head_arch: str = "linear2-norm"

    def __post_init__(self) -> None:
        _require_sizes(self)
        _require(
            self.num_sampling_steps.isdecimal() and 0 < int(self.num_sampling_steps) <= MAX_COUNT,
            f"num_sampling_steps is {shown(self.num_sampling_steps)}: it must be a whole number from 1 to {MAX_COUNT}",
        )
        _require(
            self.gen_method.startswith("flow_matching_swiglu"),
            f'gen_method is {shown(self.gen_method)}: only "flow_matching_swiglu-4" is supported',
        )
        _require(
            self.vis_head_arch == "linear2-norm",
            f'vis_head_arch is {shown(self.vis_head_arch)}: only "linear2-norm" is supported',
        )

    @property
    def steps(self) -> int:
        return int(self.num_sampling_steps)


@dataclass(frozen=True)
class UniVisionConfig:
    """The config.json of a Ming-UniVision checkpoint. `mingtok_config` None: it does not state one."""

    llm_config: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    vishead_diffloss_config: FlowHeadConfig = field(default_factory=FlowHeadConfig)
    mingtok_config: MingTokConfig | None = None
    mlp_depth: int = 2

    def __post_init__(self) -> None:
        _require_sizes(self)
        tokens = self.llm_config.num_image_tokens_for_gen
        _require(math.isqrt(tokens) ** 2 == tokens, f"num_image_tokens_for_gen is {tokens}: it must be a square number")

    @property
    def drawing_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of a drawn image."""
        side = math.isqrt(self.llm_config.num_image_tokens_for_gen)
        return side, side


def read_config(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Build the dataclass `cls` from the entries of a config.json that it knows; the others are ignored.

    Raises ConfigError that names the entry (`where` is the dotted path so far), its value and what is wrong.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the file'} is {shown(values)}, not a JSON object")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    arguments = {
        name: _convert(hints[name], value, f"{where}.{name}".lstrip("."))
        for name, value in values.items()
        if name in known
    }
    try:
        return cls(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def write_config(config: Any) -> dict[str, Any]:
    """The entries that `read_config` reads the config from: plain values, ready for json."""
    return dataclasses.asdict(config)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return read_config(hint, value, where)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not abs(value) <= sys.float_info.max:  # JSON readers take NaN and Infinity
        raise ConfigError(f"{where} is {shown(value)}, not a finite number")
    if hint is float and number:
        return float(value)
    if hint is int and number and value == int(value):
        return int(value)
    if hint is str and number:  # num_sampling_steps is found as either
        return f"{value:g}"
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is {shown(value)}, not {hint.__name__}")


def _require_swiglu(ffn_layer: str) -> None:
    _require(
        ffn_layer in ("swiglufused", "swiglu"), f'ffn_layer is {shown(ffn_layer)}: only "swiglufused" is supported'
    )
