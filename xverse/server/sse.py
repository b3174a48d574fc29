"""EVENTS -> BYTES. Server-sent events: one write for all that is ready, comments in silence."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xverse.server.presence import ClientGoneError, while_there
from xverse.server.refusals import Refusal

KEEP_ALIVE_S = 15.0  # of silence; proxies cut connections after 30 to 60 s
# In which a client takes nothing of what it asked for; it holds a place that others wait for.
STALL_S = 60.0
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back otherwise
]
DONE = b"data: [DONE]\n\n"


def event(content: object, name: str | None = None) -> bytes:
    """One event as it goes over the line."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + msgspec.json.encode(content) + b"\n\n"


class EventStream(Response):
    """An answer in events. Headers go out with the first of them, so that what is refused before
    has its own status; what fails later is an event with the error, and the last one."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._events = events
        self._started = self._sending = self._stalled = False
        self._last = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, and stop making them when the client goes."""
        with suppress(ClientGoneError):
            await while_there(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        pump = asyncio.current_task()
        assert pump is not None, "while_there makes a task of it"
        keeper = asyncio.ensure_future(self._keep_alive(send, pump))
        try:
            async with aclosing(self._events) as events:
                async for chunk in events:
                    self._last = loop.time()
                    await self._send(send, chunk)
        except Refusal as refusal:
            if not self._started:
                raise
            await self._send(send, event(refusal.body()))
        except asyncio.CancelledError:
            if self._stalled:
                raise ClientGoneError from None
            raise
        finally:
            keeper.cancel()
        await self._send(send, b"", more=False)

    async def _keep_alive(self, send: Send, pump: "asyncio.Task[None]") -> None:
        loop = asyncio.get_running_loop()
        while True:
            patience = STALL_S if self._sending else KEEP_ALIVE_S
            await asyncio.sleep(max(0.01, patience - (loop.time() - self._last)))
            silent_s = loop.time() - self._last
            if not self._sending and silent_s >= KEEP_ALIVE_S:
                self._last = loop.time()
                with suppress(TimeoutError):
                    async with asyncio.timeout(STALL_S):
                        await self._send(send, b": keep-alive\n\n")
            elif self._sending and silent_s >= STALL_S:
                self._stalled = True
                pump.cancel()
                return

    async def _send(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        self._sending = True
        await send({"type": "http.response.body", "body": chunk, "more_body": more})
        self._sending = False
