"""The headless runner on small made-up node classes: what is refused, what runs, in which order, and what is told."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ming_univision.nodes import headless_cli, host
from ming_univision.runner.run import NodeError, NodeFinished, NodeStarted, Progress, run_workflow
from ming_univision.runner.workflow import WorkflowError, plan, read_workflow, with_image, with_settings


class Number:
    RETURN_TYPES, FUNCTION = ("INT",), "give"
    made = 0

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"min": 0, "max": 9})}}

    def give(self, value):
        type(self).made += 1
        return (value,)


class Numbers:
    RETURN_TYPES, FUNCTION, OUTPUT_IS_LIST = ("INT", "INT"), "give", (True, False)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {})}}

    def give(self, count):
        return (list(range(count)), count)


class Add:
    RETURN_TYPES, FUNCTION = ("INT",), "add"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {}), "b": ("INT", {})}, "optional": {"more": ("INT,FLOAT", {})}}

    def add(self, a, b, more=0):
        return (a + b + more,)


class Gather:
    RETURN_TYPES, FUNCTION, INPUT_IS_LIST = ("STRING",), "gather", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"items": ("*",), "joint": ("STRING", {})}}

    def gather(self, items, joint):
        return (joint[0].join(map(str, items)),)


class Show:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "show", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("*",)}, "hidden": {"node_id": "UNIQUE_ID", "graph": "PROMPT"}}

    def show(self, source, node_id, graph):
        return {"ui": {"text": [str(source)], "id": [node_id], "nodes": [len(graph)]}}


class Settings:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = ("STRING",), "give", True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "mode": (["fast", "slow"],),
                "strength": ("FLOAT", {"min": 0.0, "max": 2.0}),
                "on": ("BOOLEAN", {}),
                "text": ("STRING", {}),
            },
            "optional": {"steps": ("INT", {"min": 1})},
        }

    def give(self, **values):
        return (values,)


class Picky:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = ("STRING",), "give", True
    asked_with: dict | None = None

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": (["listed"],), "size": ("INT", {"max": 5}), "extra": ("INT", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, name, size):
        cls.asked_with = {"name": name, "size": size}
        return True if name == "good" else f"no such thing: {name}"

    def give(self, name, size, extra):
        return (name,)


class Ticks:
    RETURN_TYPES, FUNCTION = ("STRING",), "tick"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"count": ("INT", {})}}

    def tick(self, count):
        report = host.progress(count)
        for i in range(count):
            report(i + 1, "字" * (i + 1))
            report(i + 1, "字" * (i + 1))
        return (f"{torch.is_inference_mode_enabled()}",)


class Broken:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "run", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"source": ("*",)}}

    def run(self, source):
        raise KeyError("the cause")


class Interrupted(Broken):
    def run(self, source):
        raise KeyboardInterrupt


CLASSES = {
    cls.__name__: cls for cls in (Number, Numbers, Add, Gather, Show, Settings, Picky, Ticks, Broken, Interrupted)
}


def node(class_type: str, _title: str = "", **inputs) -> dict:
    entry = {"class_type": class_type, "inputs": inputs}
    return {**entry, "_meta": {"title": _title}} if _title else entry


def run(workflow, tmp_path, **more):
    return run_workflow(workflow, CLASSES, output_dir=tmp_path / "output", input_dir=tmp_path, **more)


def problems_of(workflow) -> list[str]:
    with pytest.raises(WorkflowError) as caught:
        plan(workflow, CLASSES)
    return caught.value.problems


def settings(**changes) -> dict:
    return {"1": node("Settings", **{"mode": "fast", "strength": 1, "on": True, "text": "x", **changes})}


# --- Running ------------------------------------------------------------------------------------------------------


def test_values_travel_along_links_and_hidden_inputs_are_filled(tmp_path):
    graph = {"1": node("Number", value=2), "2": node("Add", a=["1", 0], b=3), "3": node("Show", source=["2", 0])}
    results = run(graph, tmp_path)
    assert results["2"].outputs == ([5],)
    assert results["3"].ui == {"text": ["5"], "id": ["3"], "nodes": [3]}


def test_only_what_an_output_needs_is_run_and_each_node_once(tmp_path):
    Number.made = 0
    graph = {
        "1": node("Number", value=2),
        "2": node("Number", value=3),  # feeds nothing
        "3": node("Add", a=["1", 0], b=["1", 0]),
        "4": node("Show", source=["3", 0]),
        "5": node("Show", source=["1", 0]),
    }
    assert set(run(graph, tmp_path)) == {"1", "3", "4", "5"}
    assert Number.made == 1


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
    with pytest.raises(NodeError, match=r'node 2 .*"source".*empty list'):
        run(graph, tmp_path)


def test_nodes_run_in_inference_mode_and_tell_every_token(tmp_path):
    events = []
    graph = {"1": node("Ticks", count=3), "2": node("Show", source=["1", 0])}
    results = run(graph, tmp_path, on_event=events.append)
    assert results["1"].outputs == (["True"],)
    kinds = [type(event) for event in events]
    assert kinds == [NodeStarted, *[Progress] * 6, NodeFinished, NodeStarted, NodeFinished]
    assert [(e.value, e.total, e.text) for e in events[1:7:2]] == [(1, 3, "字"), (2, 3, "字字"), (3, 3, "字字字")]
    assert {e.node.id for e in events[1:7]} == {"1"}


def test_the_workflow_given_is_not_changed(tmp_path):
    graph = {"1": node("Number", value="7"), "2": node("Show", source=["1", 0.0])}
    before = json.dumps(graph)
    assert run(graph, tmp_path)["1"].outputs == ([7],)
    assert json.dumps(graph) == before


def test_a_failing_node_is_named_and_its_error_is_the_cause(tmp_path):
    graph = {"1": node("Number", value=1), "2": node("Broken", "My Node", source=["1", 0])}
    with pytest.raises(NodeError, match=r'node 2 "My Node" \(Broken\) failed.*the cause') as caught:
        run(graph, tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_without_words_is_named_by_its_kind():
    assert str(
        NodeError(
            plan({"1": node("Number", value=1)} | {"2": node("Show", source=["1", 0])}, CLASSES)[0], MemoryError()
        )
    ).endswith("failed: MemoryError")


@pytest.mark.parametrize("kind", [NodeStarted, Progress, NodeFinished])
def test_what_a_listener_raises_to_stop_is_not_taken_for_the_nodes_failure(tmp_path, kind):
    class Stop(Exception):
        pass

    def stop(event):
        if isinstance(event, kind):
            raise Stop

    graph = {"1": node("Ticks", count=3), "2": node("Show", source=["1", 0])}
    with pytest.raises(Stop):
        run_workflow(graph, CLASSES, output_dir=tmp_path, on_event=stop)


def test_an_output_folder_that_cannot_be_made_is_refused_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    Number.made = 0
    graph = {"1": node("Number", value=1), "2": node("Show", source=["1", 0])}
    with pytest.raises(WorkflowError, match="is a file"):
        run_workflow(graph, CLASSES, output_dir=tmp_path / "file" / "output", input_dir=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(WorkflowError, match="there is no"):
        patch.setattr(Path, "exists", lambda path: False)  # as on a drive that is not there
        run_workflow(graph, CLASSES, output_dir=tmp_path / "output", input_dir=tmp_path)
    assert Number.made == 0


# --- Checking -----------------------------------------------------------------------------------------------------


def test_all_problems_are_collected_into_one_error():
    graph = {
        "1": node("Nubmer", value=1),
        "2": node("Add", a=["9", 0], b=["3", 4]),
        "3": node("Number", "The Number", value=99),
        "4": node("Show", source=["2", 0]),
        "5": node("Show"),
    }
    found = problems_of(graph)
    assert len(found) == 5
    assert "unknown node type Nubmer" in found[0] and "Number" in found[0]
    assert any("node 9, which is not in the workflow" in problem for problem in found)
    assert any('output 4 of node 3 "The Number" (Number), which has only outputs 0 to 0' in p for p in found)
    assert any('"value"' in p and "99 is above the largest value; allowed: 0 to 9" in p for p in found)
    assert any('node 5 "Show" (Show): the required input "source" is missing' in p for p in found)


def test_an_unknown_node_of_this_pack_and_of_another_are_told_apart():
    graph = {"1": node("MingTimeTravel"), "2": node("KSampler"), "3": node("Show", source=1)}
    ours, other = problems_of(graph)
    assert "newer" in ours
    assert "another node pack" in other


def test_a_cycle_names_its_nodes():
    graph = {
        "1": node("Add", "First", a=["2", 0], b=1),
        "2": node("Add", "Second", a=["1", 0], b=1),
        "3": node("Show", source=["2", 0]),
    }
    (problem,) = problems_of(graph)
    assert "cycle" in problem and "First (1)" in problem and "Second (2)" in problem


def test_a_link_must_fit_in_type():
    graph = {
        "1": node("Gather", items=1, joint=","),
        "2": node("Add", a=["1", 0], b=1),
        "3": node("Show", source=["2", 0]),
    }
    (problem,) = problems_of(graph)
    assert 'input "a": takes INT, but output 0 of node 1 "Gather" (Gather) is STRING' in problem


def test_any_type_and_unions_take_links_that_have_a_type_in_common():
    graph = {
        "1": node("Number", value=1),
        "2": node("Add", a=1, b=1, more=["1", 0]),
        "3": node("Show", source=["2", 0]),
    }
    assert len(plan(graph, CLASSES)) == 3


def test_a_link_into_an_input_that_does_not_exist_is_a_problem_but_a_value_is_ignored():
    graph = {"1": node("Number", value=1, upload="image"), "2": node("Show", source=["1", 0], nothing=["1", 0])}
    (problem,) = problems_of(graph)
    assert "no such input" in problem and '"nothing"' in problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mode": "Fast"}, r"'Fast' is not one of: 'fast', 'slow'; did you mean 'fast'\?"),
        ({"strength": 2.5}, "2.5 is above the largest value; allowed: 0.0 to 2.0"),
        ({"strength": -1}, "-1.0 is below the smallest value; allowed: 0.0 to 2.0"),
        ({"strength": "much"}, "'much' is not a finite number"),
        ({"strength": float("nan")}, "nan is not a finite number"),
        ({"on": "yes"}, "'yes' is neither true nor false"),
        ({"text": None}, "None is not text"),
        ({"text": ["a", "b", "c"]}, "is no value; a link is"),
        ({"steps": 2.5}, "2.5 is not a whole number"),
        ({"steps": float("inf")}, "inf is not a whole number"),
        ({"steps": True}, "True is not a whole number"),
        ({"steps": 0}, "0 is below the smallest value; allowed: 1 or more"),
    ],
)
def test_a_widget_value_that_does_not_fit_is_named_with_what_is_allowed(change, expected):
    with pytest.raises(WorkflowError, match=expected) as caught:
        plan(settings(**change), CLASSES)
    (problem,) = caught.value.problems
    assert problem.startswith(f'node 1 "Settings" (Settings), input "{next(iter(change))}": ')


def test_widget_values_are_converted_to_their_types():
    (step,) = plan(settings(strength="1.5", on=0, text=7, steps=3.0), CLASSES)
    assert step.inputs == {"mode": "fast", "strength": 1.5, "on": False, "text": "7", "steps": 3}
    assert type(step.inputs["steps"]) is int


def test_a_socket_takes_no_plain_value():
    class Takes:
        RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "take", True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"image": ("IMAGE",)}}

    with pytest.raises(WorkflowError, match="takes a link to an output of type IMAGE, not the value"):
        plan({"1": node("Takes", image="x.png")}, {"Takes": Takes})


def test_a_nodes_own_check_gets_what_it_asks_for_and_sets_its_own_bounds():
    graph = {"0": node("Number", value=1), "1": node("Picky", name="good", size=["0", 0], extra=1)}
    assert len(plan(graph, CLASSES)) == 2  # "good" is not in the combo, but the node checks that input itself
    assert Picky.asked_with == {"name": "good", "size": None}  # what is linked is not known yet
    (problem,) = problems_of({"1": node("Picky", name="bad", size=99, extra=1)})
    assert "no such thing: bad" in problem and '"name"' in problem


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({}, "empty"),
        ({"1": node("Number", value=1)}, "nothing to run"),
        ({"1": {"inputs": {}}}, 'no "class_type"'),
        ({"last_node_id": 7}, 'no "class_type"'),
        ({"1": {"class_type": "Show", "inputs": []}}, "not an object"),
    ],
)
def test_what_is_no_runnable_workflow_is_refused(graph, expected):
    with pytest.raises(WorkflowError, match=expected):
        plan(graph, CLASSES)


# --- Files and changes --------------------------------------------------------------------------------------------


def test_bad_files_are_refused_with_what_to_do(tmp_path):
    for content, expected in {
        '{"1": ': "not valid JSON: .* at line 1, column 7",
        "[]": "expected a JSON object",
        '{"nodes": [], "links": []}': r"Export \(API\)",
    }.items():
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(WorkflowError, match=expected):
            read_workflow(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkflowError, match="not UTF-8"):
        read_workflow(tmp_path / "x.json")
    with pytest.raises(WorkflowError, match="cannot be read"):
        read_workflow(tmp_path / "absent.json")


def test_the_api_twin_of_an_editor_file_is_named(tmp_path):
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "x.json").write_text("{}")
    (tmp_path / "x.json").write_text('{"nodes": []}')
    with pytest.raises(WorkflowError, match=r"twin is .*api.x\.json"):
        read_workflow(tmp_path / "x.json")


def test_the_body_of_a_queue_request_is_a_workflow_too(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"prompt": {"1": node("Show", source="今")}}), encoding="utf-8")
    assert read_workflow(tmp_path / "x.json")["1"]["inputs"] == {"source": "今"}


def test_settings_replace_values_and_links():
    graph = settings() | {"2:1": node("Add", a=1, b=["1", 0])}
    changed = with_settings(graph, ["1.strength=0.5", "1.text=12", '2:1.a=["3", 0]', "2:1.b=4", "1.mode=slow"], CLASSES)
    assert changed["1"]["inputs"] == {"mode": "slow", "strength": 0.5, "on": True, "text": "12"}
    assert changed["2:1"]["inputs"] == {"a": ["3", 0], "b": 4}
    assert graph["2:1"]["inputs"] == {"a": 1, "b": ["1", 0]}


@pytest.mark.parametrize(
    ("typed", "stored"),
    [("true", "true"), ("1e3", "1e3"), ('"quoted"', "quoted"), ("a=b.c", "a=b.c"), ('["2", 0]', ["2", 0]), ("", "")],
)
def test_text_is_taken_as_typed(typed, stored):
    assert with_settings(settings(), [f"1.text={typed}"], CLASSES)["1"]["inputs"]["text"] == stored


def test_settings_that_name_nothing_are_refused_with_what_there_is():
    with pytest.raises(WorkflowError) as caught:
        with_settings(settings(), ["7.seed=1", "1.speed=1", "rubbish", ".x=1"], CLASSES)
    no_node, no_input, rubbish, no_id = caught.value.problems
    assert "no node 7" in no_node and "1 (Settings)" in no_node
    assert '"speed"' in no_input and "mode, strength, on, text, steps" in no_input
    assert "NODE.INPUT=VALUE" in rubbish and "NODE.INPUT=VALUE" in no_id


def test_a_picture_takes_the_place_of_every_example_scene_that_feeds_something(tmp_path):
    picture = tmp_path / "my picture.png"
    picture.write_bytes(b"")
    graph = {
        "1": node("MingExampleScene", "Scene", scene="", seed=1),
        "2": node("MingExampleScene", scene="unused"),
        "3": node("LoadImage", image="other.png"),
        "4": node("Add", a=["1", 0], b=["1", 1]),
    }
    changed = with_image(graph, picture)
    expected = {
        "class_type": "LoadImage",
        "inputs": {"image": str(picture.resolve())},
        "_meta": {"title": "Load Image"},
    }
    assert changed["1"] == expected
    assert changed["4"]["inputs"] == {"a": ["1", 0], "b": ""}  # LoadImage has no caption
    assert changed["2"] == graph["2"] and changed["3"] == graph["3"]
    assert graph["1"]["class_type"] == "MingExampleScene"


def test_without_an_example_scene_the_file_of_load_image_is_replaced(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    graph = {"3": node("LoadImage", image="other.png")}
    assert with_image(graph, tmp_path / "x.png")["3"]["inputs"] == {"image": str((tmp_path / "x.png").resolve())}


def test_a_picture_that_is_absent_or_has_no_place_is_refused(tmp_path):
    with pytest.raises(WorkflowError, match="no such picture file"):
        with_image({"3": node("LoadImage", image="x")}, tmp_path / "absent.png")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(WorkflowError, match="no place for a picture"):
        with_image(settings(), tmp_path / "x.png")


# --- The terminal -------------------------------------------------------------------------------------------------


class Console(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def screen(self) -> list[str]:
        """The lines as a person sees them, after every carriage return has been obeyed."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


