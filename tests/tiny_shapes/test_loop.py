"""The training loop: models learn, runs resume exactly, and what is written is whole."""

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch

from ming_core.files import FileError
from ming_core.training.plot import plot_log
from tiny_shapes.training.data import batches
from tiny_shapes.training.loop import Run

both_kinds = pytest.mark.parametrize("kind", ["mingtok", "joint"])


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def batches_of(run, workers: int = 0):
    """The batches of a run from its step on."""
    return batches(run.objective.data, run.stage.seed, run.step, workers)


@both_kinds
def test_a_few_steps_on_one_batch_make_its_loss_fall(kind, make_run):
    run = make_run(kind, steps=100)
    batch = next(batches_of(run))

    def loss():
        with torch.no_grad():
            return float(run.objective.loss(batch, seeded())["loss"])

    before = loss()
    for _ in range(12):
        run.update(batch)
    assert loss() < 0.8 * before


@pytest.mark.parametrize("kept", [0.0, 0.4])
@both_kinds
def test_an_interrupted_run_continues_exactly(kind, kept, make_run):
    whole = make_run(kind, "whole", kept=kept)
    whole.train()
    half = make_run(kind, "halves", kept=kept)
    some = batches_of(half)
    for _ in range(3):
        half.update(next(some))
    half.checkpoint()
    other = make_run(kind, "halves", kept=kept)
    assert other.resume() and other.step == 3
    other.train()
    assert whole.losses == other.losses
    for ours, theirs in ((whole.objective.module, other.objective.module), (whole.weights(), other.weights())):
        state = theirs.state_dict()
        for name, value in ours.state_dict().items():
            assert torch.equal(value, state[name]), name


@both_kinds
def test_what_is_written_keeps_its_share_of_the_weights_that_the_stage_started_from(kind, make_run):
    run = make_run(kind, kept=0.4)
    before = {name: value.clone() for name, value in run.objective.module.named_parameters()}
    run.train()
    learned = dict(run.average.module.named_parameters())
    assert any(not torch.equal(before[name], learned[name]) for name in before)
    for name, value in run.weights().named_parameters():
        assert torch.allclose(value, 0.4 * before[name] + 0.6 * learned[name], atol=1e-7), name


@both_kinds
def test_ctrl_c_writes_a_checkpoint_and_ends_the_run(kind, make_run):
    run = make_run(kind)
    loss = run.objective.loss

    def interrupted(batch, generator):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(batch, generator)

    run.objective.loss = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert make_run(kind).resume() and run.step == 3


def test_a_resumed_run_takes_the_learning_rate_of_the_recipe_as_it_is_now(make_run):
    run = make_run("mingtok", steps=100)
    some = batches_of(run)
    for _ in range(4):
        run.update(next(some))
    run.checkpoint()
    lower = make_run("mingtok", steps=100, lr=1e-4)
    assert lower.resume()
    rates = {group["lr"] for optimizer in lower.optimizers for group in optimizer.param_groups}
    assert rates == {1e-4 * lower.learning_rate_factor(4)}


def test_the_learning_rate_of_every_step_is_that_of_the_schedule(make_run):
    run = make_run("mingtok")
    some, rates = batches_of(run), []
    for _ in range(8):
        rates.append(run.optimizers[0].param_groups[0]["lr"])
        assert rates[-1] == run.stage.lr * run.learning_rate_factor(run.step)
        run.update(next(some))
    assert rates[0] < rates[1] and rates[-1] < rates[2]


def test_a_folder_without_a_checkpoint_has_nothing_to_resume(make_run):
    assert not make_run("mingtok").resume()


def test_a_checkpoint_of_another_recipe_is_named(make_run):
    make_run("mingtok").checkpoint()
    with pytest.raises(FileError, match=r"state\.pt belongs to another recipe"):
        make_run("joint").resume()


@both_kinds
def test_training_leaves_the_global_random_state_alone(kind, make_run):
    run = make_run(kind, steps=1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    run.train()
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


def test_batches_made_ahead_are_the_same_and_ctrl_c_does_not_reach_who_makes_them(make_run):
    run = make_run("mingtok")
    handler = signal.getsignal(signal.SIGINT)
    here, ahead = batches_of(run), batches_of(run, workers=1)
    assert signal.getsignal(signal.SIGINT) is handler
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)  # while it starts
    for step in range(5):
        (images, labels), (same_images, same_labels) = next(here), next(ahead)
        assert torch.equal(images, same_images) and labels.keys() == same_labels.keys()
        assert all(torch.equal(labels[name], same_labels[name]) for name in labels)
        if step == 1:
            os.kill(worker.pid, signal.SIGINT)


def test_a_stage_whose_model_could_not_be_written_is_not_done(make_run):
    run = make_run("mingtok", steps=1)
    run.objective.export = lambda module, folder: (folder / "half").write_text("") or 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert not make_run("mingtok", steps=1).resume()


def test_the_log_has_a_row_for_every_checkpoint_and_is_plotted(make_run, tmp_path):
    run = make_run("mingtok")
    some = batches_of(run)
    for step in range(2):
        run.update(next(some))
        run.checkpoint(evaluate=step > 0)
    rows = (run.folder / "log.csv").read_text().splitlines()
    assert len(rows) == 3 and rows[0].startswith("stage,step,hours,l1") and rows[0].endswith("figure")
    assert rows[1].endswith(",") and not rows[2].endswith(",")  # the first checkpoint was not evaluated
    pytest.importorskip("matplotlib")
    assert plot_log(run.folder / "log.csv", tmp_path / "loss.png", over="hours", left_out=("stage", "step"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm(make_objective, stages, tmp_path):
    objective = make_objective("mingtok")
    objective.loss = lambda batch, generator: {"loss": objective.module.label_head.weight.sum() * float("nan")}
    run = Run(stages["mingtok"], objective, tmp_path)
    with pytest.raises(RuntimeError, match="lower this stage's learning rate"):
        run.update(None)
    assert all(torch.isfinite(p).all() for p in objective.module.parameters())
