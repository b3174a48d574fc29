"""LIST -> FILES. Each file fetched once: continued by Range after a stop, checked by its hash."""

import errno
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from xverse.errors import XverseError
from xverse.log import logger

# The HTTP library's root error: of httpx under huggingface_hub 1, of httpx2 under 2.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
TIMEOUT_S = 30.0  # for each connect and each read, not for a whole file
TRIES = 5  # in a row without one new byte
WAIT_S = 1.0  # before the second try; doubled for each further one
WORKERS = 4


@dataclass(frozen=True)
class RemoteFile:
    """A file that a hub offers; `digest` is "sha256:<hex>", "git:<hex>" or "" if none is told."""

    path: str
    size: int
    digest: str
    url: str


class HubUnreachable(XverseError):
    """The hub did not answer, or not with sense: a copy on disk may serve instead."""


class _Interrupted(Exception):
    """The transfer broke off and can be taken up again, not before `wait_s` seconds."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class _Stopped(Exception):
    """Another file failed, and its error is the one to tell."""


def fetch_all(
    wanted: Sequence[tuple[RemoteFile, Path]],
    parts: Path,
    headers: Mapping[str, str],
    page: str,
    finished: Callable[[RemoteFile], None],
) -> None:
    """Fetch each file to its path, unfinished ones waiting in `parts`; `finished` hears of each.

    `page` is where a person reads about the model. Raises XverseError at the first file that fails.
    """
    _require_space(wanted, parts)
    stop = threading.Event()
    with _bar(sum(file.size for file, _ in wanted)) as advance, ThreadPoolExecutor(WORKERS) as pool:
        jobs = {
            pool.submit(_fetch, file, target, parts, headers, page, advance, stop): file
            for file, target in wanted
        }
        try:
            for job in as_completed(jobs):
                job.result()
                finished(jobs[job])
        except BaseException:
            stop.set()
            for job in jobs:
                job.cancel()
            raise


def digest_of(path: Path, kind: str) -> str:
    """Digest of a file on disk as `RemoteFile` writes it; `kind` is "sha256" or "git"."""
    if kind == "git":  # a git blob id: SHA-1 over a header with the length, then the bytes
        hasher = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return f"{kind}:{hasher.hexdigest()}"


def refusal(status: int, what: str, page: str) -> XverseError:
    """The error for an HTTP answer of 400 and above about `what`."""
    if status in {401, 403}:
        return XverseError(
            f"{what} was refused (HTTP {status}).",
            "The model is private or gated, or there is none of that name.",
            f"Check the spelling, accept the licence at {page}, and set HF_TOKEN "
            "(for ModelScope MODELSCOPE_API_TOKEN) to a token of your account.",
        )
    if status in {404, 410}:
        return XverseError(
            f"{what} is not there (HTTP {status}).",
            f"The hub knows nothing at {page}.",
            "Check the spelling, or try the other hub: --source hf or --source modelscope.",
        )
    return HubUnreachable(
        f"{what} could not be had (HTTP {status}).",
        "The hub is overloaded, in repair, or does not understand the request.",
        "Run the same command again later (what has arrived is kept), or try the other --source.",
    )


def unreachable(what: str, cause: Exception | str) -> HubUnreachable:
    """The error for a hub that gave no answer to a question about `what`."""
    reason = cause if isinstance(cause, str) else f"{type(cause).__name__}: {cause}"
    return HubUnreachable(
        f"{what} could not be had.",
        reason,
        "Check the network, the proxy settings, and HF_ENDPOINT or MODELSCOPE_ENDPOINT if set; "
        "then run the same command again: what has arrived is kept.",
    )


def _require_space(wanted: Sequence[tuple[RemoteFile, Path]], parts: Path) -> None:
    needed = sum(file.size - min(file.size, _size(_part(parts, file))) for file, _ in wanted)
    free = shutil.disk_usage(parts).free
    if needed > free:
        raise _disk_full(parts, f"{needed / 1e9:.2f} GB are still to come, {free / 1e9:.2f} free.")


def _disk_full(folder: Path, why: str) -> XverseError:
    return XverseError(
        f"There is not enough room on the disk of {folder}.",
        why,
        "Free some space, or name another disk with --cache-dir.",
    )


def _fetch(
    file: RemoteFile,
    target: Path,
    parts: Path,
    headers: Mapping[str, str],
    page: str,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    part = _part(parts, file)
    advance(min(_size(part), file.size))
    failures = 0
    while True:
        if stop.is_set():
            raise _Stopped
        before = _size(part)
        try:
            _receive(file, part, headers, page, advance, stop)
            break
        except (_Interrupted, HTTP_ERROR) as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures >= TRIES:
                raise unreachable(f"The file {file.path}", error) from error
            wait_s = max(WAIT_S * 2 ** (failures - 1), getattr(error, "wait_s", 0.0))
            logger.warning("%s: %s; trying again in %g s", file.path, error, wait_s)
            stop.wait(wait_s)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise _disk_full(parts, str(error)) from error
            raise
    _verify(file, part)
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)


def _receive(
    file: RemoteFile,
    part: Path,
    headers: Mapping[str, str],
    page: str,
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Append to `part` what is missing; raises _Interrupted or HTTP_ERROR where it broke off."""
    held = _size(part)
    if held >= file.size:  # an earlier run got every byte; too many are _verify's business
        part.touch()
        return
    asked = {**headers, "Accept-Encoding": "identity"}
    if held:
        asked["Range"] = f"bytes={held}-"
    with get_session().stream("GET", file.url, headers=asked, timeout=TIMEOUT_S) as response:
        status = response.status_code
        if status in {408, 429} or status >= 500:
            patience = response.headers.get("Retry-After", "0")
            wait_s = min(float(patience), 60.0) if patience.isdigit() else 0.0
            raise _Interrupted(f"the hub answered HTTP {status}", wait_s)
        if status >= 400 and status != 416:
            raise refusal(status, f"The file {file.path}", page)
        if held and not (
            status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {held}-")
        ):
            part.unlink()  # not the bytes asked for: the whole file, or another stretch of it
            advance(-held)
            held = 0
            if status != 200:
                raise _Interrupted(f"the hub cannot continue the file (HTTP {status})")
        with part.open("ab") as sink:
            for chunk in response.iter_bytes():
                if stop.is_set():
                    raise _Stopped
                sink.write(chunk)
                held += len(chunk)
                advance(len(chunk))
                if held > file.size:
                    break
            sink.flush()
            os.fsync(sink.fileno())  # a power cut must not leave a finished name on empty blocks
    if held < file.size:
        raise _Interrupted(f"the connection closed after {held} of {file.size} bytes")


