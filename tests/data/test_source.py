"""Corpora in every form; dirty, broken and hostile ones are reported with file and line."""

import gzip
import io
import json
import sys
import tracemalloc
from pathlib import Path

import pytest

from xverse.data import open_text, report, source
from xverse.data.report import Report, Unit
from xverse.data.source import Reading, Text, find_files, plan_units, read_files, read_unit
from xverse.errors import XverseError

ROWS = [{"text": f"第{i} text\nof two lines", "lang": "zh", "kind": "books"} for i in range(5)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def pack(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    if ending == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return data


def read(
    path: Path, reading: Reading | None = None, **limits: float
) -> tuple[list[Text], list[str]]:
    """The documents of `path`, and "line: reason" of what was skipped."""
    log = io.StringIO()
    texts = list(read_files([path], reading or Reading(), Report(log, **limits)))
    entries = [json.loads(line) for line in log.getvalue().splitlines()]
    assert all(entry["file"] == str(path) for entry in entries)
    return texts, [f"{entry['line']}: {entry['reason']}" for entry in entries]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_jsonl(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(pack(JSONL, ending))
    texts, skipped = read(path)
    assert [text.text for text in texts] == [row["text"] for row in ROWS]
    assert {(text.language, text.kind) for text in texts} == {("zh", "books")}
    assert [text.unit.line(text.number) for text in texts] == [1, 2, 3, 4, 5]
    assert not skipped


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("txt", "wanted"),
    [
        ("file", ["a\nb\n\n\nc"]),
        ("paragraph", ["a\nb", "c"]),
        ("line", ["a", "b", "c"]),
    ],
)
def test_txt(tmp_path: Path, ending: str, txt: str, wanted: list[str]) -> None:
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(pack(b"\xef\xbb\xbfa\r\nb\n\n\nc", ending))
    texts, _ = read(path, Reading(txt=txt, language="en"))  # type: ignore[arg-type]
    assert [text.text for text in texts] == wanted
    assert texts[-1].unit.line(texts[-1].number) == (1 if txt == "file" else 5)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [*ROWS, {"text": None, "lang": "zh", "kind": "web"}, {"text": "\0", "lang": "zh"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    texts, skipped = read(path)
    assert [text.text for text in texts] == [row["text"] for row in ROWS]
    assert skipped == ["6: missing field", "7: NUL"]
    path.write_bytes(path.read_bytes()[:-30])
    assert read(path) == ([], ["1: damaged file"])


DIRTY = [
    b'{"text": "good"}',
    b'{"text": "broken',
    b'{"text": "\xff\xfe"}',
    b'{"other": "x"}',
    b'{"text": 7}',
    b'{"text": "nul \\u0000"}',
    b'{"text": "half \\ud800"}',
    b'{"text": "  "}',
    b'["text"]',
    b"[" * 100_000,
    b'{"text": "' + b"x" * 5000 + b'"}',
    b'{"n": ' + b"9" * 4900 + b"}",
    b"",
    b'{"text": "good too"}',
]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_every_dirty_line_is_reported_and_the_rest_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"dirty.jsonl{ending}"
    path.write_bytes(pack(b"\n".join(DIRTY), ending))
    texts, skipped = read(path, Reading(max_bytes=4950))
    assert [text.text for text in texts] == ["good", "good too"]
    assert skipped == [
        "2: bad JSON",
        "3: bad UTF-8",
        "4: missing field",
        "5: no text",
        "6: NUL",
        "7: half a surrogate pair",
        "8: empty",
        "9: bad JSON",
        "10: over-long line",
        "11: over-long line",
        "12: bad JSON",
    ]


def test_deep_nesting_is_bad_json(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_bytes(b"[" * 100_000 + b"\n" + b'{"text": "good"}')
    assert read(path)[1] == ["1: bad JSON"]


def test_dirty_lines_of_a_txt(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nbad \xff\nnul \0\nlast\n")
    texts, skipped = read(path)
    assert [text.text for text in texts] == ["good\nlast"]
    assert skipped == ["2: bad UTF-8", "3: NUL"]


def test_a_text_too_long_for_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"line of text\n" * 100 + b"\nshort\n")
    assert read(path, Reading(max_bytes=500))[1] == ["1: over-long document"]
    texts, skipped = read(path, Reading(max_bytes=500, txt="paragraph"))
    assert ([text.text for text in texts], skipped) == (["short"], ["1: over-long document"])


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_bomb_is_stopped(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few lines, and then emptiness that would go on for 16 MB (or for ever)."""
    monkeypatch.setattr(open_text, "FREE_EXPANSION", 1 << 20)
    monkeypatch.setattr(open_text, "MAX_EXPANSION", 10)
    path = tmp_path / f"bomb.jsonl{ending}"
    path.write_bytes(pack(JSONL + b"\n" * (16 << 20), ending))
    texts, skipped = read(path)
    assert len(texts) in (0, 5)  # zstd gives out all of it in one block
    assert len(skipped) == 1
    assert skipped[0].endswith(": damaged archive")


def test_a_line_of_40_mb_is_never_held(tmp_path: Path) -> None:
    """A line that has no end: what it costs is its bound, and the lines behind it are read."""
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(JSONL)
        for _ in range(40):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + JSONL)
    tracemalloc.start()
    texts, skipped = read(path, Reading(max_bytes=2 << 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(texts) == 10
    assert skipped == ["6: over-long line"]
    assert peak < 16 << 20


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_an_archive_that_breaks_off(tmp_path: Path, ending: str) -> None:
    lines = b"".join(b'{"text": "%d %d"}\n' % (i, i * i) for i in range(20_000))
    packed = pack(lines, ending)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed[: len(packed) // 2])
    texts, skipped = read(path)
    assert len(skipped) == 1
    assert skipped[0].endswith(": damaged archive")
    assert len(texts) == int(skipped[0].split(":")[0]) - 1
    path.write_bytes(b"no archive at all")
    assert read(path) == ([], ["1: damaged archive"])


def test_archives_of_several_parts(tmp_path: Path) -> None:
    for ending in (".gz", ".zst"):
        path = tmp_path / f"a.jsonl{ending}"
        path.write_bytes(pack(JSONL, ending) + pack(JSONL, ending))
        assert len(read(path)[0]) == 10


@pytest.mark.parametrize("unit_bytes", [1, 7, 40, 64, 1000, 100_000])
def test_divided_files_give_every_line_once(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    data = b"".join(b'{"text": "line %d"}\n' % i for i in range(30)) + b"broken\n" + JSONL
    path.write_bytes(data)
    log = io.StringIO()
    texts = [
        text
        for unit in plan_units([path], unit_bytes)
        for text in read_unit(unit, Reading(), Report(log))
    ]
    assert [text.text for text in texts][:30] == [f"line {i}" for i in range(30)]
    assert len(texts) == 35
    assert [text.unit.line(text.number) for text in texts] == [*range(1, 31), *range(32, 37)]
    assert [json.loads(line)["line"] for line in log.getvalue().splitlines()] == [31]


def test_the_budget_stops_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"broken\n" * 99 + JSONL)
    assert len(read(path, max_dirty=0.0)[0]) == 5  # so few stop nothing at once
    path.write_bytes(JSONL + b"broken\n" * 200)
    with pytest.raises(XverseError, match="--max-dirty") as stopped:
        read(path, max_dirty=0.5)
    assert "106" in stopped.value.why


def test_only_the_first_ones_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"broken\n" * 50)
    assert len(read(path)[1]) == 50
    assert len(caplog.records) == report.SHOWN
    assert f"{path}:1: skipped: bad JSON" in caplog.text


def test_folders_are_searched_and_what_is_no_corpus_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.txt", "a.jsonl.gz", "deep/c.parquet", "notes.pdf", "x.parquet.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]
    assert found == ["a.jsonl.gz", "b.txt", "deep/c.parquet"]
    assert "notes.pdf" in caplog.text
    for name in ("notes.pdf", "missing.txt"):
        with pytest.raises(XverseError, match="not a corpus file"):
            find_files([tmp_path / name])


@pytest.mark.parametrize(
    ("ending", "package"), [(".jsonl.zst", "zstandard"), (".parquet", "pyarrow")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, ending: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"x")
    with pytest.raises(XverseError, match=r"xverse-llm\[data\]"):
        list(read_unit(Unit(path), Reading(), Report()))


def test_fields_have_names_and_stand_ins(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "a", "language": "de"}\n{"content": "b", "lang": 7}\n')
    texts, _ = read(path, Reading(text_field="content", language="en", kind="web"))
    assert [(t.text, t.language, t.kind) for t in texts] == [("a", "de", "web"), ("b", "en", "web")]
    texts, _ = read(path, Reading(text_field="content", language="en", kind="web", fixed=True))
    assert {text.language for text in texts} == {"en"}
    assert source.UNKNOWN == "und"
