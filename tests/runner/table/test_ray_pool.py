"""Rows on Ray, with two workers on a CPU: the same results as without, and every row once, whoever dies."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ming_univision.nodes import host
from ming_univision.runner.table import command, ray_pool
from ming_univision.runner.workflow import read_workflow
from ming_univision.tests.runner.example_nodes import node
from ming_univision.tests.runner.table import ray_nodes

pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of one machine, on which Ray starts actors without starting itself for each test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    words += ["--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=0", "--include-dashboard=false"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as head:
        said = ""
        for line in head.stdout:
            said += line
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail(f"Ray does not start:\n{said[-2000:]}", pytrace=False)
        yield f"127.0.0.1:{port}"
        head.terminate()


DRIVER = """
import json, os, pathlib, sys, types
pack, folder, options = sys.argv[1:]
sys.modules["ming_univision"] = types.ModuleType("ming_univision")
sys.modules["ming_univision"].__path__ = [pack]
from ming_univision.runner.table import command, ray_pool
from ming_univision.tests.runner.table import ray_nodes
ray_pool.NODES = "tests.runner.table.ray_nodes:classes"
folder = pathlib.Path(folder)
(folder / "driver").write_text(str(os.getpid()))
command.main(
    folder / "workflow.json",
    table=folder / "t.jsonl",
    out=folder / "out",
    node_classes=ray_nodes.classes(),
    **json.loads(options),
)
"""


def prepare(folder: Path, texts: Sequence[str]) -> None:
    """Writes a workflow and its table, whose rows may make trouble."""
    graph = {
        "1": node("Trouble", text="", folder=str(folder)),
        "2": node("Write", source=["1", 0], name="answer.txt"),
    }
    (folder / "workflow.json").write_text(json.dumps(graph))
    (folder / "t.jsonl").write_text("".join(json.dumps({"1.text": text}) + "\n" for text in texts))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(texts, **options) -> exit code and what was printed, of a workflow whose rows may make trouble."""
    monkeypatch.setattr(ray_pool, "NODES", "tests.runner.table.ray_nodes:classes")

    def call(*texts: str, **options) -> tuple[int, str]:
        prepare(tmp_path, texts)
        stream = io.StringIO()
        code = command.main(
            tmp_path / "workflow.json",
            table=tmp_path / "t.jsonl",
            out=tmp_path / "out",
            node_classes=ray_nodes.classes(),
            stream=stream,
            **options,
        )
        return code, stream.getvalue()

    return call


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]


def check_once(folder: Path, *texts: str) -> None:
    """Every row is done, once, and nothing else is there."""
    found = records(folder / "out")
    assert [(r["status"], r["answers"]["2"]) for r in found] == [("done", text) for text in texts]
    assert [(folder / "out" / r["files"][0]).read_text() for r in found] == list(texts)
    assert len(os.listdir(folder / "out" / "rows")) == len(texts)
    assert sorted(os.listdir(folder / "out")) == ["results.jsonl", "rows"]


def test_a_worker_that_is_killed_in_the_middle_costs_a_retry_and_a_failing_row_none(run, tmp_path, cluster):
    texts = ["a", "kill", "b", "c"]
    code, said = run(*texts, "fail", ray=cluster, workers=2)
    assert code == 1 and "it rained" in said and "4 of 5 rows are done, 1 failed" in said
    (tmp_path / "out" / "results.jsonl").write_text("")
    assert run(*texts)[0] == 0  # without Ray there is nothing left to do
    check_once(tmp_path, *texts)
    runs = (tmp_path / "runs.txt").read_text().split()
    assert sorted(runs) == ["a", "b", "c", "fail", "kill", "kill"]


def test_killed_in_the_middle_and_started_again_every_row_is_done_once(run, tmp_path, cluster):
    texts = ["a", "b", "stop", "c", "d"]

    (tmp_path / "driver.py").write_text(DRIVER)
    options = {"ray": cluster, "workers": 2}
    prepare(tmp_path, texts)
    words = [sys.executable, str(tmp_path / "driver.py"), str(host.PACK), str(tmp_path), json.dumps(options)]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert run(*texts, ray=cluster, workers=2)[0] == 0
    check_once(tmp_path, *texts)


def test_two_workers_make_the_same_pictures_to_the_bit_as_none(tmp_path):
    graph = read_workflow(host.PACK / "workflows" / "api" / "text_to_image.json")
    (loader,) = (n for n in graph.values() if n["class_type"] == "MingUniVisionLoader")
    ((draw_id, draw),) = ((i, n) for i, n in graph.items() if n["class_type"] == "MingGenerate")
    loader["inputs"]["precision"] = "fp32"
    draw["inputs"]["steps"] = 1
    (tmp_path / "workflow.json").write_text(json.dumps(graph))
    (tmp_path / "t.csv").write_text(f"{draw_id}.seed\n1\n2\n3\n")
    for out, options in {"plain": {}, "ray": {"ray": "", "workers": 2}}.items():
        code = command.main(
            tmp_path / "workflow.json", table=tmp_path / "t.csv", out=tmp_path / out, stream=io.StringIO(), **options
        )
        assert code == 0
    plain, spread = records(tmp_path / "plain"), records(tmp_path / "ray")
    assert len(plain) == 3
    for one, other in zip(plain, spread, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
        for file in one["files"]:
            assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "ray" / file).read_bytes()
