"""Shares of keys, and the queue: fair, bounded, and left as it was found."""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from tests.server.inside import Scripted, inside
from xverse.errors import XverseError
from xverse.server.limits import Bucket, Keys, Shares, read_keys
from xverse.server.queue import FairQueue
from xverse.server.refusals import Refusal


def test_a_bucket_refills_and_owes() -> None:
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    bucket.spend(60)
    assert bucket.wait_s(1) == pytest.approx(1)
    now[0] = 1.0
    assert bucket.wait_s(1) == 0
    bucket.spend(121)  # an answer that was longer than what was left
    assert bucket.wait_s(1) == pytest.approx(121)
    now[0] = 1000.0
    assert bucket.wait_s(60) == 0
    assert bucket.wait_s(1000) == 0  # never more than there can be


def test_keys_are_told_apart_and_others_refused() -> None:
    keys = Keys(["first-key", "second-key"], Shares())
    first, second = keys.tenant("Bearer first-key"), keys.tenant("bearer second-key")
    assert first is not second
    assert first is keys.tenant("Bearer first-key")
    for wrong in (None, "", "Bearer", "Bearer ", "Bearer first-ke", "first-key", "Basic first-key"):
        with pytest.raises(Refusal) as caught:
            keys.tenant(wrong)
        assert caught.value.status == 401
    everybody = Keys([], Shares())
    assert everybody.tenant(None) is everybody.tenant("Bearer anything")
    assert not everybody.asked


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key\n\n  second-key  \n")
    assert read_keys(file) == ["first-key", "second-key"]
    file.write_text("# none\n")
    with pytest.raises(XverseError, match="no API key"):
        read_keys(file)
    with pytest.raises(XverseError, match="cannot be read"):
        read_keys(tmp_path / "nothing")


def test_the_queue_lets_keys_take_turns() -> None:
    async def run() -> list[str]:
        queue = FairQueue(max_requests=100, max_tokens=1000)
        entered: list[str] = []

        async def ask(key: str) -> None:
            async with queue.turn(key, 1, 1):
                entered.append(key)
                await asyncio.sleep(0)

        async with AsyncExitStack() as first:
            await first.enter_async_context(queue.turn("x", 1, 1))
            tasks = [asyncio.ensure_future(ask("a")) for _ in range(5)]
            await asyncio.sleep(0)
            tasks += [asyncio.ensure_future(ask("b")) for _ in range(2)]
            await asyncio.sleep(0)
            assert queue.waiting == 7
        await asyncio.gather(*tasks)
        assert queue.waiting == 0
        return entered

    assert asyncio.run(run()) == ["a", "b", "a", "b", "a", "a", "a"]


def test_the_queue_is_bounded_in_requests_and_tokens() -> None:
    async def run() -> None:
        queue = FairQueue(max_requests=2, max_tokens=10)
        async with queue.turn("x", 1, 1):
            tasks = [asyncio.ensure_future(enter(queue, tokens)) for tokens in (4, 4)]
            await asyncio.sleep(0)
            with pytest.raises(Refusal) as caught:
                await enter(queue, 1)
            assert caught.value.status == 429
            assert int(caught.value.headers["retry-after"]) >= 1
            tasks[0].cancel()
            await asyncio.gather(tasks[0], return_exceptions=True)
            with pytest.raises(Refusal, match="tokens"):
                await enter(queue, 7)
            more = asyncio.ensure_future(enter(queue, 6))
            await asyncio.sleep(0)
            assert queue.waiting == 2
        await asyncio.gather(tasks[1], more)

    asyncio.run(run())


async def enter(queue: FairQueue, tokens: int, weight: int = 1) -> None:
    async with queue.turn("k", weight, tokens):
        await asyncio.sleep(0)


def test_the_queue_survives_those_who_leave_at_any_moment() -> None:
    async def run() -> None:
        queue = FairQueue(max_requests=1000, max_tokens=10**6)
        queue.slots = 3
        tasks = [asyncio.ensure_future(enter(queue, 1, weight=1 + i % 5)) for i in range(200)]
        for step in range(100):
            await asyncio.sleep(0)
            tasks[(step * 37) % 200].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert queue.waiting == 0
        assert queue.used == 0
        async with queue.turn("k", 3, 1):
            pass

    asyncio.run(asyncio.wait_for(run(), 20))


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def headers() -> Iterator[dict[str, str]]:
    return {"authorization": "Bearer the-only-key"}


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (Shares(requests_per_minute=2), "requests per minute"),
        (Shares(tokens_per_minute=30), "tokens per minute"),
    ],
)
def test_a_key_that_has_had_its_share_waits(
    folder: Path, headers: dict[str, str], shares: Shares, words: str
) -> None:
    engine = Scripted(lambda _: [75, 104, 3])
    with inside(folder, engine, keys=("the-only-key", "another-key"), shares=shares) as server:
        url = f"{server.url}/v1/chat/completions"
        answers = [httpx.post(url, json=CHAT, headers=headers, timeout=60) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert words in answers[2].json()["error"]["message"]
        assert int(answers[2].headers["retry-after"]) >= 1
        other = {"authorization": "Bearer another-key"}
        assert httpx.post(url, json=CHAT, headers=other, timeout=60).status_code == 200


def test_answers_at_once_are_bounded_by_key_and_the_queue_for_all(folder: Path) -> None:
    engine = Scripted(lambda _: [75] * 100 + [3], slow_s=0.02)
    engine.max_running = 1  # and two more are let through
    with inside(folder, engine, shares=Shares(concurrency=4), max_queue=1) as server:
        running = server.running

        async def ask(client: httpx.AsyncClient) -> int:
            return (await client.post("/v1/chat/completions", json=CHAT)).status_code

        async def run() -> list[int]:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                first = [asyncio.ensure_future(ask(client)) for _ in range(4)]
                while running.service.queue.waiting < 1:
                    await asyncio.sleep(0.01)
                fifth = await ask(client)
                return [fifth, *(await asyncio.gather(*first))]

        assert asyncio.run(run()) == [429, 200, 200, 200, 200]
        text = httpx.get(f"{server.url}/metrics", timeout=60).text
        assert 'reason="rate_limit_exceeded"} 1.0' in text
