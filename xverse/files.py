"""FILES <-> OBJECTS. JSON read strictly and written whole; files that are really there."""

import json
import math
import os
from pathlib import Path

from xverse.errors import XverseError

MAX_JSON_BYTES = 16 * 2**20  # the index of 10,000 tensors is 1 MB
MAX_JSON_DEPTH = 64
MAX_INT_DIGITS = 40  # many tokenizers have int(1e30) as their model_max_length
DOWNLOAD_AGAIN = "Download the file again, and compare its size and sha256 with the hub's."


def is_there(path: Path) -> bool:
    """Whether a file, a link to one, or a dangling link of that name exists."""
    return os.path.lexists(path)


def require_file(path: Path) -> int:
    """Size in bytes of the file `path`.

    Raises XverseError where it is missing, empty, unreadable, or only a pointer to the real file.
    """
    try:
        if not path.is_file():
            why = "The link leads nowhere." if path.is_symlink() else "There is no such file."
            raise XverseError(f"{path} is missing.", why, "Download the model again.")
        with path.open("rb") as file:
            head = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise XverseError(
            f"{path} cannot be read.", str(error), "Check the disk and the file's permissions."
        ) from error
    if not head:
        raise XverseError(f"{path} is empty.", "It has 0 bytes.", DOWNLOAD_AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise XverseError(
            f"{path} is not the file itself.",
            f"It is a Git LFS pointer of {size} bytes, which only names the real file.",
            "Run `git lfs pull` in the folder, or download the model with `xverse pull`.",
        )
    return size


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, object]:
    """The JSON object in the file `path`.

    Raises XverseError where the file is missing, over `max_bytes`, or not JSON as `parse_json`
    takes it.
    """
    size = require_file(path)
    if size > max_bytes:
        raise XverseError(
            f"{path} is too large.",
            f"It has {size} bytes; at most {max_bytes} are read.",
            DOWNLOAD_AGAIN,
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise XverseError(
            f"{path} cannot be read.", str(error), "Check the disk and the file's permissions."
        ) from error
    try:
        return parse_json(raw)
    except ValueError as error:
        raise XverseError(
            f"{path} is not valid JSON.", str(error), "Correct it, or download it again."
        ) from error


def parse_json(raw: bytes) -> dict[str, object]:
    """The JSON object that the UTF-8 text `raw` holds.

    Raises ValueError for anything else, and for what readers disagree on: duplicate keys, NaN,
    numbers beyond 40 digits or a double, lone surrogates, nesting deeper than MAX_JSON_DEPTH.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels") from None
    if not isinstance(value, dict):
        raise ValueError(f"an object {{...}} is expected, not {type(value).__name__}")
    _check_nesting_and_text(value)
    return value


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} occurs more than once")
            seen.add(key)
    return unique


def _parse_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_INT_DIGITS:
        raise ValueError(f"the number {text[:24]}... is larger than any setting can be")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:24]} is beyond what a double can hold")
    return value


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def _check_nesting_and_text(value: object) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.keys())
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, str):
                item.encode("utf-8")  # a lone surrogate is a UnicodeEncodeError, a ValueError
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")


def write_json(path: Path, value: dict[str, object]) -> None:
    """Write `value` to `path` as a whole or not at all: beside it first, then renamed."""
    aside = path.with_name(f"{path.name}.partial")
    text = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False)
    try:
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise XverseError(
            f"{path} cannot be written.", str(error), "Check the disk's space and permissions."
        ) from error
