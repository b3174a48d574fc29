"""API -> ENGINE. The API's end of the socket: many flows of tokens over one connection."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Collection, Sequence

from xverse.engine.request import Request, Scores, Token
from xverse.errors import XverseError
from xverse.server.messages import (
    Abort,
    Adapt,
    Adapted,
    Ask,
    Broken,
    Load,
    Ready,
    Start,
    Stepped,
    ToApi,
    for_api,
    frame,
    frame_length,
)

Given = Token | Scores


class EngineGoneError(Exception):
    """The engine process ended while requests were with it."""


class FailedError(Exception):
    """A request that the engine had taken got no further: its grammar could not be compiled, its
    numbers were none, or memory ran out."""

    def __init__(self, error: XverseError) -> None:
        super().__init__(str(error))
        self.error = error


class Flow:
    """What comes of some requests, with the place of each among them."""

    def __init__(self, link: "Link", places: dict[int, int]) -> None:
        self._link, self._places = link, places
        self._box: list[tuple[int, Given]] = []
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    def end(self, places: Collection[int]) -> None:
        """Nothing more is wanted of the requests at these places."""
        self._link.forget([n for n, place in self._places.items() if place in places])

    def close(self) -> None:
        """Nothing more is wanted at all."""
        self._link.forget(list(self._places))

    def put(self, number: int, given: Given, *, last: bool) -> None:
        """Called by the link: this came of the request so numbered."""
        self._box.append((self._places[number], given))
        if last:
            del self._places[number]
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """Called by the link: nothing more can come."""
        self._error = error
        self._wake.set()

    def dropped(self, number: int) -> None:
        """Called by the link: it will give nothing more of this request."""
        self._places.pop(number, None)
        self._wake.set()

    async def batches(self) -> AsyncIterator[list[tuple[int, Given]]]:
        """What has come since the last time, again and again, until all requests have ended."""
        while True:
            while not self._box and self._error is None and self._places:
                self._wake.clear()
                await self._wake.wait()
            if self._box:
                box, self._box = self._box, []
                yield box
            elif self._error is not None:
                raise self._error
            else:
                return


class Link:
    """A connection to one engine process, from its start to its end."""

    def __init__(self, notice: Callable[[Load], None]) -> None:
        """`notice` is called with the engine's load after each of its steps."""
        self._notice = notice
        self._flows: dict[int, Flow] = {}
        self._adapting: dict[int, asyncio.Future[None]] = {}
        self._next = 0
        self._gone = False
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    async def open(self, connection: socket.socket, start: Start) -> Ready:
        """Tell the engine what to load, and wait until it has.

        XverseError where it cannot be loaded, EngineGoneError where the process ended.
        """
        self._reader, self._writer = await asyncio.open_unix_connection(sock=connection)
        self._write(frame(start))
        try:
            message = await self._read()
        except (EOFError, ConnectionError) as error:
            raise EngineGoneError from error
        if isinstance(message, Broken):
            raise XverseError(message.what, message.why, message.fix)
        assert isinstance(message, Ready), "an engine first says that it is ready"
        return message

    async def run(self) -> None:
        """Hand out what comes until the engine ends; then every flow fails."""
        try:
            while True:
                message = await self._read()
                if isinstance(message, Adapted):
                    self._note_adapted(message)
                    continue
                assert isinstance(message, Stepped), "a ready engine tells of its steps"
                self._hand_out(message)
        except (EOFError, ConnectionError):
            pass
        finally:
            self._gone = True
            for flow in self._flows.values():
                flow.fail(EngineGoneError())
            self._flows.clear()
            for waiting in self._adapting.values():
                if not waiting.done():
                    waiting.set_exception(EngineGoneError())
            self._adapting.clear()

    def ask(self, requests: Sequence[Request]) -> Flow:
        """Have these computed; what comes of them is in the flow."""
        numbers = range(self._next, self._next + len(requests))
        self._next += len(requests)
        flow = Flow(self, {number: place for place, number in enumerate(numbers)})
        if self._gone:
            flow.fail(EngineGoneError())
            return flow
        self._flows |= dict.fromkeys(numbers, flow)
        asks = (Ask(*pair) for pair in zip(numbers, requests, strict=True))
        self._write(b"".join(map(frame, asks)))
        return flow

    def forget(self, numbers: Sequence[int]) -> None:
        """Have the engine drop these requests, as far as it still has them."""
        known = [number for number in numbers if number in self._flows]
        for number in known:
            self._flows.pop(number).dropped(number)
        if known and not self._gone:
            self._write(frame(Abort(known)))

    async def adapt(self, name: str, folder: str | None, *, replace: bool = False) -> None:
        """Have the engine load an adapter, or forget it where `folder` is None.

        XverseError where it cannot, EngineGoneError where the process ended.
        """
        if self._gone:
            raise EngineGoneError
        number, self._next = self._next, self._next + 1
        waiting = asyncio.get_running_loop().create_future()
        self._adapting[number] = waiting
        self._write(frame(Adapt(number, name, folder, replace)))
        await waiting

    def close(self) -> None:
        """Close the connection, which ends the engine process."""
        if self._writer is not None:
            self._writer.close()

    def _write(self, data: bytes) -> None:
        assert self._writer is not None, "a link is opened first"
        self._writer.write(data)

    def _hand_out(self, stepped: Stepped) -> None:
        for scores in stepped.scores:
            self._put(scores.request, scores, last=scores.last)
        for token in stepped.tokens:
            self._put(token.request, token, last=token.finish is not None)
        for failure in stepped.failures:
            flow = self._flows.pop(failure.request, None)
            if flow is not None:
                refused = failure.refused
                flow.fail(failure.error if refused else FailedError(failure.error))
        self._notice(stepped.load)

    def _note_adapted(self, message: Adapted) -> None:
        waiting = self._adapting.pop(message.number)
        if waiting.done():
            return  # whoever asked is gone
        if message.error is None:
            waiting.set_result(None)
        else:
            waiting.set_exception(XverseError(*message.error))

    def _put(self, number: int, given: Given, *, last: bool) -> None:
        flow = self._flows.get(number)
        if flow is None:
            return  # forgotten while this was on its way
        if last:
            del self._flows[number]
        flow.put(number, given, last=last)

    async def _read(self) -> ToApi:
        head = await self._reader.readexactly(4)
        return for_api(await self._reader.readexactly(frame_length(head)))
