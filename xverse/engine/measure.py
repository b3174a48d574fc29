"""REQUESTS -> SECONDS. When every token of every request came, from our engine or from a peer."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xverse.engine.engine import Engine, Output
from xverse.engine.request import Failed, Request, Token
from xverse.engine.spread import SpreadEngine
from xverse.engine.workload import apart, make_requests


class Steps(Protocol):
    """Whoever answers requests step by step: our engine, or a peer that shows the same face."""

    def add(self, request: Request) -> int:
        """Take a request on; the number that its tokens will have."""
        ...

    def step(self) -> Sequence[Output]:
        """Compute on; the tokens that are known now."""
        ...


@dataclass(frozen=True)
class Timed:
    """One answer: when it was asked for and when each token came, in seconds from the start."""

    prompt_tokens: int
    ids: tuple[int, ...]
    asked_s: float
    token_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token, waiting in the queue included."""
        return self.token_s[0] - self.asked_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of each token after the first; None where there is but one."""
        later = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / later if later else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one token and the next; 0 for tokens that came in one step."""
        pairs = zip(self.token_s[:-1], self.token_s[1:], strict=True)
        return [later - earlier for earlier, later in pairs]


@dataclass(frozen=True)
class Measured:
    """A run of requests. What our scheduler counted in it is None for peers."""

    answers: tuple[Timed, ...]
    seconds: float
    preempted: int | None = None
    reused_tokens: int | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum(answer.prompt_tokens for answer in self.answers)

    @property
    def output_tokens(self) -> int:
        return sum(len(answer.ids) for answer in self.answers)

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def total_tokens_per_s(self) -> float:
        return (self.prompt_tokens + self.output_tokens) / self.seconds

    @property
    def ttfts_s(self) -> list[float]:
        return [answer.ttft_s for answer in self.answers]

    @property
    def tpots_s(self) -> list[float]:
        """Of the answers that have more than one token."""
        return [tpot for answer in self.answers if (tpot := answer.tpot_s) is not None]

    @property
    def gaps_s(self) -> list[float]:
        return [gap for answer in self.answers for gap in answer.gaps_s]


def measure_latency(steps: Steps, requests: Sequence[Request]) -> Measured:
    """One request after another, each alone."""
    return measure_throughput(steps, requests, concurrency=1)


def measure_throughput(
    steps: Steps, requests: Sequence[Request], *, concurrency: int | None = None
) -> Measured:
    """All requests at once, or never more than `concurrency`: then each that ends lets the next
    one in. Their sampling must be filled, and ids may not end them before max_tokens.

    Raises what a request failed of.
    """
    assert requests, "there is something to measure"
    most = concurrency or len(requests)
    waiting = deque(enumerate(requests))
    asked_s = [0.0] * len(requests)
    ids: list[list[int]] = [[] for _ in requests]
    token_s: list[list[float]] = [[] for _ in requests]
    places: dict[int, int] = {}
    before = _counted(steps)
    start = time.perf_counter()
    while waiting or places:
        while waiting and len(places) < most:
            place, request = waiting.popleft()
            asked_s[place] = time.perf_counter() - start
            places[steps.add(request)] = place
        outputs = steps.step()
        now = time.perf_counter() - start
        for output in outputs:
            if isinstance(output, Failed):
                raise output.error
            assert isinstance(output, Token), "no scores were asked for"
            place = places[output.request]
            ids[place].append(output.id)
            token_s[place].append(now)
            if output.finish:
                del places[output.request]
    seconds = time.perf_counter() - start
    for request, got in zip(requests, ids, strict=True):
        assert request.sampling is not None, "who is measured decodes"
        assert len(got) == request.sampling.max_tokens, "an answer has the length asked for"
    counts = [late - soon for soon, late in zip(before, _counted(steps), strict=True)]
    answers = zip(requests, ids, asked_s, token_s, strict=True)
    timed = [Timed(len(r.ids), tuple(i), a, tuple(t)) for r, i, a, t in answers]
    return Measured(tuple(timed), seconds, *counts)


def warm(engine: Engine | SpreadEngine) -> None:
    """Meet every number of rows and some prompts, so that whatever is compiled or captured when it
    is first met is there before the timing."""
    engine.prepare()
    vocabulary, context = engine.decoder.shape.vocab_size, engine.decoder.shape.context_length
    rows, longest = 1, min(context - 4, engine.step_tokens, engine.capacity - 4)
    while rows < 2 * engine.max_running:
        some = make_requests(min(rows, engine.max_running), (4, 4), (3, 3), vocabulary=vocabulary)
        measure_throughput(engine, apart(some, f"warm {rows}"))
        rows *= 2
    for tokens, count in ((longest, 1), (min(longest, 512), 2), (min(longest, 1100), 2)):
        some = make_requests(count, (tokens, tokens), (2, 2), vocabulary=vocabulary)
        measure_throughput(engine, apart(some, f"warm prompt {tokens}"))


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, between two by a straight line."""
    ordered = sorted(values)
    assert ordered, "there is something to rank"
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _counted(steps: Steps) -> tuple[int, ...]:
    """How often so far: preemptions, and tokens that were found instead of computed."""
    if isinstance(steps, SpreadEngine):
        steps = steps.engine
    if not isinstance(steps, Engine):
        return ()
    return steps.scheduler.preempted, steps.scheduler.reused_tokens
