"""Quantizes a checkpoint folder: `python quickstart.py quantize SOURCE TARGET [--format int4]`.

The new folder loads like any other, faster and into less memory. It has the fingerprint of the original, so that
conversations and features of one continue with the other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm import tqdm

from ..ming_core.checkpoint import load_univision, save_univision, tokenizer_files
from ..ming_core.files import write_whole_folder


def main(source: str | Path, target: str | Path, format: str = "int4") -> int:
    """Quantizes the checkpoint in `source` into the new folder `target`; returns the exit code of the process."""
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if target.exists():
        print(f"Refused: {target} exists already. Choose the name of a new folder.")
        return 2
    try:
        quantize(source, target, format)
    except ValueError as error:  # CheckpointError and FileError are ValueErrors
        print(f"Failed: {error}")
        return 1
    print(f"Done: {target} is complete.")
    return 0


def quantize(source: Path, target: Path, format: str) -> None:
    """Writes the checkpoint in `source`, quantized to `format`, to the folder `target`, completely or not at all.

    Raises CheckpointError and FileError.
    """
    print(f"Reading {source} ...", flush=True)
    with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:  # disable=None: no bar in a pipe

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model = load_univision(source, dtype=torch.bfloat16, quantization=format, on_progress=on_progress)
    print(f"Writing {target} ...", flush=True)
    tokenizer = tokenizer_files(source)
    write_whole_folder(lambda folder: save_univision(model, folder, tokenizer, dtype=torch.bfloat16), target)
