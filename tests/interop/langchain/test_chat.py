"""ChatXverse beyond the standard tests: what is refused, what is sent, what breaks off."""

import asyncio
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from pydantic import BaseModel, ValidationError

from tests.interop.langchain.trained_model import GREETING, get_weather
from xverse import LLM, XverseError
from xverse.interop.langchain import ChatXVERSE, ChatXverse
from xverse.interop.langchain.messages import to_openai

Reply = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def llm(trained: Path) -> LLM:
    return LLM(trained, dtype="float32")


@pytest.fixture
def chat(llm: LLM) -> ChatXverse:
    return ChatXverse(llm=llm, temperature=0, max_tokens=60)


def test_it_has_both_names() -> None:
    assert ChatXVERSE is ChatXverse


def test_an_answer_and_its_stream_are_the_same(chat: ChatXverse) -> None:
    whole = chat.invoke("Hello")
    chunks = list(chat.stream("Hello"))
    assert whole.content == GREETING
    assert "".join(str(chunk.content) for chunk in chunks) == GREETING
    assert sum((c.usage_metadata or {}).get("output_tokens", 0) for c in chunks) == (
        whole.usage_metadata or {}
    ).get("output_tokens")


def test_stop_ends_the_answer_before_it(chat: ChatXverse) -> None:
    assert chat.invoke("Hello", stop=["How"]).content == "Hello! "
    assert "".join(str(c.content) for c in chat.stream("Hello", stop=["How"])) == "Hello! "


def test_a_length_cut_short_is_told(chat: ChatXverse) -> None:
    answer = chat.invoke("Hello", max_tokens=2)
    assert answer.response_metadata["finish_reason"] == "length"
    assert (answer.usage_metadata or {})["output_tokens"] == 2


def test_models_are_loaded_once(trained: Path) -> None:
    one, two = (ChatXverse(model=str(trained), dtype="float32") for _ in range(2))
    assert one._source.llm(one.model) is two._source.llm(two.model)  # type: ignore[attr-defined]


def test_a_reader_that_goes_away_leaves_nothing_behind(chat: ChatXverse, llm: LLM) -> None:
    async def first() -> None:
        stream = chat.astream("Hello")
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(first())
    assert not llm.engine.busy
    chunks = chat.stream("Hello")
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert not llm.engine.busy


def test_a_timeout_ends_the_answer(llm: LLM) -> None:
    with pytest.raises(XverseError, match="too long"):
        ChatXverse(llm=llm, timeout=0, temperature=0).invoke("Hello")
    assert not llm.engine.busy


def test_messages_become_those_of_the_format() -> None:
    call = {"name": "f", "args": {"a": "上海"}, "id": "1", "type": "tool_call"}
    found = to_openai(
        [
            SystemMessage("one"),
            SystemMessage("two"),
            HumanMessage([{"type": "text", "text": "a"}, "b"], name="somebody"),
            AIMessage([{"type": "text", "text": "c"}, {"type": "tool_use"}], tool_calls=[call]),
            ToolMessage("3", tool_call_id="1"),
            ChatMessage("4", role="exec"),
        ]
    )
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool", "exec"]
    assert [message["content"] for message in found] == ["one\ntwo", "ab", "c", "3", "4"]
    assert found[2]["tool_calls"][0]["function"]["arguments"] == '{"a": "上海"}'  # type: ignore[index]


def test_a_tools_result_is_said_in_the_role_exec(chat: ChatXverse, llm: LLM) -> None:
    asked = HumanMessage("What is the weather in San Francisco, CA?")
    model = chat.bind_tools([get_weather])
    called = model.invoke([asked])
    assert called.tool_calls[0]["args"] == {"location": "San Francisco, CA"}
    result = ToolMessage("It's sunny.", tool_call_id=str(called.tool_calls[0]["id"]))
    assert model.invoke([asked, called, result]).content == "The weather there is sunny."
    prompt = llm.tokenizer.decode(llm.encode_chat(to_openai([asked, called, result])).ids)
    assert "Exec: It's sunny." in prompt


def test_tool_choice_none_gives_no_call(chat: ChatXverse) -> None:
    answer = chat.bind_tools([get_weather], tool_choice="none").invoke("Hello")
    assert answer.content == GREETING


class Joke(BaseModel):
    """Joke to tell user."""

    setup: str
    punchline: str


