"""Sessions on small node classes: what runs, in which order, what is reported, and what is computed again."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
from ming_univision.nodes import host, loaders, models
from ming_univision.runner.core_nodes import LoadImage
from ming_univision.runner.session import (
    ExecutionError,
    NodeFinished,
    NodeProgress,
    NodeStarted,
    Session,
    run_workflow,
)
from ming_univision.runner.workflow import WorkflowError, plan, read_workflow
from ming_univision.tests.runner.example_nodes import CLASSES, Add, Gather, Number, Show, Ticks, node
from PIL import Image


@pytest.fixture
def spy(monkeypatch):
    """spy(node class) -> a list that gets the inputs of every later call of its function."""

    def watch(node_class) -> list[dict]:
        calls, function = [], getattr(node_class, node_class.FUNCTION)

        def called(self, **inputs):
            calls.append(inputs)
            return function(self, **inputs)

        monkeypatch.setattr(node_class, node_class.FUNCTION, called)
        return calls

    return watch


def run(workflow, tmp_path, **more):
    return run_workflow(workflow, CLASSES, output_dir=tmp_path / "output", input_dir=tmp_path, **more)


# --- Running ------------------------------------------------------------------------------------------------------


def test_values_travel_along_links_and_hidden_inputs_are_filled(tmp_path):
    graph = {"1": node("Number", value=2), "2": node("Add", a=["1", 0], b=3), "3": node("Show", source=["2", 0])}
    results = run(graph, tmp_path)
    assert results["2"].outputs == ([5],)
    assert results["3"].ui == {"text": ["5"], "id": ["3"], "nodes": [3]}


def test_only_what_an_output_needs_is_run_and_each_node_once(tmp_path, spy):
    calls = spy(Number)
    graph = {
        "1": node("Number", value=2),
        "2": node("Number", value=3),  # feeds nothing
        "3": node("Add", a=["1", 0], b=["1", 0]),
        "4": node("Show", source=["3", 0]),
        "5": node("Show", source=["1", 0]),
    }
    assert set(run(graph, tmp_path)) == {"1", "3", "4", "5"}
    assert calls == [{"value": 2}]


def test_what_shows_a_result_runs_before_what_does_not(tmp_path):
    graph = {
        "1": node("Number", value=2),
        "2": node("Add", a=["1", 0], b=1),
        "3": node("Show", source=["2", 0]),
        "4": node("Show", source=["1", 0]),
    }
    assert [step.id for step in plan(graph, CLASSES)] == ["1", "4", "2", "3"]


def test_lists_are_mapped_and_the_shorter_repeats_its_last_item(tmp_path):
    graph = {
        "1": node("Numbers", count=3),
        "2": node("Numbers", count=2),
        "3": node("Add", a=["1", 0], b=["2", 0], more=10),
        "4": node("Show", source=["3", 0]),
    }
    results = run(graph, tmp_path)
    assert results["3"].outputs == ([10, 12, 13],)  # 0+0, 1+1, 2+1
    assert results["4"].ui["text"] == ["10", "12", "13"]


def test_list_outputs_are_joined_and_list_inputs_taken_whole(tmp_path):
    graph = {
        "1": node("Numbers", count=3),
        "2": node("Numbers", count=["1", 0]),  # called with 0, 1, 2
        "3": node("Gather", items=["2", 0], joint="-"),
        "4": node("Show", source=["3", 0]),
    }
    results = run(graph, tmp_path)
    assert results["2"].outputs == ([0, 0, 1], [0, 1, 2])
    assert results["3"].outputs == (["0-0-1"],)


def test_an_empty_list_is_reported_by_the_node_that_gets_it(tmp_path):
    graph = {"1": node("Numbers", count=0), "2": node("Show", source=["1", 0])}
    with pytest.raises(ExecutionError, match=r'node 2 .*"source".*empty list'):
        run(graph, tmp_path)


def test_nodes_run_in_inference_mode_and_tell_every_token(tmp_path):
    events = []
    graph = {"1": node("Ticks", count=3), "2": node("Show", source=["1", 0])}
    results = run(graph, tmp_path, on_event=events.append)
    assert results["1"].outputs == (["True"],)
    kinds = [type(event) for event in events]
    assert kinds == [NodeStarted, *[NodeProgress] * 6, NodeFinished, NodeStarted, NodeFinished]
    assert [(e.value, e.total, e.text) for e in events[1:7:2]] == [(1, 3, "字"), (2, 3, "字字"), (3, 3, "字字字")]
    assert {e.node.id for e in events[1:7]} == {"1"}


def test_the_workflow_given_is_not_changed(tmp_path):
    graph = {"1": node("Number", value="7"), "2": node("Show", source=["1", 0.0])}
    before = json.dumps(graph)
    assert run(graph, tmp_path)["1"].outputs == ([7],)
    assert json.dumps(graph) == before


def test_a_failing_node_is_named_and_its_error_is_the_cause(tmp_path):
    graph = {"1": node("Number", value=1), "2": node("Broken", "My Node", source=["1", 0])}
    with pytest.raises(ExecutionError, match=r'node 2 "My Node" \(Broken\) failed.*the cause') as caught:
        run(graph, tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_without_words_is_named_by_its_kind():
    assert str(
        ExecutionError(
            plan({"1": node("Number", value=1)} | {"2": node("Show", source=["1", 0])}, CLASSES)[0], MemoryError()
        )
    ).endswith("failed: MemoryError")


@pytest.mark.parametrize("kind", [NodeStarted, NodeProgress, NodeFinished])
def test_what_a_listener_raises_to_stop_is_not_taken_for_the_nodes_failure(tmp_path, kind):
    class Stop(Exception):
        pass

    def stop(event):
        if isinstance(event, kind):
            raise Stop

    graph = {"1": node("Ticks", count=3), "2": node("Show", source=["1", 0])}
    with pytest.raises(Stop):
        run_workflow(graph, CLASSES, output_dir=tmp_path, on_event=stop)


def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_runs(tmp_path, monkeypatch, spy):
    (tmp_path / "file").write_text("")
    calls = spy(Number)
    graph = {"1": node("Number", value=1), "2": node("Show", source=["1", 0])}
    with pytest.raises(WorkflowError, match="is a file"):
        run_workflow(graph, CLASSES, output_dir=tmp_path / "file" / "output", input_dir=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(WorkflowError, match="does not exist"):
        patch.setattr(Path, "exists", lambda path: False)  # as on a drive that is not there
        run_workflow(graph, CLASSES, output_dir=tmp_path / "output", input_dir=tmp_path)
    assert not calls


# --- The output cache ---------------------------------------------------------------------------------------------

ADDING = {
    "1": node("Number", value=1),
    "2": node("Number", value=2),
    "3": node("Add", a=["1", 0], b=5),
    "4": node("Add", a=["3", 0], b=["2", 0]),
    "5": node("Show", source=["4", 0]),
    "6": node("Show", source=["2", 0]),
}


def changed(graph: dict, **inputs) -> dict:
    """A copy of the workflow with inputs changed, such as n1_value=7."""
    graph = json.loads(json.dumps(graph))
    for target, value in inputs.items():
        node_id, name = target.removeprefix("n").split("_", 1)
        graph[node_id]["inputs"][name] = value
    return graph


@pytest.fixture
def session(tmp_path):
    with Session(CLASSES, output_dir=tmp_path / "output", input_dir=tmp_path) as session:
        yield session


@pytest.fixture
def computed(session):
    """computed(workflow) -> the ids of the nodes that a run in the session computed."""

    def call(graph) -> list[str]:
        events = []
        session.run(graph, on_event=events.append)
        return [event.node.id for event in events if isinstance(event, NodeFinished) and not event.cached]

    return call


def test_a_second_run_computes_nothing_and_returns_the_same_results(session, spy):
    calls = [spy(node_class) for node_class in (Number, Add, Show)]
    first = session.run(ADDING)
    made = [len(c) for c in calls]
    assert made == [2, 2, 2]
    second = session.run(ADDING)
    assert [len(c) for c in calls] == made
    assert second == first and second["5"].ui["text"] == ["8"]


def test_a_changed_value_runs_only_what_depends_on_it(computed):
    assert sorted(computed(ADDING)) == ["1", "2", "3", "4", "5", "6"]
    assert computed(changed(ADDING, n1_value=7)) == ["1", "3", "4", "5"]
    assert sorted(computed(changed(ADDING, n1_value=7, n2_value=8))) == ["2", "4", "5", "6"]
    assert computed(changed(ADDING, n1_value=7, n2_value=8, n4_a=1)) == ["4", "5"]
    assert computed(changed(ADDING, n1_value=7, n2_value=8, n4_a=1)) == []


def test_the_title_of_a_node_and_what_no_output_needs_change_nothing(computed):
    computed(ADDING)
    assert computed(ADDING | {"1": node("Number", "Another Title", value=1), "9": node("Number", value=9)}) == []


def test_an_id_changes_nothing_but_for_a_node_that_asks_for_its_id(computed):
    computed({"1": node("Number", value=1), "2": node("Show", source=["1", 0])})
    assert computed({"8": node("Number", value=1), "9": node("Show", source=["8", 0])}) == ["9"]


def test_in_another_output_folder_only_what_saves_or_shows_runs_again(session, tmp_path):
    graph = {"1": node("Number", value=1), "2": node("Write", source=["1", 0], name="x.txt")}

    def computed(folder) -> list[str]:
        events = []
        session.run(graph, output_dir=tmp_path / folder, on_event=events.append)
        return [event.node.id for event in events if isinstance(event, NodeFinished) and not event.cached]

    assert computed("a") == ["1", "2"] and computed("b") == ["2"] and computed("b") == []
    assert (tmp_path / "a" / "x.txt").read_text() == (tmp_path / "b" / "x.txt").read_text() == "1"


def test_nodes_of_equal_content_are_computed_once(session, spy):
    calls = spy(Number)
    events = []
    graph = {
        "1": node("Number", value=1),
        "2": node("Number", value=1),
        "3": node("Add", a=["1", 0], b=["2", 0]),
        "4": node("Show", source=["3", 0]),
    }
    assert session.run(graph, on_event=events.append)["4"].ui["text"] == ["2"]
    assert len(calls) == 1
    cached = [event.node.id for event in events if isinstance(event, NodeFinished) and event.cached]
    assert cached == ["2"]


def test_a_node_that_says_that_it_is_not_idempotent_shares_with_no_other(session, spy, monkeypatch):
    monkeypatch.setattr(Number, "NOT_IDEMPOTENT", True, raising=False)
    calls = spy(Number)
    graph = {
        "1": node("Number", value=1),
        "2": node("Number", value=1),
        "3": node("Add", a=["1", 0], b=["2", 0]),
        "4": node("Show", source=["3", 0]),
    }
    session.run(graph)
    session.run(graph)
    assert len(calls) == 2


def test_values_that_python_calls_equal_are_told_apart(computed):
    def graph(value):
        return {"1": node("Gather", items=value, joint=","), "2": node("Show", source=["1", 0])}

    for value in (1, 1.0, True, "1", None, {"a": 1}, {"a": 1.0}):
        assert computed(graph(value)) == ["1", "2"]
        assert computed(graph(value)) == []


def test_lists_come_out_of_the_cache_as_they_went_in(session, spy):
    calls, gathered = spy(Add), spy(Gather)
    graph = {
        "1": node("Numbers", count=3),
        "2": node("Add", a=["1", 0], b=["1", 1]),
        "3": node("Gather", items=["2", 0], joint="-"),
        "4": node("Show", source=["3", 0]),
    }
    assert session.run(graph)["4"].ui["text"] == ["3-4-5"]
    assert len(calls) == 3 and gathered == [{"items": [3, 4, 5], "joint": ["-"]}]
    assert session.run(changed(graph, n3_joint="+"))["4"].ui["text"] == ["3+4+5"]
    assert len(calls) == 3 and len(gathered) == 2


def test_a_node_that_changes_the_list_it_gets_does_not_change_the_cache(session, monkeypatch):
    def gather(self, items, joint):
        items.reverse()
        return (joint[0].join(map(str, items)),)

    monkeypatch.setattr(Gather, "gather", gather)
    graph = {
        "1": node("Numbers", count=3),
        "2": node("Gather", items=["1", 0], joint="-"),
        "3": node("Show", source=["2", 0]),
    }
    for joint in ("-", "+"):
        assert session.run(changed(graph, n2_joint=joint))["3"].ui["text"] == [joint.join("210")]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(computed, session, tmp_path):
    file = tmp_path / "x.txt"
    graph = {"1": node("ReadFile", file=str(file)), "2": node("Show", source=["1", 0])}
    for text, expected in {"one": ["1", "2"], "two": ["1", "2"]}.items():
        file.write_text(text)
        assert computed(graph) == expected and computed(graph) == []
        assert session.run(graph)["2"].ui["text"] == [text]


def test_is_changed_gets_none_for_what_is_linked(computed, tmp_path):
    (tmp_path / "x.txt").write_text("one")
    graph = {
        "1": node("Gather", items=str(tmp_path / "x.txt"), joint=""),
        "2": node("ReadFile", file=["1", 0]),
        "3": node("Show", source=["2", 0]),
    }
    assert computed(graph) and computed(graph) == []


def test_nan_from_is_changed_means_always_and_takes_what_depends_on_it_along(computed):
    graph = {
        "1": node("AlwaysChanged", value=1),
        "2": node("Number", value=2),
        "3": node("Add", a=["1", 0], b=["2", 0]),
        "4": node("Show", source=["3", 0]),
    }
    assert sorted(computed(graph)) == ["1", "2", "3", "4"]
    assert computed(graph) == ["1", "3", "4"]


def test_an_is_changed_that_fails_is_logged_and_the_node_runs(computed, tmp_path, caplog):
    (tmp_path / "x.txt").write_text("one")
    graph = {"1": node("ReadFile", file=str(tmp_path / "absent.txt")), "2": node("Show", source=["1", 0])}
    with pytest.raises(ExecutionError, match="node 1"):
        computed(graph)
    assert "IS_CHANGED failed" in caplog.text and "node 1" in caplog.text


@pytest.mark.parametrize("stopped_by", [ValueError("bad luck"), KeyboardInterrupt()])
def test_a_node_that_fails_or_is_interrupted_is_not_cached_and_what_was_done_before_it_is(
    session, computed, monkeypatch, stopped_by
):
    add = Add.add

    def fail(self, **inputs):
        raise stopped_by

    monkeypatch.setattr(Add, "add", fail)
    expected = ExecutionError if isinstance(stopped_by, Exception) else KeyboardInterrupt
    with pytest.raises(expected):
        session.run(ADDING)
    monkeypatch.setattr(Add, "add", add)
    assert computed(ADDING) == ["3", "4", "5"]  # 1, 2 and 6 ran before


def test_a_run_that_a_listener_stops_leaves_the_running_node_uncached(session, computed):
    class Stop(Exception):
        pass

    def stop(event):
        if isinstance(event, NodeProgress) and event.value == 2:
            raise Stop

    graph = {"1": node("Ticks", count=3), "2": node("Show", source=["1", 0])}
    with pytest.raises(Stop):
        session.run(graph, on_event=stop)
    assert computed(graph) == ["1", "2"]


def test_a_refused_workflow_leaves_the_cache_as_it_was(session, computed):
    computed(ADDING)
    with pytest.raises(WorkflowError):
        session.run(changed(ADDING, n1_value=99))
    assert computed(ADDING) == []


def test_only_the_outputs_of_the_last_workflow_are_kept(session, computed, monkeypatch):
    class Value:
        pass

    made = []

    def give(self, value):
        made.append(weakref.ref(found := Value()))
        return (found,)

    monkeypatch.setattr(Number, "give", give)
    monkeypatch.setattr(Number, "RETURN_TYPES", ("*",))
    graph = {"1": node("Number", value=1), "2": node("Show", source=["1", 0])}
    for value in range(5):
        session.run(changed(graph, n1_value=value))
        gc.collect()
        assert [ref() is not None for ref in made] == [False] * value + [True]
    session.close()
    gc.collect()
    assert made[-1]() is None
    assert computed(graph) == ["1", "2"]  # a closed session starts from nothing


def test_the_instance_of_a_node_is_kept_until_a_workflow_comes_without_it(session, spy):
    graph = {"1": node("Counting", seed=1), "2": node("Show", source=["1", 0])}
    assert session.run(graph)["1"].outputs == ([1],)
    assert session.run(changed(graph, n1_seed=2))["1"].outputs == ([2],)
    session.run(ADDING)
    assert session.run(graph)["1"].outputs == ([1],)


def test_two_sessions_share_nothing(tmp_path, spy):
    calls = spy(Ticks)
    graph = {"1": node("Ticks", count=3), "2": node("Show", source=["1", 0])}
    for _ in range(2):
        run_workflow(graph, CLASSES, output_dir=tmp_path)
    assert len(calls) == 2


# --- Sessions on the pack's own nodes -----------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch):
    """The folders of the checkpoints that are read."""
    read, load_univision = [], loaders.load_univision

    def watched(folder, **options):
        read.append(folder)
        return load_univision(folder, **options)

    monkeypatch.setattr(loaders, "load_univision", watched)
    return read


def drawing() -> dict:
    graph = read_workflow(host.PACK / "workflows" / "api" / "text_to_image.json")
    for entry in graph.values():
        entry["inputs"] |= {name: value for name, value in {"steps": 2}.items() if name in entry["inputs"]}
    return graph


def of_class(graph: dict, class_type: str) -> dict:
    (entry,) = (entry for entry in graph.values() if entry["class_type"] == class_type)
    return entry["inputs"]


def test_a_second_run_of_a_workflow_loads_no_model_and_a_changed_seed_draws_again(tmp_path, loads):
    graph = drawing()
    with Session(output_dir=tmp_path) as session:

        def computed() -> set[str]:
            events = []
            session.run(graph, on_event=events.append)
            return {e.node.class_type for e in events if isinstance(e, NodeFinished) and not e.cached}

        assert "MingUniVisionLoader" in computed() and len(loads) == 1
        assert computed() == set()
        of_class(graph, "MingGenerate")["seed"] += 1
        assert computed() == {"MingGenerate", "MingTokDecode", "SaveImage"}
        assert len(loads) == 1 and len(list(tmp_path.rglob("*.png"))) == 2


def test_a_closed_session_lets_its_model_go(tmp_path, loads):
    gc.collect()
    alive = len(models._live)
    with Session(output_dir=tmp_path) as session:
        session.run(drawing())
        assert len(models._live) == alive + 1
    gc.collect()
    assert len(models._live) == alive


def test_a_picture_that_was_changed_on_disk_is_loaded_again(tmp_path, monkeypatch):
    loaded, load_image = [], LoadImage.load_image
    monkeypatch.setattr(LoadImage, "load_image", lambda self, image: loaded.append(image) or load_image(self, image))
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": str(tmp_path / "a.png")}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with Session(output_dir=tmp_path / "output") as session:
        for color in ("red", "red", "blue"):
            Image.new("RGB", (8, 8), color).save(tmp_path / "a.png")
            session.run(graph)
    assert len(loaded) == 2
