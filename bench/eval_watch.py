"""ENGINE -> FIGURES. An evaluation watched: its steps, its tokens, its batches, and who waits."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from xverse.engine.engine import Engine
from xverse.engine.runner import Flight
from xverse.engine.scheduler import Chunk
from xverse.evals import harness
from xverse.evals.harness import Options
from xverse.evals.local import LocalDoor


@dataclass
class Meter:
    """What passed through an engine while it was watched."""

    until: float = math.inf  # of the clock; then it stops before the next batch
    steps: int = 0
    computed: int = 0  # tokens
    waited_s: float = 0.0  # by the host's thread, for the device
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)

    @contextmanager
    def watch(self, engine: Engine) -> Iterator[None]:
        """Count steps and tokens, and time the host's waiting and each batch of questions."""
        launch, wait, ask = engine.runner.launch, torch.cuda.Event.synchronize, harness._ask

        def counted(chunks: Sequence[Chunk]) -> Flight:
            self.steps += 1
            self.computed += sum(chunk.rows for chunk in chunks)
            return launch(chunks)

        def timed_wait(event: torch.cuda.Event) -> None:
            start = time.perf_counter()
            wait(event)
            self.waited_s += time.perf_counter() - start

        def timed_ask(door: Any, batch: Any, options: Options) -> Any:
            start = time.perf_counter()
            if start > self.until:
                raise TimeoutError
            outcomes = ask(door, batch, options)
            row = self.tasks.setdefault(batch.task.name, {"questions": 0, "seconds": 0.0})
            row["questions"] += len(outcomes)
            row["seconds"] = round(row["seconds"] + time.perf_counter() - start, 2)
            print(f"  {batch.task.name}: {row}", flush=True)
            return outcomes

        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(engine.runner, "launch", counted))
            patches.enter_context(mock.patch.object(torch.cuda.Event, "synchronize", timed_wait))
            patches.enter_context(mock.patch.object(harness, "_ask", timed_ask))
            yield


def engine_of(door: LocalDoor) -> Engine:
    """The engine of a model that is on one device."""
    engine = door.llm.engine
    assert isinstance(engine, Engine), "it is not spread"
    return engine


def measured(door: LocalDoor, work: Callable[[], int], most_s: float) -> dict[str, Any]:
    """Figures of `work`, which gives how many questions it asked; it has `most_s` for them."""
    engine, meter = engine_of(door), Meter(time.perf_counter() + most_s)
    engine.pages.free_up(engine.pages.count)  # nothing is found that was computed before
    reused, preempted = engine.scheduler.reused_tokens, engine.scheduler.preempted
    start, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
    stopped = False
    with meter.watch(engine):
        try:
            questions = work()
        except TimeoutError:
            stopped, questions = True, int(sum(row["questions"] for row in meter.tasks.values()))
    seconds = time.perf_counter() - start
    reused = engine.scheduler.reused_tokens - reused
    prompt = reused + meter.computed
    return {
        "questions": questions,
        "seconds": round(seconds, 2),
        "stopped_before_the_end": stopped,
        "prompt_tokens": prompt,  # and those that are written
        "computed_tokens": meter.computed,
        "prompt_tokens_per_s": round(prompt / seconds),
        "computed_tokens_per_s": round(meter.computed / seconds),
        "steps": meter.steps,
        "host_waited_s": round(meter.waited_s, 2),
        "host_busy_share": round(1 - meter.waited_s / seconds, 3),
        "process_cpu_s": round(time.process_time() - cpu, 1),
        "thread_cpu_s": round(time.thread_time() - thread, 1),  # waiting may be counted in it
        "preempted": engine.scheduler.preempted - preempted,
        "runner": type(engine.runner).__name__,
        "kv_tokens": engine.capacity,
        "tasks": meter.tasks,
    }


class Silent:
    """A runner that answers at once: what is left is the host's work."""

    def launch(self, chunks: Sequence[Chunk]) -> Flight:
        """Every label has the same log-probability."""
        read = [chunk.generation for chunk in chunks if chunk.complete]

        def give() -> None:
            for generation in read:
                generation.labels = [-1.0] * len(generation.request.labels)

        return Flight(chunks, [], list, labels=give)
