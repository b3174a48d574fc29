"""THREADS -> ONE ENGINE. Whoever waits for a token computes the next step for all.

There is no thread of its own: a reader that finds nothing for it takes the lock and runs a step,
whose tokens go to everybody's boxes. A reader that goes away takes its requests with it.
"""

import threading
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from xverse.engine.engine import Output
from xverse.engine.request import Failed, Request, Scores, Token

Box = deque[Output]


class Steps(Protocol):
    """An engine, in this process or spread over several."""

    def add(self, request: Request) -> int: ...

    def abort(self, number: int) -> None: ...

    def step(self) -> Sequence[Output]: ...


class Loop:
    """One engine, read from any number of threads and generators."""

    def __init__(self, engine: Steps) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._boxes: dict[int, Box] = {}
        self._left: deque[int] = deque()  # requests whose reader is gone

    def run(
        self, requests: Sequence[Request], ended: Collection[int] = ()
    ) -> Generator[Token | Scores, None, None]:
        """Tokens and scores as they come, `request` being the place in the sequence given.

        A request ends early when the reader has put its place into `ended`. Raises what one of
        them failed of. Closing the iterator aborts all that are unfinished.
        """
        box: Box = deque()
        places: dict[int, int] = {}
        known = 0  # of those that have ended
        try:
            with self._lock:
                self._forget_those_left()
                for place, request in enumerate(requests):
                    number = self.engine.add(request)
                    places[number] = place
                    self._boxes[number] = box
            while places:
                output = self._next(box)
                if output.request not in places:
                    continue  # it had ended when this was computed
                place = places[output.request]
                if isinstance(output, Failed):
                    raise output.error
                if _last(output):
                    del places[output.request]
                yield replace(output, request=place)
                if len(ended) > known:
                    known = len(ended)
                    for number in [number for number, place in places.items() if place in ended]:
                        del places[number]
                        self._left.append(number)
        finally:
            # A generator may be collected anywhere, even inside a step of this very thread: then
            # the lock is taken, and its holder or whoever comes next does the work.
            self._left.extend(places)
            if self._lock.acquire(blocking=False):
                try:
                    self._forget_those_left()
                finally:
                    self._lock.release()

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within this no step is under way, and none begins."""
        with self._lock:
            yield

    def _next(self, box: Box) -> Output:
        while not box:
            with self._lock:
                if not box:
                    self._step()
        return box.popleft()

    def _step(self) -> None:
        self._forget_those_left()
        for output in self.engine.step():
            number = output.request
            box = self._boxes[number]
            if _last(output):
                del self._boxes[number]
            box.append(output)
        self._forget_those_left()

    def _forget_those_left(self) -> None:
        while self._left:
            number = self._left.popleft()
            self._boxes.pop(number, None)
            self.engine.abort(number)


def _last(output: Output) -> bool:
    """Whether nothing more comes of its request."""
    if isinstance(output, Token):
        return output.finish is not None
    return isinstance(output, Failed) or output.last
