"""`python -m tiny_shapes.training`, and its former name."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ming_core import load_univision, save_univision
from tiny_shapes.training import __main__ as command
from tiny_shapes.training.recipe import STAGES, SideBySide
from tiny_shapes.training.stages import JointStage

ROOT = Path(__file__).parents[2]


def test_the_command_refuses_a_stage_that_the_recipe_lacks():
    with pytest.raises(SystemExit, match="its stages are 'mingtok', "):
        command.main(["nonsense"])


def test_the_command_trains_a_stage_and_skips_it_once_it_is_done(tmp_path, monkeypatch, make_objective):
    made = []

    def objective(stage, start, device):
        made.append(start)
        found = make_objective("mingtok")
        found.evaluate = lambda module: {}
        return found

    monkeypatch.setattr(command, "make_objective", objective)
    numbers = ["--steps", "2", "--batch", "4", "--device", "cpu"]
    arguments = ["mingtok", "--folder", str(tmp_path), "--start", "here", *numbers]
    assert command.main(arguments) == 0
    written = (tmp_path / "mingtok" / "model" / "model.safetensors").stat().st_mtime_ns
    assert command.main(arguments) == 0
    assert (tmp_path / "mingtok" / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert [str(start) for start in made] == ["here", "here"]


def test_the_mean_of_stages_side_by_side_goes_on(tmp_path, monkeypatch, tokenizer, engine, stages):
    pair = tuple(replace(stages["joint"], name=f"seed {seed}", seed=seed) for seed in (1, 2))
    monkeypatch.setattr(command, "RECIPE", (SideBySide("both", pair),))
    monkeypatch.setattr(command, "STAGES", pair)
    monkeypatch.setattr(JointStage, "evaluate", lambda stage, module: {})
    start = tmp_path / "start"
    save_univision(engine, start, tokenizer)
    numbers = ["--folder", str(tmp_path), "--start", str(start), "--steps", "2", "--device", "cpu"]
    assert command.main(["seed 2", *numbers]) == 0  # beforehand, as if on another machine
    trained = (tmp_path / "seed-2" / "state.pt").stat().st_mtime_ns
    assert command.main(["both", *numbers]) == 0
    assert (tmp_path / "seed-2" / "state.pt").stat().st_mtime_ns == trained

    folders = [tmp_path / name / "model" for name in ("seed-1", "seed-2", "both")]
    one, other, mean = (load_file(folder / "model.safetensors") for folder in folders)
    assert any(not torch.equal(one[name], other[name]) for name in mean)
    for name, weight in mean.items():
        expected = (one[name].float() + other[name].float()) / 2
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), expected, rtol=2**-8, atol=1e-6)
    load_univision(folders[-1])


@pytest.mark.parametrize("module", ["tiny_shapes.training", "ming_core.training"])
def test_the_command_runs_under_its_name_and_its_former_name(module):
    done = subprocess.run([sys.executable, "-m", module, "--list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert {f"{stage.name:32} {stage.trains:14} {stage.hours:g} hours" for stage in STAGES} <= {
        line.strip() for line in done.stderr.splitlines()
    }