def test_include_raw_gives_the_message_too(chat: ChatXverse) -> None:
    found = chat.with_structured_output(Joke, include_raw=True).invoke("Tell me a joke about cats.")
    assert isinstance(found, dict)
    assert isinstance(found["parsed"], Joke)
    assert found["raw"].tool_calls
    assert found["parsing_error"] is None


@pytest.mark.parametrize(
    ("act", "word"),
    [
        (lambda chat: chat.invoke("Hello", best_of=2), "no option 'best_of'"),
        (lambda chat: chat.bind_tools([get_weather], tool_choice="nobody"), "no tool 'nobody'"),
        (lambda chat: chat.bind_tools([get_weather], strict=True), "demanded calls only"),
        (lambda chat: chat.with_structured_output(Joke, method="xml"), "no method"),
        (lambda chat: chat.with_structured_output(Joke, method="json_mode", strict=True), "strict"),
        (lambda chat: chat.invoke([HumanMessage([{"type": "image"}])]), "type 'image'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    chat: ChatXverse, act: Callable[[ChatXverse], object], word: str
) -> None:
    with pytest.raises(XverseError, match=word):
        act(chat)


def test_options_are_checked_when_they_are_given(llm: LLM) -> None:
    with pytest.raises(XverseError, match="temperature"):
        ChatXverse(llm=llm, temperature=-1)
    with pytest.raises(ValidationError, match="temprature"):
        ChatXverse(llm=llm, temprature=1)  # type: ignore[call-arg]
    with pytest.raises(XverseError, match="no effect"):
        ChatXverse(model="m", base_url="http://127.0.0.1:1/v1", quantize=8)
    with pytest.raises(XverseError, match="Which model"):
        ChatXverse(base_url="http://127.0.0.1:1/v1")


@pytest.fixture
def replies() -> list[Reply]:
    """What the next requests are answered; the last one stays."""
    return []


@pytest.fixture
def odd(replies: list[Reply]) -> Iterator[str]:
    """A server that says what it is told to."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, body = replies.pop(0) if len(replies) > 1 else replies[0]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def remote(url: str, **options: object) -> ChatXverse:
    return ChatXverse(model="m", base_url=url, timeout=5, **options)  # type: ignore[arg-type]


def completion(arguments: str) -> bytes:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    choice = {"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}
    return json.dumps({"choices": [choice]}).encode()


def test_busy_is_asked_again_and_refusals_are_not(odd: str, replies: list[Reply]) -> None:
    busy = (429, {"Retry-After": "0"}, b'{"error": {"message": "full", "code": "queue_full"}}')
    replies += [busy, busy, (200, {}, completion('{"a": 1}'))]
    assert remote(odd).invoke("Hello").tool_calls[0]["args"] == {"a": 1}
    replies[:] = [busy]
    with pytest.raises(XverseError, match="full"):
        remote(odd, max_retries=1).invoke("Hello")
    wrong = (401, {}, b'{"error": {"message": "no", "code": "invalid_api_key"}}')
    replies[:] = [wrong, (200, {}, completion("{}"))]
    with pytest.raises(XverseError, match="api_key"):
        remote(odd).invoke("Hello")
    assert len(replies) == 1


def test_calls_with_broken_arguments_are_kept_aside(odd: str, replies: list[Reply]) -> None:
    replies += [(200, {}, completion('{"a": '))]
    answer = remote(odd).invoke("Hello")
    assert not answer.tool_calls
    assert answer.invalid_tool_calls[0]["args"] == '{"a": '


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n', "broke off"),
        (b'data: {"error": {"message": "engine restarted"}}\n\n', "engine restarted"),
        (b"data: {]\n\n", "no chat completion"),
        (b'data: {"choices": 7}\n\n', "no chat completion"),
    ],
)
def test_a_stream_that_breaks_is_an_error(
    odd: str, replies: list[Reply], body: bytes, word: str
) -> None:
    replies += [(200, {"Content-Type": "text/event-stream"}, body)]

    async def everything() -> None:
        async for _ in remote(odd).astream("Hello"):
            pass

    with pytest.raises(XverseError, match=word):
        list(remote(odd).stream("Hello"))
    with pytest.raises(XverseError, match=word):
        asyncio.run(everything())


def test_what_is_no_completion_is_an_error(odd: str, replies: list[Reply]) -> None:
    replies += [(200, {}, b"<html>")]
    with pytest.raises(XverseError, match="no chat completion"):
        remote(odd).invoke("Hello")


def test_nobody_there() -> None:
    with pytest.raises(XverseError, match="does not answer"):
        remote("http://127.0.0.1:9/v1", max_retries=0).invoke("Hello")
