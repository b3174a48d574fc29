"""FIXTURE. `xverse serve` as a process of its own, and clients that see every byte of an answer."""

import asyncio
import http.client
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

START_S = 280


@dataclass
class Served:
    """A server that runs: its process, where it listens, and the lines it has printed so far."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        """Where it listens on 127.0.0.1."""
        return int(self.url.rsplit(":", 1)[1])

    def engine(self) -> int | None:
        """The process id of the engine, the one child; None while there is none."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for child in path.read_text().split():
            with suppress(OSError):  # it ended since
                if "engine_process" in Path(f"/proc/{child}/cmdline").read_text():
                    return int(child)
        return None

    def alive(self) -> bool:
        """Whether the API process answers, whatever its engine does."""
        return self._get("/health")[0] == 200

    def ready(self) -> bool:
        """Whether requests can be answered now."""
        return self._get("/ready")[0] == 200

    def metric(self, name: str, label: str = "") -> float:
        """The sum of a metric over its labels, or of those that have this in them."""
        text = self._get("/metrics")[1]
        found = re.findall(rf"^xverse:{name}(?:{{([^}}]*)}})? (\S+)$", text, re.M)
        return sum(float(value) for labels, value in found if label in labels)

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


@contextmanager
def serve(model: str, *flags: str, threads: int | None = 1) -> Iterator[Served]:
    """`xverse serve` at a free port, listening but perhaps not ready; ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "xverse", "serve", model, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
    )
    served = Served(process)
    assert process.stdout is not None
    output = process.stdout
    reader = threading.Thread(target=lambda: served.lines.extend(output), daemon=True)
    reader.start()
    try:
        wait(lambda: said(served, "listening at") or process.poll() is not None)
        told = said(served, "listening at")
        assert told, "".join(served.lines)
        found = re.search(r"http://\S+", told)
        assert found is not None
        served.url = found[0]
        yield served
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        reader.join(10)
        output.close()


def said(served: Served, words: str) -> str:
    """The line with these words, "" while there is none."""
    return next((line for line in served.lines if words in line), "")


def wait(condition: Callable[[], object], seconds: float = START_S) -> None:
    """Until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@dataclass
class Reply:
    """What a client got. `whole` is whether it ended as HTTP says, `seconds` are from the first
    byte sent to the last one received."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    seconds: float = 0.0

    def json(self) -> dict[str, object]:
        """The body as one JSON object."""
        found: dict[str, object] = json.loads(self.body)
        return found

    @property
    def events(self) -> list[dict[str, object]]:
        """The events of a stream, without its [DONE]."""
        parts = [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n")]
        return [json.loads(part) for part in parts if part.startswith(b"{")]

    @property
    def text(self) -> str | None:
        """The text of a finished completion, streamed or not; None where it ended in an error."""
        if self.status != 200 or not self.whole:
            return None
        if not self.headers["content-type"].startswith("text/event-stream"):
            return _said(self.json())
        if not self.body.endswith(b"data: [DONE]\n\n"):
            return None
        return "".join(_said(event) for event in self.events)

    @property
    def error(self) -> str | None:
        """The code of the error that it is, or that its stream ended in."""
        last = self.events[-1:] if self.status == 200 else [self.json()] if self.body else []
        found = last[0].get("error") if last else None
        assert found is None or isinstance(found, dict)
        return found["code"] if found else None


def _said(content: dict[str, object]) -> str:
    choices = content["choices"]
    assert isinstance(choices, list)
    return "".join(choice["text"] for choice in choices)


async def post(
    port: int,
    path: str,
    asked: dict[str, object],
    *,
    leave_after: int | None = None,
    reset: bool = False,
) -> Reply:
    """Ask on a connection of its own. With `leave_after`, hang up once so many bytes of the answer
    have come, with `reset` as a client that is killed does; the reply is not whole then."""
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    data = bytearray()
    try:
        await writer.drain()
        while leave_after is None or len(data) < leave_after:
            part = await reader.read(2**16)
            if not part:
                break
            data += part
        if leave_after is not None and reset:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
    except ConnectionError:
        pass
    finally:
        writer.close()
    return _reply(bytes(data), time.perf_counter() - began)


def _reply(data: bytes, seconds: float) -> Reply:
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    if not first.startswith("HTTP/1.1 "):
        return Reply(seconds=seconds)
    pairs = (line.partition(": ") for line in lines)
    headers = {name.lower(): value for name, _, value in pairs}
    status = int(first.split()[1])
    if headers.get("transfer-encoding") != "chunked":
        whole = len(rest) == int(headers.get("content-length", -1))
        return Reply(status, headers, rest, whole, seconds)
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size or b"0", 16)
        if len(rest) < length + 2:
            break
        body += rest[:length]
        rest = rest[length + 2 :]
        if not length:
            return Reply(status, headers, bytes(body), True, seconds)
    return Reply(status, headers, bytes(body), False, seconds)
