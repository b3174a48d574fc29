"""PROCESS -> PROCESS. Starts the engine process, watches it, and starts it again when it dies."""

import asyncio
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable
from typing import Literal

import msgspec

from xverse.errors import XverseError
from xverse.log import logger
from xverse.server.link import EngineGoneError, Link
from xverse.server.messages import Load, Ready, Start

State = Literal["loading", "ready", "restarting", "stopped"]
BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 5.0)  # before the 1st, 2nd, ... start without a success
SOUND_S = 5.0  # an engine that answered as long begins the row anew
FIRST_STARTS = 3  # an engine that ends so often before it was ever ready never will be
STOP_S = 10.0  # how long an engine may take to notice that its socket is closed


class Supervisor:
    """Keeps one engine process alive. `link` leads to it while `state` is ready."""

    def __init__(self, start: Start, notice: Callable[[Load], None]) -> None:
        self.state: State = "loading"
        self.restarts = 0
        self.ready: Ready | None = None  # what the engine said last
        self.process: Process | None = None
        self.load = Load()  # of the engine that is running now
        self._start, self._tell = start, notice
        self._link: Link | None = None
        self._failures = 0

    @property
    def link(self) -> Link | None:
        """The connection, or None while there is no engine that could answer."""
        return self._link if self.state == "ready" else None

    def keep_adapters(self, adapters: dict[str, str]) -> None:
        """What an engine is to load that starts after this, name -> folder."""
        self._start = msgspec.structs.replace(self._start, adapters=adapters)

    async def run(self, started: Callable[[Ready], None] = lambda _: None) -> None:
        """Keep an engine running until cancelled; `started` is called whenever one is ready.

        Raises XverseError where the first one cannot load the model: none ever will.
        """
        try:
            while True:
                answered_s = await self._live(started)
                self._failures = 0 if answered_s > SOUND_S else self._failures + 1
                self.restarts += 1
                if self.ready is None and self.restarts >= FIRST_STARTS:
                    raise XverseError(
                        "The engine process ends before it has loaded the model.",
                        f"It ended {self.restarts} times; its last exit code was "
                        f"{self.process.returncode if self.process else None}.",
                        "See what it wrote above; often there is too little memory.",
                    )
                wait = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
                logger.error("the engine process ended; it starts again in %.1f s", wait)
                await asyncio.sleep(wait)
        finally:
            await self._stop()

    async def _live(self, started: Callable[[Ready], None]) -> float:
        """One engine process, from its start to its end; for how many seconds it was ready."""
        ours, theirs = socket.socketpair()  # has no name, so nobody else can connect
        command = (sys.executable, "-m", "xverse.server.engine_process", str(theirs.fileno()))
        try:
            with theirs:
                self.process = await asyncio.create_subprocess_exec(
                    *command, pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL
                )
        except OSError as error:  # memory or processes are short now, and may not be soon
            ours.close()
            logger.error("the engine process cannot be started: %s", error)
            return 0.0
        self._link = Link(self._notice)
        try:
            ready = await self._link.open(ours, self._start)
            if ready.lost and self.ready is None:
                self._link.close()
                raise XverseError(*next(iter(ready.lost.values())))
            self.ready = ready
        except EngineGoneError:
            await self.process.wait()
            return 0.0
        except XverseError as error:
            if self.ready is None:
                raise
            logger.error("the engine cannot be started again: %s", error)
            await self.process.wait()
            return 0.0
        self.state = "ready"
        began = time.monotonic()
        started(self.ready)
        try:
            await self._link.run()
        finally:
            self.state = "restarting"
            self._notice(Load())
        self._link.close()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        return time.monotonic() - began

    def _notice(self, load: Load) -> None:
        self.load = load
        self._tell(load)

    async def _stop(self) -> None:
        """Close the socket and see the process end; one that does not is killed."""
        self.state = "stopped"
        if self._link is not None:
            self._link.close()
        if self.process is None or self.process.returncode is not None:
            return
        try:
            await asyncio.wait_for(asyncio.shield(self.process.wait()), STOP_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
