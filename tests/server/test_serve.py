"""`xverse serve` as a person starts it: two processes, kill -9, SIGTERM, errors at the start."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from xverse.errors import XverseError
from xverse.server.messages import Start
from xverse.server.supervisor import Supervisor

CHAT = {
    "model": "XVERSE-Tiny-Chat",
    "messages": [{"role": "user", "content": "Hello"}],
    "temperature": 0,
    "ignore_eos": True,
    "repetition_penalty": 1.0,
    "max_tokens": 200,
}
START_S = 120


@contextmanager
def serve(folder: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, where it listens, and the lines it has printed so far."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xverse", "serve", str(folder), "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)  # type: ignore[arg-type]
    reader.start()
    try:
        wait(lambda: any("listening at" in line for line in lines) or process.poll() is not None)
        told = next(line for line in lines if "listening at" in line)
        found = re.search(r"http://\S+", told)
        assert found is not None
        yield process, found[0], lines
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
        reader.join(10)


def wait(condition: object, seconds: float = START_S) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def ready(client: httpx.Client) -> bool:
    return client.get("/ready").status_code == 200


@contextmanager
def crowd(client: httpx.Client, count: int) -> Iterator[list[httpx.Response]]:
    """So many ask at once; all have their answers at the end."""
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(client.post("/v1/chat/completions", json=CHAT))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    yield answers
    for thread in threads:
        thread.join()
    assert len(answers) == count


def engine_of(process: subprocess.Popen[str]) -> int:
    """The process id of the engine: the one child."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = [c for c in children if "engine_process" in Path(f"/proc/{c}/cmdline").read_text()]
    return int(child)


def test_killed_engines_come_back_and_a_stop_loses_nobody(folder: Path) -> None:
    with serve(folder, "--drain-seconds", "60") as (process, url, lines):
        client = httpx.Client(base_url=url, timeout=60)
        assert client.get("/health").status_code == 200  # alive before it is ready
        wait(lambda: ready(client))
        expected = client.post("/v1/chat/completions", json=CHAT).json()
        text = expected["choices"][0]["message"]["content"]
        assert text

        for _ in range(3):
            with crowd(client, 4) as answers:
                time.sleep(0.2)
                os.kill(engine_of(process), signal.SIGKILL)
            for answer in answers:  # a typed error, or the right answer: never a wrong one
                if answer.status_code == 200:
                    assert answer.json()["choices"][0]["message"]["content"] == text
                else:
                    assert answer.status_code == 503
                    assert answer.json()["error"]["code"] in ("engine_restarted", "not_ready")
            wait(lambda: ready(client))
            again = client.post("/v1/chat/completions", json=CHAT).json()
            assert again["choices"][0]["message"]["content"] == text
        metrics = client.get("/metrics").text
        assert re.search(r"engine_restarts_total\S* 3\.0", metrics)

        # SIGTERM under load: who is being answered is answered, who comes now is refused.
        with crowd(client, 6) as found:
            wait(lambda: sum_of(client, "num_requests_running") + len(found) >= 6)
            process.send_signal(signal.SIGTERM)
            wait(lambda: any('"draining"' in line for line in lines))
            if len(found) < 6:
                assert client.post("/v1/chat/completions", json=CHAT).status_code == 503
        assert [answer.status_code for answer in found] == [200] * 6
        assert {a.json()["choices"][0]["message"]["content"] for a in found} == {text}
        assert process.wait(30) == 0
        assert any(line.startswith("next: curl") for line in lines)


def sum_of(client: httpx.Client, name: str) -> float:
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in client.get("/metrics").text.splitlines()
        if line.startswith(f"xverse:{name}")
    )


def test_a_model_that_cannot_be_loaded_is_said_and_ends_it(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for file in broken.glob("pytorch_model-00003*"):
        file.unlink()
    supervisor = Supervisor(Start(str(broken)), lambda _: None)
    with pytest.raises(XverseError, match="pytorch_model-00003"):
        asyncio.run(asyncio.wait_for(supervisor.run(), START_S))
    assert supervisor.process is not None
    assert supervisor.process.returncode == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--api-keys-file", "/nonexistent"], "cannot be read"),
        (["--max-choices", "500"], "max_choices"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    folder: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from xverse.cli import run

    assert run(["serve", str(folder), *flags]) == 1
    assert words in capsys.readouterr().err
