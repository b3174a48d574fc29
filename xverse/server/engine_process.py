"""THE ENGINE PROCESS. Owns the model: takes requests from the socket, computes step after step."""

import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

from xverse import log
from xverse.checkpoint.adapter import read_adapter
from xverse.device import env
from xverse.engine.engine import Engine
from xverse.engine.llm import LLM
from xverse.engine.request import Failed, Scores, Token
from xverse.engine.spread import SpreadEngine
from xverse.errors import XverseError
from xverse.server.messages import (
    Abort,
    Adapt,
    Adapted,
    Ask,
    Broken,
    Failure,
    Inbox,
    Load,
    Ready,
    Start,
    Stepped,
    ToApi,
    ToEngine,
    frame,
)

END_S = 2.0  # for what is under way to end by itself


def main(descriptor: int) -> int:
    """Serve the API process at the other end of the inherited socket until it goes away."""
    # A terminal's Ctrl-C and a stop of the whole service reach us too; the API process decides
    # when the last request is done, and then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.setup(env("XVERSE_LOG_LEVEL", "WARNING").upper())
    connection = socket.socket(fileno=descriptor)
    threading.Thread(target=_end_with, args=[connection], daemon=True).start()
    inbox = Inbox(connection)
    first = inbox.messages(wait=True)
    if not first:
        return 0
    start = first[0]
    assert isinstance(start, Start), "the first message says what to load"
    with suppress(ConnectionError):  # the API process is gone, and with it everybody who asked
        try:
            llm = _load(start)
        except XverseError as error:
            connection.sendall(frame(Broken(error.what, error.why, error.fix)))
            return 1
        ready = _ready(llm, _load_adapters(llm, start))
        Server(llm.engine, connection, inbox).run(ready, first[1:])
    return 0


def _end_with(connection: socket.socket) -> NoReturn:
    """End this process soon after the API process, even in the midst of loading or of a step: one
    that was killed cannot end it, and the model's memory would stay taken."""
    poll = select.poll()
    poll.register(connection, 0)  # closing is reported unasked
    while not poll.poll():
        pass
    time.sleep(END_S)
    os._exit(1)


def _load(start: Start) -> LLM:
    llm = LLM(
        start.model,
        dtype=start.dtype,
        device=start.device,
        quantize=start.quantize,
        kv_tokens=start.kv_tokens,
        kv_dtype=start.kv_dtype,
        deterministic=start.deterministic,
        tensor_parallel=start.tensor_parallel,
        speculate=start.speculate,
        host_embedding=start.host_embedding,
        max_adapters=start.max_adapters,
        adapter_bytes=start.adapter_bytes,
        adapter_slots=start.adapter_slots,
        adapter_rank=start.adapter_rank,
    )
    llm.engine.prepare()
    return llm


def _load_adapters(llm: LLM, start: Start) -> dict[str, tuple[str, str, str]]:
    """Load what was loaded when the engine before this one ended; what cannot be, and why."""
    lost = {}
    for name, folder in start.adapters.items():
        try:
            llm.load_adapter(name, folder)
        except XverseError as error:
            lost[name] = (error.what, error.why, error.fix)
    return lost


def _ready(llm: LLM, lost: dict[str, tuple[str, str, str]]) -> Ready:
    engine = llm.engine
    return Ready(
        context=llm.context,
        capacity=engine.capacity,
        max_running=engine.max_running,
        vocab_size=engine.decoder.shape.vocab_size,
        device=str(next(engine.decoder.parameters()).device),
        shared_page=engine.options.page_size if engine.options.share_prefixes else 0,
        lost=lost,
    )


class Server:
    """One engine, one connection, one thread: between two steps it reads what has arrived."""

    def __init__(
        self, engine: Engine | SpreadEngine, connection: socket.socket, inbox: Inbox
    ) -> None:
        self.engine, self._connection, self._inbox = engine, connection, inbox
        self._ours: dict[int, int] = {}  # number of the API -> number of the engine
        self._theirs: dict[int, int] = {}

    def run(self, ready: Ready, early: list[ToEngine]) -> None:
        """Until the API process closes the connection."""
        self._send(ready)
        failures = self._hear(early)
        while not self._inbox.closed:
            idle = not self.engine.busy
            if idle:  # the load is told before the silence, so that it reads zero then
                self._send(Stepped([], [], failures, self._load()))
            failures = self._hear(self._inbox.messages(wait=idle))
            self._step(failures)
            failures = []

    def _hear(self, messages: list[ToEngine]) -> list[Failure]:
        """Queue and abort as the messages say; who was refused."""
        failures: list[Failure] = []
        for message in messages:
            if isinstance(message, Ask):
                try:
                    number = self.engine.add(message.request)
                except XverseError as error:
                    failures.append(_failure(message.number, error, refused=True))
                    continue
                self._ours[message.number] = number
                self._theirs[number] = message.number
            elif isinstance(message, Adapt):
                self._send(self._adapt(message))
            elif isinstance(message, Abort):
                for theirs in message.numbers:
                    ours = self._ours.pop(theirs, None)
                    if ours is not None:
                        del self._theirs[ours]
                        self.engine.abort(ours)
        return failures

    def _adapt(self, message: Adapt) -> Adapted:
        """Between two steps, so that everybody waits: some 10 ms for an adapter of 100 MB."""
        assert isinstance(self.engine, Engine), "of others `max_adapters` is 0"
        try:
            if message.folder is None:
                self.engine.unload_adapter(message.name)
            else:
                adapter = read_adapter(message.folder)
                self.engine.load_adapter(message.name, adapter, replace=message.replace)
        except XverseError as error:
            return Adapted(message.number, (error.what, error.why, error.fix))
        return Adapted(message.number)

    def _step(self, failures: list[Failure]) -> None:
        tokens: list[Token] = []
        scores: list[Scores] = []
        for output in self.engine.step():
            number = self._theirs.get(output.request)
            if number is None:
                continue  # aborted while the step was under way
            last = True
            if isinstance(output, Token):
                tokens.append(replace(output, request=number))
                last = output.finish is not None
            elif isinstance(output, Failed):
                failures.append(_failure(number, output.error))
            else:
                scores.append(Scores(number, output.logprobs, output.last, output.tops))
                last = output.last
            if last:
                del self._theirs[output.request], self._ours[number]
        if tokens or scores or failures:
            self._send(Stepped(tokens, scores, failures, self._load()))

    def _load(self) -> Load:
        inner = self.engine.engine if isinstance(self.engine, SpreadEngine) else self.engine
        scheduler, pages = inner.scheduler, inner.pages
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=pages.count - pages.available,
            pages=pages.count,
            preempted=scheduler.preempted,
            reused_tokens=scheduler.reused_tokens,
        )

    def _send(self, message: ToApi) -> None:
        self._connection.sendall(frame(message))


def _failure(number: int, error: XverseError, *, refused: bool = False) -> Failure:
    return Failure(number, error.what, error.why, error.fix, refused)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
