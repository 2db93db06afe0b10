"""The mean of models that were trained from the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ming_core import load_univision, save_univision
from ming_core.checkpoint import tokenizer_files
from ming_core.files import write_whole_folder


@torch.no_grad()
def write_mean(models: Sequence[Path], folder: Path) -> None:
    """Write the model whose weights are the mean of others', in bfloat16, as it is committed.

    models  folders of models with one config and text tokenizer. Raises as `load_univision`
    folder  of the mean; whatever was there is replaced
    """
    engines = [load_univision(model) for model in models]
    mean, states = engines[0], [engine.network.state_dict() for engine in engines]
    for name, weight in mean.network.state_dict().items():
        weight.copy_(torch.stack([state[name].float() for state in states]).mean(0))
    tokenizer = tokenizer_files(models[0])
    write_whole_folder(lambda fresh: save_univision(mean, fresh, tokenizer, dtype=torch.bfloat16), folder)
