"""The edge: keys on every route, hosts, bodies, headers; the published service as it is called."""

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import requests

from tests.server.inside import Inside, Scripted, inside
from xverse.errors import XverseError
from xverse.server.messages import Start
from xverse.server.options import ServeOptions
from xverse.server.routes import GUIDE_ROUTES, ROUTES

KEY, OTHER = "key-number-one", "key-number-two"
# Every route, and whether it asks for the key: a change here is a decision.
GOLDEN = {
    ("GET", "/health"): False,
    ("GET", "/ready"): False,
    ("GET", "/metrics"): True,
    ("GET", "/openapi.json"): True,
    ("GET", "/v1/models"): True,
    ("GET", "/v1/models/{model:path}"): True,
    ("POST", "/v1/chat/completions"): True,
    ("POST", "/v1/completions"): True,
    ("POST", "/v1/responses"): True,
    ("POST", "/v1/decisions"): True,
    ("POST", "/tokenize"): True,
    ("POST", "/detokenize"): True,
    ("POST", "/render"): True,
    ("POST", "/v1/load_lora_adapter"): True,
    ("POST", "/v1/unload_lora_adapter"): True,
}
GUIDE = {("GET", "/health"): False, ("GET", "/ready"): False, ("POST", "/"): True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Inside]:
    engine = Scripted(lambda _: [75, 104, 3])
    with inside(folder, engine, keys=(KEY, OTHER), allowed_hosts=("model.example",)) as server:
        yield server


def test_the_route_table(locked: Inside) -> None:
    for url, golden, routes in (
        (locked.url, GOLDEN, ROUTES),
        (locked.guide_url, GUIDE, GUIDE_ROUTES),
    ):
        assert {(r.method, r.path) for r in routes} == {*golden} - {("GET", "/openapi.json")}
        for (method, path), closed in golden.items():
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}):
                answer = httpx.request(method, url + path, headers=headers, timeout=60)
                assert (answer.status_code == 401) == closed, (path, answer.status_code)
                if closed:
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(url + "/no/such/route", timeout=60).status_code == 401


def test_the_table_has_every_route_of_the_app(locked: Inside) -> None:
    """By the app itself, so that a route which comes in by another way is seen."""
    routes = [route for route in locked.app.routes if hasattr(route, "methods")]
    found = {(method, route.path) for route in routes for method in route.methods}  # type: ignore[attr-defined]
    assert found - {("HEAD", "/openapi.json")} == {*GOLDEN}
    assert len(routes) == len(locked.app.routes)  # nothing is mounted that the gate's table lacks


def test_openapi_tells_of_every_route_and_its_key(locked: Inside) -> None:
    spec = httpx.get(f"{locked.url}/openapi.json", headers=bearer(KEY), timeout=60).json()
    for (method, path), closed in GOLDEN.items():
        if path == "/openapi.json":
            continue
        told = spec["paths"][path.replace(":path", "")][method.lower()]
        assert bool(told.get("security")) == closed, path
        assert {"200", "400", "401"} <= set(told["responses"])
        if method == "POST":
            ref = told["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            assert ref.rsplit("/", 1)[1] in spec["components"]["schemas"]
    for ref in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(spec)):
        assert ref in spec["components"]["schemas"]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_the_right_key_opens(locked: Inside) -> None:
    for key in (KEY, OTHER):
        answer = httpx.post(
            f"{locked.url}/v1/chat/completions", json=CHAT, headers=bearer(key), timeout=60
        )
        assert answer.status_code == 200, answer.text
    namespaces = {request.namespace for request in locked.engine.requests}  # type: ignore[attr-defined]
    assert len(namespaces) == 2  # what one key had computed, the other does not find
    assert KEY not in locked.journal.getvalue()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("127.0.0.1:8000", 200),
        ("192.168.3.4:80", 200),
        ("[::1]:80", 200),
        ("model.example:443", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("", 421),
        ("[", 421),
    ],
)
def test_only_our_own_names_are_answered(locked: Inside, host: str, status: int) -> None:
    assert (
        httpx.get(f"{locked.url}/health", headers={"host": host}, timeout=60).status_code == status
    )


