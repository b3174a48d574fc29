"""OPTIONS -> A SERVER THAT RUNS. Listens, keeps the engine alive, ends in order on SIGTERM."""

import asyncio
import math
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from xverse.checkpoint.load import Checkpoint, open_checkpoint, open_tokenizer
from xverse.checkpoint.resolve import resolve, title_of
from xverse.errors import XverseError
from xverse.server.app import build_app
from xverse.server.gate import MAX_HEADER_BYTES, Gate, Traffic
from xverse.server.journal import Journal
from xverse.server.limits import Keys
from xverse.server.messages import Ready
from xverse.server.metrics import Metrics
from xverse.server.options import ServeOptions
from xverse.server.protocol import Connection
from xverse.server.queue import FairQueue
from xverse.server.routes import GUIDE_ROUTES
from xverse.server.service import Service
from xverse.server.supervisor import Supervisor

# Adds pages to the app, given the server's own address and its model; what it returns stands
# before the gate.
Mount = Callable[[FastAPI, str, Checkpoint], Callable[[ASGIApp], ASGIApp]]
QUIET_S = 0.05  # between two looks whether the last request is done
# Of silence, until a connection is closed: longer than clients (5 s) and proxies (60 s) keep
# theirs, for whoever closes must not be the one who does not know that a request is on its way.
KEEP_ALIVE_S = 75


@dataclass(frozen=True)
class Listening:
    """Where a server that has begun can be reached."""

    url: str
    guide_url: str | None


def serve(
    options: ServeOptions,
    *,
    mount: Mount | None = None,
    listening: Callable[[Listening], None] = lambda _: None,
    ready: Callable[[Ready], None] = lambda _: None,
) -> None:
    """Serve until SIGTERM or SIGINT. `listening` is called once requests are heard, `ready` each
    time the engine has loaded the model. XverseError where port or model cannot be had."""
    asyncio.run(Running(options, mount).run(listening, ready))


class Running:
    """One server: its sockets, its apps, its engine."""

    def __init__(self, options: ServeOptions, mount: Mount | None = None) -> None:
        path = resolve(options.start.model)  # from now on nothing is looked up elsewhere
        self.options = options
        self.metrics = Metrics(options.name)
        prompts = options.log_prompts
        self.journal = Journal.on_stderr(prompts=prompts) if options.log_requests else Journal(None)
        self.traffic = Traffic()
        self.keys = Keys(options.keys, options.shares, options.admin_key)
        queue = FairQueue(max_requests=options.max_queue, max_tokens=options.max_queue_tokens)
        at = {name: str(Path(folder).resolve()) for name, folder in options.start.adapters.items()}
        start = msgspec.structs.replace(options.start, model=str(path), adapters=at)
        self.supervisor = Supervisor(start, lambda load: self.service.note_load(load))
        self.service = Service(
            options.name,
            open_tokenizer(path),
            open_checkpoint(path, title_of(options.start.model)),
            self.supervisor,
            queue,
            self.metrics,
            start,
            options.adapters_dir,
        )
        self._mount = mount
        self._hurry = False
        self._left_s = 1  # for what is written to arrive

    async def run(
        self, listening: Callable[[Listening], None], ready: Callable[[Ready], None]
    ) -> None:
        """Until a signal, or until the engine proves impossible."""
        options = self.options
        app = build_app(self.service, self.traffic, max_choices=options.max_choices)
        ear = listen(options.host, options.port)
        before = None
        if self._mount is not None:
            before = self._mount(app, url_of(ear), self.service.checkpoint)
        servers = [(self._server(app, before), ear)]
        guide = None
        if options.guide_port is not None:
            guide = listen(options.host, options.guide_port)
            pages = build_app(self.service, self.traffic, routes=GUIDE_ROUTES)
            servers.append((self._server(pages), guide))

        def engine_ready(told: Ready) -> None:
            self.service.note_ready(told)
            self.metrics.ready.set(1)
            self.journal.write("ready", device=told.device, kv_tokens=told.capacity)
            ready(told)

        engine = asyncio.ensure_future(self.supervisor.run(engine_ready))
        heard = [asyncio.ensure_future(server.serve([ear])) for server, ear in servers]
        stop = asyncio.Event()
        with self._signals(stop, [server for server, _ in servers]):
            listening(Listening(url_of(ear), url_of(guide) if guide else None))
            stopping = asyncio.ensure_future(stop.wait())
            await asyncio.wait({engine, stopping, *heard}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                await self._drain(engine)
            stopping.cancel()
            for server, _ in servers:
                # Answers that are done may still be on their way to who reads slowly.
                server.config.timeout_graceful_shutdown = self._left_s
                server.should_exit = True
            await asyncio.gather(*heard)
            if engine.done():
                engine.result()  # raises what ended it
            engine.cancel()
            with suppress(asyncio.CancelledError):
                await engine

    async def _drain(self, engine: "asyncio.Future[None]") -> None:
        """Let nobody in, and wait for those who are."""
        self.traffic.draining = True
        self.journal.write("draining", active=self.traffic.active)
        loop = asyncio.get_running_loop()
        until = loop.time() + self.options.drain_s
        while self.traffic.active and loop.time() < until and not (engine.done() or self._hurry):
            await asyncio.sleep(QUIET_S)
        if not self._hurry:
            self._left_s = max(1, math.ceil(until - loop.time()))
        self.journal.write("stopping", active=self.traffic.active)

    def _server(self, app: ASGIApp, before: Callable[[ASGIApp], ASGIApp] | None = None) -> "_Quiet":
        gate: ASGIApp = Gate(
            app,
            keys=self.keys,
            hosts={self.options.host, *self.options.allowed_hosts},
            traffic=self.traffic,
            metrics=self.metrics,
            journal=self.journal,
        )
        config = uvicorn.Config(
            gate if before is None else before(gate),
            # The other parser has no bound on headers, which would be memory for anybody to take.
            http=Connection,
            h11_max_incomplete_event_size=2 * MAX_HEADER_BYTES,
            ws="none",
            lifespan="off" if before is None else "on",  # pages start their queue there
            log_config=None,
            log_level="error",  # its warnings are of what clients do wrong, in lines of no form
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=2048,
        )
        return _Quiet(config)

    @contextmanager
    def _signals(self, stop: asyncio.Event, servers: "Sequence[_Quiet]") -> Iterator[None]:
        """The first signal stops the server in order, and a second one at once."""
        loop = asyncio.get_running_loop()

        def heard() -> None:
            self._hurry = stop.is_set()
            for server in servers:
                server.force_exit = self._hurry
            stop.set()

        known = (signal.SIGTERM, signal.SIGINT)
        for each in known:
            loop.add_signal_handler(each, heard)
        try:
            yield
        finally:
            for each in known:
                loop.remove_signal_handler(each)


class _Quiet(uvicorn.Server):
    """A uvicorn server that leaves the signals to us: it would hang up on who is being answered."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; XverseError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        ear = socket.socket(family, kind, protocol)
        # Else the second of two small writes, the body after the headers, waits 40 ms for the
        # other side's word; asyncio only does this where the protocol is named.
        ear.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ear.bind(address)
        ear.listen(2048)
    except OSError as error:
        raise XverseError(
            f"Port {port} of {host} cannot be listened at.",
            str(error),
            "Another program may have it: give another --port, or --port 0 for a free one.",
        ) from error
    ear.setblocking(False)
    return ear


def url_of(ear: socket.socket) -> str:
    """How a client on this machine reaches it."""
    host, port = ear.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    return f"http://{shown}:{port}"
