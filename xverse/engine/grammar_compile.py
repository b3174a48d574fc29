"""GRAMMARS -> COMPILED GRAMMARS. Asked for at once, compiled aside, kept for the next who asks.

Two threads each own a process that compiles. Whoever asks gets an `Ask` and looks at it now and
then; nobody waits in the middle of a step.
"""

import importlib.util
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from xverse.engine.grammar import Grammar
from xverse.engine.grammar_process import START_S, Process, Vocabulary, too_slow, unusable
from xverse.engine.grammar_state import Compiled, GrammarState, Threads
from xverse.errors import XverseError
from xverse.text.tokenizer import Tokenizer

PROCESSES = 2
KEPT = 128
KEPT_BYTES = 64 * 2**20
ANSWER_S = 0.8  # what an answer may take longer than compiling


@dataclass(eq=False)
class Ask:
    """A grammar that somebody waits for, and what came of it."""

    grammar: Grammar
    since: float = field(default_factory=time.monotonic)
    answer: Compiled | XverseError | None = None


class Grammars:
    """The grammars of one engine, compiled for one vocabulary."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], seconds: float = 5.0) -> None:
        """`vocabulary` is called once, aside; each grammar may take `seconds` to compile, and is
        answered within one second more."""
        self._desk = _Desk(vocabulary, seconds)
        weakref.finalize(self, self._desk.close)  # at the latest when Python ends

    @cached_property
    def _threads(self) -> Threads:
        threads = Threads()
        weakref.finalize(self, threads.close)
        return threads

    def start(self) -> None:
        """Have a process ready before anybody asks."""
        _require_xgrammar()
        self._desk.start_thread()

    def ask(self, grammar: Grammar) -> Ask:
        """Have it compiled, if it is not yet. XverseError where nothing can be compiled here."""
        _require_xgrammar()
        return self._desk.ask(grammar)

    def answer(self, ask: Ask) -> Compiled | XverseError | None:
        """What came of it; None for not yet. An error at the latest when its time is over."""
        if ask.answer is None and self._desk.time_left(ask) < 0:
            return too_slow(self._desk.seconds)
        return ask.answer

    def state(self, compiled: Compiled) -> GrammarState:
        """The beginning of an answer."""
        return GrammarState(compiled, self._threads)

    def wait(self, seconds: float) -> None:
        """Until any grammar is answered, at most so long."""
        self._desk.answered.wait(seconds)
        self._desk.answered.clear()

    def close(self) -> None:
        """End all processes; nothing can be asked any more."""
        self._desk.close()


class _Desk:
    """What the threads share: who waits, what is known. It does not know of `Grammars`, so that
    these can be collected while threads wait."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], seconds: float) -> None:
        self.seconds = seconds
        self.answered = threading.Event()
        self._spell = vocabulary
        self._changed = threading.Condition()
        self._known: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._open: dict[Grammar, Ask] = {}
        self._queue: deque[Ask] = deque()
        self._processes: set[Process] = set()
        self._threads = self._idle = 0
        self._ready: float | None = None  # since when the first process is there
        self._closed = False
        self._learning = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._info: Any = None  # xgrammar's TokenizerInfo of it

    def ask(self, grammar: Grammar) -> Ask:
        with self._changed:
            assert not self._closed, "it was closed"
            known = self._known.get(grammar)
            if known is not None:
                self._known.move_to_end(grammar)
                return Ask(grammar, answer=known.refused or known)
            if grammar in self._open:
                return self._open[grammar]
            ask = self._open[grammar] = Ask(grammar)
            self._queue.append(ask)
            self._changed.notify()
            wanted = len(self._queue) > self._idle
        if wanted:
            self.start_thread()
        return ask

    def start_thread(self) -> None:
        """One more, if there may be."""
        with self._changed:
            if self._threads == PROCESSES:
                return
            self._threads += 1
        threading.Thread(target=self._serve, daemon=True).start()

    def time_left(self, ask: Ask) -> float:
        """Seconds until it must be answered. The first start of a process does not count."""
        if self._ready is None:
            return ask.since + START_S - time.monotonic()
        return max(ask.since, self._ready) + self.seconds + ANSWER_S - time.monotonic()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for process in self._processes:
                process.end()

    def _serve(self) -> None:
        while not self._closed:
            try:
                process = Process(self._learn())
            except XverseError as error:
                ask = self._next()
                if ask is not None:
                    self._answer(ask, error)
                continue
            self._add(process)
            while process.lives() and (ask := self._next()) is not None:
                if process.lives():
                    self._answer(ask, self._compiled(process, ask))
                else:  # it was ended while it had nothing to do: another one takes it
                    self._put_back(ask)
            process.end()

    def _add(self, process: Process) -> None:
        with self._changed:
            if self._closed:
                process.end()
            self._processes = {old for old in self._processes if old.lives()} | {process}
            self._ready = self._ready or time.monotonic()

    def _next(self) -> Ask | None:
        """Whose turn it is; None when there is nothing to wait for any more."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._queue or self._closed)
            self._idle -= 1
            return None if self._closed else self._queue.popleft()

    def _put_back(self, ask: Ask) -> None:
        with self._changed:
            self._queue.appendleft(ask)

    def _compiled(self, process: Process, ask: Ask) -> Compiled | XverseError:
        left = self.time_left(ask) - ANSWER_S / 2
        if left <= 0:
            return _busy()
        try:
            data = process.compile(ask.grammar, min(left, self.seconds))
            return self._read(data)
        except XverseError as error:
            return error

    def _read(self, data: bytes) -> Compiled:
        from xgrammar import CompiledGrammar

        try:
            grammar = CompiledGrammar.deserialize_json(data.decode(), self._info)
        except (RuntimeError, ValueError) as error:
            raise unusable(f"It cannot be read back: {error!s:.200}") from error
        return Compiled(grammar, len(data))

    def _answer(self, ask: Ask, answer: Compiled | XverseError) -> None:
        with self._changed:
            ask.answer = answer
            self._open.pop(ask.grammar, None)
            if isinstance(answer, Compiled):
                self._known[ask.grammar] = answer
                self._forget()
        self.answered.set()

    def _forget(self) -> None:
        """What was asked for least lately, until the rest is within the bounds."""
        size = sum(compiled.size for compiled in self._known.values())
        while len(self._known) > KEPT or size > KEPT_BYTES:
            size -= self._known.popitem(last=False)[1].size

    def _learn(self) -> Vocabulary:
        """The vocabulary; when first asked for, made ready for reading compiled grammars too."""
        with self._learning:
            if self._vocabulary is None:
                from xgrammar import TokenizerInfo  # 1.5 s: it imports transformers

                words = self._vocabulary = self._spell()
                self._info = TokenizerInfo(words.tokens, stop_token_ids=words.end_ids)
            return self._vocabulary


def vocabulary_of(tokenizer: Tokenizer, end_ids: Collection[int], count: int) -> Vocabulary:
    """The vocabulary of a model with `count` ids. Special tokens spell nothing: no grammar can ask
    for one."""
    tokens = [b""] * count
    for id in tokenizer.backend.get_vocab(with_added_tokens=True).values():
        if id < count and id not in tokenizer.special_ids:
            tokens[id] = tokenizer.token_bytes(id)
    ends = sorted(id for id in end_ids if id < count)
    return Vocabulary(tokens, ends, tokenizer.strips_leading_space)


def _busy() -> XverseError:
    return XverseError(
        "The grammar was not compiled.",
        "Other grammars, which take long, were asked for before it.",
        "Ask again a little later.",
    )


def _require_xgrammar() -> None:
    if sys.platform == "win32":
        raise XverseError(
            "Grammars cannot be used on Windows.",
            "They are compiled in a process with limits that only Unix has.",
            "Use WSL, or ask without a grammar.",
        )
    if importlib.util.find_spec("xgrammar") is None:
        raise XverseError(
            "Grammars need xgrammar, which is not installed.",
            "It compiles them, and finds which tokens may come next.",
            'Install it with `pip install "xverse-llm[serve]"`.',
        )
