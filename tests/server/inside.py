"""FIXTURE. The whole server in this process: API and engine in threads, the real socket between."""

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI

from xverse.checkpoint.load import open_checkpoint, open_tokenizer
from xverse.engine.llm import LLM
from xverse.engine.request import Request, Token
from xverse.server.app import build_app
from xverse.server.engine_process import Server
from xverse.server.journal import Journal
from xverse.server.limits import Keys
from xverse.server.link import Link
from xverse.server.messages import Inbox, Load, Ready, Start
from xverse.server.options import ServeOptions
from xverse.server.routes import GUIDE_ROUTES
from xverse.server.run import Mount, Running, listen, url_of
from xverse.server.supervisor import Supervisor


class Scripted:
    """Has an engine's face, and says what it was told to: `says` gives the ids after a prompt."""

    max_running = 64

    def __init__(self, says: Callable[[Request], list[int]], *, slow_s: float = 0.0) -> None:
        self.says, self.slow_s = says, slow_s
        self.answers: dict[int, list[int]] = {}
        self.requests: list[Request] = []
        self.aborted = 0
        self.scheduler, self.pages = self, self
        self.preempted = self.reused_tokens = 0
        self.count = self.available = 10

    @property
    def running(self) -> list[int]:
        return list(self.answers)

    @property
    def waiting(self) -> list[int]:
        return []

    @property
    def busy(self) -> bool:
        return bool(self.answers)

    def add(self, request: Request) -> int:
        self.requests.append(request)
        number = len(self.requests)
        self.answers[number] = list(self.says(request))
        return number

    def abort(self, number: int) -> None:
        self.aborted += self.answers.pop(number, None) is not None

    def step(self) -> list[Token]:
        time.sleep(self.slow_s)
        tokens = []
        for number, left in list(self.answers.items()):
            id = left.pop(0)
            if not left:
                del self.answers[number]
            tokens.append(Token(number, id, None if left else "stop"))
        return tokens


@dataclass
class Inside:
    """A server that runs: where it is, and what it consists of."""

    url: str
    guide_url: str
    running: Running
    journal: io.StringIO
    loop: asyncio.AbstractEventLoop
    engine: object = None
    app: FastAPI = None  # type: ignore[assignment]
    done: threading.Event = field(default_factory=threading.Event)

    def logged(self, name: str) -> dict[str, object]:
        """The line of the request so named; it is written once the answer is sent."""
        for _ in range(200):
            for line in self.journal.getvalue().splitlines():
                facts: dict[str, object] = json.loads(line)
                if facts.get("id") == name:
                    return facts
            time.sleep(0.01)
        raise AssertionError(f"{name} is not in the log")

    def stop_engine(self) -> None:
        """The engine goes away, as a process that dies does."""
        self.engine_socket.shutdown(socket.SHUT_RDWR)

    engine_socket: socket.socket = None  # type: ignore[assignment]


def model_options(folder: Path, **more: object) -> ServeOptions:
    return ServeOptions(start=Start(model=str(folder)), name="tiny", port=0, guide_port=0, **more)


@contextmanager
def inside(
    folder: Path, engine: object = None, mount: Mount | None = None, **more: object
) -> Iterator[Inside]:
    """Serve the model of the folder, or a Scripted engine with its tokenizer."""
    running = Running(model_options(folder, **more))
    journal = io.StringIO()
    running.journal = Journal(journal)
    ready_engine = engine or LLM(folder, dtype="float32").engine
    ours, theirs = socket.socketpair()
    inbox = Inbox(theirs)
    context = running.service.context
    known = running.service.vocab_size
    told = Ready(context, 16 * context, ready_engine.max_running, known, "cpu", shared_page=16)
    server = Server(ready_engine, theirs, inbox)  # type: ignore[arg-type]

    def compute() -> None:
        inbox.messages(wait=True)
        with suppress(OSError):
            server.run(told, [])

    made: list[Inside] = []
    begun, stop = threading.Event(), threading.Event()

    async def api() -> None:
        link = Link(running.supervisor._notice)
        supervisor: Supervisor = running.supervisor
        supervisor.ready = await link.open(ours, supervisor._start)
        supervisor._link, supervisor.state = link, "ready"
        running.service.note_ready(supervisor.ready)
        reading = asyncio.ensure_future(link.run())

        def gone(_: object) -> None:
            supervisor.state = "restarting"
            supervisor._notice(Load())

        reading.add_done_callback(gone)
        app = build_app(running.service, running.traffic, max_choices=running.options.max_choices)
        guide = build_app(running.service, running.traffic, routes=GUIDE_ROUTES)
        ears = [listen("127.0.0.1", 0), listen("127.0.0.1", 0)]
        before = mount(app, url_of(ears[0]), running.service.checkpoint) if mount else None
        servers = [running._server(app, before), running._server(guide)]
        heard = [
            asyncio.ensure_future(one.serve([ear])) for one, ear in zip(servers, ears, strict=True)
        ]
        made.append(
            Inside(
                url_of(ears[0]),
                url_of(ears[1]),
                running,
                journal,
                asyncio.get_running_loop(),
                ready_engine,
                app,
            )
        )
        made[0].engine_socket = theirs
        begun.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        for one in servers:
            one.should_exit = True
        await asyncio.gather(*heard)
        link.close()
        await asyncio.gather(reading, return_exceptions=True)

    threads = [
        threading.Thread(target=compute, daemon=True),
        threading.Thread(target=lambda: asyncio.run(api()), daemon=True),
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(240), "the server did not begin"
    try:
        yield made[0]
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)


__all__ = ["Inside", "Keys", "Scripted", "inside", "open_checkpoint", "open_tokenizer"]
