"""Continuous batching: whatever happens around a request, its tokens are those it gets alone."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.tiny import (
    VOCAB,
    dynamic_decoder,
    greedy,
    plain_answer,
    plain_choice,
    repeating_decoder,
    tiny_decoder,
)
from xverse.engine.engine import Engine
from xverse.engine.options import EngineOptions
from xverse.engine.request import Failed, Request, Sampling, Scores, Token
from xverse.engine.simple import decode
from xverse.errors import XverseError


def engine(kv_tokens: int = 4096, **options: int) -> Engine:
    return Engine(tiny_decoder(), options=EngineOptions(kv_tokens=kv_tokens, **options))


def finish(it: Engine) -> dict[int, list[int]]:
    """Run until nothing is left; the ids of each request."""
    found: dict[int, list[int]] = {}
    while it.busy:
        for output in it.step():
            assert isinstance(output, Token)
            found.setdefault(output.request, []).append(output.id)
        it.scheduler.check()
    return found


def prompts(count: int, seed: int = 0, most: int = 40) -> list[tuple[int, ...]]:
    chance = random.Random(seed)
    return [
        tuple(chance.randrange(VOCAB) for _ in range(chance.randint(1, most))) for _ in range(count)
    ]


def test_32_at_once_get_their_solo_answers() -> None:
    it = engine()
    asked = prompts(32)
    numbers = [it.add(Request(ids, greedy(20))) for ids in asked]
    found = finish(it)
    for number, ids in zip(numbers, asked, strict=True):
        assert found[number] == plain_answer(ids, 20)
    assert len({tuple(ids) for ids in found.values()}) > 16  # the model is not a constant


@st.composite
def stories(draw: st.DrawFn) -> dict[str, object]:
    """Machine, and what happens at each step: arrivals with shared beginnings, and aborts."""
    size = draw(st.integers(1, 9))
    rows = draw(st.integers(1, 8))
    return {
        "page_size": size,
        "max_running": rows,
        "step_tokens": draw(st.integers(rows, rows + 40)),
        "kv_tokens": draw(st.integers(56, 200)),
        "share_prefixes": draw(st.booleans()),
        "speculate": draw(st.sampled_from([0, 1, 8])),
        "seed": draw(st.integers(0, 2**32)),
    }


KINDS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.0),
    Sampling(temperature=0.9, seed=1, top_k=20, top_p=0.9),
    Sampling(temperature=0.0, presence_penalty=1.0, repetition_penalty=1.3),
    Sampling(temperature=1.0, seed=2, stop_ids=(3, 4, 5), min_tokens=3),
    Sampling(temperature=0.0, logprobs=2, prompt_logprobs=1),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stories())
def test_the_same_ids_whatever_happens(story: dict[str, int]) -> None:
    """Random arrivals, lengths, options, aborts, tiny memories, shared beginnings, chunk sizes."""
    chance = random.Random(story.pop("seed"))
    # Where much is guessed, a model that repeats itself: or all of it would be wrong.
    decoder = repeating_decoder() if story["speculate"] == 8 else tiny_decoder()
    it = Engine(decoder, options=EngineOptions(**story))
    beginnings = prompts(3, seed=1, most=30)
    asked: dict[int, tuple[tuple[int, ...], Sampling]] = {}
    found: dict[int, list[int]] = {}
    done: set[int] = set()
    for tick in range(400):
        if tick < 20 and chance.random() < 0.7:
            own = tuple(chance.randrange(VOCAB) for _ in range(chance.randint(0, 12)))
            ids = (chance.choice(beginnings) + own)[:40]
            limit = {"max_new_tokens": chance.choice([1, 4, 16])}
            sampling = chance.choice(KINDS).over(limit)
            number = it.add(Request(ids, sampling, chance.choice("ab")))
            asked[number] = ids, sampling
            found[number] = []
        if asked and chance.random() < 0.1:
            gone = chance.choice(list(asked))
            if gone not in done:
                del asked[gone]
            it.abort(gone)
        for output in it.step():
            if isinstance(output, Scores):
                assert found[output.request] == []
                assert len(output.logprobs) == len(asked[output.request][0]) - 1
                continue
            assert isinstance(output, Token)
            found[output.request].append(output.id)
            if output.finish:
                done.add(output.request)
        it.scheduler.check()
        if tick > 20 and not it.busy:
            break
    assert set(asked) == done
    for number, (ids, sampling) in asked.items():
        assert found[number] == plain_choice(ids, sampling, decoder)
    assert it.pages.available == it.pages.count


def test_preemption_changes_nothing() -> None:
    it = engine(kv_tokens=64, page_size=4)
    preempted = 0
    plain = it.scheduler._preempt

    def count(generation: object) -> None:
        nonlocal preempted
        preempted += 1
        plain(generation)

    it.scheduler._preempt = count  # type: ignore[method-assign]
    sampling = Sampling(max_tokens=30, temperature=1.0, seed=3).over({})
    asked = prompts(6, seed=2, most=20)
    numbers = [it.add(Request(ids, sampling)) for ids in asked]
    found = finish(it)
    assert preempted > 0
    for number, ids in zip(numbers, asked, strict=True):
        assert found[number] == [t.id for t in decode(tiny_decoder(), [ids], [sampling])]


def test_rope_that_follows_the_length_does_so_however_prompts_are_cut() -> None:
    """Past the trained 16 tokens: shared beginnings, chunks, preemption."""
    decoder = dynamic_decoder()
    options = EngineOptions(kv_tokens=128, page_size=2, step_tokens=9, max_running=5)
    it = Engine(decoder, options=options)
    stem = prompts(1, seed=20)[0] * 40
    asked = [stem[:length] for length in (30, 10, 30, 14, 38, 25, 30, 16, 17)]
    numbers = [it.add(Request(ids, greedy(20))) for ids in asked]
    found = finish(it)
    for number, ids in zip(numbers, asked, strict=True):
        assert found[number] == [t.id for t in decode(decoder, [ids], [greedy(20)])]


def test_pages_come_back_after_a_thousand_aborts() -> None:
    """While they wait, in the middle of their prompts, while they decode, and after their end."""
    it = engine(kv_tokens=256, page_size=4, step_tokens=9, max_running=5)
    chance = random.Random(0)
    live: list[int] = []
    moments: Counter[str] = Counter()

    def abort(number: int) -> None:
        generation = it._generations.get(number)
        if generation is None:
            moments["ended"] += 1
        elif generation.table is None:
            moments["waiting"] += 1
        else:
            moments["prompt" if generation.missing > 1 else "decoding"] += 1
        it.abort(number)

    for ids in prompts(1000, seed=4, most=30):
        live.append(it.add(Request(ids, greedy(20), chance.choice("abc"))))
        for _ in range(chance.choice([0, 0, 0, 1, 2])):
            it.step()
        if len(live) > chance.randint(0, 8):
            abort(live.pop(chance.randrange(len(live))))
            it.scheduler.check()
    for number in live:
        abort(number)
    assert moments.total() == 1000
    assert all(moments[moment] > 50 for moment in ("waiting", "prompt", "decoding")), moments
    it.scheduler.check()
    assert it.pages.available == it.pages.count == 64
    assert not it.busy
    assert it.step() == []


def test_namespaces_do_not_share_pages() -> None:
    ids = tuple(range(21))
    it = engine(page_size=2)
    computed = []
    for name in ("a", "a", "b", ""):
        number = it.add(Request(ids, greedy(2), name))
        chunks = it.scheduler.plan()
        computed.append(chunks[0].count)
        it.abort(number)
        it.add(Request(ids, greedy(2), name))
        finish(it)
    assert computed == [21, 1, 21, 21]


def test_end_ids_end_an_answer() -> None:
    ids = prompts(1)[0]
    free = plain_answer(ids, 20)
    it = Engine(tiny_decoder(), end_ids={free[5]}, options=EngineOptions(kv_tokens=512))
    it.add(Request(ids, greedy(20)))
    assert finish(it) == {0: free[: free.index(free[5]) + 1]}


def test_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder()
    plain = decoder.logits

    def broken(x_TD: torch.Tensor) -> torch.Tensor:
        logits = plain(x_TD).clone()
        logits[0] = float("nan")
        return logits

    it = engine()
    asked = prompts(4, seed=6)
    numbers = [it.add(Request(ids, greedy(6))) for ids in asked]
    monkeypatch.setattr(decoder, "logits", broken)
    first = it.step()
    monkeypatch.undo()
    failed = [output for output in first if isinstance(output, Failed)]
    assert len(failed) == 1
    assert "NaN" in str(failed[0].error)
    tokens = {o.request: [o.id] for o in first if isinstance(o, Token)}
    for number, more in finish(it).items():
        tokens[number] += more
    for number, ids in zip(numbers, asked, strict=True):
        if number != failed[0].request:
            assert tokens[number] == plain_answer(ids, 6)
    assert it.pages.available == it.pages.count


@pytest.mark.parametrize(
    "bad",
    [
        {"page_size": 0},
        {"kv_tokens": -1},
        {"max_running": True},
        {"step_tokens": 8, "max_running": 9},
    ],
)
def test_impossible_options_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(XverseError):
        EngineOptions(**bad)  # type: ignore[arg-type]


def test_memory_is_sized_by_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Engine(tiny_decoder())
    assert it.capacity == 16 * 256  # sixteen whole contexts of this small model
    monkeypatch.setattr("xverse.engine.memory.free_memory", lambda device: 2**20)
    bytes_of_a_token = 2 * 2 * 2 * 8 * 4
    assert Engine(tiny_decoder()).capacity == 2**19 // bytes_of_a_token
    monkeypatch.setattr("xverse.engine.memory.free_memory", lambda device: 0)
    with pytest.raises(XverseError, match="No memory"):
        Engine(tiny_decoder())
