"""WHAT A SERVER SURVIVES. Killed engines, clients that vanish, overload, stops: counted, not timed.

`python -m bench.server_chaos --kills 50 --leavers 1000 --overload-s 300 --stops 20 --api-kills 5`
does all parts; a part whose number is 0 is left out. Every greedy answer that is finished is
compared with the one that the model gives in this process. One file of figures a part.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.record import record
from tests.server.served import Reply, Served, post, serve, wait
from xverse import LLM, Sampling

NAME = "chaos"  # what the server calls its model
PATH = "/v1/completions"
PROMPTS = 12
FLAGS = ("--served-model-name", NAME, "--dtype", "float32", "--no-log-requests")
ALLOWED_S = 0.05  # for a rejection, at the 99th percentile
ALLOWED_GROWTH = 0.05  # of memory, from the second quarter of the overload to its last
Figures = dict[str, object]


@dataclass(frozen=True)
class Subject:
    """A model, and what it answers to some prompts when nothing goes wrong."""

    model: str
    max_tokens: int
    answers: dict[str, str]

    @classmethod
    def of(cls, model: str, max_tokens: int = 24) -> "Subject":
        """Computed here, by the engine without a server."""
        prompts = [f"{number} things to know about the sea:" for number in range(2, 2 + PROMPTS)]
        options = Sampling(
            temperature=0.0, repetition_penalty=1.0, max_tokens=max_tokens, ignore_eos=True
        )
        answers = LLM(model, dtype="float32").generate(prompts, options)
        texts = [answer.text for answer in answers]
        return cls(model, max_tokens, dict(zip(prompts, texts, strict=True)))

    def asked(self, prompt: str, **more: object) -> dict[str, object]:
        """The request for a known answer."""
        options = {"temperature": 0, "repetition_penalty": 1.0, "ignore_eos": True}
        asked = {"model": NAME, "prompt": prompt, "max_tokens": self.max_tokens}
        return {**asked, **options, **more}


@dataclass
class Tally:
    """What became of requests: right answers, wrong ones, errors by their code."""

    subject: Subject
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    async def ask(self, port: int, *, stream: bool) -> Reply:
        """Ask for one of the known answers, and compare."""
        prompt = random.choice([*self.subject.answers])
        try:
            reply = await post(port, PATH, self.subject.asked(prompt, stream=stream))
        except OSError:
            reply = Reply()
        self.note(prompt, reply)
        return reply

    def note(self, prompt: str, reply: Reply, choices: int = 1) -> None:
        """Count what came."""
        if reply.text is None:
            self.counts[reply.error or ("cut" if reply.status else "unheard")] += 1
        elif reply.text == self.subject.answers[prompt] * choices:
            self.counts["right"] += 1
        else:
            self.counts["wrong"] += 1
            self.wrong.append(f"{prompt!r}: {reply.text!r}")

    def require(self, *allowed: str) -> dict[str, int]:
        """The counts; AssertionError where there is anything beside right answers and these."""
        other = set(self.counts) - {"right", *allowed}
        assert not other, f"{dict(self.counts)} {self.wrong[:3]}"
        assert self.counts["right"], "nobody was answered"
        return dict(self.counts)


async def kills(subject: Subject, served: Served, count: int, clients: int = 8) -> Figures:
    """Kill the engine again and again under load: typed errors, right answers, and it is back."""
    tally, done = Tally(subject), asyncio.Event()

    async def client(number: int) -> None:
        while not done.is_set():
            reply = await tally.ask(served.port, stream=number % 2 == 0)
            await asyncio.sleep(0.2 if reply.text is None else 0)

    crowd = [asyncio.ensure_future(client(number)) for number in range(clients)]
    back_s: list[float] = []
    for _ in range(count):
        await until(lambda: served.metric("num_requests_running") > 0)
        await asyncio.sleep(random.uniform(0, 0.3))
        engine = served.engine()
        assert engine is not None, "it is ready"
        os.kill(engine, signal.SIGKILL)
        began = time.perf_counter()
        assert await asyncio.to_thread(served.alive), "the API lives"
        await until(partial(replaced, served, engine))
        back_s.append(time.perf_counter() - began)
        after = Tally(subject)
        await after.ask(served.port, stream=False)
        after.require()
    done.set()
    await asyncio.gather(*crowd)
    counts = tally.require("engine_restarted", "not_ready")
    assert counts.get("engine_restarted"), "requests were with the engines that were killed"
    assert served.metric("engine_restarts_total") == count
    return {"kills": count, "clients": clients, "outcomes": counts, "ready_again_s": spread(back_s)}


async def leavers(subject: Subject, served: Served, count: int, at_once: int = 40) -> Figures:
    """Clients that hang up anywhere in an answer: nothing of them stays."""
    before = usage(served)
    turn = asyncio.Semaphore(at_once)

    async def leave(number: int) -> int:
        # Every fourth says nothing more than it has to and goes at once; the others read a part.
        most = 0 if number % 4 == 0 else random.randrange(1, 2500)
        more = {"stream": number % 3 != 0, "n": 1 + number % 3}
        asked = subject.asked(random.choice([*subject.answers]), **more)
        async with turn:
            reply = await post(served.port, PATH, asked, leave_after=most, reset=number % 2 == 0)
            return reply.whole

    read = await asyncio.gather(*map(leave, range(count)))
    aborted = served.metric("request_success_total", "abort")
    await until(lambda: usage(served) == before)
    assert aborted, "some went while they were answered"
    tally = Tally(subject)  # and as many as fit at once are answered as if nobody had been there
    await asyncio.gather(*(tally.ask(served.port, stream=True) for _ in range(72)))
    figures = {"before_and_after": before, "right_answers_after": tally.require()["right"]}
    return {"clients": count, "read_to_the_end": sum(read), "answers_aborted": aborted, **figures}


async def overload(
    subject: Subject, served: Served, seconds: float, *, queue: int, choices: int, factor: float
) -> Figures:
    """`factor` times what the server can do, at an even rate: it says no at once, or answers."""
    tally, refused_s = Tally(subject), list[float]()
    prompts = [*subject.answers]

    async def ask(number: int) -> None:
        prompt = prompts[number % len(prompts)]
        reply = await post(served.port, PATH, subject.asked(prompt, n=choices))
        tally.note(prompt, reply, choices)
        if reply.status == 429:
            assert int(reply.headers["retry-after"]) >= 1
            refused_s.append(reply.seconds)

    at_once = 64 // choices
    began = time.perf_counter()
    await asyncio.gather(*map(ask, range(2 * at_once)))
    rate = factor * 2 * at_once / (time.perf_counter() - began)
    depth: list[float] = []
    memory: dict[str, list[int]] = {"api": [], "engine": []}

    async def look() -> None:
        engine = served.engine()
        assert engine is not None, "it is ready"
        while True:
            depth.append(await asyncio.to_thread(served.metric, "num_requests_queued"))
            memory["api"].append(resident(served.process.pid))
            memory["engine"].append(resident(engine))
            await asyncio.sleep(0.5)

    looking = asyncio.ensure_future(look())
    asking = set[asyncio.Task[None]]()
    offered = max(int(rate * seconds), 4 * (at_once + queue))
    began = time.perf_counter()
    for number in range(offered):
        await asyncio.sleep(began + number / rate - time.perf_counter())
        task = asyncio.create_task(ask(number))
        asking.add(task)
    await asyncio.gather(*asking)
    looking.cancel()
    with suppress(asyncio.CancelledError):
        await looking
    counts = tally.require("overloaded")
    assert max(depth) <= queue, f"{max(depth)} waited"
    assert refused_s, "nobody was refused"
    assert served.metric("engine_restarts_total") == 0
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "requests_a_second_offered": round(rate, 1),
        "times_capacity": factor,
        "choices_a_request": choices,
        "outcomes": counts,
        "queue_bound": queue,
        "queue_longest": max(depth),
        "rejection_ms": {name: round(1000 * s, 1) for name, s in spread(refused_s).items()},
        "memory": {name: growth(found) for name, found in memory.items()},
    }


async def stop(subject: Subject, served: Served, clients: int = 24) -> Figures:
    """SIGTERM in the midst of answers: whoever asked before has an answer, and the code is 0."""
    before, after = Tally(subject), Tally(subject)
    asked = [before.ask(served.port, stream=number % 2 == 0) for number in range(clients)]
    asking = asyncio.gather(*asked)
    await until(lambda: served.metric("num_requests_running") >= clients / 2 or asking.done())
    await asyncio.sleep(random.uniform(0, 0.2))
    served.process.send_signal(signal.SIGTERM)
    late: list[Reply] = []
    while served.process.poll() is None:
        late.append(await after.ask(served.port, stream=True))
        await asyncio.sleep(0.05)
    await asking
    assert served.process.returncode == 0, served.process.returncode
    # Nobody who was there is unheard; "unheard" is who came when the port was closed already.
    counts = before.require("shutting_down")
    assert set(after.counts) <= {"right", "shutting_down", "unheard"}, after.counts
    return {"before": counts, "after": dict(after.counts)}


async def kill_api(subject: Subject, served: Served, clients: int = 8) -> float:
    """Kill -9 the API process under load; seconds until its engine is gone and its port free."""
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    chat = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    await post(served.port, "/v1/chat/completions", {**chat, "response_format": form})
    family = descendants(served.process.pid)
    assert len(family) >= 2, "the engine, and what compiles grammars"
    tally = Tally(subject)
    crowd = asyncio.gather(*(tally.ask(served.port, stream=True) for _ in range(clients)))
    await until(lambda: served.metric("num_requests_running") > 0)
    served.process.kill()
    began = time.perf_counter()
    served.process.wait()
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))
    gone_s = time.perf_counter() - began
    await crowd
    assert set(tally.counts) <= {"right", "cut", "unheard"}, tally.counts
    with socket.socket() as ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ear.bind(("127.0.0.1", served.port))
    return gone_s


async def until(condition: Callable[[], object], seconds: float = 300) -> None:
    """Until it is so; looked at in a thread, so that clients go on."""
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.02)


def replaced(served: Served, engine: int) -> bool:
    """Whether another engine process is ready."""
    return served.engine() not in (None, engine) and served.ready()


def usage(served: Served) -> dict[str, float]:
    """What requests hold: their places before the engine and in it, and pages of KV memory."""
    names = ("num_slots_used", "num_requests_queued", "num_requests_running", "kv_cache_usage_perc")
    return {name: served.metric(name) for name in names}


def resident(process: int) -> int:
    """Bytes of memory that a process really has."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descendants(process: int) -> list[int]:
    """All processes below this one."""
    children: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        children += map(int, file.read_text().split())
    return children + [below for child in children for below in descendants(child)]


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    ranked = sorted(seconds)
    last = ranked[min(len(ranked) - 1, int(len(ranked) * 0.99))]
    found = {"median": statistics.median(ranked), "p99": last, "max": ranked[-1]}
    return {name: round(value, 4) for name, value in found.items()}


