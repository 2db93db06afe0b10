"""`python -m tiny_shapes.training`, and its former name."""

import subprocess
import sys
from pathlib import Path

import pytest

from tiny_shapes.training import __main__ as command

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


@pytest.mark.parametrize("module", ["tiny_shapes.training", "ming_core.training"])
def test_the_command_runs_under_its_name_and_its_former_name(module):
    done = subprocess.run([sys.executable, "-m", module, "--list"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "terse prompts" in done.stderr
