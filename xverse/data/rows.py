"""FILES -> ROWS. The objects in jsonl, json, csv and parquet; what is none is reported."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xverse.data.open_text import BLOCK, MAX_LINE_BYTES, UnpackError, open_bytes, read_lines
from xverse.data.report import Report, Unit
from xverse.errors import XverseError

PACKED = (".gz", ".zst")
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
ROWS = 256  # of a parquet file, read at once
MAX_ROW_GROUP_BYTES = 4 << 30
BLANK = " \t\r\n"

Object = dict[str, Any]


class Row(NamedTuple):
    """One object of a file, and the line on which it begins; its number from 1 on in a parquet
    file, and in an array that is one line."""

    value: Object
    number: int


def row_format(path: Path) -> str:
    """One of FORMATS, by the name of the file; "" for any other."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = bool(suffixes) and suffixes[-1] in PACKED
    if packed:
        suffixes.pop()
    ending = suffixes[-1] if suffixes else ""
    return ending if ending in FORMATS and not (packed and ending == ".parquet") else ""


def read_rows(path: Path, report: Report) -> Iterator[Row]:
    """Every object of `path`; what is no object goes to `report`."""
    unit, kind = Unit(path), row_format(path)
    if kind == ".parquet":
        return read_parquet(unit, report)
    if kind == ".csv":
        return _read_csv(unit, report)
    if kind == ".json" and _begins_with(path) == "[":
        return _read_array(unit, report)
    return _read_lines(unit, report)


def parse_row(line: bytes, number: int, unit: Unit, report: Report) -> Object | None:
    """The object on a line of jsonl; None where there is none, which is reported unless blank."""
    if not line.strip():
        return None
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        report.skip(unit, number, "bad UTF-8", error.reason)
    except (ValueError, RecursionError) as error:
        report.skip(unit, number, "bad JSON", str(error)[:200])
    else:
        if isinstance(row, dict):
            return row
        report.skip(unit, number, "bad JSON", "no object")
    return None


def read_parquet(unit: Unit, report: Report, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a parquet file, of these `columns` where they are there; else of all."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise XverseError(
            f"{unit.path} can't be read.",
            "The package pyarrow is not installed.",
            'Run pip install "xverse-llm[data]".',
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(unit.path) as file:
            names = None
            if columns is not None:
                names = sorted(set(columns) & set(file.schema_arrow.names))
            for group in range(file.num_row_groups):
                rows, size = _row_group(file.metadata.row_group(group))
                if size > MAX_ROW_GROUP_BYTES:
                    report.skip(unit, number + 1, "over-long row group", f"{size:,} bytes")
                    number += rows
                    continue
                for batch in file.iter_batches(ROWS, row_groups=[group], columns=names):
                    for row in batch.to_pylist():
                        number += 1
                        yield Row(row, number)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        report.skip(unit, number + 1, "damaged file", f"the rest is left out: {error}"[:200])


def _row_group(facts: Any) -> tuple[int, int]:
    """(rows, unpacked bytes) of a row group."""
    return int(facts.num_rows), int(facts.total_byte_size)


def _read_lines(unit: Unit, report: Report) -> Iterator[Row]:
    with open_bytes(unit.path) as source:
        for number, _, line in read_lines(source, unit, report):
            row = parse_row(line, number, unit, report)
            if row is not None:
                yield Row(row, number)


def _begins_with(path: Path) -> str:
    """The first character of the file that is not blank; "" where there is none."""
    with open_bytes(path) as source:
        try:
            head = source.read(BLOCK)
        except UnpackError:  # reading it as lines reports it
            return ""
    return head.removeprefix(b"\xef\xbb\xbf").strip()[:1].decode("utf-8", "replace")


def _read_array(unit: Unit, report: Report) -> Iterator[Row]:
    """The objects in a JSON array. One that is broken ends the reading: where the next begins is
    not known then."""
    text = _text(unit, report)
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("[") + 1) if "[" in text else len(text)
    one_line = "\n" not in text.strip()
    line, counted = 0 if one_line else 1, 0
    why = "the array has no end"
    while at < len(text) and text[at] != "]":
        line, counted = line + (1 if one_line else text.count("\n", counted, at)), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", str(error))
            break
        if not isinstance(value, dict):
            report.skip(unit, line, "bad JSON", "no object")
        elif _is_broken(value):
            report.skip(unit, line, "bad UTF-8")
        else:
            yield Row(value, line)
        at = _skip(text, at)
        if text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at : at + 1] != "]":
            break
    else:
        if at < len(text):
            return
    report.skip(unit, max(1, line), "bad JSON", f"the rest is left out: {why}"[:200])


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in BLANK:
        at += 1
    return at


def _read_csv(unit: Unit, report: Report) -> Iterator[Row]:
    """The rows under the first one, which names the columns. Cells are texts."""
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(io.StringIO(_text(unit, report), newline=""), strict=True)
    names: list[str] | None = None
    number = 1
    try:
        for cells in reader:
            if names is None:
                names = cells
            elif len(cells) != len(names):
                if cells:
                    why = f"{len(cells)} instead of {len(names)}"
                    report.skip(unit, number, "wrong number of cells", why)
            elif any(map(_is_broken, cells)):
                report.skip(unit, number, "bad UTF-8")
            else:
                yield Row(dict(zip(names, cells, strict=True)), number)
            number = reader.line_num + 1
    except csv.Error as error:
        report.skip(unit, number, "bad CSV", f"the rest is left out: {error}"[:200])


def _text(unit: Unit, report: Report) -> str:
    """All of a file; bytes that are no UTF-8 become halves of surrogate pairs, to be found where
    they stand."""
    blocks = []
    with open_bytes(unit.path) as source:
        try:
            while block := source.read(BLOCK):
                blocks.append(block)
        except UnpackError as error:
            report.skip(unit, 1, "damaged archive", f"the rest is left out: {error}")
    return b"".join(blocks).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _is_broken(value: object) -> bool:
    """Whether there is half a surrogate pair anywhere in a JSON value."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
