"""Two replicas on a Ray cluster of this machine, one of which is killed under load."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.tiny_model import write_published_folder
from xverse import XverseError
from xverse.engine.llm import LLM
from xverse.engine.request import Sampling
from xverse.interop.ray_serve import build_app

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
psutil = pytest.importorskip("psutil")

MESSAGES = [{"role": "user", "content": "你好"}]
ASKED = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 8}


def test_the_number_of_replicas_is_checked() -> None:
    with pytest.raises(XverseError, match="cannot be 0 replicas"):
        build_app("somewhere", replicas=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ray") / "tiny"
    write_published_folder(path)
    return path


@pytest.fixture(scope="module")
def url(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    if "ray" not in request.config.getoption("markexpr"):
        pytest.skip("starts a cluster for a minute: run with -m ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = build_app(str(folder), name="tiny", cpus=0.1, kv_tokens=4096, keys=("secret-key",))
    serve.run(app)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def replicas() -> list[psutil.Process]:
    """The Ray workers whose children are servers."""
    found = psutil.process_iter()
    servers = [p for p in found if "xverse.interop.ray_replica" in " ".join(_words(p))]
    ours = {child.pid for child in psutil.Process().children(recursive=True)}
    return [p.parent() for p in servers if p.pid in ours]


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words


def expected(folder: Path) -> str:
    return LLM(folder).chat(MESSAGES, Sampling(temperature=0.0, max_tokens=8)).text


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(280)
def test_a_killed_replica_costs_its_requests_and_no_more(url: str, folder: Path) -> None:
    right = expected(folder)
    address, headers = f"{url}/v1/chat/completions", {"Authorization": "Bearer secret-key"}
    assert httpx.post(address, json=ASKED, timeout=60).status_code == 401
    done, answers, errors = threading.Event(), [], []

    def ask() -> None:
        with httpx.Client(timeout=60, headers=headers) as client:
            while not done.is_set():
                try:
                    response = client.post(address, json=ASKED)
                except httpx.TransportError as error:
                    errors.append(repr(error))
                    continue
                if response.status_code == 200:
                    answers.append(response.json()["choices"][0]["message"]["content"])
                else:
                    errors.append(f"{response.status_code} {response.text}")

    def wait_for(count: int) -> None:
        end = time.monotonic() + 100
        while len(answers) < count:
            assert time.monotonic() < end, f"{len(answers)} answers, errors: {errors[-3:]}"
            time.sleep(0.05)

    before = replicas()
    assert len(before) == 2
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_for(20)
        os.kill(before[0].pid, signal.SIGKILL)
        wait_for(len(answers) + 40)
        end = time.monotonic() + 100
        while {p.pid for p in replicas()} <= {p.pid for p in before[1:]}:  # until it is replaced
            assert time.monotonic() < end, "no new replica began"
            time.sleep(0.5)
        errors_then = len(errors)
        wait_for(len(answers) + 40)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {right}
    assert errors_then <= len(threads), errors
    assert len(errors) == errors_then, errors[errors_then:]
    with httpx.stream(
        "POST", address, json={**ASKED, "stream": True}, headers=headers, timeout=60
    ) as response:
        assert list(response.iter_lines())[-2] == "data: [DONE]"
