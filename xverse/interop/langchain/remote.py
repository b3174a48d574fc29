"""QUESTION -> ANSWER, OVER HTTP. A server with an OpenAI-style API answers what LangChain asks."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import aclosing, closing, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import httpx

from xverse.errors import XverseError
from xverse.interop.langchain.question import CallPart, Delta, Question, Usage

PATH = "chat/completions"
RETRIED = frozenset({429, 502, 503, 504})
LONGEST_PAUSE_S = 30.0


class OverHttp:
    """Answers by the server at `base_url` (".../v1").

    A failed connection, and an answer that says "later", is tried again up to `max_retries` times;
    nothing is once an answer has begun.
    """

    def __init__(
        self, base_url: str, api_key: str | None, timeout_s: float | None, max_retries: int
    ) -> None:
        self._url = f"{base_url.rstrip('/')}/"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._options: dict[str, Any] = {
            "base_url": self._url,
            "headers": headers,
            "timeout": timeout_s,
        }
        self._max_retries = max_retries
        # A client belongs to the event loop that it is first used in.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient]
        self._clients = WeakKeyDictionary()

    def answer(self, question: Question) -> list[Delta]:
        """The whole answer, in one response."""
        responses = self._responses(question, stream=False)
        with closing(responses), _reading(self._url):
            response = next(responses)
            response.read()
        return [_whole(response)]

    def stream(self, question: Question) -> Generator[Delta, None, None]:
        """The answer as it becomes final."""
        responses, events = self._responses(question, stream=True), _Events()
        with closing(responses), _reading(self._url):
            for line in next(responses).iter_lines():
                yield from events.take(line)
            yield from events.end()

    async def aanswer(self, question: Question) -> list[Delta]:
        """The whole answer, in one response."""
        async with aclosing(self._aresponses(question, stream=False)) as responses:
            with _reading(self._url):
                response = await anext(responses)
                await response.aread()
        return [_whole(response)]

    async def astream(self, question: Question) -> AsyncGenerator[Delta, None]:
        """The answer as it becomes final."""
        events = _Events()
        async with aclosing(self._aresponses(question, stream=True)) as responses:
            with _reading(self._url):
                async for line in (await anext(responses)).aiter_lines():
                    for delta in events.take(line):
                        yield delta
            for delta in events.end():
                yield delta

    def _responses(
        self, question: Question, *, stream: bool
    ) -> Generator[httpx.Response, None, None]:
        """The one response that is no failure, open for as long as this is."""
        body = _body(question, stream=stream)
        for attempt in range(self._max_retries + 1):
            try:
                with self._client.stream("POST", PATH, json=body) as response:
                    if response.status_code == 200:
                        yield response
                        return
                    response.read()
                    error = _refused(response)
                    pause = _pause(response, attempt)
            except httpx.TransportError as failure:
                error = _unreachable(self._url, failure)
                pause = 0.0 if _before_sending(failure) else None
            if pause is None or attempt == self._max_retries:
                raise error
            time.sleep(pause or _backoff(attempt))

    async def _aresponses(
        self, question: Question, *, stream: bool
    ) -> AsyncGenerator[httpx.Response, None]:
        """The one response that is no failure, open for as long as this is."""
        body = _body(question, stream=stream)
        for attempt in range(self._max_retries + 1):
            try:
                async with self._async_client().stream("POST", PATH, json=body) as response:
                    if response.status_code == 200:
                        yield response
                        return
                    await response.aread()
                    error = _refused(response)
                    pause = _pause(response, attempt)
            except httpx.TransportError as failure:
                error = _unreachable(self._url, failure)
                pause = 0.0 if _before_sending(failure) else None
            if pause is None or attempt == self._max_retries:
                raise error
            await asyncio.sleep(pause or _backoff(attempt))

    @cached_property
    def _client(self) -> httpx.Client:
        """Made when it is first needed: reading the certificates takes 30 ms."""
        return httpx.Client(**self._options)

    def _async_client(self) -> httpx.AsyncClient:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._clients[loop] = httpx.AsyncClient(**self._options)
        return client


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Failures of a connection in the middle of an answer, in our words."""
    try:
        yield
    except httpx.TransportError as failure:
        raise _unreachable(url, failure) from failure


