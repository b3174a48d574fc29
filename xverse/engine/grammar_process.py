"""GRAMMARS -> A PROCESS -> COMPILED ONES. One process of grammar_worker.py, started and ended."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from xverse.engine import grammar_worker
from xverse.engine.grammar import Grammar
from xverse.engine.grammar_schema import without_lengths
from xverse.engine.grammar_worker import read_frame, write_frame
from xverse.errors import XverseError

START_S = 60.0  # 0.8 s on a quiet machine
MEMORY_BYTES = 2**30  # of one grammar while it is compiled, beside 55 MB of the process itself


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of every id (none for those that spell no text), the ids that end an answer, and
    whether the text of an answer loses a leading space."""

    tokens: list[bytes]
    end_ids: list[int]
    leading_space: bool


class Process:
    """A process that compiles one grammar at a time. One thread at a time may use it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Start it and wait until it is ready; XverseError where it cannot be."""
        # By its path, and -P: the folder of the file is no place to import from.
        command = [sys.executable, "-P", grammar_worker.__file__]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise _not_started(str(error)) from error
        about = {
            "lengths": [len(token) for token in vocabulary.tokens],
            "end_ids": vocabulary.end_ids,
            "leading_space": vocabulary.leading_space,
            "memory_bytes": MEMORY_BYTES,
        }
        try:
            with self._ended_after(START_S):
                self._ask(about, b"".join(vocabulary.tokens))
        except (EOFError, OSError) as error:
            raise _not_started(f"It ended with code {self._process.wait()}.") from error

    def lives(self) -> bool:
        """Whether it can be given a grammar."""
        return self._process.poll() is None

    def compile(self, grammar: Grammar, seconds: float) -> bytes:
        """The compiled grammar, as xgrammar writes it. XverseError where it is none, or needs more
        time or memory than there is; the process may be gone then."""
        text = grammar.text
        if grammar.kind == "json_schema":
            text = without_lengths(text)
        header: dict[str, object] = {"kind": grammar.kind, "seconds": seconds}
        try:
            with self._ended_after(seconds) as late:
                reply, compiled = self._ask(header, text.encode())
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise too_slow(seconds) if late.is_set() else _died(code) from error
        if "error" in reply:
            raise unusable(reply["error"])
        return compiled

    def end(self) -> None:
        """Kill it, and wait until nothing is left of it."""
        self._process.kill()
        self._process.wait()

    def _ask(self, header: dict[str, object], body: bytes) -> tuple[dict[str, str], bytes]:
        assert self._process.stdin is not None, "it was opened with pipes"
        assert self._process.stdout is not None, "it was opened with pipes"
        write_frame(self._process.stdin, header, body)
        return read_frame(self._process.stdout)

    @contextmanager
    def _ended_after(self, seconds: float) -> Iterator[threading.Event]:
        """Kill it after some time; the event tells whether that was done."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield late
        finally:
            timer.cancel()


def unusable(why: str) -> XverseError:
    """A grammar that nothing can be done with."""
    return XverseError(
        "The grammar cannot be used.", why, "Correct it, or make it smaller and less nested."
    )


def too_slow(seconds: float) -> XverseError:
    """A grammar that takes too long to compile."""
    return XverseError(
        "The grammar takes too long to compile.",
        f"It was not done within {seconds:.1f} s.",
        "Make it smaller: fewer properties, smaller counts and lengths, less nesting.",
    )


def _died(code: int) -> XverseError:
    if -code in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
        return unusable("The compiler gave up on it: too much memory, or too deep a recursion.")
    if -code in (signal.SIGXCPU, signal.SIGALRM):
        return unusable("It takes too long to compile.")
    return XverseError(
        "The grammar was not compiled.",
        f"The process that compiles it was ended from outside (code {code}).",
        "Ask again; where the machine is short of memory, mend that first.",
    )


def _not_started(why: str) -> XverseError:
    return XverseError(
        "The process that compiles grammars could not be started.",
        why,
        'Install xgrammar anew (`pip install "xverse-llm[serve]"`), and see that memory is left.',
    )
