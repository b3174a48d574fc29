"""FILES -> TEXTS. A corpus in txt, jsonl or parquet, packed or not; dirty lines are reported."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from xverse.data.open_text import MAX_LINE_BYTES, open_bytes, read_lines
from xverse.data.report import Report, Unit
from xverse.data.rows import PACKED, parse_row, read_parquet
from xverse.errors import XverseError
from xverse.log import logger

FORMATS = (".txt", ".jsonl", ".parquet")
UNIT_BYTES = 64 << 20
UNKNOWN = "und"  # ISO 639's code of an undetermined language


@dataclass(frozen=True)
class Text:
    """One document of a corpus, and where it stood."""

    text: str
    language: str
    kind: str
    unit: Unit
    number: int  # line of the unit


@dataclass(frozen=True)
class Reading:
    """How files are read: which fields, what stands in for a missing one, what a document is."""

    text_field: str = "text"
    language_fields: tuple[str, ...] = ("language", "lang")
    kind_fields: tuple[str, ...] = ("kind", "type")
    language: str = UNKNOWN
    kind: str = "other"
    fixed: bool = False  # take `language` and `kind`, whatever the fields say
    txt: Literal["file", "paragraph", "line"] = "file"
    max_bytes: int = MAX_LINE_BYTES


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """The corpus files among `paths`, in order; of folders all that are inside, sorted.

    Raises XverseError for a path that is not there or a file of another kind; files of other kinds
    inside a folder are left out and told.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            found += [file for file in inside if file_format(file)]
            if others := [file.name for file in inside if not file_format(file)]:
                logger.warning("%s: %d files are no corpus: %s", path, len(others), others[:5])
            continue
        if not path.is_file() or not file_format(path):
            raise XverseError(
                f"{path} is not a corpus file.",
                "There is no such file." if not path.exists() else "Its ending is not known.",
                f"Give folders, or files ending in {', '.join(FORMATS)}, also with .gz or .zst.",
            )
        found.append(path)
    return found


def file_format(path: Path) -> str:
    """ ".txt", ".jsonl" or ".parquet"; "" for any other kind of file."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in (".txt", ".jsonl") else ""
    return suffixes[-1] if suffixes and suffixes[-1] in FORMATS else ""


def plan_units(files: Sequence[Path], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """What to read in one go: plain jsonl files are divided, all others whole."""
    units: list[Unit] = []
    for file in files:
        size = file.stat().st_size
        if file.suffix.lower() != ".jsonl" or size <= unit_bytes:
            units.append(Unit(file))
            continue
        starts = [*range(0, size, unit_bytes), size]
        units += [Unit(file, a, b) for a, b in itertools.pairwise(starts)]
    return units


def read_files(paths: Iterable[str | Path], reading: Reading, report: Report) -> Iterator[Text]:
    """All documents of `paths`."""
    for file in find_files(paths):
        yield from read_unit(Unit(file), reading, report)


def read_unit(unit: Unit, reading: Reading, report: Report) -> Iterator[Text]:
    """The documents of one unit; what is no text goes to `report`."""
    kind = file_format(unit.path)
    if kind == ".parquet":
        texts = _read_parquet(unit, reading, report)
    elif kind == ".txt":
        texts = _read_txt(unit, reading, report)
    else:
        texts = _read_jsonl(unit, reading, report)
    for text in texts:
        report.read += 1
        yield text


def _read_jsonl(unit: Unit, reading: Reading, report: Report) -> Iterator[Text]:
    if unit.start:  # the line that runs across it belongs to the unit before
        unit = replace(unit, start=_next_line(unit.path, unit.start))
    with open_bytes(unit.path, unit.start) as source:
        for number, place, line in read_lines(source, unit, report, reading.max_bytes):
            if unit.end is not None and place >= unit.end:
                return
            row = parse_row(line, number, unit, report)
            if row is not None and (text := _take(row, number, unit, reading, report)):
                yield text


def _next_line(path: Path, start: int) -> int:
    """Where the first line begins that begins at `start` or behind it."""
    with path.open("rb") as file:
        file.seek(start - 1)
        while block := file.read(1 << 16):
            if (end := block.find(b"\n")) >= 0:
                return file.tell() - len(block) + end + 1
        return file.tell()


def _take(
    row: dict[str, object], number: int, unit: Unit, reading: Reading, report: Report
) -> Text | None:
    """The document in `row`, or None where its text is none."""
    text = row.get(reading.text_field)
    if not isinstance(text, str):
        missing = "missing field" if text is None else "no text"
        report.skip(unit, number, missing, reading.text_field)
        return None
    if flaw := flaw_of(text):
        report.skip(unit, number, flaw)
        return None
    language, kind = reading.language, reading.kind
    if not reading.fixed:
        language = _first(row, reading.language_fields) or language
        kind = _first(row, reading.kind_fields) or kind
    return Text(text, language, kind, unit, number)


def flaw_of(text: str) -> str:
    """Why `text` is no text that can be trained on; "" where it is."""
    if "\0" in text:
        return "NUL"
    if not text.strip():
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half a surrogate pair"
    return ""


def _first(row: dict[str, object], names: Iterable[str]) -> str:
    found = (row.get(name) for name in names)
    return next((value for value in found if isinstance(value, str) and value), "")


def _read_txt(unit: Unit, reading: Reading, report: Report) -> Iterator[Text]:
    """Documents of a plain text: the whole file, its paragraphs (by empty lines), or its lines."""
    held: list[str] = []
    first, size = 1, 0

    def finish() -> Iterator[Text]:
        nonlocal held, size
        if size > reading.max_bytes:
            why = f"more than {reading.max_bytes:,} bytes; --txt cuts files into smaller ones"
            report.skip(unit, first, "over-long document", why)
        elif any(line.strip() for line in held):
            yield Text("\n".join(held), reading.language, reading.kind, unit, first)
        held, size = [], 0

    with open_bytes(unit.path) as source:
        for number, _, raw in read_lines(source, unit, report, reading.max_bytes):
            line = _decode(raw, number, unit, report)
            if line is None:
                continue
            if line == "" and reading.txt == "paragraph":
                yield from finish()
                continue
            if not size:
                first = number
            size += len(raw) + 1
            if size <= reading.max_bytes:
                held.append(line)
            if reading.txt == "line":
                yield from finish()
        yield from finish()


def _decode(raw: bytes, number: int, unit: Unit, report: Report) -> str | None:
    if number == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in raw:
        report.skip(unit, number, "NUL")
        return None
    try:
        return raw.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        report.skip(unit, number, "bad UTF-8", error.reason)
        return None


def _read_parquet(unit: Unit, reading: Reading, report: Report) -> Iterator[Text]:
    columns = [reading.text_field, *reading.language_fields, *reading.kind_fields]
    for row, number in read_parquet(unit, report, columns):
        if text := _take(row, number, unit, reading, report):
            yield text
