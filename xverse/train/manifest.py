"""CHECKPOINT -> WHOLE OR NOT. Hashes, syncs, and what they prove."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from xverse.errors import XverseError
from xverse.files import read_json

MANIFEST = "manifest.json"
FORMAT = 1


def published(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, the newest last; those being written have other names."""
    found = []
    for place in folder.glob("step-*") if folder.is_dir() else ():
        number = place.name.removeprefix("step-")
        if number.isdecimal():
            found.append((int(number), place))
    return sorted(found)


def read_manifest(place: Path) -> dict[str, object] | str:
    """The manifest of a checkpoint, or why it is none."""
    try:
        manifest = read_json(place / MANIFEST)
    except XverseError as error:
        return f"{error.what} {error.why}"
    told = manifest.pop("sha256", None)
    if told != _digest(manifest):
        return "its manifest was changed after it was written"
    if manifest.get("format") != FORMAT:
        return f"it has format {manifest.get('format')!r}, and this version reads {FORMAT}"
    return manifest


def write_durably(path: Path, value: Mapping[str, object]) -> None:
    """JSON that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, allow_nan=False, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system knows how."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_facts(file: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def difference(file: Path, fact: object) -> str:
    """Why a file is not the one that was written; empty where it is."""
    try:
        size = file.stat().st_size
        assert isinstance(fact, dict)
        if size != fact["bytes"]:
            return f"{file.name} has {size} bytes instead of {fact['bytes']}"
        return "" if file_facts(file) == fact else f"{file.name} was changed: its sha256 is another"
    except OSError as error:
        return f"{file.name} cannot be read: {error}"


def write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    """The manifest, with its own hash in it, for good."""
    write_durably(folder / MANIFEST, {**manifest, "sha256": _digest(manifest)})


def _digest(manifest: Mapping[str, object]) -> str:
    text = json.dumps(manifest, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
