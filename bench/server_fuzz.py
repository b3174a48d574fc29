"""SERVER -> DOES IT STAND. Hostile and valid requests at every route, and what came of them.

Starts `xverse serve` with a small random model and a key, the published service beside it. A
process makes the cases, --clients tasks send them. Right is: no status of 500 or above, every
answer as our own OpenAPI has it, every stream with an end, no engine that died, no line on
standard error that is not JSON, and a server that is idle and ready when all is over.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from bench.fuzz_cases import Source
from bench.fuzz_check import Judge
from bench.fuzz_http import Caller, NoHttpError
from bench.fuzz_mutants import Case
from bench.record import record

KEY, MODEL = "the-key-of-the-fuzzer", "tiny"
PATIENCE_S = 120.0  # for an answer: the machine may be busy with other things
EXAMPLES, MUTANTS = 60, 400  # of a block: schemathesis makes 30 to 100 a second, mutants are cheap
CONTEXT = 2048
KEPT = 20  # faults that are told in full


@dataclass(frozen=True)
class Served:
    """A server under test: its ports, and the file of what it writes on standard error."""

    ports: dict[bool, int]
    errors: Path

    def get(self, path: str, guide: bool = False) -> Any:
        """The text or JSON of a route, with the key."""
        url = f"http://127.0.0.1:{self.ports[guide]}{path}"
        asked = Request(url, headers={"authorization": f"Bearer {KEY}"})
        with urlopen(asked, timeout=30) as answer:
            text = answer.read().decode()
        return json.loads(text) if path.endswith(".json") else text

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if f"xverse:{name}" in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#")


def write_model(folder: Path) -> None:
    """A small random model with the tests' tokenizer, and room for the tools of a prompt."""
    from tests.tiny_model import write_published_folder

    write_published_folder(folder)
    config = folder / "config.json"
    facts = {**json.loads(config.read_text()), "max_position_embeddings": CONTEXT}
    config.write_text(json.dumps(facts))
    options = folder / "generation_config.json"  # answers that are short where nothing says so
    options.write_text(json.dumps({**json.loads(options.read_text()), "max_new_tokens": 8}))


@contextmanager
def served(model: Path, folder: Path) -> Iterator[Served]:
    """`xverse serve` of the model, ready; ended afterwards."""
    errors = folder / "stderr"
    command = [sys.executable, "-m", "xverse", "serve", str(model), "--served-model-name", MODEL]
    flags = [
        "--port",
        "0",
        "--guide-api",
        "--guide-port",
        "0",
        "--drain-seconds",
        "5",
        "--kv-tokens",
        "65536",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XVERSE_API_KEY": KEY}
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=stream, text=True, env=environment
        )
        assert process.stdout is not None
        try:
            ports: list[int] = []
            for line in process.stdout:
                ports += [int(port) for port in re.findall(r"http://127\.0\.0\.1:(\d+)", line)]
                if line.startswith("ready"):
                    break
            assert len(ports) >= 2, f"the server did not start: {errors.read_text()[-2000:]}"
            yield Served({False: ports[0], True: ports[1]}, errors)
        finally:
            process.terminate()
            process.stdout.close()
            assert process.wait(60) == 0, "the server did not end in order"


@dataclass
class Tally:
    """What came of all requests."""

    by_route: dict[str, Counter[str]] = field(default_factory=dict)
    by_source: Counter[str] = field(default_factory=Counter)
    streams: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def add(self, case: Case, status: str, faults: list[str], seconds: float) -> None:
        """One request more."""
        route = case.route or "no route"
        self.by_route.setdefault(f"{case.method} {route}", Counter())[status] += 1
        self.by_source[case.source] += 1
        self.slowest_s = max(self.slowest_s, seconds)
        for fault in faults:
            self.faults[fault[:60]] += 1
            if len(self.told) < KEPT:
                body = (case.body or b"")[:600]
                what = f"{case.source}: {case.method} {case.target!r} {body!r}"
                self.told.append(f"{fault} <- {what}")

    @property
    def requests(self) -> int:
        """How many were sent."""
        return self.by_source.total()

    def figures(self) -> dict[str, object]:
        """For the record."""
        return {
            "requests": self.requests,
            "streams": self.streams,
            "slowest_s": round(self.slowest_s, 2),
            "faults": dict(self.faults),
            "by_route": {
                route: dict(sorted(c.items())) for route, c in sorted(self.by_route.items())
            },
            "by_source": dict(sorted(self.by_source.items())),
        }


