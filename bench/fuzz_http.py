"""CASE -> ANSWER. A client that sends any bytes, and is strict about the HTTP that comes back."""

import asyncio
from dataclasses import dataclass, field

from bench.fuzz_mutants import Case

LEAVING = ("half", "leave")


class NoHttpError(Exception):
    """What came is no HTTP."""


@dataclass(frozen=True)
class Answer:
    """A whole answer. `status` 0: the connection was closed without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class Caller:
    """One client: a connection that is kept while both sides keep it."""

    def __init__(self, ports: dict[bool, int], patience_s: float) -> None:
        """`ports`: the API's under False, the published service's under True. An answer that takes
        longer than `patience_s` is a hang."""
        self._ports, self._patience_s = ports, patience_s
        self._open: dict[bool, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def ask(self, case: Case) -> Answer:
        """Send it and read what comes. NoHttpError where that is none, TimeoutError for a hang."""
        async with asyncio.timeout(self._patience_s):
            # A server may close a connection that was kept at the moment it is used again.
            for kept in (case.guide in self._open, False):
                try:
                    return await self._ask(case)
                except (ConnectionError, asyncio.IncompleteReadError):
                    self._drop(case.guide)
                    if not kept:
                        break
            return Answer(0)

    def close(self) -> None:
        """Close all connections."""
        for guide in [*self._open]:
            self._drop(guide)

    async def _ask(self, case: Case) -> Answer:
        reader, writer = await self._connection(case)
        head, body = case.wire()
        if case.manner == "half":
            writer.write(head + body[: len(body) // 2])
            await asyncio.sleep(0)
            self._drop(case.guide)
            return Answer(0)
        writer.write(head + body)
        try:
            status, headers = await _head(reader)
            if case.manner == "leave":
                self._drop(case.guide)
                return Answer(0)
            content = await _body(reader, status, headers, case.method)
        except BaseException:
            self._drop(case.guide)
            raise
        # What was sent may be more than was read of it: then the next answer is not ours.
        if headers.get("connection") == "close" or not case.plain or 400 <= status != 404:
            self._drop(case.guide)
        return Answer(status, headers, content)

    async def _connection(self, case: Case) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        kept = self._open.get(case.guide)
        if kept is not None and not kept[0].at_eof() and not kept[1].is_closing():
            return kept
        port = self._ports[case.guide]
        self._open[case.guide] = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        return self._open[case.guide]

    def _drop(self, guide: bool) -> None:
        kept = self._open.pop(guide, None)
        if kept is not None:
            kept[1].close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, their names in lower case."""
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    except asyncio.LimitOverrunError as error:
        raise NoHttpError("headers without end") from error
    version, _, rest = lines[0].partition(" ")
    if version != "HTTP/1.1" or not rest[:3].isdecimal():
        raise NoHttpError(lines[0][:80])
    pairs = [line.partition(":") for line in lines[1:]]
    if not all(colon and name and name == name.strip() for name, colon, _ in pairs):
        raise NoHttpError(f"a header is none: {lines[1:]!r:.200}")
    headers = {name.lower(): value.strip() for name, _, value in pairs}
    if len(headers) != len(pairs):
        raise NoHttpError(f"a header comes twice: {lines[1:]!r:.200}")
    return int(rest[:3]), headers


async def _body(
    reader: asyncio.StreamReader, status: int, headers: dict[str, str], method: str
) -> bytes:
    if method == "HEAD" or status in (204, 304):
        return b""
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"]))
    if headers.get("transfer-encoding") != "chunked":
        return await reader.read()
    parts: list[bytes] = []
    while True:
        size = int((await reader.readuntil(b"\r\n")), 16)
        part = await reader.readexactly(size + 2)
        if not part.endswith(b"\r\n"):
            raise NoHttpError("a chunk is longer than it says")
        if not size:
            return b"".join(parts)
        parts.append(part[:-2])
