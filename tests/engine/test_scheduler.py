"""Who brings what to a step: budgets hold, first come is first served, pages run out in order."""

import pytest

from tests.engine.tiny import greedy
from xverse.engine.pages import Pages
from xverse.engine.request import Request
from xverse.engine.sampler import Sampler
from xverse.engine.scheduler import Chunk, Generation, Scheduler
from xverse.errors import XverseError


def scheduler(pages: int = 100, size: int = 4, step_tokens: int = 16, rows: int = 8) -> Scheduler:
    return Scheduler(Pages(pages, size), step_tokens, rows)


def arrive(it: Scheduler, number: int, tokens: int, answer: int = 8) -> Generation:
    ids = tuple(range(100 * number, 100 * number + tokens))
    request = Request(ids, greedy(answer))
    generation = Generation(number, request, Sampler(request.sampling), "", list(ids))
    it.add(generation)
    return generation


def step(it: Scheduler) -> dict[int, int]:
    """Plan, pretend to compute, and give each complete one a token. Number -> tokens brought."""
    chunks: list[Chunk] = it.plan()
    complete = [chunk.generation for chunk in chunks if chunk.complete]
    it.launched(chunks)
    for generation in complete:
        generation.ids[-1], generation.pending = 7, 0
    it.landed(chunk.generation for chunk in chunks)
    it.check()
    return {chunk.generation.number: chunk.count for chunk in chunks}


def test_prompts_come_in_chunks_beside_those_who_decode() -> None:
    it = scheduler()
    arrive(it, 0, 5)
    assert step(it) == {0: 5}
    arrive(it, 1, 40)
    arrive(it, 2, 3)
    assert step(it) == {1: 16, 0: 1}  # as many as without company
    assert step(it) == {1: 16, 0: 1}
    assert step(it) == {1: 8, 2: 3, 0: 1}
    assert step(it) == {0: 1, 1: 1, 2: 1}


def test_no_more_run_than_may() -> None:
    it = scheduler(rows=2)
    generations = [arrive(it, number, 2) for number in range(4)]
    assert set(step(it)) == {0, 1}
    it.remove(generations[0])
    assert set(step(it)) == {1, 2}


def test_whoever_came_last_makes_room_and_is_computed_again() -> None:
    it = scheduler(pages=4, size=2, step_tokens=8)
    first = arrive(it, 0, 3, 5)
    second = arrive(it, 1, 1, 5)
    step(it)
    seen = []
    while len(first.ids) < 8:
        seen.append(set(step(it)))
    assert {0, 1} in seen
    assert seen[-1] == {0}
    assert it.waiting == [second]
    assert second.held == 0
    kept = list(second.ids)
    it.remove(first)
    assert step(it)[1] >= 1
    assert second.ids[: len(kept)] == kept


def test_a_prompt_waits_until_it_fits_and_nobody_passes_it() -> None:
    it = scheduler(pages=10, size=4, step_tokens=64)
    first = arrive(it, 0, 30, 2)
    arrive(it, 1, 12, 2)
    arrive(it, 2, 1, 2)
    assert set(step(it)) == {0}
    it.remove(first)
    assert set(step(it)) == {1, 2}


def test_what_can_never_fit_is_refused() -> None:
    it = scheduler(pages=4, size=4)
    arrive(it, 0, 8, 8)
    with pytest.raises(XverseError, match="does not fit"):
        arrive(it, 1, 9, 8)
    assert len(it.waiting) == 1


def test_a_known_beginning_is_not_computed_again() -> None:
    it = scheduler()
    first = arrive(it, 0, 13)
    assert step(it) == {0: 13}
    again = Generation(1, first.request, first.sampler, "", list(first.request.ids))
    it.add(again)
    assert step(it) == {0: 1, 1: 1}
    assert again.held == 13


def test_twins_wait_for_each_other_and_others_pass() -> None:
    it = scheduler(step_tokens=8)
    for number in range(3):
        ids = tuple(range(13)) if number < 2 else (5, 5)
        request = Request(ids, greedy(8))
        it.add(Generation(number, request, Sampler(request.sampling), "", list(ids)))
    assert step(it) == {0: 8}
    assert step(it) == {0: 5, 2: 2}
    assert step(it) == {1: 1, 0: 1, 2: 1}
    assert it.running[1].held == 13


def test_removing_at_any_moment_returns_every_page() -> None:
    it = scheduler(pages=9, size=2, step_tokens=8)
    for number in range(200):
        generation = arrive(it, number, 1 + number % 7)
        for _ in range(number % 3):
            step(it)
        for gone in [generation] if number % 2 else [*it.running, *it.waiting]:
            it.remove(gone)
        it.check()
    for gone in [*it.running, *it.waiting]:
        it.remove(gone)
    assert it.pages.available == 9