def test_no_origin_is_invited(locked: Inside) -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = httpx.options(f"{locked.url}/v1/chat/completions", headers=headers | bearer(KEY))
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_request_ids_go_both_ways(locked: Inside) -> None:
    given = httpx.get(f"{locked.url}/health", headers={"x-request-id": "my-own.1"}, timeout=60)
    assert given.headers["x-request-id"] == "my-own.1"
    assert locked.logged("my-own.1")["route"] == "/health"
    for bad in ("a b", "x" * 129, 'a"b'):
        made = httpx.get(f"{locked.url}/health", headers={"x-request-id": bad}, timeout=60)
        assert made.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'"a"', 400, "invalid_json"),
        (b'{"a": NaN}', 400, "invalid_json"),
        (b'{"a": 1e999}', 400, "invalid_json"),
        (b'{"a": "\\ud800"}', 400, "invalid_json"),
        (b'{"a": "\xff"}', 400, "invalid_json"),
        (b"\xef\xbb\xbf{}", 400, "invalid_json"),
        (b'{"a": "\\u0000"}', 400, "null_character"),
        (b'{"\\u0000": 1}', 400, "null_character"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", 400, "json_too_deep"),
        (b'{"a": ' + b"[" * 200_000, 400, "json_too_deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", 400, None),
        (b'{"prompt": "' + b"a" * (8 * 2**20) + b'"}', 413, "request_too_large"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_bodies_that_are_refused(
    http: httpx.Client, body: bytes, status: int, code: str | None
) -> None:
    for route in ("/v1/chat/completions", "/tokenize"):
        answer = http.post(route, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        if code is not None:
            assert answer.json()["error"]["code"] == code


def test_an_escaped_backslash_before_u0000_is_no_null(http: httpx.Client) -> None:
    body = b'{"prompt": "\\\\u0000"}'
    answer = http.post("/tokenize", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_other_content_types_are_refused(http: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = http.post("/tokenize", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 415
    charset = {"content-type": "application/json; charset=utf-8"}
    assert http.post("/tokenize", content=b'{"prompt": "a"}', headers=charset).status_code == 200


def test_headers_are_bounded(server: Inside) -> None:
    many = {f"x-{number}": "a" for number in range(101)}
    assert httpx.get(f"{server.url}/health", headers=many, timeout=60).status_code == 431
    long = {"x-long": "a" * 70_000}
    assert httpx.get(f"{server.url}/health", headers=long, timeout=60).status_code == 431
    with contextlib.suppress(httpx.HTTPError):  # far over, the parser itself hangs up
        answer = httpx.get(f"{server.url}/health", headers={"x-long": "a" * 10**6}, timeout=60)
        assert 400 <= answer.status_code < 500


def test_unknown_routes_and_methods_have_the_same_form(http: httpx.Client) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/tokenize", 405)):
        answer = http.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert http.get("/v1/models/other").status_code == 404
    assert http.get("/v1/models/tiny").json()["id"] == "tiny"


def test_the_log_has_no_prompts_and_no_line_of_anybody_elses(
    http: httpx.Client, server: Inside
) -> None:
    secret = 'a-secret-word\r\n{"event": "forged"}'
    http.post("/tokenize", json={"prompt": secret, "user": secret})
    http.get("/nothing?" + "x" * 100, headers={"user-agent": "a-secret-word"})
    for line in server.journal.getvalue().splitlines():
        assert json.loads(line)["event"] != "forged"
    assert "secret" not in server.journal.getvalue()


def test_prompts_are_logged_where_one_asks_for_it(folder: Path) -> None:
    """Answers are not, nor what was refused; and a prompt cannot begin a line."""
    said = 'a-word\r\n{"event": "forged"}\x1b[31m'
    with inside(folder, Scripted(lambda _: [75, 3]), log_prompts=True) as server:
        for name, route in (("1", server.guide_url), ("2", f"{server.url}/tokenize")):
            body = {"prompt": said}
            httpx.post(route, json=body, headers={"x-request-id": name}, timeout=60)
            assert server.logged(name)["asked"] == body
        wrong = {"prompt": said, "nothing_like_it": 1}
        refused = {"x-request-id": "refused"}
        httpx.post(f"{server.url}/tokenize", json=wrong, headers=refused, timeout=60)
        assert "asked" not in server.logged("refused")
        lines = server.journal.getvalue().splitlines()
        assert {json.loads(line)["event"] for line in lines} == {"request"}
        assert "\x1b" not in server.journal.getvalue()


# --- The published service


def test_the_published_curl_call(server: Inside) -> None:
    """As printed, but for the port."""
    found = subprocess.run(
        [
            *("curl", "-s", "-X", "POST", server.guide_url),
            *("-H", "Content-Type: application/json"),
            *("-d", '{"prompt": "Hello, who are you?"}'),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    expect_guide(json.loads(found.stdout))


def test_the_published_requests_call(server: Inside) -> None:
    """As printed, but for the port."""
    headers = {"Content-Type": "application/json"}
    data = {"prompt": "Hello, who are you?"}
    response = requests.post(url=server.guide_url, headers=headers, data=json.dumps(data))
    expect_guide(response.json())


def expect_guide(answer: dict[str, object]) -> None:
    assert list(answer) == ["response", "status", "time"]
    assert isinstance(answer["response"], str)
    assert answer["status"] == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", str(answer["time"]))


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"prompt": ""}',
        b'{"prompt": 1}',
        b'{"prompt": null}',
        b"prompt",
        b'{"prompt": "\\u0000"}',
    ],
)
def test_the_published_service_refuses_in_json(server: Inside, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(server.guide_url + "/", content=body, headers=headers, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_health_is_answered_while_many_are_served(folder: Path) -> None:
    engine = Scripted(lambda _: [75] * 40 + [3], slow_s=0.01)
    with inside(folder, engine) as server:
        ask = lambda: httpx.post(server.guide_url, json={"prompt": "Hello"}, timeout=30)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(16)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        took = []
        for _ in range(10):
            began = time.perf_counter()
            assert httpx.get(f"{server.guide_url}/health", timeout=60).status_code == 200
            took.append(time.perf_counter() - began)
        for thread in threads:
            thread.join()
        assert max(len(engine.requests), 0) == 16
        assert min(took) < 1


# --- Options


def options(**more: object) -> ServeOptions:
    return ServeOptions(start=Start(model="m"), name="m", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_a_public_address_needs_a_key_or_the_word(host: str) -> None:
    with pytest.raises(XverseError, match="no API key"):
        options(host=host)
    assert options(host=host, insecure=True).public
    assert options(host=host, keys=(KEY,)).public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_loopback_needs_none(host: str) -> None:
    assert not options(host=host).public


@pytest.mark.parametrize(
    "more",
    [
        {"port": 70000},
        {"guide_port": 8000},
        {"max_queue": -1},
        {"max_choices": 129},
        {"log_prompts": True, "log_requests": False},
        {"drain_s": float("nan")},
        {"keys": ("short",)},
        {"keys": ("with a\nline end",)},
        {"name": ""},
    ],
)
def test_options_that_cannot_be(more: dict[str, object]) -> None:
    with pytest.raises(XverseError):
        ServeOptions(**({"start": Start(model="m"), "name": "m"} | more))  # type: ignore[arg-type]


def test_small_writes_do_not_wait() -> None:
    from xverse.server.run import listen

    with listen("127.0.0.1", 0) as ear, socket.create_connection(ear.getsockname()):
        ear.setblocking(True)
        with ear.accept()[0] as connection:
            assert connection.proto == socket.IPPROTO_TCP
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_said(server: Inside) -> None:
    from xverse.server.run import listen

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(XverseError, match="cannot be listened at"):
            listen("127.0.0.1", taken.getsockname()[1])
