"""FOLDER -> FACTS. What a model folder holds: its configs, and its manifest."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from xverse.errors import XverseError
from xverse.files import is_there, read_json, write_json
from xverse.log import logger

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face model folder that has been looked at: what its two configs say."""

    path: Path
    config: dict[str, object]
    generation_config: dict[str, object]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the configs of the folder `path`; code in it, and keys that name code, are ignored.

        Raises XverseError where the folder or its config.json is missing or malformed.
        """
        folder = Path(path).expanduser()
        require_folder(folder)
        config = read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        found = sorted(file.name for file in folder.glob("*.py"))
        found += sorted({"auto_map", "trust_remote_code"} & config.keys())
        if found:
            logger.debug("%s: %s ignored: code in a model folder never runs", folder, found)
        return cls(folder, config, read_json(generation) if is_there(generation) else {})


def require_folder(path: Path) -> None:
    """Raise XverseError unless `path` is a folder that can be read."""
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        if os.access(path, os.R_OK | os.X_OK):
            return
        why = "Its permissions keep this user out."
    else:
        why = "It is a file." if is_there(path) else "There is nothing at that path."
    raise XverseError(
        f"{path} is not a model folder.", why, "Name the folder that holds config.json."
    )


def write_manifest(folder: Path, **facts: object) -> None:
    """Write `manifest.json`: bytes and sha256 of every file in `folder`, and `facts` (JSON values).

    Typical facts: source, licence, the report of a quantization.
    """
    assert "files" not in facts
    files: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {**facts, "files": files})


def verify_manifest(folder: Path) -> list[str]:
    """Names of the files in `manifest.json` that are missing or changed; empty when all is well.

    Raises XverseError where there is no manifest or it is malformed.
    """
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise _bad_manifest(folder, "It has no table of files.")
    return [name for name, fact in files.items() if not _is_unchanged(folder, name, fact)]


def _is_unchanged(folder: Path, name: str, fact: object) -> bool:
    if not isinstance(fact, dict) or not {"bytes", "sha256"} <= fact.keys():
        raise _bad_manifest(folder, f"The entry {name!r} lacks bytes or sha256.")
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise _bad_manifest(folder, f"The name {name!r} leads out of the folder.")
    path = folder / name
    if not os.path.isfile(path) or path.stat().st_size != fact["bytes"]:  # noqa: PTH113
        return False
    return _sha256(path) == fact["sha256"]


def _bad_manifest(folder: Path, why: str) -> XverseError:
    return XverseError(f"{folder / MANIFEST} is malformed.", why, "Download the model again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
