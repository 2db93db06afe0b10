"""What a checkpoint folder says about its model: config.json, and what its tensors and its neighbours add to that.

A quantized folder has an entry `quantization_config`. A Ming-UniVision folder may lack the config of its MingTok, which
then is that of a MingTok checkpoint beside it; and the sizes of its flow head are those of the tensors.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..config import ConfigError, FlowHeadConfig, LanguageModelConfig, MingTokConfig, UniVisionConfig, read_config
from ..json_files import FileError, MissingFileError, read_json, shown
from ..mingtok import MingTok
from ..quantization import FORMATS
from .keys import checkpoint_keys
from .reader import REDOWNLOAD_FILE, REDOWNLOAD_HINT, CheckpointError, CheckpointReader, missing

log = logging.getLogger(__name__)

MISMATCH = "config.json and the weights belong to different checkpoints, or the download is incomplete"
QUANT_METHOD = "ming_weight_only"  # in config.json, so that no one takes the weights for another library's
KINDS = {"univision": "llm_config", "mingtok": "low_level_encoder"}  # kind of model -> entry that only it has

Config = TypeVar("Config", MingTokConfig, UniVisionConfig)


class QuantizationOrigin(NamedTuple):
    """`quantization_config` of a quantized folder: the format of its weights, and what they were made from."""

    quantization: str
    fingerprint: str
    mingtok_fingerprint: str

    def entry(self) -> dict[str, str]:
        """The entry as it is written."""
        return {"quant_method": QUANT_METHOD, **self._asdict()}


class CheckpointConfig:
    """The config.json of a folder, read once. Raises CheckpointError."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "config.json"
        self.entries = _read_entries(self.path)

    @property
    def kind(self) -> str | None:
        """ "mingtok", "univision", or None for neither."""
        return next((kind for kind, entry in KINDS.items() if entry in self.entries), None)

    @property
    def origin(self) -> QuantizationOrigin | None:
        """What a quantized folder was made from; None for another folder."""
        entry = self.entries.get("quantization_config")
        if entry is None:
            return None
        ours = isinstance(entry, dict) and entry.get("quant_method") == QUANT_METHOD
        if not ours or entry.get("quantization") not in FORMATS:
            raise CheckpointError(
                f"{self.path}: quantization_config {shown(entry)} is not supported: get the checkpoint in bf16, or "
                f"one that this library has quantized to {' or '.join(FORMATS)}"
            )
        values = [entry.get(name) for name in QuantizationOrigin._fields]
        if not all(isinstance(value, str) and value and value.isprintable() for value in values):
            needed = ", ".join(QuantizationOrigin._fields)
            raise CheckpointError(f"{self.path}: quantization_config lacks one of {needed}: {REDOWNLOAD_HINT}")
        return QuantizationOrigin(*values)

    def read(self, cls: type[Config]) -> Config:
        """The config of this class of model."""
        expected = KINDS["univision" if cls is UniVisionConfig else "mingtok"]
        if expected not in self.entries:
            raise CheckpointError(f"{self.path} has no {expected}: this folder holds another kind of model")
        try:
            return read_config(cls, self.entries)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: {error}; correct it, or {REDOWNLOAD_FILE}") from error


def _read_entries(path: Path) -> dict[str, Any]:
    """All entries of config.json; none where it is not a JSON object."""
    try:
        entries = read_json(path, remedy=REDOWNLOAD_FILE)
    except MissingFileError as error:
        raise missing(path, error) from None
    except FileError as error:
        raise CheckpointError(str(error)) from None
    return entries if isinstance(entries, dict) else {}


# --- Ming-UniVision: what config.json may leave out -------------------------------------------------------------------


def complete_config(config: CheckpointConfig, reader: CheckpointReader) -> tuple[UniVisionConfig, int | None]:
    """The whole config of a Ming-UniVision, and the inner width of its flow head's layers (None: the usual one)."""
    found = config.read(UniVisionConfig)
    require_counts(config.path, language_counts(found.llm_config), reader.tensors)
    mingtok = found.mingtok_config or _sibling_mingtok(config.folder, reader) or MingTokConfig()
    require_counts(config.path, mingtok_counts(mingtok), reader.tensors)
    if found.drawing_grid != (mingtok.low_level_encoder.grid,) * 2:
        raise CheckpointError(
            f"{config.path}: num_image_tokens_for_gen is {found.llm_config.num_image_tokens_for_gen}, but a picture of "
            f"its MingTok has {mingtok.low_level_encoder.grid**2} tokens: {MISMATCH}"
        )
    try:
        flow, hidden = _flow_head(found.vishead_diffloss_config, reader)
    except ConfigError as error:
        raise CheckpointError(f"{config.folder}: according to the weights, {error}: {REDOWNLOAD_HINT}") from error
    return dataclasses.replace(found, mingtok_config=mingtok, vishead_diffloss_config=flow), hidden