def _body(question: Question, *, stream: bool) -> dict[str, object]:
    """The request. What was not asked for is left to the server."""
    body: dict[str, object] = {
        "model": question.model,
        "messages": question.messages,
        **question.options,
    }
    bias = question.options.get("logit_bias")
    more = {
        "logit_bias": {str(id): value for id, value in bias.items()} if bias else None,
        "stop": list(question.stop) or None,
        "tools": list(question.tools) or None,
        "tool_choice": question.tool_choice if question.tools else None,
        "parallel_tool_calls": question.parallel_tool_calls if question.tools else None,
        "response_format": question.response_format,
        "stream": True if stream else None,
        "stream_options": {"include_usage": True} if stream else None,
    }
    return body | {name: value for name, value in more.items() if value is not None}


def _whole(response: httpx.Response) -> Delta:
    try:
        found = response.json()
        choice = found["choices"][0]
        message = choice["message"]
        calls = tuple(
            CallPart(place, call["id"], call["function"]["name"], call["function"]["arguments"])
            for place, call in enumerate(message.get("tool_calls") or ())
        )
        return Delta(message.get("content") or "", calls, choice["finish_reason"], _usage(found))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _not_ours(response.text) from error


class _Events:
    """Takes a stream of server-sent events apart."""

    def __init__(self) -> None:
        self._last: Delta | None = None  # held back: the count of tokens comes after it
        self._done = False

    def take(self, line: str) -> Iterator[Delta]:
        """What one line makes final."""
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            self._done = True
        elif data:
            yield from self._chunk(data)

    def end(self) -> Iterator[Delta]:
        """The last delta. XverseError where the stream ended before the answer did."""
        if not self._done or self._last is None:
            raise XverseError(
                "The answer broke off.",
                "The server closed the stream before the answer's end.",
                "Ask again.",
            )
        yield self._last

    def _chunk(self, data: str) -> Iterator[Delta]:
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                raise _failed(chunk["error"])
            usage = _usage(chunk)
            for choice in chunk["choices"]:
                delta = _delta(choice)
                if delta.finish is None:
                    if delta.text or delta.calls:
                        yield delta
                else:
                    self._last = delta
            if usage is not None and self._last is not None:
                self._last = replace(self._last, usage=usage)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise _not_ours(data) from error


def _delta(choice: dict[str, Any]) -> Delta:
    said = choice["delta"]
    calls = tuple(_part(call) for call in said.get("tool_calls") or ())
    return Delta(said.get("content") or "", calls, choice.get("finish_reason"))


def _part(call: dict[str, Any]) -> CallPart:
    function = call.get("function") or {}
    arguments = function.get("arguments") or ""
    return CallPart(call["index"], call.get("id"), function.get("name"), arguments)


def _usage(found: dict[str, Any]) -> Usage | None:
    counts = found.get("usage")
    return Usage(counts["prompt_tokens"], counts["completion_tokens"]) if counts else None


def _pause(response: httpx.Response, attempt: int) -> float | None:
    """Seconds until this may be tried again; None where it may not."""
    if response.status_code not in RETRIED:
        return None
    after = response.headers.get("Retry-After", "")
    asked = float(after) if after.isascii() and after.isdecimal() else _backoff(attempt)
    return asked if asked <= LONGEST_PAUSE_S else None


def _backoff(attempt: int) -> float:
    return min(0.25 * 2.0**attempt, LONGEST_PAUSE_S)


def _before_sending(failure: httpx.TransportError) -> bool:
    return isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)


def _unreachable(url: str, failure: httpx.TransportError) -> XverseError:
    return XverseError(
        f"The server at {url} does not answer.",
        f"{type(failure).__name__}: {failure}",
        "Start it with `xverse serve MODEL`, or correct base_url or timeout.",
    )


def _refused(response: httpx.Response) -> XverseError:
    try:
        said = response.json()["error"]
        message, code = str(said["message"]), said.get("code") or said.get("type")
    except (ValueError, LookupError, TypeError, AttributeError):
        message, code = response.text[:200], None
    return XverseError(
        f"The server refused: {message}",
        f"It answered {response.status_code} ({code or response.reason_phrase}).",
        "Give the right api_key."
        if response.status_code in (401, 403)
        else "Change what is asked, or ask again later.",
    )


def _failed(error: object) -> XverseError:
    message = error.get("message") if isinstance(error, dict) else error
    return XverseError(
        f"The answer failed: {message}",
        "The server said so in the middle of its answer.",
        "Ask again.",
    )


def _not_ours(text: str) -> XverseError:
    return XverseError(
        "What the server answered is no chat completion.",
        f"It begins with {text[:80]!r}.",
        "Give the base_url of an OpenAI-style API, ending in /v1.",
    )
