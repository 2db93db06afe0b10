"""Workflow files: what is read, changed and refused."""

from __future__ import annotations

import json
import re

import pytest
from ming_univision.runner.workflow import WorkflowError, plan, read_workflow, with_image, with_settings
from ming_univision.tests.runner.example_nodes import CLASSES, Picky, node


def problems_of(workflow) -> list[str]:
    with pytest.raises(WorkflowError) as caught:
        plan(workflow, CLASSES)
    return caught.value.problems


def settings(**changes) -> dict:
    return {"1": node("Settings", **{"mode": "fast", "strength": 1, "on": True, "text": "x", **changes})}


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
    assert any('"value"' in p and "99 is above the maximum; it must be 0 to 9" in p for p in found)
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
    assert 'input "a": expected INT, but output 0 of node 1 "Gather" (Gather) is STRING' in problem


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
        ({"strength": 2.5}, "2.5 is above the maximum; it must be 0.0 to 2.0"),
        ({"strength": -1}, "-1.0 is below the minimum; it must be 0.0 to 2.0"),
        ({"strength": "much"}, "'much' is not a finite number"),
        ({"strength": float("nan")}, "nan is not a finite number"),
        ({"on": "yes"}, "'yes' is neither true nor false"),
        ({"text": None}, "None is not text"),
        ({"text": ["a", "b", "c"]}, "is not a value; a link is"),
        ({"steps": 2.5}, "2.5 is not a whole number"),
        ({"steps": float("inf")}, "inf is not a whole number"),
        ({"steps": True}, "True is not a whole number"),
        ({"steps": 0}, "0 is below the minimum; it must be 1 or more"),
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

    for value in ("x.png", {"__value__": ["2", 0]}):  # the latter says that it is a list, though it looks like a link
        with pytest.raises(WorkflowError, match="expected a link to an output of type IMAGE, not the value"):
            plan({"1": node("Takes", image=value)}, {"Takes": Takes})


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


def test_a_class_is_asked_for_its_inputs_once_however_many_nodes_it_has(monkeypatch):
    asked, declare = [], CLASSES["Number"].INPUT_TYPES
    monkeypatch.setattr(CLASSES["Number"], "INPUT_TYPES", lambda: asked.append(1) or declare())
    graph = {str(i): node("Number", value=1) for i in range(50)}
    graph["last"] = node("Show", source=["7", 0])
    assert [step.id for step in plan(graph, CLASSES)] == ["7", "last"]
    assert asked == [1]


def test_many_problems_are_counted_and_the_first_ones_shown():
    with pytest.raises(WorkflowError) as caught:
        plan({str(i): node(f"Unheard{i}") for i in range(1000)}, CLASSES)
    assert len(caught.value.problems) == 1000
    message = str(caught.value)
    assert message.startswith("1000 problems in this workflow:") and message.endswith("and 980 more")
    assert "unknown node type Unheard19; it belongs to" in message and len(message) < 10_000


@pytest.mark.parametrize(
    "graph",
    [
        {"1": node("x" * 100_000)},
        {"1" * 5000: node("Show")},
        {"1": node("Show", "title " * 5000)},
        settings(mode="x" * 100_000),
        settings(mode=["x" * 100_000]),
        settings(steps=-(10**200)),
        settings(strength={"a": ["x" * 1000] * 1000}),
        {"1": node("Show", source=["x" * 5000, 0])},
        {str(i): node("Add", a=[str((i + 1) % 500), 0], b=1) for i in range(500)}
        | {"s": node("Show", source=["0", 0])},
    ],
    ids=range(9),
)
def test_a_message_stays_short_however_long_the_names_and_values_are(graph):
    with pytest.raises(WorkflowError) as caught:
        plan(graph, CLASSES)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("index", [0.5, float("nan"), float("inf"), True, "0", None])
def test_a_link_to_an_output_that_is_no_whole_number_is_refused(index):
    graph = {"1": node("Number", value=1), "2": node("Add", a=["1", index], b=1), "3": node("Show", source=["2", 0])}
    (problem,) = problems_of(graph)
    assert "is not a value; a link is [node id, output index]" in problem


@pytest.mark.parametrize("value", [None, {"a": 1}])
def test_a_choice_is_never_an_object_or_nothing(value):
    (problem,) = problems_of({"1": node("Picky", name=value, size=1, extra=1)})
    assert "is not a choice" in problem


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
    with pytest.raises(WorkflowError, match=r"absent\.json: no such file"):
        read_workflow(tmp_path / "absent.json")


def test_hostile_json_is_one_error_that_names_the_file(tmp_path):
    for content, expected in {
        "[" * 100_000: "nested more than 64 levels",
        '{"1": ' + "9" * 5000 + "}": "5000 digits",
        '{"1": NaN}': "nan, not a finite number",
        '{"1": 1e999}': "not a finite number",
    }.items():
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(WorkflowError, match=re.escape(expected)) as caught:
            read_workflow(tmp_path / "x.json")
        assert "x.json" in str(caught.value)
    with pytest.raises(WorkflowError, match="is a folder"):
        read_workflow(tmp_path)


def test_a_setting_that_is_no_plain_json_is_taken_as_text():
    for typed in ("[" * 2000, "9" * 5000, "NaN", '"\\ud800'):
        assert with_settings(settings(), [f"1.mode={typed}"], CLASSES)["1"]["inputs"]["mode"] == typed


def test_the_api_twin_of_an_editor_file_is_named(tmp_path):
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "x.json").write_text("{}")
    (tmp_path / "x.json").write_text('{"nodes": []}')
    with pytest.raises(WorkflowError, match=r"use .*api.x\.json"):
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
    with pytest.raises(WorkflowError, match="there is no picture file"):
        with_image({"3": node("LoadImage", image="x")}, tmp_path / "absent.png")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(WorkflowError, match="does not start from a picture"):
        with_image(settings(), tmp_path / "x.png")
