"""Rows of every kind of file: lines and numbers are told, nothing is lost in silence."""

import gzip
import io
import json
from pathlib import Path

import pytest

from xverse.data.report import Report
from xverse.data.rows import Row, read_rows, row_format


def read(path: Path) -> tuple[list[Row], list[dict[str, object]]]:
    """The rows of a file, and what was reported."""
    told = io.StringIO()
    rows = list(read_rows(path, Report(told)))
    return rows, [json.loads(line) for line in told.getvalue().splitlines()]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl(tmp_path: Path) -> None:
    rows, told = read(written(tmp_path, "a.jsonl", '\ufeff{"a": 1}\n\n{"a": \n[1]\n{"a": 2}'))
    assert rows == [Row({"a": 1}, 1), Row({"a": 2}, 5)]
    assert [(one["line"], one["reason"]) for one in told] == [(3, "bad JSON"), (4, "bad JSON")]


def test_an_array_tells_the_lines_on_which_its_objects_begin(tmp_path: Path) -> None:
    text = '[\n  {"a": 1},\n  {\n    "a": "]\\n["\n  }, 5,\n{"a": "\\ud800"}, {"a": 3}\n]\n'
    path = written(tmp_path, "a.json", text)
    rows, told = read(path)
    assert rows == [Row({"a": 1}, 2), Row({"a": "]\n["}, 3), Row({"a": 3}, 6)]
    assert [(one["line"], one["reason"]) for one in told] == [(5, "bad JSON"), (6, "bad UTF-8")]
    packed = written(tmp_path, "a.json.gz", gzip.compress(path.read_bytes()))
    assert read(packed)[0] == rows


def test_an_array_on_one_line_tells_the_numbers_of_its_objects(tmp_path: Path) -> None:
    rows, told = read(written(tmp_path, "a.json", '[{"a": 1}, 5, {"a": "\\n"}]\n'))
    assert rows == [Row({"a": 1}, 1), Row({"a": "\n"}, 3)]
    assert [(one["line"], one["reason"]) for one in told] == [(2, "bad JSON")]


@pytest.mark.parametrize(
    ("text", "count", "line"),
    [
        ('[{"a": 1},\n{"a": ', 1, 2),
        ('[{"a": 1}\n', 1, 1),
        ('[{"a": 1} {"a": 2}]', 1, 1),
        ("[" * 100_000, 0, 1),
        ("[", 0, 1),
    ],
)
def test_a_broken_array_ends_the_reading_and_says_so(
    tmp_path: Path, text: str, count: int, line: int
) -> None:
    rows, told = read(written(tmp_path, "a.json", text))
    assert len(rows) == count
    assert [one["line"] for one in told] == [line]
    assert "the rest is left out" in str(told[0]["detail"])


def test_json_that_is_jsonl(tmp_path: Path) -> None:
    rows, told = read(written(tmp_path, "a.json", '\n{"a": 1}\n{"a": 2}\n'))
    assert rows == [Row({"a": 1}, 2), Row({"a": 2}, 3)]
    assert told == []
    assert read(written(tmp_path, "empty.json", ""))[0] == []
    assert read(written(tmp_path, "none.json", "[ ]")) == ([], [])


def test_csv(tmp_path: Path) -> None:
    text = 'q,a\n"two\nlines",1\nonly\n\n"a ""b""",2\nbad \udcff,3\n"no end\n'
    path = written(tmp_path, "a.csv", text.encode("utf-8", "surrogateescape"))
    rows, told = read(path)
    assert rows == [Row({"q": "two\nlines", "a": "1"}, 2), Row({"q": 'a "b"', "a": "2"}, 6)]
    assert [(one["line"], one["reason"]) for one in told] == [
        (4, "wrong number of cells"),
        (7, "bad UTF-8"),
        (8, "bad CSV"),
    ]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    talk = [[{"role": "user", "content": "q"}], [{"role": "user", "content": "r"}]]
    parquet.write_table(pyarrow.table({"messages": talk, "n": [1, 2]}), tmp_path / "a.parquet")
    rows, told = read(tmp_path / "a.parquet")
    assert rows[1] == Row({"messages": [{"role": "user", "content": "r"}], "n": 2}, 2)
    assert told == []
    broken = written(tmp_path, "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-9])
    rows, told = read(broken)
    assert rows == []
    assert told[0]["reason"] == "damaged file"


def test_a_damaged_archive_is_told(tmp_path: Path) -> None:
    whole = gzip.compress(b'[{"a": 1}, {"a": 2}]' * 50)
    _, told = read(written(tmp_path, "a.json.gz", whole[: len(whole) // 2]))
    assert "damaged archive" in {one["reason"] for one in told}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.JSONL", ".jsonl"),
        ("a.json.gz", ".json"),
        ("a.csv.zst", ".csv"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", ""),
        ("a.txt", ""),
        ("json", ""),
    ],
)
def test_formats_are_told_by_their_names(name: str, kind: str) -> None:
    assert row_format(Path(name)) == kind
