"""Serving the pages: where they listen, who may see them, and that they call nobody."""

import os
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tiny_model import write_published_folder
from tests.web.live import Echo, pages
from xverse import XverseError, cli
from xverse.web.site import is_loopback, listen, parse_auth

ROOT = Path(__file__).resolve().parents[2]


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(XverseError, match=f"port {port}: address already in use") as refused:
            listen("127.0.0.1", port)
        assert "--port" in refused.value.fix


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("198.51.100.7", 0)])
def test_an_address_that_is_none_of_ours(host: str, port: int) -> None:
    with pytest.raises(XverseError, match="cannot listen"):
        listen(host, port)


def test_auth_is_a_name_and_a_password() -> None:
    assert parse_auth("me:a:b") == ("me", "a:b")
    for text in ("me", "me:", ":secret", ""):
        with pytest.raises(XverseError, match="--auth"):
            parse_auth(text)


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
    ],
)
def test_which_addresses_are_this_machine_alone(host: str, own: bool) -> None:
    assert is_loopback(host) is own


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "--insecure"),
        (["--auth", "me"], "no password"),
        (["--api-key", "k"], "--url"),
        (["--port", "70000"], "cannot listen"),
        (["--url", "http://127.0.0.1:9/v1"], "does not answer"),
    ],
)
def test_what_the_verb_refuses(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.run(["web", "smollm2", *(["--port", "0"] if "--port" not in flags else []), *flags])
        == 1
    )
    assert words in capsys.readouterr().err


def test_a_password_is_asked_for() -> None:
    with (
        pages(Echo(), page="chat", lang="en", auth=("me", "secret")) as address,
        httpx.Client(base_url=address, follow_redirects=True, timeout=60) as visitor,
    ):
        for route in ("/en/config", "/en/gradio_api/info", "/config"):
            assert visitor.get(route).status_code == 401, route
        body = {"data": [], "fn_index": 0, "session_hash": "x"}
        assert visitor.post("/en/gradio_api/queue/join", json=body).status_code == 401
        wrong = {"username": "me", "password": "guess"}
        assert visitor.post("/en/login", data=wrong).status_code == 400
        right = {"username": "me", "password": "secret"}
        assert visitor.post("/en/login", data=right).status_code == 200
        assert visitor.get("/en/config").status_code == 200


def test_another_name_of_this_machine_is_refused(address: str) -> None:
    assert (
        httpx.get(f"{address}/en/", headers={"Host": "evil.example"}, timeout=60).status_code == 400
    )
    assert httpx.get(f"{address}/en/", timeout=60).status_code == 200


def test_files_are_not_taken(address: str) -> None:
    files = {"files": ("a.txt", b"some bytes")}
    reply = httpx.post(f"{address}/en/gradio_api/upload", files=files, timeout=60)
    assert reply.status_code in (400, 403, 413), reply.text
    assert httpx.get(f"{address}/en/gradio_api/file=/etc/hostname", timeout=60).status_code in (
        403,
        404,
    )


def test_one_language_and_one_page() -> None:
    with pages(Echo(), page="generate", lang="ja") as address:
        page = httpx.get(
            address, headers={"Accept-Language": "zh"}, follow_redirects=True, timeout=60
        )
        assert page.url.path == "/ja/"
        assert "チャット" not in page.text  # no tabs
        assert "書き出し" in page.text
        assert "送信" not in page.text


def test_nobody_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while the pages are built, and not while they answer."""
    called: list[Any] = []
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def watched(self: socket.socket, to: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_loopback(to[0]):
            called.append(to)
        connect(self, to)

    def asked(host: Any, *rest: Any, **more: Any) -> Any:
        if host is not None and not is_loopback(host if isinstance(host, str) else host.decode()):
            called.append(host)
        return lookup(host, *rest, **more)

    monkeypatch.setattr(socket.socket, "connect", watched)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    with pages(Echo(), lang="en") as address:
        page = httpx.get(f"{address}/en/", trust_env=False, timeout=60).text
        config = httpx.get(f"{address}/en/config", trust_env=False, timeout=60).json()
    assert not called
    assert config["analytics_enabled"] is False
    assert "fonts.googleapis" not in page
    assert "cdnjs" not in page


@pytest.mark.parametrize(
    ("script", "port", "model"),
    [("chat_demo", 36000, "./XVERSE-7B-Chat"), ("text_generation_demo", 20014, "./XVERSE-7B")],
)
def test_published_scripts(
    script: str,
    port: int,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    main = import_module(script).main
    with pytest.raises(SystemExit, match="2"):
        main(["--no_such_flag"])
    assert "unrecognized arguments: --no_such_flag" in capsys.readouterr().err
    with listen("127.0.0.1", 0) as at:
        taken = str(at.getsockname()[1])
        assert main(["--port", taken]) == 1
    assert f"port {taken}: address already in use" in capsys.readouterr().err
    assert main(["--port", "0", "--title", "T", "--tokenizer_path", "./none"]) == 1
    assert f"There is no model '{model}'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert str(port) in capsys.readouterr().out


def test_a_script_serves_its_page(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "model")
    command = [sys.executable, "examples/text_generation_demo.py", "--port", "0", "--title", "Mine"]
    process = subprocess.Popen(
        [*command, "--model_path", str(tmp_path / "model")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    title, _, address = process.stdout.readline().strip().partition(" is at ")
    assert title == "Mine"
    page = httpx.get(
        address, headers={"Accept-Language": "en"}, follow_redirects=True, timeout=60
    ).text
    assert "max_new_tokens" in page
    assert "Advanced settings" not in page
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    process.stdout.close()


def test_a_tokenizer_of_its_own(tmp_path: Path) -> None:
    from tests.text.tiny import write_tiny_tokenizer
    from xverse import LLM

    write_published_folder(tmp_path / "model")
    write_tiny_tokenizer(tmp_path / "tokenizer")
    own = LLM(tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    assert own.tokenizer.eos_id == 3
    with pytest.raises(XverseError, match="belongs to another model"):
        LLM(tmp_path / "model", tokenizer="smollm2")
    with pytest.raises(XverseError):
        LLM(tmp_path / "model", tokenizer=tmp_path / "nothing")
