"""HUB -> LIST. What Hugging Face or ModelScope says a model holds: names, sizes, hashes, URLs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal
from urllib.parse import quote, urlencode, urlsplit

from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # lazily exported

from xverse import device
from xverse.checkpoint.hub_fetch import (
    HTTP_ERROR,
    TIMEOUT_S,
    HubUnreachable,
    RemoteFile,
    refusal,
    unreachable,
)
from xverse.errors import XverseError
from xverse.log import logger

Hub = Literal["hf", "modelscope"]
DEFAULT_REVISION: dict[Hub, str] = {"hf": "main", "modelscope": "master"}
MODELSCOPE_LIST_LIMIT = 3000  # its list of files stops here without a word
COMMIT = re.compile(r"[0-9a-f]{40}")
_HASH = {"sha256": re.compile(r"[0-9a-f]{64}"), "git": re.compile(r"[0-9a-f]{40}")}


@dataclass(frozen=True)
class Listing:
    """What a hub offers under one revision, and what it takes to ask for the files."""

    revision: str  # the branch, tag or commit that exists
    commit: str  # 40 hex digits; "" on ModelScope, which names files by revision
    files: list[RemoteFile]
    headers: dict[str, str]
    page: str


def list_files(hub: Hub, model_id: str, revision: str | None) -> Listing:
    """Ask `hub` for the files of `model_id`; without a revision those of its default branch.

    Raises HubUnreachable where it gave no answer, XverseError where the answer is no.
    """
    listing = _list_hugging_face if hub == "hf" else _list_modelscope
    asked = revision or DEFAULT_REVISION[hub]
    found = listing(model_id, asked)
    if found is None and revision == DEFAULT_REVISION["modelscope" if hub == "hf" else "hf"]:
        other = DEFAULT_REVISION[hub]
        logger.warning("%s has no revision %r here; taking %r", model_id, revision, other)
        found = listing(model_id, other)
    if found is None:
        raise XverseError(
            f"{model_id} has no revision {asked!r}.",
            "The hub knows the model, but no branch, tag or commit of that name.",
            "Leave --revision out for the default branch, or see the names on the model's page.",
        )
    for file in found.files:
        _require_safe(file.path, model_id)
    return found


def _list_hugging_face(model_id: str, revision: str) -> Listing | None:
    """The listing, or None where the model has no such revision."""
    endpoint = _endpoint(device.env("HF_ENDPOINT", "https://huggingface.co"), "HF_ENDPOINT")
    page = f"{endpoint}/{model_id}"
    try:
        info = HfApi(endpoint=endpoint).model_info(
            model_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S
        )
        files = [
            _hugging_face_file(
                sibling,
                hf_hub_url(model_id, sibling.rfilename, revision=info.sha, endpoint=endpoint),
                page,
            )
            for sibling in info.siblings or []
        ]
    except RevisionNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise refusal(error.response.status_code, f"The model {model_id}", page) from error
    except HFValidationError as error:
        raise XverseError(
            f"Hugging Face can have no model called {model_id!r}.",
            str(error),
            "Copy the name from the model's page.",
        ) from error
    except (HTTP_ERROR, OSError) as error:
        raise unreachable(f"The model {model_id}", error) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _nonsense(page, str(error)) from error
    if not COMMIT.fullmatch(info.sha or ""):
        raise _nonsense(page, f"it names the commit {info.sha!r}")
    assert info.sha is not None
    return Listing(revision, info.sha, files, build_hf_headers(library_name="xverse"), page)


def _hugging_face_file(sibling: RepoSibling, url: str, page: str) -> RemoteFile:
    if sibling.lfs is not None:
        digest = _digest("sha256", sibling.lfs.sha256, page)
        return _file(sibling.rfilename, sibling.lfs.size, digest, url, page)
    digest = _digest("git", sibling.blob_id, page)
    return _file(sibling.rfilename, sibling.size, digest, url, page)


def _list_modelscope(model_id: str, revision: str) -> Listing | None:
    """The listing, or None where the model has no such revision."""
    told = device.env("MODELSCOPE_ENDPOINT") or device.env("MODELSCOPE_DOMAIN", "modelscope.cn")
    told = told if "://" in told else f"https://{told}"
    endpoint = _endpoint(told, "MODELSCOPE_ENDPOINT")
    page = f"{endpoint}/models/{model_id}"
    api = f"{endpoint}/api/v1/models/{model_id}"
    headers = {"User-Agent": "xverse"}
    if token := device.env("MODELSCOPE_API_TOKEN"):
        headers |= {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={quote(token)}"}
    what = f"The model {model_id}"
    asked = {"Revision": revision, "Recursive": "True"}
    status, data = _get(f"{api}/repo/files?{urlencode(asked)}", headers, what)
    if status in {400, 404}:  # no such model, or no such revision of it: ask which
        status, _ = _get(f"{api}/revisions", headers, what)
        if status < 400:
            return None
    if status >= 400:
        raise refusal(status, what, page)
    entries = data.get("Files") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise _nonsense(page, "it holds no list of files")
    if len(entries) >= MODELSCOPE_LIST_LIMIT:
        raise XverseError(
            f"{model_id} has more files than ModelScope lists.",
            f"Its answer ends at {MODELSCOPE_LIST_LIMIT} entries without saying what is missing.",
            "Pull it with --source hf.",
        )
    files = [
        _modelscope_file(entry, f"{api}/repo", revision, page)
        for entry in entries
        if not (isinstance(entry, dict) and entry.get("Type") == "tree")
    ]
    return Listing(revision, "", files, headers, page)


def _modelscope_file(entry: object, url: str, revision: str, page: str) -> RemoteFile:
    if not isinstance(entry, dict):
        raise _nonsense(page, f"a file is {entry!r}")
    path, told = entry.get("Path"), entry.get("Sha256")
    query = urlencode({"Revision": revision, "FilePath": str(path)})
    digest = _digest("sha256", told, page) if told else ""
    return _file(path, entry.get("Size"), digest, f"{url}?{query}", page)


def _get(url: str, headers: Mapping[str, str], what: str) -> tuple[int, object]:
    """HTTP status of `url` and the `Data` of ModelScope's answer."""
    try:
        response = get_session().get(url, headers=headers, timeout=TIMEOUT_S)
    except (HTTP_ERROR, OSError) as error:
        raise unreachable(what, error) from error
    if response.status_code >= 400:
        return response.status_code, None
    try:
        body = response.json()
    except ValueError as error:
        raise _nonsense(url, str(error)) from error
    if not isinstance(body, dict):
        raise _nonsense(url, "it is no JSON object")
    code = body.get("Code", 200)
    if body.get("Success") is not False and code == 200:
        return 200, body.get("Data")
    # An error told inside a success: its own codes have eleven digits, HTTP's have three.
    return (code if isinstance(code, int) and 400 <= code < 600 else 404), None


