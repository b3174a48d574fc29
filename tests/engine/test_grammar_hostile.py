"""Grammars meant to do harm: each is answered in time, and everybody else goes on meanwhile."""

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine.grammar_walk import END, TOKENS
from tests.engine.hostile_grammars import grammars, worst
from tests.engine.tiny import greedy
from tests.text.tiny import write_tiny_tokenizer
from tests.tiny_model import published_config, random_decoder
from xverse.engine import grammar_compile, grammar_state
from xverse.engine.engine import Engine, Output
from xverse.engine.grammar import Grammar, Kind
from xverse.engine.grammar_compile import Ask, Grammars
from xverse.engine.grammar_process import Vocabulary
from xverse.engine.grammar_state import PATIENCE, Compiled, Job, Threads
from xverse.engine.options import EngineOptions
from xverse.engine.request import Failed, Request, Sampling, Token
from xverse.errors import XverseError
from xverse.text.tokenizer import Tokenizer

ANSWERED_S = 6.0  # what is promised where a grammar may take 5 s


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return Tokenizer.load(folder)


@contextmanager
def new_engine(tokenizer: Tokenizer, seconds: float) -> Iterator[Engine]:
    options = EngineOptions(kv_tokens=8192, grammar_seconds=seconds)
    decoder = random_decoder(published_config())
    engine = Engine(decoder, end_ids=[3], options=options, tokenizer=tokenizer)
    assert isinstance(first_answers(engine, [Grammar.regex("warm")])[0], Token)
    yield engine
    engine.grammars.close()


@pytest.fixture(scope="module")
def it(tokenizer: Tokenizer) -> Iterator[Engine]:
    with new_engine(tokenizer, 5.0) as engine:
        yield engine


def held(grammar: Grammar) -> Sampling:
    return Sampling(max_tokens=8, grammar=grammar).over({})


def first_answers(it: Engine, asked: Sequence[Grammar]) -> list[Output]:
    """Ask for all at once, and an ordinary request beside them gets a token in every step."""
    numbers = [it.add(Request((5, 6), held(grammar))) for grammar in asked]
    found: dict[int, Output] = {}
    ordinary = it.add(Request((7, 8), greedy(200)))
    while len(found) < len(numbers):
        outputs = it.step()
        (token,) = [output for output in outputs if output.request == ordinary]
        assert isinstance(token, Token)
        if token.finish:
            ordinary = it.add(Request((7, 8), greedy(200)))
        for output in outputs:
            if output.request in numbers:
                found.setdefault(output.request, output)
                it.abort(output.request)
    it.abort(ordinary)
    return [found[number] for number in numbers]


def test_a_hundred_hostile_grammars_while_another_request_goes_on(tokenizer: Tokenizer) -> None:
    texts = grammars()
    assert len(texts) >= 100
    asked = [grammar for grammar in map(taken, texts) if grammar is not None]
    failed = 0
    with new_engine(tokenizer, 0.4) as it:
        for first in range(0, len(asked), 12):
            start = time.monotonic()
            answers = first_answers(it, asked[first : first + 12])
            assert time.monotonic() - start < ANSWERED_S
            failed += sum(isinstance(answer, Failed) for answer in answers)
        assert 20 < failed < len(asked)
        assert not it.busy
        assert it.pages.available == it.pages.count
        assert isinstance(first_answers(it, [Grammar.regex("good")])[0], Token)


def taken(asked: tuple[Kind, str]) -> Grammar | None:
    """The grammar, if it is not refused as soon as it is written down."""
    try:
        return Grammar(*asked)
    except XverseError:
        return None


def test_the_worst_are_answered_within_six_seconds(it: Engine) -> None:
    start = time.monotonic()
    answers = first_answers(it, [*worst(), Grammar.regex("in time, or told why not")])
    assert time.monotonic() - start < ANSWERED_S
    for answer in answers[:-1]:
        assert isinstance(answer, Failed)
        assert any(word in str(answer.error) for word in ("too long", "Other grammars", "memory"))
    assert isinstance(first_answers(it, [Grammar.regex("good again")])[0], Token)


def wait_until_compiling(grammars: Grammars) -> None:
    desk = grammars._desk
    while not (desk._processes and desk._open and not desk._queue):
        time.sleep(0.01)
    time.sleep(0.05)


def test_a_process_killed_in_the_middle(it: Engine) -> None:
    number = it.add(Request((5, 6), held(worst()[0])))
    wait_until_compiling(it.grammars)
    for process in tuple(it.grammars._desk._processes):
        process.end()  # waits, so that the idle one is given nothing while it still looks alive
    outputs: list[Output] = []
    while it.busy:
        outputs += it.step()
    (failed,) = outputs
    assert isinstance(failed, Failed)
    assert failed.request == number
    assert "ended from outside" in str(failed.error)
    assert isinstance(first_answers(it, [Grammar.regex("next")])[0], Token)
    for process in tuple(it.grammars._desk._processes):  # while they have nothing to do
        process.end()
    assert isinstance(first_answers(it, [Grammar.regex("after")])[0], Token)


