"""HUB -> FOLDER. A model pulled from Hugging Face or ModelScope: chosen, fetched, verified."""

import re
from pathlib import Path, PurePosixPath
from typing import Literal

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # lazily exported

from xverse import device
from xverse.checkpoint.hub_fetch import HubUnreachable, RemoteFile, fetch_all
from xverse.checkpoint.hub_list import DEFAULT_REVISION, Hub, Listing, list_files
from xverse.checkpoint.hub_place import (
    Place,
    Record,
    Verified,
    is_verified,
    is_weights,
    link_snapshot,
    local_place,
    missing_files,
    not_here,
    place_of,
    read_record,
    write_record,
)
from xverse.errors import XverseError
from xverse.log import logger

MODEL_ID = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,95})/([A-Za-z0-9][A-Za-z0-9._-]{0,95})")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*")
TEXTS = {".json", ".txt", ".model", ".tiktoken", ".jinja", ".md"}
LICENCE = re.compile(r"(?i)[^/]*(licen[cs]e|notice)[^/.]*(\.(txt|md|pdf|html|rst))?")


def pull(
    model_id: str,
    *,
    source: Literal["auto", "hf", "modelscope"] = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    offline: bool | None = None,
    include_weights: bool = True,
) -> Path:
    """Bring the model "owner/name" to this disk, every file verified, and return its folder.

    With `cache_dir` that is cache_dir/owner/name, otherwise in the hub's own cache. A pull that was
    stopped goes on where it was. Raises XverseError for whatever prevents a complete folder.
    """
    parse_model_id(model_id)
    hub = _hub(source)
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise XverseError(
            f"{revision!r} is not the name of a revision.",
            "A revision is a branch, a tag or a commit.",
            f"Leave it out for the default branch, {DEFAULT_REVISION[hub]!r}.",
        )
    root = None if cache_dir is None else Path(cache_dir)
    if offline is None:
        offline = device.env_flag("HF_HUB_OFFLINE") or device.env_flag("TRANSFORMERS_OFFLINE")
    try:
        if offline:
            return _local(hub, model_id, root, revision, include_weights)
        try:
            listing = list_files(hub, model_id, revision)
        except HubUnreachable as error:
            return _instead(error, hub, model_id, root, revision, include_weights)
        place = place_of(hub, model_id, root, listing.commit or listing.revision)
        return _bring(model_id, listing, place, revision, include_weights)
    except OSError as error:
        raise XverseError(
            f"{model_id} could not be written to this disk.",
            str(error),
            "Check the folder and your rights to it, or name another one with --cache-dir.",
        ) from error


def parse_model_id(text: str) -> tuple[str, str]:
    """Owner and name of "owner/name"; anything else is an XverseError."""
    match = MODEL_ID.fullmatch(text)
    if match is None or ".." in text or len(text) > 200:
        raise XverseError(
            f"{text[:200]!r} is not the name of a model on a hub.",
            "A name is owner/name, of letters, digits, '-', '_' and '.', each up to 96 long.",
            "Write it as on the model's page, such as xverse/XVERSE-7B-Chat.",
        )
    return match[1], match[2]


def choose(files: list[RemoteFile], include_weights: bool) -> tuple[list[RemoteFile], list[str]]:
    """The files that a model folder needs, and the names of those left out.

    Code is never taken. Of weights the first kind on offer is: safetensors, pickles, GGUF.
    """
    kinds = (".safetensors", ".bin", ".gguf")
    kind = next((kind for kind in kinds if any(_weights_of(file, kind) for file in files)), None)

    def needed(file: RemoteFile) -> bool:
        path = PurePosixPath(file.path)
        if any(piece.startswith(".") for piece in path.parts):
            return False
        if kind is not None and _weights_of(file, kind):
            return include_weights
        if path.name.endswith(".bin.index.json"):
            return kind == ".bin"
        return path.suffix in TEXTS or LICENCE.fullmatch(path.name) is not None

    chosen = [file for file in files if needed(file)]
    return chosen, sorted({file.path for file in files} - {file.path for file in chosen})


def _weights_of(file: RemoteFile, kind: str) -> bool:
    name = PurePosixPath(file.path).name
    return name.endswith(kind) and (kind != ".bin" or name.startswith("pytorch_model"))


def _hub(source: str) -> Hub:
    told = device.env("XVERSE_SOURCE", "hf") if source == "auto" else source
    if told == "hf":
        return "hf"
    if told == "modelscope":
        return "modelscope"
    raise XverseError(
        f"There is no hub called {told!r}.",
        "Models are pulled from Hugging Face (hf) or ModelScope (modelscope).",
        "Use --source hf or --source modelscope, and the same in XVERSE_SOURCE.",
    )


