"""Folders to train on, and trainings of the small checkpoint with random weights: 32x32 pictures of 16 tokens."""

import json

import numpy as np
import pytest
import torch
from PIL import Image


def write_image(path, seed=0, side=32):
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def data(tmp_path):
    """A folder with a drawing, an edit, and questions with and without a picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, name in enumerate(("cat", "day_before", "day_after", "dog")):
        write_image(folder / f"{name}.png", seed)
    (folder / "cat.txt").write_text("A cat.")
    (folder / "day.txt").write_text("Make it night.")
    lines = [{"question": "What is it?", "answer": "A dog."}, {"question": "Is it a cat?", "answer": "No."}]
    (folder / "dog.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "hello.jsonl").write_text(json.dumps({"question": "Hello.", "answer": "Woof."}))
    return folder


@pytest.fixture
def train(model, tmp_path, data):
    """train(steps, ...) -> a Training on the folder `data` that has run."""
    from ming_univision.ming_core.training.adapters import DEFAULT_GROUPS, TrainedLayers, choose_layers
    from ming_univision.ming_core.training.batches import SampleStream
    from ming_univision.ming_core.training.cache import ImageCache
    from ming_univision.ming_core.training.data import pictures_of, read_folder
    from ming_univision.ming_core.training.loop import Plan, Training
    from ming_univision.ming_core.training.loss import LoraLoss
    from ming_univision.ming_core.training.processes import Processes

    def make(
        steps,
        *,
        engine=model,
        folder=data,
        work=tmp_path / "work",
        groups=DEFAULT_GROUPS,
        checkpointing=True,
        run=True,
        dropping=0.15,
        rank=4,
        processes=None,
        resume=False,
        stop_after=None,
        **plan,
    ):
        found = read_folder(folder, 32, "center crop", len, 500)
        images = ImageCache(engine.mingtok, "center crop", work / "cache").load(pictures_of(found.samples))
        adapters = TrainedLayers(choose_layers(engine.network, groups), rank, rank)
        grid = engine.config.drawing_grid
        stream = SampleStream(found.samples, images, engine.chat, grid, dropping=dropping)
        training = Training(
            Plan(steps, **{"batch": 2, "pass_batch": 2, "lr": 1e-2, "warmup": 1, **plan}),
            LoraLoss(engine.network, adapters, checkpointing=checkpointing),
            stream,
            processes or Processes(torch.device("cpu")),
            work,
            about={"rank": rank},
            save=lambda: adapters.save(work / "lora.safetensors", engine.network),
        )
        if resume:
            assert training.resume()
        if stop_after is not None:
            with training.loss.in_place():
                for _ in range(stop_after):
                    training.update()
            training.checkpoint()
        elif run:
            training.run()
        return training

    return make