def _verify(file: RemoteFile, part: Path) -> None:
    """Hold what lies on the disk, not what passed by, against the hub's word; delete if wrong."""
    size = part.stat().st_size
    kind = file.digest.partition(":")[0]
    found = digest_of(part, kind) if kind and size == file.size else ""
    if not kind:
        logger.warning("%s: the hub tells no hash; only the size was checked", file.path)
    if size == file.size and found == file.digest:
        return
    part.unlink()
    raise XverseError(
        f"The file {file.path} arrived damaged, and was deleted.",
        f"The hub says {file.size} bytes, {file.digest or 'no hash'}; "
        f"what came is {size} bytes, {found or 'not hashed'}.",
        "Run the same command again: only this file is fetched anew. If it happens again, "
        "a proxy may be changing it, or the hub's copy is broken: try the other --source.",
    )


def _part(parts: Path, file: RemoteFile) -> Path:
    # By content, so that a file is never continued with what has replaced it on the hub, and by
    # path, so that two workers never write one part when two files are alike.
    path = hashlib.sha256(file.path.encode()).hexdigest()[:16]
    return parts / f"{file.digest.partition(':')[2]}-{path}.part"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def _bar(total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal, nothing elsewhere."""
    columns = (TextColumn("pull"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("pull", total=total)
        yield lambda count: progress.advance(task, count)
