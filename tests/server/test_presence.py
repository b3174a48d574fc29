"""Clients that go, and engines that do: work ends with its reader, readers hear of the end."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, MutableMapping
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from tests.server.inside import Inside, Scripted, inside
from xverse.server.sse import EventStream

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


def until(condition: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_request_along(folder: Path, stream: bool) -> None:
    engine = Scripted(lambda _: [75] * 10_000, slow_s=0.01)
    with inside(folder, engine) as server:
        asked = {**CHAT, "stream": stream, "n": 2, "max_tokens": 200}
        url = f"{server.url}/v1/chat/completions"
        if stream:
            with httpx.stream("POST", url, json=asked, timeout=60) as answer:
                lines = answer.iter_lines()  # let go of, it would hang up
                next(lines)
                assert engine.busy
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=asked, timeout=0.3)
        until(lambda: engine.aborted == 2)
        assert not engine.busy
        until(lambda: server.running.traffic.active == 0)
        assert server.running.service.queue.used == 0
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
        assert 'request_success_total{finished_reason="abort",model_name="tiny"} 2.0' in text


def test_a_hundred_clients_that_go_leave_no_page_behind(server: Inside) -> None:
    pages = server.engine.pages  # type: ignore[attr-defined]

    def leave(number: int) -> None:
        asked = {**CHAT, "stream": True, "max_tokens": 200, "ignore_eos": True}
        with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
            lines = answer.iter_lines()
            for _ in range(number % 4):
                next(lines)

    with httpx.Client(base_url=server.url, timeout=30) as client:
        for start in range(0, 100, 20):
            threads = [threading.Thread(target=leave, args=(start + n,)) for n in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    until(lambda: pages.available == pages.count, 30)
    until(lambda: server.running.traffic.active == 0)
    assert server.running.service.queue.used == server.running.service.queue.waiting == 0


def test_when_the_engine_ends_every_reader_hears_of_it(folder: Path) -> None:
    engine = Scripted(lambda _: [75] * 10_000, slow_s=0.01)
    with inside(folder, engine) as server:
        url = f"{server.url}/v1/chat/completions"
        statuses: list[tuple[int, str]] = []

        def ask() -> None:
            answer = httpx.post(url, json={**CHAT, "max_tokens": 200}, timeout=30)
            statuses.append((answer.status_code, answer.json()["error"]["code"]))

        waiting = threading.Thread(target=ask)
        waiting.start()
        with httpx.stream(
            "POST", url, json={**CHAT, "stream": True, "max_tokens": 200}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            until(lambda: len(engine.answers) == 2)
            server.stop_engine()
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_restarted"
        waiting.join()
        assert statuses == [(503, "engine_restarted")]
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 503
        refused = httpx.post(url, json=CHAT, timeout=60)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "not_ready"
        assert int(refused.headers["retry-after"]) >= 1


def test_openai_raises_on_an_error_in_the_stream(folder: Path) -> None:
    engine = Scripted(lambda _: [75] * 10_000, slow_s=0.01)
    with (
        inside(folder, engine) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        next(stream)
        server.stop_engine()
        with pytest.raises(openai.APIError, match="engine"):
            list(stream)


def test_silence_is_filled_with_comments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.server.sse.KEEP_ALIVE_S", 0.1)
    engine = Scripted(lambda _: [75, 104, 3], slow_s=0.35)
    with inside(folder, engine) as server:
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json={**CHAT, "stream": True}, timeout=60) as answer:
            lines = list(answer.iter_lines())
    assert lines.count(": keep-alive") >= 3
    assert lines[-2] == "data: [DONE]"


def test_a_client_that_reads_nothing_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.server.sse.STALL_S", 0.1)
    closed: list[bool] = []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            closed.append(True)

    async def send(message: MutableMapping[str, object]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # as uvicorn does while nothing is taken

    async def receive() -> MutableMapping[str, object]:
        return await asyncio.get_running_loop().create_future()

    async def run() -> None:
        await asyncio.wait_for(EventStream(events())({}, receive, send), 60)

    asyncio.run(run())
    assert closed


def test_what_the_engine_refuses_has_its_own_status(folder: Path) -> None:
    from xverse.errors import XverseError

    def refuse(_: object) -> list[int]:
        raise XverseError("It does not fit.", "There is little room.", "Make it shorter.")

    with inside(folder, Scripted(refuse)) as server:
        for stream in (False, True):
            url = f"{server.url}/v1/chat/completions"
            answer = httpx.post(url, json={**CHAT, "stream": stream}, timeout=60)
            assert answer.status_code == 400
            assert "It does not fit." in answer.json()["error"]["message"]
        asked = {"model": "tiny", "input": "Hello", "stream": True}
        assert httpx.post(f"{server.url}/v1/responses", json=asked, timeout=60).status_code == 400
