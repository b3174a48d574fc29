"""MANY -> A FEW AT ONCE. The queue before the engine: bounded, and fair from key to key."""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from xverse.server.limits import overloaded


@dataclass(eq=False)
class Waiter:
    """A request in the queue: how many sequences it brings, and how many prompt tokens."""

    weight: int
    tokens: int
    turn: "asyncio.Future[None]"


class FairQueue:
    """Lets `slots` sequences at once through to the engine. Keys take turns, whoever asks how
    much; within a key the first to come is the first to go."""

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        """At most so many requests wait, and of them all at most so many prompt tokens."""
        self.slots = 1
        self.waiting = 0
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._tokens = 0
        self.used = 0
        self._rows: OrderedDict[str, deque[Waiter]] = OrderedDict()  # the next key comes first
        self._seconds = 1.0  # that a request was at work, of late

    @asynccontextmanager
    async def turn(self, key: str, weight: int, tokens: int) -> AsyncIterator[float]:
        """Within this, the request is at work; gives the seconds that it waited.

        Refusal (429) at once where the queue is full.
        """
        began = time.monotonic()
        weight = min(weight, self.slots)
        if self.waiting or self.used + weight > self.slots:
            await self._wait(key, weight, tokens)
        else:
            self.used += weight
        entered = time.monotonic()
        try:
            yield entered - began
        finally:
            self._seconds += 0.1 * (time.monotonic() - entered - self._seconds)
            self.used -= weight
            self._admit()

    async def _wait(self, key: str, weight: int, tokens: int) -> None:
        wait_s = min(60.0, self._seconds * (1 + self.waiting / self.slots))
        if self.waiting >= self._max_requests:
            raise overloaded(f"{self.waiting} are in the queue", wait_s)
        if self._tokens + tokens > self._max_tokens:
            raise overloaded(f"their prompts have {self._tokens} tokens", wait_s)
        waiter = Waiter(weight, tokens, asyncio.get_running_loop().create_future())
        self._rows.setdefault(key, deque()).append(waiter)
        self.waiting += 1
        self._tokens += tokens
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.cancelled():
                self._leave(key, waiter)
            else:
                self.used -= weight  # it was let in at the moment it left
            self._admit()
            raise

    def _admit(self) -> None:
        """Let in whoever is next, as far as there is room."""
        while self._rows:
            key, row = next(iter(self._rows.items()))
            waiter = row[0]
            if self.used + waiter.weight > self.slots:
                return  # it stays first: others overtaking would starve what brings many
            self._rows.move_to_end(key)
            self._leave(key, waiter)
            if not waiter.turn.cancelled():
                self.used += waiter.weight
                waiter.turn.set_result(None)

    def _leave(self, key: str, waiter: Waiter) -> None:
        row = self._rows.get(key)
        if row is None or waiter not in row:
            return  # it left already, cancelled while it was about to be let in
        row.remove(waiter)
        if not row:
            del self._rows[key]
        self.waiting -= 1
        self._tokens -= waiter.tokens
