"""Rows side by side: drawn in one pass, the same as alone within rounding, and failing alone."""

from __future__ import annotations

import pytest
import torch
from ming_univision.ming_core import Engine
from ming_univision.nodes import NODE_CLASS_MAPPINGS, host
from ming_univision.runner.execution import ExecutionError
from ming_univision.runner.session import Session
from ming_univision.runner.table.batches import BatchSession
from ming_univision.runner.table.jobs import Job
from ming_univision.runner.table.results import FolderResults
from ming_univision.runner.table.worker import RowRunner
from ming_univision.runner.workflow import WorkflowError
from ming_univision.tests.runner.example_nodes import node

TOLERANCE = 3e-4  # as between any two ways of computing one result
DRAW = {"text_guidance": 3.0, "steps": 2, "temperature": 1.0, "solver": "euler", "max_new_tokens": 4}
DRAW |= {"batch_size": 1, "start": "draw now", "image_guidance": 1.1}


@pytest.fixture
def passes(golden_folder, tmp_path, monkeypatch):
    """The sizes of the batches that are drawn; the small model "edit_round" can be loaded."""
    sizes, generate_batch = [], Engine.generate_batch

    def counted(self, requests, options=None):
        sizes.append(len(requests))
        return generate_batch(self, requests, options)

    monkeypatch.setattr(Engine, "generate_batch", counted)
    monkeypatch.setattr(host, "model_folders", lambda: [golden_folder])
    with host.folders(output=tmp_path / "output", input=tmp_path):
        yield sizes


def two_rounds(prompt="A cat.", seed=0, then="Make it red.", **more) -> dict:
    return {
        "1": node("MingUniVisionLoader", model_name="edit_round", precision="fp32"),
        "2": node("MingGenerate", model=["1", 0], prompt=prompt, seed=seed, **DRAW | more),
        "3": node("MingEdit", model=["1", 0], instruction=then, seed=seed, conversation=["2", 1], **DRAW),
        "4": node("MingTokDecode", mingtok=["1", 1], features=["3", 0]),
        "5": node("SaveImage", images=["4", 0], filename_prefix="x"),
    }


def drawn(outcome) -> torch.Tensor:
    return torch.cat([outcome[node_id].outputs[0][0].latents for node_id in ("2", "3")])


def test_rows_are_drawn_in_one_pass_and_are_the_same_as_alone(passes, tmp_path):
    rows = [two_rounds(), two_rounds("A red dog on a hill.", 1), two_rounds("A cat.", 2, "Remove it, please.")]
    with BatchSession(3) as session:
        together = session.run_together(rows, [tmp_path / str(i) for i in range(3)])
    assert passes == [3, 3]
    for number, row in enumerate(rows):
        with Session(output_dir=tmp_path / "alone") as session:
            alone = session.run(row)
        assert set(together[number]) == set(alone)
        torch.testing.assert_close(drawn(together[number]), drawn(alone), rtol=0, atol=TOLERANCE)
        assert together[number]["3"].outputs[1][0].digest() != "" and len(together[number]["3"].outputs[1]) == 1
        assert (tmp_path / str(number) / "x_00001_.png").is_file()
    assert passes == [3, 3]


def test_equal_rounds_are_drawn_once_and_other_settings_in_passes_of_their_own(passes, tmp_path):
    rows = [two_rounds(), two_rounds(then="Make it blue."), two_rounds("A dog."), two_rounds("A dog.", steps=1)]
    with BatchSession(8) as session:
        outcomes = session.run_together(rows, [tmp_path / str(i) for i in range(4)])
    assert passes == [2, 4]  # the fourth row's first round has other steps, and is drawn alone
    assert outcomes[0]["2"].outputs[0][0] is outcomes[1]["2"].outputs[0][0]


def test_what_cannot_be_drawn_in_one_pass_is_drawn_alone(passes, tmp_path):
    rows = [two_rounds(seed=seed, batch_size=2) for seed in (0, 5)]
    for row in rows:
        del row["3"]
        row["4"]["inputs"]["features"] = ["2", 0]
    with BatchSession(2) as session:
        outcomes = session.run_together(rows, [tmp_path / "a", tmp_path / "b"])
    assert passes == [] and all(len(outcome["2"].outputs[0]) == 2 for outcome in outcomes)
    with BatchSession(2) as session:  # the rows would not begin their pictures at the same step
        session.run_together([two_rounds(start="model decides")] * 2, [tmp_path / "a", tmp_path / "b"])
    assert passes == []


def test_a_row_that_fails_fails_alone_with_its_own_error(passes, tmp_path):
    too_long = "many words " * 5000
    rows = [two_rounds(), two_rounds(too_long, 1), two_rounds(seed=2), {"1": node("Unheard")}]
    with BatchSession(4) as session:
        outcomes = session.run_together(rows, [tmp_path / str(i) for i in range(4)])
    assert isinstance(outcomes[1], ExecutionError) and "node 2 " in str(outcomes[1])
    assert isinstance(outcomes[3], WorkflowError)
    for number in (0, 2):
        assert (tmp_path / str(number) / "x_00001_.png").is_file()


def test_a_worker_runs_rows_in_batches_and_commits_each(passes, tmp_path, monkeypatch):
    loader = NODE_CLASS_MAPPINGS["MingUniVisionLoader"]
    loads, load = [], getattr(loader, loader.FUNCTION)
    monkeypatch.setattr(loader, loader.FUNCTION, lambda self, **inputs: loads.append(1) or load(self, **inputs))
    results = FolderResults(tmp_path / "out")
    jobs = [Job(f"r{i}", f"key{i}", f"row{i}", two_rounds(seed=i)) for i in range(5)]
    with results.staged("row1") as folder:
        results.commit("row1", folder, {"key": "key1", "status": "done"})
    runner = RowRunner(results, batch=2)
    found = list(runner.run(jobs))
    assert sorted(record["key"] for record in found) == [job.key for job in jobs]
    assert all(record["status"] == "done" for record in found)
    assert len(results.done()) == 5 and loads == [1]
    assert passes == [2, 2]  # rows 2 and 3; row 0 has no company, nor has row 4
