"""HUB -> ORIGINAL FILES. Benchmarks whose original archives a hub has, fetched and unpacked."""

import shutil
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from xverse.device import env
from xverse.errors import XverseError
from xverse.evals.item import Task
from xverse.log import logger

MAX_BYTES = 2**30  # of an unpacked archive; the largest known has 170 MB


@dataclass(frozen=True)
class Archive:
    """An archive in a data set of Hugging Face; what is below `inside` is the task's folder."""

    repository: str
    file: str
    inside: str = ""


ARCHIVES = {
    "mmlu": Archive("cais/mmlu", "data.tar", "data"),
    "ceval": Archive("ceval/ceval-exam", "ceval-exam.zip"),
    "cmmlu": Archive("haonan-li/cmmlu", "cmmlu_v1_0_1.zip"),
}


def fetch_missing(tasks: list[Task], data: Path) -> None:
    """Bring the folders that the tasks want and `data` lacks; those that are there stay.

    XverseError for a task of which no hub has the original files, and where the hub fails.
    """
    for folder in dict.fromkeys(task.folder for task in tasks if task.folder):
        if (data / folder).is_dir():
            continue
        archive = ARCHIVES.get(folder)
        if archive is None:
            raise XverseError(
                f"The folder {folder} of the benchmarks cannot be fetched.",
                "No hub has its original files in one archive.",
                f"Put them into {data / folder}: docs/evaluate.md tells where they are.",
            )
        fetch(archive, data / folder)


def fetch(archive: Archive, target: Path) -> None:
    """Download and unpack; `target` appears whole or not at all."""
    logger.info("fetching %s from %s", archive.file, archive.repository)
    try:
        file = hf_hub_download(
            archive.repository,
            archive.file,
            repo_type="dataset",
            endpoint=env("HF_ENDPOINT", "") or None,
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise XverseError(
            f"{archive.file} of {archive.repository} could not be had.",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "Check the network and HF_ENDPOINT, and run the same command again; or put the "
            f"original files into {target}.",
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        unpack(Path(file), Path(aside))
        inside = Path(aside) / archive.inside
        if not inside.is_dir() or not any(inside.iterdir()):
            raise _bad(Path(file), f"It has nothing at {archive.inside or 'its top'}.")
        shutil.move(inside, target) if archive.inside else shutil.copytree(inside, target)


def unpack(file: Path, folder: Path) -> None:
    """Plain files of a zip or tar archive; XverseError for names that lead out of it, for links,
    and for more than MAX_BYTES."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as packed:
                entries = [e for e in packed.infolist() if not e.is_dir()]
                _require_sound(file, [(e.filename, e.file_size) for e in entries])
                for entry in entries:
                    packed.extract(entry, folder)
        else:
            with tarfile.open(file) as tar:
                members = tar.getmembers()
                if any(not (m.isreg() or m.isdir()) for m in members):
                    raise _bad(file, "It has links or devices in it.")
                _require_sound(file, [(m.name, m.size) for m in members])
                tar.extractall(folder, members, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise _bad(file, str(error)) from error


def _require_sound(file: Path, entries: list[tuple[str, int]]) -> None:
    for name, _ in entries:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise _bad(file, f"The name {name!r:.80} leads out of it.")
    if sum(size for _, size in entries) > MAX_BYTES:
        raise _bad(file, f"Unpacked it would have more than {MAX_BYTES >> 20} MiB.")


def _bad(file: Path, why: str) -> XverseError:
    return XverseError(
        f"{file.name} is no archive of a benchmark.", why, "Delete it, and fetch it again."
    )
