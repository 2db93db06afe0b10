"""Checkpoint folders: config.json, safetensors (one file, or an index with shards) and tokenizer files.

reader   the safetensors files: which tensor is where
keys     the keys of the tensors, and the parameters they belong to
config   what config.json says
folder   all of that as one object, read once
load     a folder becomes a model
save     a model becomes a folder
"""

from ..text_tokenizer import tokenizer_files
from .folder import Checkpoint
from .load import checkpoint_bytes, checkpoint_kind, fill, load_mingtok, load_univision, stored_quantization
from .reader import INDEX, CheckpointError
from .save import in_shards, save_mingtok, save_univision

__all__ = [
    "INDEX",
    "Checkpoint",
    "CheckpointError",
    "checkpoint_bytes",
    "checkpoint_kind",
    "fill",
    "in_shards",
    "load_mingtok",
    "load_univision",
    "save_mingtok",
    "save_univision",
    "stored_quantization",
    "tokenizer_files",
]
