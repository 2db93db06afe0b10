"""Training in several processes: the same loss, checkpoints for another number of them, and one that writes."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent.parent


def run(processes, checkpoint, data, out, steps, batch, *more):
    """Train in this many processes; gives the losses of all rows of the log."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, *(torchrun if processes > 1 else ["-m"]), "ming_core.training", "lora"]
    options = {"model": checkpoint, "data": data, "out": out, "rank": 2, "steps": steps, "batch": batch, "lr": 0.01}
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments, "--device", "cpu", "--save-precision", "fp32", *more],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (out.with_suffix(".training") / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)], done.stderr


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_with_the_doubled_batch_and_either_goes_on_with_the_others_checkpoint(
    checkpoint_folder, data, tmp_path
):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    losses, _ = run(1, checkpoint_folder, data, one, 10, 4)
    together, said = run(2, checkpoint_folder, data, two, 10, 2)
    assert together == pytest.approx(losses, rel=1e-4)
    first, second = load_file(one), load_file(two)
    assert all((first[name] - second[name]).abs().max() < 1e-3 for name in first)
    # one process talks
    assert said.count("memory: ") == said.count("written: ") == 1
    # each goes on with what the other has
    for file in ("state.safetensors", "log.csv"):
        a, b = (path.with_suffix(".training") / file for path in (one, two))
        kept = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(kept)
    longer, _ = run(1, checkpoint_folder, data, one, 20, 4, "--resume")
    together, said = run(2, checkpoint_folder, data, two, 20, 2, "--resume")
    assert "continuing from step 10" in said
    assert len(longer) == 2 and longer[1] < longer[0] and together == pytest.approx(longer, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_two_processes_that_share_out_the_layers_learn_what_one_with_the_whole_model_learns_and_it_goes_on_with_theirs(
    checkpoint_folder, data, tmp_path, precision
):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    options = "--precision", precision, "--others", str(data)  # the whole network teaches, too
    losses, _ = run(1, checkpoint_folder, data, one, 10, 4, *options)
    together, said = run(2, checkpoint_folder, data, two, 10, 2, *options, "--shard")
    assert together == pytest.approx(losses, rel=1e-4)
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).abs().max() < 1e-3 for name in first)
    longer, _ = run(1, checkpoint_folder, data, one, 20, 4, *options, "--resume")
    alone, said = run(1, checkpoint_folder, data, two, 20, 4, *options, "--resume")
    assert "continuing from step 10" in said and alone == pytest.approx(longer, rel=1e-3)


JOINED = """
from pathlib import Path
import torch
from ming_core.training.processes import joined

class Run:
    def __init__(self, processes):
        self.itself = self  # is freed by the collector alone
        self.module = processes.parallel(torch.nn.Linear(4, 4))
        self.module(torch.ones(2, 4)).sum().backward()

def threads():
    return sum("gloo" in file.read_text() for file in Path("/proc/self/task").glob("*/comm"))

with joined("cpu") as processes:
    Run(processes)
    assert threads()
print(f"{threads()} threads are left")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the names of threads as Linux gives them")
def test_no_thread_of_the_group_is_left_when_a_process_ends_which_could_abort_it(tmp_path):
    (tmp_path / "joined.py").write_text(JOINED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*torchrun, str(tmp_path / "joined.py")], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("0 threads are left") == 2, done.stdout