def new_grammars(seconds: float = 20.0) -> Grammars:
    return Grammars(lambda: Vocabulary(TOKENS, [END], False), seconds)


def answer(grammars: Grammars, ask: Ask) -> Compiled | XverseError:
    while (found := grammars.answer(ask)) is None:
        grammars.wait(0.05)
    return found


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compile, "KEPT", 3)
    grammars = new_grammars()
    asked = [Grammar.regex("a" * count) for count in range(1, 6)]
    sizes = []
    for grammar in asked:
        found = answer(grammars, grammars.ask(grammar))
        assert isinstance(found, Compiled)
        sizes.append(found.size)
    assert [grammars.ask(grammar).answer is not None for grammar in asked[2:]] == [True] * 3
    again = grammars.ask(asked[0])
    assert again.answer is None
    answer(grammars, again)
    assert len(grammars._desk._known) == 3
    monkeypatch.setattr(grammar_compile, "KEPT_BYTES", max(sizes) + 1)
    answer(grammars, grammars.ask(Grammar.regex("b")))
    assert len(grammars._desk._known) == 1
    grammars.close()


def test_no_process_is_left() -> None:
    grammars = new_grammars()
    for text in ("a", "b"):
        answer(grammars, grammars.ask(Grammar.regex(text)))
    started = list(grammars._desk._processes)
    assert started
    del grammars
    gc.collect()
    assert all(process._process.returncode is not None for process in started)


SCRIPT = """
import time
from tests.engine.hostile_grammars import worst
from tests.engine.test_grammar_hostile import answer, new_grammars, wait_until_compiling
from xverse.engine.grammar import Grammar
grammars = new_grammars(1.5)
answer(grammars, grammars.ask(Grammar.regex("a")))
grammars.ask(worst()[0])
wait_until_compiling(grammars)
print(*[process._process.pid for process in grammars._desk._processes], flush=True)
if {wait}: time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("killed", [False, True], ids=["at the end", "when killed"])
def test_no_process_outlives_python(killed: bool) -> None:
    command = [sys.executable, "-c", SCRIPT.format(wait=killed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as python:
        assert python.stdout is not None
        ids = python.stdout.readline().split()
        if killed:
            python.send_signal(signal.SIGKILL)
    assert ids
    end = time.monotonic() + 10  # a compilation that nobody waits for ends itself after 2.5 s
    while any(_runs(id) for id in ids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(_runs(id) for id in ids)


def _runs(id: str) -> bool:
    try:
        state = Path(f"/proc/{id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie here is for the machine's first process to bury


def test_a_grammar_too_slow_to_decode_fails_alone(
    it: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, release = Grammar.regex("[s]low"), threading.Event()
    plain = grammar_state.GrammarState._compute_mask

    def stuck(state: grammar_state.GrammarState) -> None:
        if state._compiled is it.grammars.ask(slow).answer:
            release.wait(20)
        plain(state)

    monkeypatch.setattr(grammar_state, "STEP_S", 0.1)
    monkeypatch.setattr(grammar_state.GrammarState, "_compute_mask", stuck)
    others = [Grammar.regex("x+"), Grammar.regex("y+")]
    answers = first_answers(it, [slow, slow, slow, *others])
    assert all(isinstance(answer, Failed) for answer in answers[:3])
    assert "too slow" in str(answers[0].error)  # type: ignore[union-attr]
    assert all(isinstance(answer, Token) for answer in answers[3:])
    start = time.monotonic()
    (again,) = first_answers(it, [slow])  # now it is known, and not even tried
    assert isinstance(again, Failed)
    assert time.monotonic() - start < 5
    release.set()


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="no clock of a thread")
def test_a_busy_machine_is_no_fault_of_the_grammar() -> None:
    job = Job(lambda: None)
    assert not job.too_long(1.0)  # nobody has begun
    job.run()
    assert not job.too_long(1.0)
    job.started -= PATIENCE * 0.9  # it was not given the CPU for that long
    assert not job.too_long(1.0)
    job.cpu_started -= 1.1
    assert job.too_long(1.0)
    job.cpu_started += 1.1
    job.started -= PATIENCE * 0.2
    assert job.too_long(1.0)


def test_stuck_jobs_are_left_and_errors_are_passed_on() -> None:
    threads, release = Threads(2), threading.Event()
    before = threading.active_count()
    stuck = [threads.start(lambda: release.wait(20) and None) for _ in range(3)]
    quick = threads.start(lambda: None)
    wrong = threads.start(lambda: [][1])
    for job in stuck:
        with pytest.raises(TimeoutError):
            threads.finish(job, 0.05)
    threads.finish(quick, 0.5)
    with pytest.raises(IndexError):
        threads.finish(wrong, 0.5)
    release.set()
    threads.close()
    end = time.monotonic() + 5
    while threading.active_count() > before - 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before - 2
