"""TOKENS SO FAR -> TOKENS ALLOWED. Where an answer stands in its grammar; steps have a limit."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from xverse.errors import XverseError

# Seconds of a CPU. Where the machine is busy with other things a step takes longer, and that is no
# fault of the grammar; but nobody waits for it PATIENCE times as long.
STEP_S = 0.25  # after that the request fails: 0.1 ms is usual, and others wait meanwhile
MEAN_STEP_S = 0.05  # strings of up to 129 characters and more need 0.02 s a token
FREE_S = 1.0  # before the mean counts
PATIENCE = 8


@dataclass(eq=False)
class Job:
    """Something that a thread of `Threads` does; `left` where nobody waits for it any more."""

    action: Callable[[], None]
    done: threading.Event = field(default_factory=threading.Event)
    started: float = math.inf
    clock: int | None = None  # of the thread's own CPU time, where the system has such
    cpu_started: float = 0.0
    error: Exception | None = None
    left: bool = False

    def run(self) -> None:
        """Do it, and keep what went wrong."""
        if hasattr(time, "pthread_getcpuclockid"):
            self.clock = time.pthread_getcpuclockid(threading.get_ident())
            self.cpu_started = time.clock_gettime(self.clock)
        self.started = time.monotonic()
        try:
            self.action()
        except Exception as error:
            self.error = error
        self.done.set()

    def too_long(self, seconds: float) -> bool:
        """Whether it has used up `seconds` of a CPU, or PATIENCE times as many have gone by."""
        passed = time.monotonic() - self.started
        if self.clock is None:
            return passed > seconds
        try:
            used = time.clock_gettime(self.clock) - self.cpu_started
        except OSError:  # the thread has ended since
            return False
        return used > seconds or passed > PATIENCE * seconds


class Threads:
    """A few threads for work that cannot be interrupted: where one is stuck, its job is left alone
    and another thread takes its place."""

    def __init__(self, count: int = 2) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._running: list[Job] = []
        self._count = count
        for _ in range(count):
            self._start_thread()

    def start(self, action: Callable[[], None]) -> Job:
        """Queue it."""
        job = Job(action)
        self._jobs.put(job)
        return job

    def finish(self, job: Job, seconds: float) -> None:
        """Wait for it, and raise what it raised; TimeoutError once it has run for too long, as
        `Job.too_long` has it."""
        while not job.done.wait(seconds / 10):
            for running in list(self._running):
                if not running.left and running.too_long(seconds):
                    running.left = True
                    self._start_thread()
            if job.left:
                raise TimeoutError
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self._count):
            self._jobs.put(None)

    def _start_thread(self) -> None:
        arguments = self._jobs, self._running  # and not self: threads outlive nobody
        threading.Thread(target=_serve, args=arguments, daemon=True).start()


def _serve(jobs: "SimpleQueue[Job | None]", running: list[Job]) -> None:
    while (job := jobs.get()) is not None:
        running.append(job)
        job.run()
        running.remove(job)
        if job.left:
            return


@dataclass(eq=False)
class Compiled:
    """A compiled grammar that requests share, and whether it has turned out to be too slow."""

    grammar: Any  # xgrammar's CompiledGrammar
    size: int  # bytes
    refused: XverseError | None = None


class GrammarState:
    """Where one answer stands. The next mask is computed while the model computes its logits."""

    def __init__(self, compiled: Compiled, threads: Threads) -> None:
        from xgrammar import GrammarMatcher

        info = compiled.grammar.tokenizer_info
        self.vocab_size: int = info.vocab_size
        self._compiled, self._threads = compiled, threads
        self._matcher = GrammarMatcher(compiled.grammar)
        self._ends = frozenset(info.stop_token_ids)
        self._mask_W = torch.zeros((self.vocab_size + 31) // 32, dtype=torch.int32)
        self._spent, self._steps = 0.0, 0
        self._job = threads.start(self._compute_mask)

    @property
    def terminated(self) -> bool:
        """Whether the answer is whole: an end id was accepted, or the model has none and nothing
        can follow."""
        if self._ends:
            return bool(self._matcher.is_terminated())
        try:
            self._finish()
        except XverseError:
            return False  # `fill` will say so
        return not self._mask_W.any() and bool(self._matcher.is_completed())

    def fill(self, mask_W: Tensor) -> None:
        """Write the tokens that are allowed next into int32 words on the CPU: 32 ids in a word,
        the lowest bit first. XverseError where there is none, or where it takes too long."""
        self._finish()
        if not self._mask_W.any():
            raise XverseError(
                "The grammar leads to where no token can follow.",
                "What it asks for next cannot be written with this model's tokens, or not at all.",
                "Correct the grammar, so that every beginning has an end.",
            )
        mask_W.copy_(self._mask_W)

    def masked(self, logits_V: Tensor) -> Tensor:
        """The logits, and minus infinity for ids that are not allowed next."""
        mask_W = torch.empty_like(self._mask_W)
        self.fill(mask_W)
        return logits_V.masked_fill(~unpack(mask_W.to(logits_V.device), len(logits_V)), -torch.inf)

    @property
    def only_end(self) -> bool:
        """Whether nothing but an end of the answer is allowed next."""
        try:
            self._finish()
        except XverseError:
            return False  # `fill` will say so
        allowed_V = unpack(self._mask_W, self.vocab_size)
        return bool(allowed_V.sum() == allowed_V[sorted(self._ends)].sum())

    def accept(self, id: int) -> None:
        """Go on by a token that `fill` allowed."""
        self._finish()
        if id in self._ends:
            self._matcher.accept_token(id)
            return
        self._job = self._threads.start(partial(self._advance, id))

    def _finish(self) -> None:
        """Wait for the mask; XverseError, also when asked again, where that takes too long."""
        try:
            self._threads.finish(self._job, STEP_S)
        except TimeoutError:
            raise self._too_slow(STEP_S) from None
        if self._spent > FREE_S + MEAN_STEP_S * self._steps:
            raise self._too_slow(self._spent / self._steps)

    def _too_slow(self, seconds: float) -> XverseError:
        self._compiled.refused = XverseError(
            "The grammar is too slow to decode with.",
            f"It needs {seconds:.2f} s for a single token, while others wait.",
            "Make it less ambiguous: one way to read each text, and no nested repetitions.",
        )
        return self._compiled.refused

    def _advance(self, id: int) -> None:
        start = time.thread_time()
        assert self._matcher.accept_token(id), "the mask allowed it"
        self._compute_mask()
        self._spent += time.thread_time() - start
        self._steps += 1

    def _compute_mask(self) -> None:
        self._matcher.fill_next_token_bitmask(self._mask_W[None])
        if self.vocab_size % 32:  # bits past the last id are left as they are
            self._mask_W[-1] &= (1 << self.vocab_size % 32) - 1


def unpack(mask_W: Tensor, count: int) -> Tensor:
    """The first `count` bits of int32 words, as booleans on the same device."""
    shifts = torch.arange(32, device=mask_W.device, dtype=torch.int32)
    return ((mask_W[:, None] >> shifts) & 1).flatten()[:count].bool()
