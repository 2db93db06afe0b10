"""Workflow files that were damaged, or that ask for what there is not."""

from __future__ import annotations

import copy
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ming_univision.runner import terminal
from ming_univision.tests.comfyui.server import read_workflow
from ming_univision.tests.fuzz.hostile import any_json, broken_text, changed_tree, dumped, examples, is_for_people

NAMES = ("describe", "text_to_image", "save_and_continue")
SMALL = {"model_name": "tiny", "scene": "", "size": 64, "steps": 1, "max_new_tokens": 2}
texts_of_settings = ("7", "1e400", "NaN", "x", "[" * 2000, "9" * 5000, '["1", 0]', "null", "{}", '"\\ud800"', "")


def small(name: str) -> dict:
    """A shipped workflow that takes no time on the small model."""
    workflow = read_workflow(name)
    for node in workflow.values():
        node["inputs"] |= {key: value for key, value in SMALL.items() if key in node["inputs"]}
        node["inputs"].pop("scene", None) if node["class_type"] != "MingExampleScene" else node["inputs"].update(
            scene=""
        )
    return workflow


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return folder / "workflow.json"


def runs_or_says_why_not(file: Path, data: bytes, settings: tuple[str, ...] = ()) -> int:
    """Runs a workflow file as the command line does, and looks at what it says and leaves."""
    file.write_bytes(data)
    output, said = file.parent / "output", io.StringIO()
    with redirect_stdout(said):
        code = terminal.main(file, settings=settings, output=output)
    text = said.getvalue()
    assert code in (terminal.EXIT_DONE, terminal.EXIT_FAILED, terminal.EXIT_REFUSED)
    if code != terminal.EXIT_DONE:
        word = "Failed: " if code == terminal.EXIT_FAILED else "Refused: "
        assert word in text and is_for_people(text.partition(word)[2]), text[-1000:]
    left = [path.name for path in output.rglob("*") if path.is_file()]
    assert not [name for name in left if name.startswith(".") or not name.endswith((".png", ".safetensors"))]
    return code


@pytest.mark.parametrize("name", NAMES)
def test_the_workflows_that_are_spoiled_below_run_as_they_are(file, name):
    assert runs_or_says_why_not(file, dumped(small(name))) == terminal.EXIT_DONE


@examples(100)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_a_changed_workflow_runs_or_is_refused_in_words(file, data, name):
    runs_or_says_why_not(file, dumped(data.draw(changed_tree(small(name)))))


@examples(60)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_a_workflow_with_a_changed_input_runs_or_is_refused_in_words(file, data, name):
    workflow = small(name)
    node = data.draw(st.sampled_from(sorted(workflow)))
    workflow[node]["inputs"] = data.draw(changed_tree(workflow[node]["inputs"]))
    runs_or_says_why_not(file, dumped(workflow))


@examples(60)
@given(data=st.data())
def test_a_workflow_with_other_links_runs_or_is_refused_in_words(file, data):
    workflow = small("save_and_continue")
    linked = [
        (i, name) for i, node in workflow.items() for name, value in node["inputs"].items() if type(value) is list
    ]
    node, name = data.draw(st.sampled_from(linked))
    ids, outputs = st.sampled_from([*workflow, "99", 1]), st.sampled_from((0, 1, 2, 99, -1, 0.5, True, "0", None))
    workflow[node]["inputs"][name] = data.draw(st.tuples(ids, outputs).map(list))
    runs_or_says_why_not(file, dumped(workflow))


@examples(60)
@given(data=st.data())
def test_a_damaged_workflow_file_is_refused_in_words(file, data):
    text = json.dumps(small("describe")).encode()
    runs_or_says_why_not(file, data.draw(broken_text(text) | any_json.map(dumped)))


@examples(40)
@given(data=st.data())
def test_a_setting_of_the_command_line_is_taken_or_refused_in_words(file, data):
    workflow = copy.deepcopy(small("describe"))
    node = data.draw(st.sampled_from([*workflow, "99", ""]))
    name = data.draw(st.sampled_from([*workflow.get(node, {"inputs": {}})["inputs"], "x", ""]))
    setting = f"{node}.{name}={data.draw(st.sampled_from(texts_of_settings))}"
    runs_or_says_why_not(file, dumped(workflow), (setting,))
