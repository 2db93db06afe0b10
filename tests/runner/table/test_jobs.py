"""Rows become workflows that are checked before anything runs, and known by their content."""

from __future__ import annotations

from pathlib import Path

import pytest
from ming_univision.runner.core_nodes import LoadImage
from ming_univision.runner.table.jobs import in_sharing_order, make_jobs
from ming_univision.runner.table.rows import Row, Table, TableError
from ming_univision.runner.workflow import WorkflowError
from ming_univision.tests.runner.example_nodes import CLASSES as EXAMPLES
from ming_univision.tests.runner.example_nodes import node
from PIL import Image

CLASSES = {**EXAMPLES, "LoadImage": LoadImage}
ADDING = {
    "1": node("Number", value=1),
    "2": node("Add", a=["1", 0], b=5),
    "3": node("Settings", mode="fast", strength=1, on=True, text="x"),
    "4": node("Show", source=["2", 0]),
}


def jobs_of(rows: list[dict], workflow=ADDING, folder=Path()):
    made = [Row(number, cells.pop("id", str(number)), cells) for number, cells in enumerate(map(dict, rows), start=1)]
    return make_jobs(Table(made, folder), workflow, CLASSES)


def refusal(rows: list[dict], **more) -> str:
    with pytest.raises(TableError) as caught:
        jobs_of(rows, **more)
    return str(caught.value)


def test_cells_take_the_place_of_inputs_and_text_is_literal_only_where_text_belongs():
    (job,) = jobs_of([{"1.value": "7", "3.text": '"12"', "3.on": "false", "2.b": 3}])
    assert job.workflow["1"]["inputs"] == {"value": 7} and job.workflow["2"]["inputs"]["b"] == 3
    assert job.workflow["3"]["inputs"] == {"mode": "fast", "strength": 1, "on": False, "text": '"12"'}
    assert ADDING["1"]["inputs"] == {"value": 1}


def test_what_a_table_gets_wrong_is_named_with_row_and_column():
    assert refusal([{"9.value": 1}]).startswith("column 9.value: there is no node 9; the workflow has 1 (Number)")
    assert 'column 1.speed: node 1 "Number" has no input "speed"; it has value' in refusal([{"1.speed": 1}])
    message = refusal([{"1.value": 1}, {"1.value": "99"}, {"id": "last", "1.value": "x"}])
    assert message.startswith("2 problems in the table:")
    assert "row 2, column 1.value: node 1" in message and "99 is above the maximum; it must be 0 to 9" in message
    assert "row 3 (last), column 1.value:" in message and "'x' is not a whole number" in message


def test_a_workflow_that_no_cell_can_mend_is_refused_as_such():
    with pytest.raises(WorkflowError, match="unknown node type Unheard"):
        jobs_of([{"1.value": 1}], ADDING | {"9": node("Unheard")})


def loading(image="x.png") -> dict:
    return {"1": node("LoadImage", image=image), "2": node("Show", source=["1", 0])}


def test_pictures_are_looked_for_beside_the_table(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "in" / "a.png")
    for column in ("image", "1.image"):
        (job,) = jobs_of([{column: "in/a.png"}], loading(), tmp_path)
        assert job.workflow["1"]["inputs"] == {"image": str(tmp_path / "in" / "a.png")}


def test_missing_and_broken_pictures_are_all_named_before_anything_runs(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("words")
    rows = [{"image": "good.png"}, {"image": "absent.png"}, {"image": "bad.png"}]
    message = refusal(rows, workflow=loading(), folder=tmp_path)
    assert "row 2, column image: there is no picture file" in message and "absent.png" in message
    assert "row 3, column image:" in message and "not a picture" in message and "row 1" not in message
    assert "row 2, column 1.image" in refusal(
        [{"1.image": "good.png"}, {"1.image": "absent.png"}], workflow=loading(), folder=tmp_path
    )


def test_a_key_tells_content_and_not_names(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")

    def key(cells=None, workflow=None) -> str:
        return jobs_of([cells or {"image": "a.png"}], workflow or loading(), tmp_path)[0].key

    first = key()
    titled = {"7": node("LoadImage", "A Title", image="x.png"), "9": node("Show", source=["7", 0])}
    assert key(workflow=titled) == first and key({"id": "other", "image": "a.png"}) == first
    assert key(workflow=loading() | {"3": node("Number", value=1)}) == first  # no output needs it
    assert key(workflow=loading() | {"3": node("Show", source=1)}) != first
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    assert key() != first


def test_equal_rows_are_told_apart_and_keep_their_keys_when_others_come_and_go():
    one, two, three = jobs_of([{"1.value": 1}, {"1.value": 2}, {"1.value": 1}])
    assert len({one.key, two.key, three.key}) == 3
    moved = jobs_of([{"1.value": 3}, {"1.value": 1}, {"1.value": 1}])
    assert [job.key for job in moved[1:]] == [one.key, three.key]


def test_folders_have_readable_names_of_their_own():
    names = [job.name for job in jobs_of([{"id": "a/b c?.png"}, {"id": "../.."}, {"id": "猫" * 100}])]
    assert names[0].startswith("a_b_c_.png-") and names[1].startswith("-") and len(names[2]) == 53
    assert len(set(names)) == 3 and not any("/" in name for name in names)


def test_rows_that_share_a_beginning_run_one_after_another_and_the_rest_stays_in_order():
    values = [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (1, 3)]
    jobs = jobs_of([{"1.value": first, "2.b": then} for first, then in values])
    ordered = in_sharing_order(jobs)
    assert [int(job.row_id) for job in ordered] == [1, 3, 6, 2, 5, 4]
