"""Training in several processes: what one process learns from as many batches a step."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def train(processes: int, start: Path, folder: Path, steps: int) -> str:
    """Train a stage on two batches of a step in all, and return what was said."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, *(torchrun if processes > 1 else ["-m"]), "tiny_shapes.training", "two objects"]
    options = {"start-from": start, "folder": folder, "steps": steps, "batch": 2, "passes": 2 // processes}
    arguments = [str(word) for name, value in {**options, "device": "cpu"}.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def learned(folder: Path) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    """The rows of the log, and the weights."""
    with (folder / "two-objects" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, torch.load(folder / "two-objects" / "state.pt", weights_only=True)["module"]


def assert_alike(one: Path, other: Path) -> None:
    (rows, weights), (other_rows, other_weights) = learned(one), learned(other)
    assert len(rows) == len(other_rows) > 0
    for row, other_row in zip(rows, other_rows, strict=True):
        for term in ("loss", "text", "flow", "patches", "objects", "balance"):
            assert float(other_row[term]) == pytest.approx(float(row[term]), rel=1e-3), term
    assert all((weights[name] - other_weights[name]).abs().max() < 1e-3 for name in weights)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_two_batches_a_step_and_either_goes_on_with_the_others_checkpoint(
    make_objective, tmp_path
):
    objective = make_objective("joint")
    objective.export(objective.module, tmp_path / "start")
    one, two = tmp_path / "one", tmp_path / "two"
    train(1, tmp_path / "start", one, 3)
    said = train(2, tmp_path / "start", two, 3)
    assert_alike(one, two)
    assert said.count("hours ") == 1  # the first process talks, and writes
    # each goes on with what the other has
    one.rename(tmp_path / "kept")
    two.rename(one)
    (tmp_path / "kept").rename(two)
    train(1, tmp_path / "start", one, 6)
    assert "continuing from step 3" in train(2, tmp_path / "start", two, 6)
    assert_alike(one, two)
    assert len(learned(one)[0]) == 2


def test_the_gradient_of_several_batches_is_the_mean_of_theirs(make_run):
    def gradients(*numbers: int) -> dict[str, torch.Tensor]:
        run = make_run("joint")
        run.batches = numbers[0]
        run._gradients(tuple(run.objective.data(np.random.default_rng(number)) for number in numbers))
        return {name: p.grad for name, p in run.objective.module.named_parameters() if p.grad is not None}

    both, first, second = gradients(0, 1), gradients(0), gradients(1)
    assert both.keys() == first.keys() == second.keys()
    for name, found in both.items():
        assert torch.allclose(found, (first[name] + second[name]) / 2, atol=1e-6), name


def test_a_state_from_before_batches_were_counted_goes_on(make_run):
    run = make_run("mingtok", steps=4)
    run.train()
    path = run.folder / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["batches"]
    torch.save(state, path)
    again = make_run("mingtok", steps=8)
    assert again.resume() and again.step == again.batches == 4