def _bring(
    model_id: str, listing: Listing, place: Place, asked: str | None, include_weights: bool
) -> Path:
    """Fetch whatever `place` lacks of `listing`."""
    chosen, left_out = choose(listing.files, include_weights)
    if not any(file.path == "config.json" or is_weights(file.path) for file in listing.files):
        raise XverseError(
            f"{model_id} holds no model.",
            f"Of its {len(listing.files)} files none is config.json or a file of weights.",
            "Check the name; a data set or an adapter is not a model.",
        )
    if include_weights and not any(is_weights(file.path) for file in chosen):
        logger.warning("%s has no weights that can be loaded, only its other files", model_id)
    place.state.mkdir(parents=True, exist_ok=True)
    if place.blobs:
        place.blobs.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(place.state / "lock"):
        record = _begin(listing, place, asked)
        lacking = [file for file in chosen if not _is_here(file, place, record)]
        write_record(place, record)

        def finished(file: RemoteFile) -> None:
            _note(file, place, record)
            write_record(place, record)

        targets = [(file, place.target(file)) for file in lacking]
        fetch_all(targets, place.state, listing.headers, listing.page, finished)
        if place.blobs:
            link_snapshot(place, chosen, listing.revision)
    got = f"{len(lacking)} of {len(chosen)} files fetched, the rest were here"
    logger.info("%s: %s; left out: %s", model_id, got, ", ".join(left_out) or "nothing")
    logger.info("%s", _licence(model_id, place.folder, listing))
    return place.folder


def _begin(listing: Listing, place: Place, asked: str | None) -> Record:
    """The record at the start of a pull: what is wanted now, and what the last one verified."""
    last = read_record(place)
    wanted, _ = choose(listing.files, include_weights=True)
    revisions = {listing.revision, listing.commit, asked or listing.revision} - {""}
    offered = {file.path: file.digest for file in listing.files}
    verified = {} if last is None else last.verified
    kept = {name: item for name, item in verified.items() if offered.get(name) == item.digest}
    return Record(sorted(revisions), [file.path for file in wanted], kept)


def _is_here(file: RemoteFile, place: Place, record: Record) -> bool:
    target = place.target(file)
    if is_verified(file, target, record.verified.get(file.path)):
        _note(file, place, record)
        return True
    if target.exists():
        logger.warning("%s is not what the hub has; it is fetched anew", target)
    record.verified.pop(file.path, None)
    return False


def _note(file: RemoteFile, place: Place, record: Record) -> None:
    stat = place.target(file).stat()
    record.verified[file.path] = Verified(stat.st_size, stat.st_mtime_ns, file.digest)


def _local(
    hub: Hub, model_id: str, root: Path | None, revision: str | None, include_weights: bool
) -> Path:
    """The folder of an earlier pull, if it is complete; no request is made."""
    place = local_place(hub, model_id, root, revision)
    missing = missing_files(place, include_weights)
    if missing:
        few = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise not_here(model_id, f"{place.folder} lacks {len(missing)} of its files: {few}.")
    record = read_record(place)
    if revision is not None and record is not None and revision not in record.revisions:
        held = " = ".join(record.revisions)
        raise not_here(model_id, f"{place.folder} holds the revision {held}, not {revision}.")
    if revision is not None and record is None:
        logger.warning(
            "%s does not say of which revision it is; taken for %s", place.folder, revision
        )
    return place.folder


def _instead(
    error: HubUnreachable,
    hub: Hub,
    model_id: str,
    root: Path | None,
    revision: str | None,
    include_weights: bool,
) -> Path:
    """The complete copy on this disk in place of a hub that does not answer."""
    try:
        folder = _local(hub, model_id, root, revision, include_weights)
    except XverseError as local:
        raise XverseError(
            error.what, f"{error.why.rstrip('.')}. And here: {local.why}", error.fix
        ) from error
    logger.warning("the hub does not answer (%s); using the copy at %s", error.why, folder)
    return folder


def _licence(model_id: str, folder: Path, listing: Listing) -> str:
    """One line about the terms: what the card's header says, and the files that say more."""
    card = folder / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    header = text.split("\n---", 1)[0] if text.startswith("---") else ""
    told = re.findall(r"(?m)^license(?:_name|_link)?:[ \t]*(\S.*?)[ \t\r]*$", header)
    files = [
        file.path for file in listing.files if LICENCE.fullmatch(PurePosixPath(file.path).name)
    ]
    # The card is the publisher's text: nothing in it may play with the terminal.
    terms = "".join(filter(str.isprintable, ", ".join([*told, *files])))[:300] or "not stated"
    return f"{model_id}: licence: {terms}; read {listing.page} before use"