def language_counts(config: LanguageModelConfig) -> dict[str, tuple[int, str]]:
    """How often something repeats in a language model: entry of the config -> (its number, how its keys begin)."""
    layers = r"model\.model\.layers\."
    counts = {"llm_config.num_hidden_layers": (config.num_hidden_layers, layers)}
    if config.first_k_dense_replace < config.num_hidden_layers:
        counts["llm_config.num_experts"] = (config.num_experts, rf"{layers}[0-9]+\.mlp\.experts\.")
    return counts


def mingtok_counts(config: MingTokConfig) -> dict[str, tuple[int, str]]:
    """How often something repeats in a MingTok: entry of the config -> (its number, how its keys begin)."""
    depths = {
        "low_level_encoder.depth": config.low_level_encoder.depth,
        "semantic_decoder.decoder_depth": config.semantic_decoder.decoder_depth,
        "pixel_decoder.decoder_depth": config.pixel_decoder.decoder_depth,
    }
    return {entry: (n, rf"(?:vision\.)?{entry.split('.')[0]}\.blocks\.0\.") for entry, n in depths.items()}


def require_counts(path: Path, counts: Mapping[str, tuple[int, str]], keys: Iterable[str]) -> None:
    """Raises CheckpointError unless the weights have as many layers, blocks and experts as config.json says.

    It comes before a model is built: one of a thousand layers with a thousand experts each takes minutes, also without
    memory. And parts that the config leaves out would otherwise be taken for tensors that nobody needs.
    """
    for entry, (count, begin) in counts.items():
        pattern = re.compile(begin + r"([0-9]{1,9})\.")
        found = {match[1]: key for key in keys if (match := pattern.match(key))}
        number = 1 + max(map(int, found), default=-1)
        if number != count:
            like = f", such as {found[max(found, key=int)]}" if found else ""
            raise CheckpointError(f"{path}: {entry} is {count}, but the weights have {number}{like}: {MISMATCH}")


def _flow_head(config: FlowHeadConfig, reader: CheckpointReader) -> tuple[FlowHeadConfig, int | None]:
    """The flow head's config and inner width as its tensors have them. Raises ConfigError."""
    prefix = "model.diffloss.net."
    shape = {key.removeprefix(prefix): x.shape for key, x in reader.tensors.items() if key.startswith(prefix)}
    try:
        depth = 1 + max(int(key.split(".")[1][:9]) for key in shape if key.startswith("res_blocks."))
        width, hidden = shape["input_proj.weight"][0], shape["res_blocks.0.mlp.w12.weight"][0] // 2
    except (KeyError, ValueError, IndexError):
        return config, None  # a tensor of the head is missing: loading checks them all, and names it
    return dataclasses.replace(config, diffloss_w=width, diffloss_d=depth), hidden


def _sibling_mingtok(folder: Path, reader: CheckpointReader) -> MingTokConfig | None:
    """The config of the MingTok checkpoint beside this folder that has the shapes of the one inside."""
    inside = {key: info.shape for key, info in reader.only_vision().tensors.items()}
    found: dict[MingTokConfig, Path] = {}
    for other in _siblings(folder):
        config = _mingtok_config(other)
        if config and _fits(config, inside, other):
            found[config] = other
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: its config.json has no mingtok_config, and {' and '.join(map(str, found.values()))} differ: "
            "leave only the MingTok that belongs to it beside it"
        )
    return next(iter(found), None)


def _fits(config: MingTokConfig, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> bool:
    """Whether a MingTok of this config has tensors of these shapes."""
    try:
        require_counts(folder / "config.json", mingtok_counts(config), shapes)
        keys = checkpoint_keys(MingTok(config, device="meta"))
    except (CheckpointError, RuntimeError, OverflowError) as error:  # sizes that torch cannot even write down
        log.info("skipped as a MingTok: %s", error)
        return False
    return all(shapes.get(key) == part.shape for key, part in keys.items())


def _mingtok_config(folder: Path) -> MingTokConfig | None:
    """The config of a folder that is called MingTok; None where it is not that of one."""
    if "mingtok" not in folder.name.lower():
        return None
    try:
        config = CheckpointConfig(folder)
        return config.read(MingTokConfig) if config.kind == "mingtok" else None
    except CheckpointError as error:
        log.info("skipped as a MingTok: %s", error)
        return None


def _siblings(folder: Path) -> Iterator[Path]:
    """What lies beside a folder and, where the folder is a link, beside its target."""
    for parent in dict.fromkeys((folder.absolute().parent, folder.resolve().parent)):
        try:
            yield from sorted(parent.iterdir())
        except OSError as error:
            log.info("%s cannot be listed: %s", parent, error)
