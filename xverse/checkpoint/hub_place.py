"""NAME -> PLACE. Where a pulled model lies on the disk, and what of it is already there."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import constants

from xverse import device
from xverse.checkpoint.hub_fetch import RemoteFile, digest_of
from xverse.checkpoint.hub_list import COMMIT, DEFAULT_REVISION, Hub
from xverse.errors import XverseError
from xverse.log import logger

WEIGHTS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Place:
    """The folder that a reader opens, and our own notes, lock and unfinished files in `state`.

    Hugging Face's cache keeps each file once, by hash, in `blobs`, and links it into the folder.
    """

    folder: Path
    state: Path
    blobs: Path | None = None

    @property
    def record(self) -> Path:
        name = self.folder.name if self.blobs else "pull"
        return self.state / f"{name}.json"

    def target(self, file: RemoteFile) -> Path:
        """Where the bytes of `file` are kept. Raises XverseError where that is not in the place."""
        target = self.folder / file.path
        if not target.parent.resolve().is_relative_to(self.folder.resolve()):
            raise XverseError(
                f"{target} is not inside {self.folder}.",
                f"A link leads {target.parent} elsewhere, and a download does not follow it.",
                "Remove that link, or name another --cache-dir.",
            )
        if self.blobs and not (target.is_file() and not target.is_symlink()):
            return self.blobs / file.digest.partition(":")[2]
        return target


@dataclass(frozen=True)
class Verified:
    """A file as it was when its hash was last found right."""

    size: int
    mtime_ns: int
    digest: str


@dataclass
class Record:
    """What a pull wanted and has verified so far; a model is complete when nothing is left."""

    revisions: list[str]
    wanted: list[str]
    verified: dict[str, Verified] = field(default_factory=dict)


def place_of(hub: Hub, model_id: str, cache_dir: Path | None, version: str) -> Place:
    """The place of a model: under `cache_dir` as owner/name, or in the hub's own cache.

    `version` is the commit on Hugging Face, the revision on ModelScope.
    """
    owner, name = model_id.split("/")
    if cache_dir is not None:
        return _plain(cache_dir.expanduser() / owner / name)
    if hub == "hf":
        storage = _hugging_face_storage(model_id)
        return Place(storage / "snapshots" / version, storage / ".xverse", storage / "blobs")
    cache = Path(device.env("MODELSCOPE_CACHE", "~/.cache/modelscope")).expanduser()
    for older in (  # where earlier versions of ModelScope's library put things
        cache / "models" / owner / name.replace(".", "___"),
        cache / "hub" / "models" / owner / name.replace(".", "___"),
        cache / "hub" / owner / name,
        cache / owner / name,
    ):
        if (older / "config.json").is_file():
            return _plain(older)
    return _plain(cache / "models" / f"{owner}--{name}" / "snapshots" / version)


def local_place(hub: Hub, model_id: str, cache_dir: Path | None, revision: str | None) -> Place:
    """The place that an earlier pull used, found without asking the hub.

    Raises XverseError where there was none.
    """
    version = revision or DEFAULT_REVISION[hub]
    if hub == "hf" and cache_dir is None and not COMMIT.fullmatch(version):
        refs = _hugging_face_storage(model_id) / "refs"
        if version == "master" and not (refs / version).is_file():
            logger.warning("%s has no revision 'master' on this disk; taking 'main'", model_id)
            version = "main"
        commit = (
            (refs / version).read_text("utf-8", "replace") if (refs / version).is_file() else ""
        )
        if not COMMIT.fullmatch(commit):
            raise not_here(model_id, f"The cache at {refs.parent} has no revision {version!r}.")
        version = commit
    return place_of(hub, model_id, cache_dir, version)


def not_here(model_id: str, why: str) -> XverseError:
    """The error for a model that has to be on the disk and is not."""
    return XverseError(
        f"{model_id} is not complete on this disk, and the hub may not be asked.",
        why,
        "Pull it once with a network (offline=False, and without HF_HUB_OFFLINE).",
    )


def missing_files(place: Place, include_weights: bool) -> list[str]:
    """Names of the files that `place` lacks to be complete; empty when it is usable."""
    record = read_record(place)
    if record is None:
        return _missing_by_index(place.folder, include_weights)
    names = [name for name in record.wanted if include_weights or not is_weights(name)]
    return [name for name in names if not _has_size(place.folder / name, record.verified.get(name))]


def is_weights(name: str) -> bool:
    """Whether a file of this name holds tensors."""
    return name.endswith(WEIGHTS)


def is_verified(file: RemoteFile, target: Path, known: Verified | None) -> bool:
    """Whether `target` holds the bytes of `file`; read again unless size and mtime are `known`."""
    if not _has_size(target, Verified(file.size, 0, "")):
        return False
    if known and known.digest == file.digest and known.mtime_ns == target.stat().st_mtime_ns:
        return True
    return not file.digest or digest_of(target, file.digest.partition(":")[0]) == file.digest


def read_record(place: Place) -> Record | None:
    """What the last pull noted, or None where it noted nothing legible."""
    try:
        told = json.loads(place.record.read_text("utf-8"))
        verified = {
            str(name): Verified(int(item["size"]), int(item["mtime_ns"]), str(item["digest"]))
            for name, item in told["verified"].items()
        }
        wanted = [str(name) for name in told["wanted"]]
        return Record([str(name) for name in told["revisions"]], wanted, verified)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is not legible and is ignored: %s", place.record, error)
        return None


def write_record(place: Place, record: Record) -> None:
    """Note `record`, whole or not at all."""
    fresh = place.record.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(record), indent=1), "utf-8")
    fresh.replace(place.record)


def link_snapshot(place: Place, files: list[RemoteFile], revision: str) -> None:
    """Give each blob its name in the folder, and the revision its commit, as Hugging Face does."""
    assert place.blobs is not None
    for file in files:
        name, blob = place.folder / file.path, place.target(file)
        if name == blob or (name.is_symlink() and name.exists() and name.samefile(blob)):
            continue
        name.parent.mkdir(parents=True, exist_ok=True)
        name.unlink(missing_ok=True)
        try:
            name.symlink_to(os.path.relpath(blob, name.parent.resolve()))
        except OSError:  # no right to make links, as on most Windows machines
            blob.replace(name)
    if not COMMIT.fullmatch(revision):
        ref = place.folder.parents[1] / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(place.folder.name, "utf-8")


def _plain(folder: Path) -> Place:
    return Place(folder, folder / ".xverse")


def _hugging_face_storage(model_id: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}"


def _has_size(path: Path, expected: Verified | None) -> bool:
    return expected is not None and path.is_file() and path.stat().st_size == expected.size


def _missing_by_index(folder: Path, include_weights: bool) -> list[str]:
    """What a folder that another tool has filled lacks, by the index of its shards."""
    names = ["config.json"]
    index = next(
        (
            folder / name
            for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json")
            if (folder / name).is_file()
        ),
        None,
    )
    if include_weights and index is not None:
        try:
            shards = json.loads(index.read_text("utf-8"))["weight_map"].values()
            names += sorted({str(name) for name in shards})
        except (ValueError, KeyError, TypeError, AttributeError):
            return [index.name]
    elif include_weights and not any(is_weights(path.name) for path in folder.glob("*")):
        names.append("model.safetensors")
    return [name for name in names if not (folder / name).is_file()]
