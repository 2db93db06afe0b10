"""Checkpoint folders in and out: config.json, safetensors (one file, or an index with shards), tokenizer files."""

from .checkpoint import (
    checkpoint_bytes,
    checkpoint_kind,
    load_mingtok,
    load_univision,
    save_mingtok,
    save_univision,
    stored_quantization,
    tokenizer_files,
)
from .reader import INDEX, CheckpointError

__all__ = [
    "INDEX",
    "CheckpointError",
    "checkpoint_bytes",
    "checkpoint_kind",
    "load_mingtok",
    "load_univision",
    "save_mingtok",
    "save_univision",
    "stored_quantization",
    "tokenizer_files",
]