@pytest.fixture
def command(tmp_path, monkeypatch):
    """command(graph, is_terminal, ...) -> (exit code, console), through `main` and a file."""

    def call(graph, is_terminal=False, **more):
        console = Console(is_terminal)
        monkeypatch.setattr("sys.stdout", console)
        monkeypatch.setattr(headless_cli, "known_node_classes", lambda: CLASSES)
        monkeypatch.setattr(headless_cli, "run_workflow", lambda *a, **k: run_workflow(*a, node_classes=CLASSES, **k))
        (tmp_path / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
        return headless_cli.main(tmp_path / "graph.json", output=tmp_path / "output", **more), console

    return call


TICKING = {"1": node("Ticks", "Long Work", count=4), "2": node("Show", "Answer", source=["1", 0])}


def test_without_a_terminal_every_stage_is_a_line(command):
    code, console = command(TICKING)
    lines = console.getvalue().splitlines()
    assert code == 0 and "\r" not in console.getvalue()
    assert lines[1:4] == ["[1/2] Long Work (1) ...", "      1/4", "      4/4"]
    assert lines[4].endswith(" s")
    assert "      True" in lines  # the answer


def test_on_a_terminal_the_bar_moves_with_every_token_and_leaves_one_line_a_node(command):
    code, console = command(TICKING, is_terminal=True)
    raw, screen = console.getvalue(), console.screen()
    assert code == 0 and "\x1b" not in raw
    assert [f"{i}/4" in raw for i in range(1, 5)] == [True] * 4
    assert "字字" in raw and "█" in raw
    assert screen[1].startswith("[1/2] Long Work (1)  ") and "█" not in screen[1] and screen[1].endswith(" s")
    assert screen[2].startswith("[2/2] Answer (2)  ")
    assert screen[3] == "      True"


@pytest.mark.parametrize(("kind", "said"), [("Broken", "Failed: "), ("Interrupted", "Stopped.")])
def test_what_stops_a_node_is_the_last_thing_on_the_screen(command, kind, said):
    _, console = command({"1": node(kind, "Long Work", source="x")}, is_terminal=True)
    lines = [line for line in console.screen() if line]
    assert any(line.startswith(said) for line in lines[1:])
    assert not any(line.startswith("[1/1]") for line in lines)


def test_a_log_warning_is_printed_above_the_line_that_is_redrawn():
    console = Console(True)
    terminal = headless_cli.Terminal(console, "")
    terminal._draw("working")
    headless_cli._TerminalLog(terminal).emit(logging.makeLogRecord({"msg": "careful", "levelname": "WARNING"}))
    assert console.screen() == ["      warning: careful", "working"]


def test_wide_characters_are_counted_as_two_columns():
    assert headless_cli._columns_of("a字e\u0301") == 4
    assert headless_cli._last_columns("一二三\n四", 5) == "三 四"
    assert headless_cli._first_columns("一二三", 5) == "一二"


def test_exit_codes_tell_done_failed_refused_and_stopped(command):
    assert command({"1": node("Show", source="x")})[0] == 0
    code, console = command({"1": node("Broken", source="x")})
    assert code == 1 and "the cause" in console.getvalue()
    code, console = command({"1": node("Show")})
    assert code == 2 and "Refused" in console.getvalue() and '"source" is missing' in console.getvalue()
    code, console = command({"1": node("Interrupted", source="x")})
    assert code == 130 and "Stopped" in console.getvalue()
    assert command({"1": node("Show", source="x")}, settings=["2.a=1"])[0] == 2
    assert command({"1": node("Show", source="x")}, image="absent.png")[0] == 2


@pytest.mark.parametrize(("workflow", "lines"), [("reconstruct", 1), ("reconstruct", -1), ("missing", 0)])
def test_a_reader_that_goes_away_ends_the_run_without_a_traceback(tmp_path, workflow, lines):
    """After the first line, before the last one ("Done in ..."), or before all that is said."""
    code = "import sys, time, quickstart; quickstart.load_pack(); from ming_univision.nodes import headless_cli; "
    code += "say = headless_cli.Terminal.say; headless_cli.Terminal.say = lambda self, text: ("
    code += "time.sleep(1 if text.startswith(('Done', 'Refused')) else 0), say(self, text)); "
    code += f"sys.exit(headless_cli.main('workflows/api/{workflow}.json', output={str(tmp_path)!r}))"
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, cwd=host.PACK, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        if lines == 1:
            assert child.stdout.readline().startswith("Running reconstruct.json")
        while lines == -1 and "saved" not in child.stdout.readline():
            pass
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1
