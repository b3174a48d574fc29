"""The server as a process, ill-treated: the parts of bench/server_chaos.py in small."""

import asyncio
import json
import signal
import socket
import time
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


def test_a_stop_waits_for_who_reads_slowly(subject: Subject) -> None:
    body = json.dumps({"prompt": "a b " * 750_000}).encode()  # whose ids are 8 MB of JSON
    head = "POST /tokenize HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with serve(subject.model, "--drain-seconds", "120") as served, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(head.encode() + body)
        heard = slow.recv(4096)
        served.process.send_signal(signal.SIGTERM)
        wait(lambda: said(served, '"stopping"'))
        time.sleep(1.5)  # a server that does not wait is gone by then, and the test fails
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**22)
        while part := slow.recv(2**20):
            heard += part
        assert served.process.wait(60) == 0
    head, _, content = heard.partition(b"\r\n\r\n")
    assert f"content-length: {len(content)}".encode() in head
    assert json.loads(content)["count"] >= 1_500_000


def test_an_engine_does_not_outlive_its_api_process(subject: Subject) -> None:
    pytest.importorskip("xgrammar")
    with serve(subject.model, *FLAGS) as served:
        wait(served.ready)
        asyncio.run(kill_api(subject, served))
