"""`map`: every row once, whatever happens in between."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from ming_univision.nodes import host
from ming_univision.runner.table import command
from ming_univision.runner.table.jobs import Job
from ming_univision.runner.table.results import FolderResults, RemoteResults, ResultsError, open_results
from ming_univision.runner.table.worker import RowRunner
from ming_univision.tests.runner.example_nodes import CLASSES as EXAMPLES
from ming_univision.tests.runner.example_nodes import Write, node


class Trouble:
    """Passes a text on, and keeps a list of what went through. Some texts make trouble, as long as a file is absent."""

    RETURN_TYPES, FUNCTION = ("STRING",), "give"
    folder: Path

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {}), "base": ("INT", {})}}

    def give(self, text, base):
        with (self.folder / "runs.txt").open("a") as file:
            file.write(f"{text} ")
        if not (self.folder / "mended").exists():
            if text == "fail":
                raise ValueError("it rained")
            if text == "interrupt":
                raise KeyboardInterrupt
            if text == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return (f"{text}{base}",)


CLASSES = {**EXAMPLES, "Trouble": Trouble}
WORKFLOW = {
    "1": node("Number", value=4),
    "2": node("Trouble", text="", base=["1", 0]),
    "3": node("Write", source=["2", 0], name="answer.txt"),
    "4": node("Write", source=["1", 0], name="base.txt"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Trouble, "folder", tmp_path, raising=False)
    (tmp_path / "workflow.json").write_text(json.dumps(WORKFLOW))
    with host.folders(output=tmp_path / "nowhere", input=tmp_path / "input"):
        yield tmp_path
    assert not (tmp_path / "nowhere").exists()


def table(folder: Path, *texts: str, column: str = "2.text") -> Path:
    (folder / "t.jsonl").write_text("".join(json.dumps({"id": f"r{i}", column: t}) + "\n" for i, t in enumerate(texts)))
    return folder / "t.jsonl"


def run(folder: Path, *texts: str, out: str | Path | None = None, **more) -> tuple[int, str]:
    """The exit code, and what was printed."""
    stream = io.StringIO()
    code = command.main(
        folder / "workflow.json",
        table=table(folder, *texts),
        out=out or folder / "out",
        node_classes=CLASSES,
        stream=stream,
        **more,
    )
    return code, stream.getvalue()


def text_job(text: str) -> dict:
    return WORKFLOW | {"2": node("Trouble", text=text, base=["1", 0])}


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text("utf-8").splitlines()]


def ran(folder: Path) -> list[str]:
    """What was computed since the last call."""
    file = folder / "runs.txt"
    texts = file.read_text().split() if file.exists() else []
    file.write_text("")
    return texts


def check_whole(folder: Path, *texts: str) -> None:
    """Every row is done, has its files, and nothing else is there."""
    found = records(folder)
    assert [(r["row"], r["status"], r["answers"]["3"]) for r in found] == [
        (f"r{i}", "done", f"{text}4") for i, text in enumerate(texts)
    ]
    for record, text in zip(found, texts, strict=True):
        assert [file.rsplit("/", 1)[1] for file in record["files"]] == ["answer.txt", "base.txt"]
        assert [(folder / "out" / file).read_text() for file in record["files"]] == [f"{text}4", "4"]
    assert len(os.listdir(folder / "out" / "rows")) == len(texts)
    assert sorted(os.listdir(folder / "out")) == ["results.jsonl", "rows"]


def test_every_row_gets_a_folder_and_a_line(folder):
    code, said = run(folder, "a", "b", "a")
    assert code == 0 and "3 rows. Results go to" in said and said.endswith("3 of 3 rows are done.\n")
    check_whole(folder, "a", "b", "a")
    assert ran(folder) == ["a", "b"]  # the two rows of equal content follow each other, and share
    first = records(folder)[0]
    assert set(first) == {"row", "status", "seconds", "answers", "files", "error", "key"}
    assert first["error"] is None and first["seconds"] >= 0


def test_what_rows_share_is_computed_once_and_saved_for_each(folder, monkeypatch):
    calls = {"Number": 0, "Write": 0}
    give, write = EXAMPLES["Number"].give, Write.write

    def counting(name, function):
        def call(self, **inputs):
            calls[name] += 1
            return function(self, **inputs)

        return call

    monkeypatch.setattr(EXAMPLES["Number"], "give", counting("Number", give))
    monkeypatch.setattr(Write, "write", counting("Write", write))
    assert run(folder, "a", "b", "c")[0] == 0
    assert calls == {"Number": 1, "Write": 6}
    check_whole(folder, "a", "b", "c")


def test_run_again_only_what_is_new_or_changed_runs(folder):
    run(folder, "a", "b")
    assert ran(folder) == ["a", "b"]
    code, said = run(folder, "a", "b")
    assert code == 0 and ran(folder) == [] and "2 rows, of which 2 are done already" in said
    assert run(folder, "a", "c", "d")[0] == 0 and ran(folder) == ["c", "d"]
    assert [record["answers"]["3"] for record in records(folder)] == ["a4", "c4", "d4"]
    run(folder, "a", settings=["1.value=5"])  # the workflow has changed
    assert ran(folder) == ["a"] and records(folder)[0]["answers"]["3"] == "a5"


def test_a_failing_row_is_reported_and_the_others_go_on(folder):
    code, said = run(folder, "a", "fail", "b")
    assert code == 1 and ran(folder) == ["a", "fail", "b"]
    assert "Row r1 failed: node 2" in said and "it rained" in said
    assert (
        "2 of 3 rows are done, 1 failed; mend what the messages name, and run the same command again for these." in said
    )
    failure = records(folder)[1]
    assert failure["status"] == "failed" and "it rained" in failure["error"] and failure["files"] == []
    (folder / "mended").touch()
    assert run(folder, "a", "fail", "b")[0] == 0 and ran(folder) == ["fail"]
    check_whole(folder, "a", "fail", "b")


def test_ctrl_c_keeps_what_is_done_and_a_second_run_goes_on(folder):
    code, said = run(folder, "a", "interrupt", "b")
    assert code == 130 and said.endswith(
        "Interrupted: 1 of 3 rows are done; run the same command again for the others.\n"
    )
    assert sorted(os.listdir(folder / "out")) == ["results.jsonl", "rows"] and ran(folder) == ["a", "interrupt"]
    (folder / "mended").touch()
    assert run(folder, "a", "interrupt", "b")[0] == 0 and ran(folder) == ["interrupt", "b"]
    check_whole(folder, "a", "interrupt", "b")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that can be killed cheaply")
def test_killed_in_the_middle_and_started_again_every_row_is_done_once(folder):
    process = multiprocessing.get_context("fork").Process(target=run, args=(folder, "a", "kill", "b"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and ran(folder) == ["a", "kill"]
    assert (folder / "out" / ".work" / "lock.json").is_file()  # nobody was left to tidy up
    (folder / "mended").touch()
    assert run(folder, "a", "kill", "b")[0] == 0 and ran(folder) == ["kill", "b"]
    check_whole(folder, "a", "kill", "b")


def test_bad_tables_and_folders_are_refused_before_anything_runs(folder):
    (folder / "file").write_text("")
    for texts, more, words in (
        (("a",), {"settings": ["9.x=1"]}, "there is no node 9"),
        ((["a"],), {}, "row 1 (r0), column 2.text:"),
        (("a",), {"out": folder / "file" / "out"}, "choose another --out"),
        (("a",), {"out": "unheard://of"}, "unheard://of cannot be used"),
    ):
        code, said = run(folder, *texts, **more)
        assert code == 2 and said.startswith("Refused: ") and words in said
    assert ran(folder) == []


def test_two_runs_at_once_do_not_write_to_one_folder(folder):
    with FolderResults(folder / "out").in_use():
        code, said = run(folder, "a")
        assert code == 2 and f"another run writes to {folder / 'out'} (process {os.getpid()})" in said
    assert run(folder, "a")[0] == 0
    lock = folder / "out" / ".work" / "lock.json"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"host": "elsewhere", "process": 1, "started": 1.0}))  # of a machine that has gone
    assert run(folder, "a")[0] == 0


def test_results_that_somebody_else_has_made_meanwhile_stay(tmp_path):
    results = FolderResults(tmp_path)
    for number in (1, 2):
        with results.staged("x") as staged:
            (staged / "a.txt").write_text(str(number))
            assert results.commit("x", staged, {"key": "k", "row": number})["row"] == 1
    assert (tmp_path / "rows" / "x" / "a.txt").read_text() == "1"
    (tmp_path / "rows" / "x" / "result.json").write_text("{")  # damaged: it is not done
    assert results.done() == {} and results.find("x") is None
    with results.staged("x") as staged:
        results.commit("x", staged, {"key": "k", "row": 3})
    assert results.done()["k"]["row"] == 3 and not (tmp_path / "rows" / "x" / "a.txt").exists()


def test_results_can_be_kept_at_an_fsspec_url(folder):
    url = f"memory://{folder.name}"
    assert run(folder, "a", "fail", "b", out=url)[0] == 1 and ran(folder) == ["a", "fail", "b"]
    (folder / "mended").touch()
    assert run(folder, "a", "fail", "b", out=url)[0] == 0 and ran(folder) == ["fail"]
    results = open_results(url)
    assert isinstance(results, RemoteResults) and len(results.done()) == 3
    lines = [json.loads(line) for line in results.files.cat_file(f"{results.root}/results.jsonl").splitlines()]
    assert [line["answers"]["3"] for line in lines] == ["a4", "fail4", "b4"]
    assert results.files.cat_file(f"{results.root}/{lines[1]['files'][0]}") == b"fail4"


def test_an_upload_that_breaks_off_leaves_the_row_undone(tmp_path):
    results = RemoteResults(f"memory://{tmp_path.name}")

    def broken(*_, **__):
        raise OSError("the line is cut")

    with results.staged("x") as staged:
        (staged / "a.txt").write_text("1")
        put, results.files.put_file = results.files.put_file, broken
        with pytest.raises(OSError, match="the line is cut"):
            results.commit("x", staged, {"key": "k"})
        assert results.find("x") is None
        results.files.put_file = put
        results.commit("x", staged, {"key": "k"})
    assert list(results.done()) == ["k"]


@pytest.mark.parametrize("place", ["folder", "url"])
def test_a_row_in_which_three_workers_died_counts_as_failed_and_the_others_go_on(folder, place):
    results = open_results(folder / "out" if place == "folder" else f"memory://{folder.name}")
    jobs = [Job(text, f"key-{text}", text, text_job(text)) for text in ("a", "bad", "b")]
    with results.in_use(), contextlib.ExitStack() as dead:
        runner = RowRunner(results, node_classes=CLASSES, batch=3)
        for died in range(3):
            assert results.deaths("bad") == died
            dead.enter_context(results.staged("bad"))  # a worker that dies leaves it there
        assert [(r["row"], r["status"]) for r in runner.run(jobs)] == [("bad", "failed"), ("a", "done"), ("b", "done")]
        (failure, *_) = runner.run(jobs[1:2])
        assert "3 workers died while they ran this row: it may need more memory" in failure["error"]
    with results.in_use():  # a new run tries it once more
        (record,) = RowRunner(results, node_classes=CLASSES).run(jobs[1:2])
        assert record["status"] == "done" and results.deaths("bad") == 0


def test_a_row_in_which_a_worker_died_is_not_run_together_with_others(folder, monkeypatch):
    results, groups = FolderResults(folder / "out"), []
    jobs = [Job(text, f"key-{text}", text, text_job(text)) for text in ("a", "bad", "b", "c")]
    run_together = RowRunner._run_together

    def noted(self, group):
        groups.append([job.row_id for job in group])
        return run_together(self, group)

    monkeypatch.setattr(RowRunner, "_run_together", noted)
    with results.in_use(), results.staged("bad"):
        runner = RowRunner(results, node_classes=CLASSES, batch=3)
        assert [r["status"] for r in runner.run(jobs)] == ["done"] * 4
    assert groups == [["a", "b"], ["bad"], ["c"]]


def test_a_folder_that_a_later_run_has_cleared_away_is_not_taken_for_a_whole_result(tmp_path):
    results = FolderResults(tmp_path)
    with results.staged("x") as staged:
        (staged / "a.txt").write_text("1")
        with results.in_use():  # of the later run
            staged.mkdir()  # as a node does that saves a second file
            (staged / "b.txt").write_text("2")
            with pytest.raises(FileNotFoundError):
                results.commit("x", staged, {"key": "k"})
    assert results.done() == {}


def test_workers_without_ray_are_refused(folder):
    code, said = run(folder, "a", workers=2)
    assert code == 2 and said.startswith("Refused: --workers is the number of Ray's processes") and ran(folder) == []


def test_a_full_disk_stops_the_run_with_a_sentence(folder, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device", str(folder / "out" / "results.jsonl"))

    monkeypatch.setattr(FolderResults, "append", full)
    code, said = run(folder, "a", "b")
    assert code == 1 and "Stopped: [Errno 28] No space left on device" in said
    monkeypatch.undo()
    monkeypatch.setattr(Trouble, "folder", folder, raising=False)
    assert run(folder, "a", "b")[0] == 0
    check_whole(folder, "a", "b")


def test_progress_tells_the_rate_and_the_time_left():
    bar = command.tqdm(total=40, initial=10, file=io.StringIO())
    assert command.rate_and_time_left(bar) == "10 of 40 rows"
    bar.update(2)
    bar.start_t, bar._time = 0.0, lambda: 3.0
    assert command.rate_and_time_left(bar) == "12 of 40 rows, 1.5 s a row, 00:42 left"
    bar._time = lambda: 0.5
    assert command.rate_and_time_left(bar) == "12 of 40 rows, 4.0 rows a second, 00:07 left"
    bar.close()


def test_a_place_that_cannot_be_used_says_why(tmp_path):
    with pytest.raises(ResultsError, match="cannot be used"):
        open_results("unheard://of")
