"""Rows on Ray, with two workers on a CPU: the same results as without, and every row once, whoever dies."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
    without_token = pytest.MonkeyPatch()
    without_token.setenv("RAY_AUTH_MODE", "disabled")
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
    without_token.undo()


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
code = command.main(
    folder / "workflow.json",
    table=folder / "t.jsonl",
    out=folder / "out",
    node_classes=ray_nodes.classes(),
    **json.loads(options),
)
sys.exit(code)
"""


def prepare(folder: Path, texts: Sequence[str]) -> None:
    """Writes a workflow and its table, whose rows may make trouble."""
    graph = {
        "1": node("Trouble", text="", folder=str(folder)),
        "2": node("Write", source=["1", 0], name="answer.txt"),
    }
    (folder / "workflow.json").write_text(json.dumps(graph))
    (folder / "t.jsonl").write_text("".join(json.dumps({"1.text": text}) + "\n" for text in texts))


def start_driver(folder: Path, texts: Sequence[str], options: dict) -> subprocess.Popen:
    """`map` in a process of its own."""
    (folder / "driver.py").write_text(DRIVER)
    prepare(folder, texts)
    words = [sys.executable, str(folder / "driver.py"), str(host.PACK), str(folder), json.dumps(options)]
    return subprocess.Popen(words)


def done_in(folder: Path) -> set[str]:
    rows = folder / "out" / "rows"
    return set(os.listdir(rows)) if rows.is_dir() else set()


def wait_until(condition: Callable[[], bool], limit: float = 120.0) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.1)


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


def test_a_row_that_kills_every_worker_is_reported_and_the_others_go_on(run, tmp_path, cluster):
    code, said = run("a", "die", "b", "c", ray=cluster, workers=2)
    assert code == 1 and "Row 2 failed: 3 workers died while they ran this row" in said and "3 of 4 rows" in said
    assert sorted((tmp_path / "runs.txt").read_text().split()) == ["a", "b", "c", "die", "die", "die"]
    assert [r["status"] for r in records(tmp_path / "out")] == ["done", "failed", "done", "done"]


def test_ctrl_c_keeps_what_is_done_and_ends_the_workers(run, tmp_path, cluster):
    texts = ["a", *(f"slow{number}" for number in range(8))]
    with start_driver(tmp_path, texts, {"ray": cluster, "workers": 2}) as driver:
        wait_until(lambda: len(done_in(tmp_path)) >= 1)
        driver.send_signal(signal.SIGINT)
        assert driver.wait(60) == 130
    kept = done_in(tmp_path)
    assert 1 <= len(kept) < len(texts)
    time.sleep(5)
    assert done_in(tmp_path) == kept and sorted(os.listdir(tmp_path / "out")) == ["results.jsonl", "rows"]
    assert run(*texts, ray=cluster, workers=2)[0] == 0
    check_once(tmp_path, *texts)


def test_what_stops_ray_is_said_in_a_sentence(run, monkeypatch, cluster):
    code, said = run("a", ray="127.0.0.1:1", workers=1)
    assert code == 1 and "Stopped: no Ray cluster answers at 127.0.0.1:1" in said
    monkeypatch.setattr(ray_pool, "NODES", "tests.runner.table.nowhere:classes")
    code, said = run("a", ray=cluster, workers=1)
    assert code == 1 and "Stopped: a worker cannot start" in said and "No module named" in said and "nowhere" in said


def test_killed_in_the_middle_and_started_again_every_row_is_done_once(run, tmp_path, cluster):
    texts = ["a", "b", "stop", "c", "d"]
    with start_driver(tmp_path, texts, {"ray": cluster, "workers": 2}) as driver:
        assert driver.wait(120) == -signal.SIGKILL
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
