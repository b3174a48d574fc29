"""The server as a process, ill-treated: the parts of bench/server_chaos.py in small."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.server_chaos import FLAGS, Subject, kill_api, kills, leavers, overload, stop
from tests.server.served import Served, said, serve, wait

QUEUE = 8


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return Subject.of(str(folder), max_tokens=40)


@pytest.fixture(scope="module")
def served(subject: Subject) -> Iterator[Served]:
    with serve(subject.model, *FLAGS, "--max-queue", str(QUEUE)) as found:
        assert found.alive()  # before it is ready
        wait(found.ready)
        yield found


def test_overload_is_refused_and_the_rest_answered(subject: Subject, served: Served) -> None:
    part = overload(subject, served, 2, queue=QUEUE, choices=16, factor=20)
    assert asyncio.run(part)["queue_longest"]


def test_clients_that_hang_up_leave_nothing_behind(subject: Subject, served: Served) -> None:
    asyncio.run(leavers(subject, served, 30))


def test_killed_engines_come_back_and_nobody_is_told_wrong(
    subject: Subject, served: Served
) -> None:
    asyncio.run(kills(subject, served, 3))
    assert said(served, "next: curl")


@pytest.mark.parametrize("number", range(2))
def test_a_stop_loses_nobody(subject: Subject, number: int) -> None:
    with serve(subject.model, *FLAGS, "--drain-seconds", "120") as served:
        wait(served.ready)
        asyncio.run(stop(subject, served))


def test_an_engine_does_not_outlive_its_api_process(subject: Subject) -> None:
    pytest.importorskip("xgrammar")
    with serve(subject.model, *FLAGS) as served:
        wait(served.ready)
        asyncio.run(kill_api(subject, served))