def growth(found: list[int]) -> dict[str, float]:
    """Megabytes in the second quarter of the time and in its last, by their medians."""
    quarter = max(1, len(found) // 4)
    early, late = found[quarter : 2 * quarter] or found, found[-quarter:]
    return {"early_mb": _mega(early), "late_mb": _mega(late), "most_mb": _mega([max(found)])}


def _mega(found: list[int]) -> float:
    return round(statistics.median(found) / 2**20, 1)


def judge(figures: Figures) -> None:
    """What only a quiet machine can be asked for: AssertionError where the overload missed it."""
    rejection, memory = figures["rejection_ms"], figures["memory"]
    assert isinstance(rejection, dict)
    assert isinstance(memory, dict)
    assert rejection["p99"] <= 1000 * ALLOWED_S, rejection
    for name, found in memory.items():
        assert found["late_mb"] <= found["early_mb"] * (1 + ALLOWED_GROWTH), (name, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--kills", type=int, default=0, help="of the engine")
    parser.add_argument("--leavers", type=int, default=0, help="clients that hang up")
    parser.add_argument("--overload-s", type=float, default=0)
    parser.add_argument("--factor", type=float, default=20, help="times what the server can do")
    parser.add_argument("--overload-tokens", type=int, default=128, help="of each answer then")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait in overload")
    parser.add_argument("--stops", type=int, default=0, help="SIGTERM under load, so many times")
    parser.add_argument("--api-kills", type=int, default=0, help="of the API process")
    asked = parser.parse_args()
    subject = Subject.of(asked.model)

    def one(part: Callable[[Served], Awaitable[Figures]], *flags: str) -> Figures:
        with serve(asked.model, *FLAGS, "--drain-seconds", "600", *flags, threads=None) as served:
            wait(served.ready)
            return asyncio.run(_awaited(part(served)))

    def keep(name: str, figures: Figures) -> None:
        tokens = asked.overload_tokens if name == "overload" else subject.max_tokens
        about = {"model": f"{asked.model}, fp32", "new_tokens": tokens}
        print(json.dumps(figures, indent=1))
        print(record(f"server_{name}", {**about, **figures}, ("fastapi", "uvicorn")), flush=True)

    if asked.kills:
        keep("kills", one(lambda served: kills(subject, served, asked.kills)))
    if asked.leavers:
        keep("leavers", one(lambda served: leavers(subject, served, asked.leavers)))
    found: Figures | None = None
    if asked.overload_s:
        patient = Subject.of(asked.model, asked.overload_tokens)
        found = one(
            lambda served: overload(
                patient,
                served,
                asked.overload_s,
                queue=asked.queue,
                choices=1,
                factor=asked.factor,
            ),
            "--max-queue",
            str(asked.queue),
        )
        keep("overload", found)
    if asked.stops:
        stopped = [one(lambda served: stop(subject, served)) for _ in range(asked.stops)]
        totals: dict[str, Counter[str]] = {"before": Counter(), "after": Counter()}
        for name, counts in totals.items():
            for each in stopped:
                found_here = each[name]
                assert isinstance(found_here, dict)
                counts.update(found_here)
        keep("stops", {"stops": asked.stops, "asked": totals, "exit_codes": [0]})
    if asked.api_kills:
        gone_s = [one_kill(subject, asked.model) for _ in range(asked.api_kills)]
        keep("api_kills", {"kills": asked.api_kills, "engine_gone_s": spread(gone_s)})
    if found is not None:
        judge(found)  # last, so that it keeps no other part from being measured


def one_kill(subject: Subject, model: str) -> float:
    """A server of its own, for `kill_api`."""
    with serve(model, *FLAGS, threads=None) as served:
        wait(served.ready)
        return asyncio.run(kill_api(subject, served))


async def _awaited(work: Awaitable[Figures]) -> Figures:
    return await work


if __name__ == "__main__":
    main()