_source: Source | None = None


def _begin(*facts: Any) -> None:
    global _source
    os.nice(1)  # who makes cases lets those go first who answer them
    _source = Source(*facts)


def _block(examples: int, mutants: int) -> list[Case]:
    assert _source is not None, "the process began with it"
    return _source.block(examples, mutants)


async def fuzz(
    server: Served, requests: int, *, seed: int = 0, clients: int = 16, patience_s: float = 30.0
) -> Tally:
    """Send so many requests. Faults are told in the tally, none is raised."""
    specs = {guide: server.get("/openapi.json", guide) for guide in (False, True)}
    tally, judge = Tally(), Judge(specs)
    queue: asyncio.Queue[Case | None] = asyncio.Queue(clients * 4)
    host = f"127.0.0.1:{server.ports[False]}"

    async def client() -> None:
        caller = Caller(server.ports, patience_s)
        while (case := await queue.get()) is not None:
            await _try(caller, case, judge, tally)
        caller.close()

    tasks = [asyncio.ensure_future(client()) for _ in range(clients)]
    async for case in _cases((specs, host, KEY, MODEL, seed), requests):
        await queue.put(case)
    for _ in tasks:
        await queue.put(None)
    await asyncio.gather(*tasks)
    return tally


async def _cases(facts: tuple[Any, ...], count: int) -> AsyncIterator[Case]:
    """So many cases; the next block is being made while one is sent."""
    loop, sent = asyncio.get_running_loop(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _begin, facts) as pool:
        sizes = (EXAMPLES, MUTANTS) if count > 5000 else (EXAMPLES // 6, MUTANTS // 6)
        block = loop.run_in_executor(pool, _block, *sizes)
        while sent < count:
            cases = await block
            if sent + len(cases) < count:
                block = loop.run_in_executor(pool, _block, *sizes)
            for case in cases[: count - sent]:
                yield case
            sent += len(cases)


async def _try(caller: Caller, case: Case, judge: Judge, tally: Tally) -> None:
    began = time.perf_counter()
    try:
        answer = await caller.ask(case)
        faults = judge.faults(case, answer)
        status = str(answer.status or "none")
        tally.streams += answer.headers.get("content-type", "").startswith("text/event-stream")
    except TimeoutError:
        status, faults = "hang", ["no answer in time"]
    except NoHttpError as error:
        status, faults = "no HTTP", [f"no HTTP: {error}"]
    tally.add(case, status, faults, time.perf_counter() - began)


def aftermath(server: Served) -> dict[str, object]:
    """How the server is when all is over; `wrong` lists what should not be."""
    wrong: list[str] = []
    end = time.monotonic() + 60
    while server.metric("num_requests_running") or server.metric("num_requests_waiting"):
        if time.monotonic() > end:
            wrong.append("requests are still under way")
            break
        time.sleep(0.1)
    restarts = server.metric("engine_restarts")
    if restarts:
        wrong.append(f"the engine died {restarts:g} times")
    if '"ready"' not in server.get("/ready"):
        wrong.append("it is not ready")
    lines = server.errors.read_text("utf-8").splitlines()
    strange = [line for line in lines if not _is_json(line)]
    wrong += [f"on standard error: {line[:200]}" for line in strange[:KEPT]]
    return {"engine_restarts": int(restarts), "log_lines": len(lines), "wrong": wrong}


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def main() -> int:
    """Run it; the exit status is 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument(
        "--record", action="store_true", help="write bench/results/server_fuzz.json"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = Path(name) / "model"
        write_model(model)
        with served(model, Path(name)) as server:
            began = time.monotonic()
            tally = asyncio.run(
                fuzz(
                    server,
                    asked.requests,
                    seed=asked.seed,
                    clients=asked.clients,
                    patience_s=PATIENCE_S,
                )
            )
            seconds = time.monotonic() - began
            after = aftermath(server)
    figures = {
        **tally.figures(),
        **after,
        "seed": asked.seed,
        "clients": asked.clients,
        "seconds": round(seconds),
        "requests_per_second": round(tally.requests / seconds, 1),
    }
    print(json.dumps(figures, indent=1))
    print(*tally.told, sep="\n", file=sys.stderr)
    if asked.record:
        record("server_fuzz", figures, ("fastapi", "uvicorn", "h11", "schemathesis", "hypothesis"))
    return 1 if tally.faults or after["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
