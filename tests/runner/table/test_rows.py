"""Tables: what is read, and what is refused with row and column."""

from __future__ import annotations

import datetime
import importlib.util

import pytest
from ming_univision.runner.table.rows import TableError, read_table, table_of_images
from PIL import Image


@pytest.fixture
def table(tmp_path):
    """table(text, name) -> the rows of such a file."""

    def read(text: str, name: str = "t.csv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return read_table(tmp_path / name).rows

    return read


def test_the_cells_of_a_csv_file_are_text_and_empty_ones_set_nothing(table):
    rows = table('\ufeffid,3.seed,5.prompt,#note\nfirst,7,"a, b\nc",x\nsecond,,"",y\n')
    assert [(row.number, row.id, row.cells) for row in rows] == [
        (1, "first", {"3.seed": "7", "5.prompt": "a, b\nc"}),
        (2, "second", {}),
    ]


def test_tabs_separate_the_cells_of_a_tsv_file(table):
    (row,) = table("3.seed\t5.prompt\n7\ta, b\n", "t.tsv")
    assert row.cells == {"3.seed": "7", "5.prompt": "a, b"} and row.id == "1"


def test_a_csv_file_of_a_spreadsheet_may_be_separated_by_semicolons(table):
    (row,) = table("id;3.seed;5.prompt\na;7;a, b; c\n".replace("a, b; c", '"a, b; c"'))
    assert row.cells == {"3.seed": "7", "5.prompt": "a, b; c"} and row.id == "a"


def test_json_lines_keep_types_and_an_empty_text_is_a_text(table):
    rows = table('{"3.seed": 7, "5.prompt": ""}\n\n{"3.seed": null, "5.prompt": "x"}\n', "t.jsonl")
    assert [row.cells for row in rows] == [{"3.seed": 7, "5.prompt": ""}, {"5.prompt": "x"}]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
def test_a_parquet_file_keeps_types(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = {"3.seed": [7, None], "5.prompt": ["a", "b"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    rows = read_table(tmp_path / "t.parquet").rows
    assert [row.cells for row in rows] == [{"3.seed": 7, "5.prompt": "a"}, {"5.prompt": "b"}]
    days = {"5.prompt": [datetime.date(2026, 1, 31)], "#day": [datetime.date(2026, 1, 31)]}
    pyarrow.parquet.write_table(pyarrow.table(days), tmp_path / "t.parquet")
    with pytest.raises(TableError, match=r"^row 1, column 5\.prompt: datetime.date\(2026, 1, 31\) is a date; save it"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(TableError, match=r"t\.parquet cannot be read"):
        read_table(tmp_path / "t.parquet")


def test_without_pyarrow_a_parquet_file_is_refused_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(TableError, match="pip install pyarrow, or save the table as CSV"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.csv", "", "has no rows"),
        ("t.csv", "3.seed\n", "has no rows"),
        ("t.csv", "3.seed,5.prompt\n7\n", "row 1, column 5.prompt: it is missing"),
        ("t.csv", "id,3.seed,5.prompt\na,1,x\nb,7\n", "row 2, column 5.prompt: it is missing"),
        (
            "t.csv",
            "5.prompt\na, b\n",
            "row 1 has 2 cells, and the table 1 columns: put a text with a comma into",
        ),
        ("t.csv", "3.seed,3.seed\n1,2\n", "column '3.seed' is there more than once"),
        ("t.csv", "seed\n7\n", "column 'seed': expected NODE.INPUT, for example 5.seed, or image"),
        ("t.csv", '5.prompt\n"a\n', "line 2: unexpected end of data"),
        ("t.csv", "id,3.seed\na,1\na,2\n", r"row 2 \(a\), column id: 'a' is also the id of row 1"),
        ("t.jsonl", '{"3.seed": 7}\n{"5.x": 1}\n', "row 1, column 5.x: it is missing"),
        ("t.jsonl", "[1]\n", "line 1: expected an object"),
        ("t.jsonl", '{"3.seed": 7}\n{"3.seed": NaN}\n', r"t\.jsonl, line 2.* nan, not a finite number"),
        ("t.jsonl", "[" * 10_000, "line 1 is nested more than"),
        ("t.xlsx", "", r"is not a table that can be read: use a file that ends in \.csv"),
    ],
)
def test_bad_tables_are_refused_with_row_and_column(table, name, text, words):
    with pytest.raises(TableError, match=words):
        table(text, name)


def test_a_file_that_is_not_utf_8_or_not_there_is_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes("5.prompt\nBär\n".encode("latin-1"))
    with pytest.raises(TableError, match="is not UTF-8 text: save it as CSV in UTF-8"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(TableError, match="cannot be read: No such file"):
        read_table(tmp_path / "absent.csv")


def test_all_problems_are_counted_and_the_first_ones_shown(table):
    with pytest.raises(TableError) as caught:
        table("id,3.seed\n" + "a,1\n" * 100)
    assert len(caught.value.problems) == 99
    assert str(caught.value).startswith("99 problems in the table:") and str(caught.value).endswith("and 79 more")


def test_a_folder_of_pictures_is_a_table_by_name(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("b.png", "below/a.jpg", "a.webp"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    rows = table_of_images(tmp_path).rows
    assert [row.id for row in rows] == ["a.webp", "b.png", "below/a.jpg"]
    assert rows[2].cells == {"image": "below/a.jpg"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(TableError, match="there is no picture in"):
        table_of_images(tmp_path / "empty")
