"""GRAMMAR -> COMPILED GRAMMAR. The process that compiles: it has limits, and may be killed.

Run as a file of its own, which imports nothing of XVERSE. On standard input it is told the
vocabulary, then one grammar after another; each is answered on standard output. Nothing is pickled:
a frame is two lengths, a JSON object, and bytes.
"""

import json
import os
import random
import re
import signal
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

MAX_COMPILED_BYTES = 16 * 2**20  # read back at 15 to 50 MB/s
SLOWEST_STEP_S = 0.1  # of a CPU, a mask and a token in the trial; ordinary grammars need 0.1 ms
TRIAL_TOKENS = 48
THREADS = 4  # strings of bounded length need 5 s of one with a vocabulary of 100,000
_PIPE_BYTES = 65536
_LENGTHS = struct.Struct("<II")
# How xgrammar begins what it says: [12:00:00] /project/cpp/grammar_parser.cc:820:
_SOURCE = re.compile(r"^(\[[\d:]+\] \S+:\d+: |Check failed: .*? is false: )*(Warning: )?")

Header = dict[str, Any]  # parsed JSON


def write_frame(pipe: IO[bytes], header: Header, body: bytes = b"") -> None:
    """Send a JSON object and bytes; OSError where nobody listens any more."""
    head = json.dumps(header).encode()
    pipe.write(_LENGTHS.pack(len(head), len(body)) + head)
    pipe.write(body)
    pipe.flush()


def read_frame(pipe: IO[bytes]) -> tuple[Header, bytes]:
    """What `write_frame` sent; EOFError where the other end is gone."""
    head, body = _LENGTHS.unpack(_read(pipe, _LENGTHS.size))
    return json.loads(_read(pipe, head)), _read(pipe, body)


def _read(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


class Refused(Exception):
    """A grammar that is understood, and not taken; says why."""


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    os.nice(5)  # whoever decodes goes first
    wanted, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    remarks = _Remarks()
    compiler = _Compiler(*read_frame(wanted))
    write_frame(answers, {"ready": True})
    while not (remarks.full or compiler.worn):
        try:
            header, body = read_frame(wanted)
        except EOFError:
            return
        with _time_limit(header["seconds"]):
            reply, compiled = compiler.answer(header["kind"], body.decode(), remarks)
        write_frame(answers, reply, compiled)


class _Remarks:
    """What libraries print. They warn there of what they leave aside, and go on."""

    def __init__(self) -> None:
        self.full = False
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(write, False)  # what does not fit is lost, and nobody waits
        os.dup2(write, 1)
        os.dup2(write, 2)

    def take(self) -> str:
        """What was printed since the last call."""
        try:
            printed = os.read(self._read, _PIPE_BYTES)
        except BlockingIOError:
            return ""
        self.full |= len(printed) > _PIPE_BYTES // 2  # from now on something may be lost
        return printed.decode("utf-8", "replace")


class _Compiler:
    """xgrammar, for one vocabulary."""

    def __init__(self, about: Header, vocabulary: bytes) -> None:
        self.xgrammar = _light_xgrammar()
        ends = [0]
        for length in about["lengths"]:
            ends.append(ends[-1] + length)
        tokens = [vocabulary[start:end] for start, end in pairwise(ends)]
        self.lengths = about["lengths"]
        self.info = self.xgrammar.TokenizerInfo(tokens, stop_token_ids=about["end_ids"])
        self.compiler = self.xgrammar.GrammarCompiler(
            self.info, max_threads=THREADS, cache_enabled=False
        )
        self.worn = False  # memory ran out once: a new process has all of it
        self.leading_space = about["leading_space"]
        _limit_memory(about["memory_bytes"])

    def answer(self, kind: str, text: str, remarks: _Remarks) -> tuple[Header, bytes]:
        """The compiled grammar as xgrammar writes it, or why there is none."""
        remarks.take()
        try:
            compiled = self.compile(kind, text)
            warning = remarks.take()
            if "Warning" in warning:
                raise Refused(_first_words(warning))
            data = compiled.serialize_json().encode()
            if len(data) > MAX_COMPILED_BYTES:
                raise Refused(f"Compiled it has {len(data) / 2**20:.0f} MiB.")
            for choose in (random.Random(0).choice, self._longest, min):
                self._try_out(compiled, choose)
        except (Refused, MemoryError, RuntimeError, ValueError) as error:
            self.worn = isinstance(error, MemoryError) or "bad_alloc" in str(error)
            memory = "It needs more memory than a grammar may have."
            return {"error": memory if self.worn else _first_words(str(error))}, b""
        return {}, data

    def compile(self, kind: str, text: str) -> Any:
        """xgrammar's CompiledGrammar."""
        grammars = self.xgrammar.Grammar
        if kind in ("json", "json_schema"):
            grammar = grammars.from_json_schema(text or '{"type": "object"}')
        elif kind == "regex":
            grammar = grammars.from_regex(text)
        else:
            grammar = grammars.from_ebnf(text)
        if self.leading_space:
            grammar = grammars.concat(grammars.from_ebnf('root ::= " "'), grammar)
        return self.compiler.compile_grammar(grammar)

    def _longest(self, ids: Sequence[int]) -> int:
        return max(ids, key=self.lengths.__getitem__)

    def _try_out(self, compiled: Any, choose: Callable[[Sequence[int]], int]) -> None:
        """Walk through it: a crash or a slow step shows here, and not in the engine."""
        import numpy

        words = (self.info.vocab_size + 31) // 32
        mask = numpy.zeros((1, words), dtype=numpy.int32)
        matcher = self.xgrammar.GrammarMatcher(compiled)
        for _ in range(TRIAL_TOKENS):
            start = time.thread_time()  # a machine with much else to do is no fault of the grammar
            matcher.fill_next_token_bitmask(mask, 0)
            bits = numpy.unpackbits(mask.view(numpy.uint8), bitorder="little")
            allowed = numpy.flatnonzero(bits[: len(self.lengths)]).tolist()
            if not allowed and matcher.is_completed():
                return
            if not allowed:
                raise Refused("No text matches it, or it leads to where none does.")
            matcher.accept_token(choose(allowed))
            took = time.thread_time() - start
            if took > SLOWEST_STEP_S:
                raise Refused(f"It needs {took:.2f} s for a single token; it is too ambiguous.")
            if matcher.is_terminated():
                return


def _first_words(text: str) -> str:
    lines = [_SOURCE.sub("", line).strip() for line in text.splitlines()]
    return next((line for line in lines if line), "It was refused without a word.")[:400]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End this process where it takes longer, even when nobody is there to kill it."""
    import resource  # only on Unix: whoever reads frames elsewhere has none

    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + THREADS * seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _limit_memory(count: int) -> None:
    """At most `count` bytes more than now, where the system tells what there is now."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        now = int(sizes.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + count, now + count))


class _Absent(types.ModuleType):
    """A module that has every class one may name."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *given, **named: None})


def _light_xgrammar() -> Any:
    """xgrammar without torch and transformers, which it names in signatures and we have no use for
    here: 0.4 s and 55 MB instead of 4 s and 350 MB."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # tvm_ffi, below xgrammar, asks for it and goes on without
    import tvm_ffi  # noqa: F401

    absent = ("torch", "transformers")
    modules.update({name: _Absent(name) for name in absent})
    import xgrammar

    for name in absent:
        del modules[name]
    return xgrammar


if __name__ == "__main__":
    main()
