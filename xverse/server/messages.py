"""API <-> ENGINE. What crosses the socket between the two processes: typed, as MessagePack."""

import socket
import struct
from typing import Any, Literal

import msgspec

from xverse.engine.request import Request, Scores, Token
from xverse.errors import XverseError

MAX_FRAME = 256 * 2**20  # bytes; the largest honest one holds a step's prompt log-probabilities
_LENGTH = struct.Struct(">I")


class Start(msgspec.Struct, tag=True, frozen=True):
    """API -> engine, first of all: which model, on what."""

    model: str
    dtype: str = "auto"
    device: str = "auto"
    quantize: int | None = None
    kv_tokens: int | None = None
    kv_dtype: Literal["auto", "fp8"] = "auto"
    deterministic: bool = False
    tensor_parallel: int = 1
    speculate: int = 0
    host_embedding: bool = False
    adapters: dict[str, str] = {}  # name -> folder
    max_adapters: int = 0
    adapter_bytes: int = 2**30
    adapter_slots: int | None = None
    adapter_rank: int = 32


class Ask(msgspec.Struct, tag=True, frozen=True):
    """API -> engine: compute this; what comes of it has `number`."""

    number: int
    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True):
    """API -> engine: nobody reads these any more."""

    numbers: list[int]


class Adapt(msgspec.Struct, tag=True, frozen=True):
    """API -> engine: load the adapter in `folder` under this name, or forget it where that is
    None; told with `number` when it is done."""

    number: int
    name: str
    folder: str | None
    replace: bool = False


class Adapted(msgspec.Struct, tag=True, frozen=True):
    """Engine -> API: what was asked with `number` is done, or cannot be: what, why, fix."""

    number: int
    error: tuple[str, str, str] | None = None


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Engine -> API: the model is loaded. `context` and `capacity` are in tokens, and so is a page
    that requests share: `shared_page`, 0 where they share none. `lost` are adapters that could not
    be loaded, with what, why, fix."""

    context: int
    capacity: int
    max_running: int
    vocab_size: int
    device: str
    shared_page: int
    lost: dict[str, tuple[str, str, str]] = {}


class Broken(msgspec.Struct, tag=True, frozen=True):
    """Engine -> API: the model cannot be loaded, for a reason that a person can mend."""

    what: str
    why: str
    fix: str


class Failure(msgspec.Struct, frozen=True):
    """The request numbered `request` got no further; `refused` where it was never begun."""

    request: int
    what: str
    why: str
    fix: str
    refused: bool = False

    @property
    def error(self) -> XverseError:
        """As it was raised in the engine."""
        return XverseError(self.what, self.why, self.fix)


class Load(msgspec.Struct, frozen=True):
    """How busy the engine is; the last two count since it started."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages: int = 1
    preempted: int = 0
    reused_tokens: int = 0


class Stepped(msgspec.Struct, tag=True, frozen=True):
    """Engine -> API: all that came of one step, of all requests."""

    tokens: list[Token]
    scores: list[Scores]
    failures: list[Failure]
    load: Load


ToEngine = Start | Ask | Abort | Adapt
ToApi = Ready | Broken | Stepped | Adapted

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_api: msgspec.msgpack.Decoder[ToApi] = msgspec.msgpack.Decoder(ToApi)


def frame(message: ToEngine | ToApi) -> bytes:
    """A message as it goes through the socket: four bytes of length, then MessagePack."""
    body = _encoder.encode(message)
    assert len(body) <= MAX_FRAME, "what is asked is bounded at the edge"
    return _LENGTH.pack(len(body)) + body


def frame_length(head: bytes) -> int:
    """How many bytes follow these four."""
    length: int = _LENGTH.unpack(head)[0]
    assert length <= MAX_FRAME, "the other side is ours"
    return length


def for_engine(body: bytes | memoryview) -> ToEngine:
    """The message in a frame that came from the API process."""
    return _to_engine.decode(body)


def for_api(body: bytes | memoryview) -> ToApi:
    """The message in a frame that came from the engine process."""
    return _to_api.decode(body)


class Inbox:
    """The engine's end of the socket: whole messages, with or without waiting for one."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._bytes = bytearray()
        self.closed = False

    def messages(self, *, wait: bool) -> list[ToEngine]:
        """All messages that are here; with `wait`, at least one unless the other side is gone."""
        found = self._whole()
        while not self.closed:
            try:
                data = self._connection.recv(2**20, 0 if wait and not found else _DONT_WAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            self.closed = not data
            self._bytes += data
            found += self._whole()
        return found

    def _whole(self) -> list[ToEngine]:
        found: list[ToEngine] = []
        start, held = 0, self._bytes
        while len(held) - start >= _LENGTH.size:
            end = start + _LENGTH.size + frame_length(bytes(held[start : start + _LENGTH.size]))
            if len(held) < end:
                break
            found.append(for_engine(bytes(held[start + _LENGTH.size : end])))
            start = end
        del held[:start]
        return found


_DONT_WAIT: Any = socket.MSG_DONTWAIT
