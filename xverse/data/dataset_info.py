"""NAMES -> DATA SETS. Files and folders; other names as LLaMA-Factory's dataset_info has them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from xverse.config import nearest
from xverse.data.layout import COLUMNS, MEDIA, TAGS, Kind, Layout, layout_of
from xverse.data.rows import FORMATS, row_format
from xverse.data.source import file_format
from xverse.errors import XverseError
from xverse.files import read_json
from xverse.log import logger

NAME = "dataset_info.json"
FORMATTING: dict[str, Kind] = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")
FIELDS = {"file_name", "formatting", "ranking", "columns", "tags", "num_samples", "file_sha1"}
OF_HUBS = {*HUBS, "subset", "split", "folder"}
NOT_HERE = {"kto_tag": "learning from marks (KTO)", **dict.fromkeys(MEDIA, "what is no text")}


@dataclass(frozen=True)
class DataSet:
    """Files that are read as one data set; without `layout`, each file's first row tells it."""

    name: str
    files: tuple[Path, ...]
    layout: Layout | None = None
    limit: int | None = None  # rows to take


def find_data_sets(data: Sequence[str | Path], folder: str | Path) -> list[DataSet]:
    """The data sets named: files, folders of files, and names from `folder`/dataset_info.json,
    several of them with commas between.

    Raises XverseError for what is none of these, and for data that would have to be downloaded.
    """
    found: list[DataSet] = []
    for given in data:
        path = Path(given).expanduser()
        if path.name == NAME:
            raise XverseError(
                f"{path} lists data sets, and is none.",
                "A run learns from some of them.",
                "Give their names, and this folder as the data set folder.",
            )
        if path.exists():
            found.append(DataSet(str(path), tuple(_files(path))))
        else:
            names = [name.strip() for name in str(given).split(",") if name.strip()]
            found += [_named(name, Path(folder).expanduser()) for name in names]
    if not found:
        raise XverseError("There is no data.", "None was named.", "Name a file or a data set.")
    return found


def _files(path: Path) -> list[Path]:
    """The file itself, or all files in a folder that are data, sorted; others are told."""
    if path.is_file() and _is_data(path):
        return [path]
    inside = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else []
    files = [file for file in inside if _is_data(file) and file.name != NAME]
    if not files:
        raise XverseError(
            f"{path} is no data that can be read.",
            "It is a folder without any." if path.is_dir() else "Its ending is not known.",
            f"Give files ending in {', '.join((*FORMATS, '.txt'))}, also with .gz or .zst.",
        )
    if others := [file.name for file in inside if file not in files and file.name != NAME]:
        logger.warning("%s: %d files are no data: %s", path, len(others), others[:5])
    return files


def _is_data(path: Path) -> bool:
    return bool(row_format(path)) or file_format(path) == ".txt"


def _named(name: str, folder: Path) -> DataSet:
    index = folder / NAME
    if not index.is_file():
        raise XverseError(
            f"There is no data {name!r}.",
            f"It is no file or folder, and there is no {index} that would name it.",
            "Check the path, or name the folder that has the dataset_info.json.",
        )
    known = read_json(index)
    entry = known.get(name)
    if not isinstance(entry, dict):
        raise XverseError(
            f"There is no data set {name!r}.{nearest(name, known)}",
            f"It is no file or folder, and {index} does not name it.",
            "Check the name, or add it there.",
        )
    try:
        return _described(name, entry, folder)
    except _Wrong as error:
        raise XverseError(
            f"The entry {name!r} of {index} can't be used.", error.why, error.fix
        ) from error


class _Wrong(Exception):
    def __init__(self, why: str, fix: str = "Correct the entry.") -> None:
        super().__init__(why)
        self.why, self.fix = why, fix


def _described(name: str, entry: Mapping[str, object], folder: Path) -> DataSet:
    if unknown := sorted(set(entry) - FIELDS - OF_HUBS):
        raise _Wrong(f"It has {unknown[0]!r}, which is not known.{nearest(unknown[0], FIELDS)}")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str):
        where = next((str(entry[key]) for key in HUBS if entry.get(key)), "nowhere")
        raise _Wrong(
            f"It has no file_name: its data lies on a hub ({where}).",
            f"Download it into {folder}, and add its file_name to the entry.",
        )
    path = folder / file_name
    if not path.exists():
        raise _Wrong(
            f"{path} is missing.", "Download it, or correct the file_name or the data set folder."
        )
    _compare_sha1(path, entry.get("file_sha1"))
    limit = entry.get("num_samples")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise _Wrong(f"num_samples is {limit!r}, which is no number of rows.")
    return DataSet(name, tuple(_files(path)), _layout(entry), limit)


def _layout(entry: Mapping[str, object]) -> Layout:
    formatting = entry.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in FORMATTING:
        raise _Wrong(f"Its formatting {formatting!r} is none of {', '.join(FORMATTING)}.")
    ranking = entry.get("ranking", False)
    if not isinstance(ranking, bool):
        raise _Wrong(f"ranking is {ranking!r}, and should be true or false.")
    columns = dict(_texts(entry, "columns"))
    if list(columns) == ["prompt"] and formatting == "alpaca" and not ranking:
        return Layout("text", columns={"text": columns["prompt"]})  # a prompt alone is plain text
    for key, what in NOT_HERE.items():
        if columns.get(key):
            raise _Wrong(f"It has the column {key!r}, and {what} is not there.", "Take other data.")
    usual = layout_of(FORMATTING[formatting], ranking)
    allowed = {**COLUMNS[usual.kind], "history": ""}
    if unknown := sorted(set(columns) - set(allowed)):
        raise _Wrong(f"A column {unknown[0]!r} is not known.{nearest(unknown[0], allowed)}")
    tags = dict(_texts(entry, "tags"))
    if unknown := sorted(set(tags) - set(TAGS)):
        raise _Wrong(f"A tag {unknown[0]!r} is not known.{nearest(unknown[0], TAGS)}")
    return Layout(usual.kind, ranking, {**usual.columns, **columns}, tags)


def _texts(entry: Mapping[str, object], key: str) -> Iterator[tuple[str, str]]:
    table = entry.get(key) or {}
    if not isinstance(table, dict) or not all(isinstance(v, str | None) for v in table.values()):
        raise _Wrong(f"{key} is no table of names.")
    for name, value in cast("dict[str, str | None]", table).items():
        if value is not None:
            yield name, value


def _compare_sha1(path: Path, told: object) -> None:
    if not isinstance(told, str) or not path.is_file():
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha1").hexdigest()
    if found != told:
        logger.warning("%s has the sha1 %s, and dataset_info.json tells %s", path, found, told)
