"""The openai package where things go wrong: errors by their class, retries, timeouts; and calls
that come in parallel while it streams."""

import json
import threading
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from tests.server.inside import Inside, Scripted, inside
from tests.server.test_presence import until
from tests.server.test_tools import ARGUMENTS, ASKED, CALL, TOOLS, caller, scripted
from xverse.server.limits import Shares

__all__ = ["caller", "scripted"]  # fixtures

HELLO = [{"role": "user", "content": "Hello"}]


def client_of(server: Inside, **more: object) -> OpenAI:
    options = {"api_key": "none", "max_retries": 0, **more}
    return OpenAI(base_url=f"{server.url}/v1", **options)


def answer_of(client: OpenAI) -> str | None:
    asked = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4)
    return asked.choices[0].message.content


def test_every_error_has_its_class(folder: Path) -> None:
    engine = Scripted(lambda _: [75, 3])
    shares = Shares(requests_per_minute=2)
    with inside(folder, engine, keys=("the-right-key",), shares=shares) as server:
        with pytest.raises(openai.AuthenticationError):
            answer_of(client_of(server))
        client = client_of(server, api_key="the-right-key")
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="another", messages=HELLO)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="tiny", messages=HELLO, temperature=3)
        assert wrong.value.param == "temperature"
        with pytest.raises(openai.RateLimitError) as often:
            answer_of(client)
        assert often.value.code == "rate_limit_exceeded"
        assert int(often.value.response.headers["retry-after"]) >= 1
        server.running.supervisor.state = "restarting"
        server.running.keys.tenant("Bearer the-right-key").requests = None
        with pytest.raises(openai.InternalServerError) as away:
            answer_of(client)
        assert away.value.status_code == 503
        assert away.value.code == "not_ready"


def test_503_is_tried_again_until_the_engine_is_back(folder: Path) -> None:
    with inside(folder, Scripted(lambda _: [75, 3])) as server:
        refused = server.running.metrics.rejected
        supervisor = server.running.supervisor

        def back(reason: str) -> None:
            refused(reason)
            supervisor.state = "ready"  # once somebody has been told that it is not

        server.running.metrics.rejected = back  # type: ignore[method-assign]
        supervisor.state = "restarting"
        assert answer_of(client_of(server, max_retries=2))
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
        assert 'reason="not_ready"} 1.0' in text


def test_429_is_tried_again_until_there_is_room(folder: Path) -> None:
    engine = Scripted(lambda request: [75] * ((request.sampling.max_tokens or 1) - 1) + [3])
    engine.max_running = 1  # and two more are let through
    engine.slow_s = 0.02
    with inside(folder, engine, max_queue=0) as server:
        queue, client = server.running.service.queue, client_of(server, max_retries=6)
        asked = {"model": "tiny", "messages": HELLO, "n": 3, "max_tokens": 40}
        first = threading.Thread(
            target=httpx.post, args=[f"{server.url}/v1/chat/completions"], kwargs={"json": asked}
        )
        first.start()
        until(lambda: queue.used == 3)
        assert answer_of(client)
        first.join()
        assert 'reason="overloaded"}' in httpx.get(f"{server.url}/metrics", timeout=60).text


def test_a_client_whose_patience_ends_takes_its_request_along(folder: Path) -> None:
    engine = Scripted(lambda _: [75] * 10_000, slow_s=0.01)
    with inside(folder, engine) as server:
        client = client_of(server, timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200)
        until(lambda: engine.aborted == 1 and not engine.busy, 30)


def test_parallel_calls_stream_one_after_another(
    scripted: tuple[Inside, list[str]], caller: OpenAI
) -> None:
    scripted[1][0] = "Two:" + CALL + CALL + "Done."
    chunks = list(
        caller.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert calls[0].id != calls[1].id
    for call in calls:
        assert call.function is not None
        assert call.function.name == "hotel_search"
        assert json.loads(call.function.arguments or "") == ARGUMENTS
    assert "".join(delta.content or "" for delta in deltas) == "Two:Done."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_packages_own_gathering_of_a_stream_of_calls(
    scripted: tuple[Inside, list[str]], caller: OpenAI
) -> None:
    scripted[1][0] = CALL + CALL
    with caller.chat.completions.stream(model="tiny", messages=ASKED, tools=TOOLS) as stream:
        stream.until_done()
        whole = stream.get_final_completion()
    calls = whole.choices[0].message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [ARGUMENTS] * 2
