"""Below HTTP's routes: what is no HTTP, what never ends, and what nobody waits for any more."""

import json
import socket
from pathlib import Path

import httpx
import pytest

from tests.server.inside import Inside, Scripted, inside
from xverse.server.protocol import Connection

HEAD = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def sent(server: Inside, *parts: bytes, seconds: float = 120) -> bytes:
    """All that the server says to these bytes until it hangs up; empty where it says nothing."""
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as line:
        for part in parts:
            line.sendall(part)
        answer = b""
        while data := line.recv(2**16):
            answer += data
        return answer


def error(answer: bytes, status: int) -> dict[str, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), head
    assert b"application/json" in head
    assert b"connection: close" in head.lower()
    found: dict[str, str] = json.loads(body)["error"]
    return found


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx bad: 1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n",
        HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"transfer-encoding: gzip\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\nabc",
        b"GET /\xe4\xbd\xa0 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    ],
    ids=lambda value: repr(value[-24:]),
)
def test_what_is_no_http_is_refused_in_our_form(server: Inside, request_bytes: bytes) -> None:
    assert error(sent(server, request_bytes), 400)["code"] == "invalid_http"
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def test_headers_that_never_end(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.server.protocol.HEAD_S", 0.2)
    told = error(sent(server, b"GET /health HTTP/1.1\r\nhost: loc"), 408)
    assert "0.2 s" in told["message"]
    assert error(sent(server), 408)  # and not a single byte
    # A second request that never ends holds the connection no longer than one that never begins,
    # which is a minute and more outside of tests.
    short = property(lambda _: 1, lambda *_: None)
    monkeypatch.setattr(Connection, "timeout_keep_alive", short, raising=False)
    one = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    first, _, second = sent(server, one, b"GET /heal").partition(b'{"status":"alive"}')
    assert b" 200 " in first
    assert not second or error(second, 408)


def test_a_body_that_never_comes(server: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.server.body.READ_S", 0.2)
    answer = sent(server, HEAD + b"content-length: 100\r\n\r\n", b'{"prompt": ')
    assert "0.2 s" in error(answer, 408)["message"]
    assert server.running.traffic.active == 0


def test_a_mistake_of_ours_has_our_form_and_a_name_in_the_log(
    server: Inside, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a-secret-of-ours")

    monkeypatch.setattr(server.running.service.tokenizer, "encode", broken)
    answer = http.post("/tokenize", json={"prompt": "a"}, headers={"x-request-id": "broken-1"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert server.logged("broken-1")["error"] == "internal_error"


def test_nothing_is_redirected(http: httpx.Client) -> None:
    for path in ("/health/", "/v1/models/", "/tokenize/"):
        for method in ("GET", "POST"):
            answer = http.request(method, path, follow_redirects=False)
            assert answer.status_code in (404, 405), (method, path)
            assert answer.json()["error"]["message"]


def test_the_log_can_be_left_out(folder: Path) -> None:
    from xverse.server.run import Running

    for log_requests in (True, False):
        options = {"log_requests": log_requests}
        with inside(folder, Scripted(lambda _: [75, 3]), **options) as server:
            journal = Running(server.running.options).journal
            assert (journal._stream is not None) == log_requests
