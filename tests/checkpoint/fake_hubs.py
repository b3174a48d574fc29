"""A server on loopback that answers as Hugging Face and as ModelScope do, and keeps a log."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

MODEL = "xverse/XVERSE-7B-Chat"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".gguf")  # in LFS: hashed by SHA-256, served by another host


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it; `file` is set when the bytes of a file were asked for."""

    path: str
    file: str = ""
    range: str = ""
    authorization: str = ""


@dataclass
class FakeHub:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: dict[str, bytes]
    branch: str = "main"
    bytes_per_s: float = 0.0  # 0: as fast as it goes
    token: str = ""  # needed for everything, if set
    status: int = 0  # answered to everything, if set
    file_status: list[int] = field(default_factory=list)  # answered to the next files
    drop_after: list[int] = field(
        default_factory=list
    )  # bytes after which the next files break off
    corrupt: set[str] = field(default_factory=set)
    no_hash: bool = False
    tells_length: bool = True  # else the end of the connection is the end of the file
    asked: list[Asked] = field(default_factory=list)
    sent: int = 0
    url: str = ""

    def ranges(self, name: str) -> list[str]:
        """The Range of every request for the bytes of file `name` ("" for all of it)."""
        return [asked.range for asked in self.asked if asked.file == name]

    def fetched(self) -> set[str]:
        """Names of the files whose bytes were asked for."""
        return {asked.file for asked in self.asked if asked.file}


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        cdn = path.removeprefix("/cdn/") if path.startswith("/cdn/") else ""
        file = cdn or query.get("FilePath", "") or path.partition(f"/resolve/{COMMIT}/")[2]
        # A redirect on its own carries no bytes, so only the answer with them counts as the file's.
        carries = bool(cdn) or not file.endswith(LARGE)
        authorization = self.headers.get("Authorization", "")
        asked_range = self.headers.get("Range", "")
        self.hub.asked.append(Asked(path, file if carries else "", asked_range, authorization))
        if self.hub.status:
            self._status(self.hub.status)
        elif self.hub.token and not cdn and authorization != f"Bearer {self.hub.token}":
            self._status(401)
        elif file:
            self._file(file, large=not carries, ranged=bool(cdn))
        elif path.startswith(f"/api/models/{MODEL}/revision/"):
            self._hugging_face(path.rpartition("/")[2])
        elif path == f"/api/v1/models/{MODEL}/repo/files":
            self._modelscope(query["Revision"])
        elif path == f"/api/v1/models/{MODEL}/revisions":
            branches = [{"Revision": self.hub.branch}]
            self._json({"Code": 200, "Data": {"RevisionMap": {"Branches": branches}}})
        else:
            self._status(404)

    def _hugging_face(self, revision: str) -> None:
        if revision not in {self.hub.branch, COMMIT}:
            self._status(404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings: list[dict[str, object]] = []
        for name, content in self.hub.files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
            if name.endswith(LARGE):
                lfs = {"size": len(content), "sha256": sha256(content), "pointerSize": 130}
                entry["lfs"] = lfs
            siblings.append(entry)
        self._json({"id": MODEL, "sha": COMMIT, "siblings": siblings})

    def _modelscope(self, revision: str) -> None:
        if revision != self.hub.branch:
            self._status(404)
            return
        entries: list[dict[str, object]] = [{"Path": "assets", "Type": "tree", "Size": 0}]
        for name, content in self.hub.files.items():
            digest = "" if self.hub.no_hash else sha256(content)
            entries.append({"Path": name, "Type": "blob", "Size": len(content), "Sha256": digest})
        self._json({"Code": 200, "Success": True, "Data": {"Files": entries}})

    def _file(self, name: str, *, large: bool, ranged: bool) -> None:
        if self.hub.file_status:
            self._status(self.hub.file_status.pop(0))
        elif name not in self.hub.files:
            self._status(404)
        elif large:  # to another origin, where no token may follow
            place = self.hub.url.replace("127.0.0.1", "localhost")
            self._status(302, {"Location": f"{place}/cdn/{name}"})
        else:
            self._bytes(name, ranged)

    def _bytes(self, name: str, ranged: bool) -> None:
        content = self.hub.files[name]
        if name in self.hub.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, asked = 0, self.headers.get("Range", "")
        if asked and ranged:  # small files are served whole, as the real hubs may
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if self.hub.tells_length:
            self.send_header("Content-Length", str(len(content) - start))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        end = len(content)
        if self.hub.drop_after:
            end = min(end, start + self.hub.drop_after.pop(0))
        block = 16384
        for at in range(start, end, block):
            piece = content[at : min(at + block, end)]
            self.wfile.write(piece)
            self.hub.sent += len(piece)
            if self.hub.bytes_per_s:
                time.sleep(len(piece) / self.hub.bytes_per_s)
        self.close_connection = self.close_connection or end < len(content)

    def _json(self, body: object) -> None:
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _status(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed in the middle is what the tests are about."""


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run `hub` on a free port of loopback; its address is `hub.url`."""
    server = _Server(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
