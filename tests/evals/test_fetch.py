"""Archives come from a hub and are unpacked; what is hostile in them is refused."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from xverse.errors import XverseError
from xverse.evals.fetch import fetch_missing, unpack
from xverse.evals.tasks import all_tasks


def tar_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes]]:
    """A hub that has what is put into the dictionary, by path."""
    files: dict[str, bytes] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            content = files.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", "a" * 40)
            self.end_headers()
            if body and content:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield files
    server.shutdown()
    server.server_close()


def test_an_archive_becomes_a_folder_once(hub: dict[str, bytes], tmp_path: Path) -> None:
    content = tar_of({"data/dev/anatomy_dev.csv": b"q,1,2,3,4,A\n", "data/readme": b"x"})
    hub["/datasets/cais/mmlu/resolve/main/data.tar"] = content
    data = tmp_path / "data"
    fetch_missing([all_tasks()["mmlu"], all_tasks()["mmlu-val"]], data)
    assert (data / "mmlu" / "dev" / "anatomy_dev.csv").read_bytes() == b"q,1,2,3,4,A\n"
    assert [path.name for path in data.iterdir()] == ["mmlu"]
    hub.clear()
    fetch_missing([all_tasks()["mmlu"]], data)  # it is there


def test_what_no_hub_has_is_told(hub: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(XverseError, match="could not be had"):
        fetch_missing([all_tasks()["ceval"]], tmp_path)
    with pytest.raises(XverseError, match="cannot be fetched"):
        fetch_missing([all_tasks()["gsm8k"]], tmp_path)


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a\\..\\..\\evil"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    tar, packed = tmp_path / "a.tar", tmp_path / "a.zip"
    tar.write_bytes(tar_of({name: b"x"}))
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(name, b"x")
    for file in (tar, packed):
        with pytest.raises(XverseError, match="no archive"):
            unpack(file, tmp_path / "inside" / "deep")
    assert not list(tmp_path.rglob("evil"))


def test_links_and_damage_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(XverseError, match="links"):
        unpack(file, tmp_path)
    file.write_bytes(b"no archive")
    with pytest.raises(XverseError, match="no archive"):
        unpack(file, tmp_path)
