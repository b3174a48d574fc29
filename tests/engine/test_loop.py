"""One engine under many readers: threads, half-read generators, and those that are dropped."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.test_engine import prompts
from tests.engine.tiny import greedy, plain_answer, tiny_decoder
from xverse.engine.engine import Engine
from xverse.engine.loop import Loop
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request
from xverse.errors import XverseError


@pytest.fixture
def loop() -> Loop:
    return Loop(Engine(tiny_decoder(), options=EngineOptions(kv_tokens=1024, page_size=4)))


def at_rest(loop: Loop) -> bool:
    pages = loop.engine.pages
    return not loop.engine.busy and pages.available == pages.count and not loop._boxes


def test_threads_get_their_own_tokens(loop: Loop) -> None:
    asked = prompts(16, seed=8)

    def read(ids: tuple[int, ...]) -> list[int]:
        return [token.id for token in loop.run([Request(ids, greedy(15))])]

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(read, asked))
    assert found == [plain_answer(ids, 15) for ids in asked]
    assert at_rest(loop)


def test_generators_read_in_turns(loop: Loop) -> None:
    asked = prompts(5, seed=9)
    streams = [loop.run([Request(ids, greedy(10))]) for ids in asked]
    found = list(zip(*[[t.id for t in stream] for stream in streams], strict=True))
    assert found == list(zip(*[plain_answer(ids, 10) for ids in asked], strict=True))
    streams = [loop.run([Request(ids, greedy(10))]) for ids in asked]
    turns = [[next(stream).id for stream in streams] for _ in range(10)]
    assert turns == [list(turn) for turn in found]


def test_an_abandoned_generator_aborts_its_request(loop: Loop) -> None:
    for ids in prompts(5, seed=10):
        stream = loop.run([Request(ids, greedy(100)), Request(ids[:1], greedy(100))])
        next(stream)
        assert loop.engine.busy
        del stream
        gc.collect()
        assert at_rest(loop)


def test_dropping_one_inside_a_step_waits_for_the_step(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector may close a generator while this thread holds the lock."""
    asked = prompts(2, seed=11)
    dropped = [loop.run([Request(asked[0], greedy(50))])]
    next(dropped[0])
    plain = loop.engine.step

    def step() -> object:
        dropped.clear()
        return plain()

    monkeypatch.setattr(loop.engine, "step", step)
    found = [token.id for token in loop.run([Request(asked[1], greedy(8))])]
    assert found == plain_answer(asked[1], 8)
    assert at_rest(loop)


def test_the_reader_ends_one_of_several(loop: Loop) -> None:
    ended: set[int] = set()
    counts = [0, 0, 0]
    requests = [Request(ids, greedy(12)) for ids in prompts(3, seed=12)]
    for token in loop.run(requests, ended):
        counts[token.request] += 1
        if counts[1] == 3:
            ended.add(1)
    assert counts == [12, 3, 12]
    assert at_rest(loop)


def test_one_that_never_fits_takes_back_those_before_it(loop: Loop) -> None:
    requests = [Request((1, 2), greedy(5)), Request((1,), greedy(5000))]
    with pytest.raises(XverseError, match="does not fit"):
        list(loop.run(requests))
    assert at_rest(loop)


def test_an_interrupted_step_leaves_the_engine_whole(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompts(1, seed=13)[0]
    other = loop.run([Request(ids, greedy(9))])
    found = [next(other).id]
    with monkeypatch.context() as broken:
        broken.setattr(loop.engine.decoder, "logits", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(loop.run([Request(ids, greedy(9))]))
    assert found + [token.id for token in other] == plain_answer(ids, 9)
    assert at_rest(loop)