def _endpoint(told: str, variable: str) -> str:
    try:
        parts = urlsplit(told)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise XverseError(
            f"{told!r} is not the address of a hub.",
            "It has to be http:// or https:// and the name of a host.",
            f"Correct the environment variable {variable}, or unset it.",
        )
    return told.rstrip("/")


def _file(path: object, size: object, digest: str, url: str, page: str) -> RemoteFile:
    if not isinstance(path, str) or not isinstance(size, int) or size < 0:
        raise _nonsense(page, f"the file {path!r} has the size {size!r}")
    return RemoteFile(path, size, digest, url)


def _digest(kind: str, told: object, page: str) -> str:
    # Hashes become file names, so nothing but hex digits may pass.
    if not isinstance(told, str) or not _HASH[kind].fullmatch(told.lower()):
        raise _nonsense(page, f"{told!r} is no {kind} hash")
    return f"{kind}:{told.lower()}"


def _require_safe(path: str, model_id: str) -> None:
    """Refuse a list that names anything outside the folder it is to be put in."""
    pieces = path.split("/")
    if (
        not path.isprintable()
        or "\\" in path
        or any(piece in {"", ".", ".."} for piece in pieces)
        or PurePosixPath(path).is_absolute()
        or PureWindowsPath(path).drive
    ):
        raise XverseError(
            f"The hub lists a file of {model_id} that does not belong in a folder: {path!r}.",
            "Such a name could write outside the model's folder.",
            "Do not use this copy of the model; tell the hub, or try the other --source.",
        )


def _nonsense(page: str, why: str) -> HubUnreachable:
    return HubUnreachable(
        f"The answer about {page} is not that of a model hub.",
        why,
        "A proxy or login page may stand in between; check HF_ENDPOINT or MODELSCOPE_ENDPOINT.",
    )
