"""COMMANDS <-> BYTES. What processes of one engine say to each other, as JSON on a socket."""

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from zlib import crc32

from xverse.engine.engine import Output
from xverse.engine.request import Failed, Request, Sampling, Scores
from xverse.errors import XverseError

Message = dict[str, Any]
_LENGTH = struct.Struct("<I")


class Line:
    """A socket to another process of ours. Both ends may be used by one thread each."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def send(self, message: Mapping[str, object]) -> None:
        """Raises OSError where nobody is at the other end."""
        body = json.dumps(message, separators=(",", ":")).encode()
        self.end.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> Message:
        """The next message; EOFError where the other end is closed."""
        (length,) = _LENGTH.unpack(self._bytes(_LENGTH.size))
        message = json.loads(self._bytes(length))
        assert isinstance(message, dict), "a message is an object"
        return message

    def _bytes(self, count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            try:
                some = self.end.recv(count - len(found))
            except ConnectionError:
                some = b""
            if not some:
                raise EOFError
            found += some
        return bytes(found)


def encode_request(request: Request) -> Message:
    """A request as JSON has it."""
    encoded: Message = json.loads(json.dumps(asdict(request)))
    assert decode_request(encoded) == request, "nothing of it is lost on the way"
    return encoded


def decode_request(message: Message) -> Request:
    """The inverse of `encode_request`."""
    sampling = message["sampling"]
    if sampling is not None:
        bias = sampling["logit_bias"]
        if bias is not None:
            sampling = sampling | {"logit_bias": {int(id): add for id, add in bias.items()}}
        sampling = Sampling(**sampling)
    tuples = {name: tuple(message[name]) for name in ("ids", "labels")}
    return Request(**message | tuples | {"sampling": sampling})


def encode_error(error: XverseError) -> Message:
    """An error as JSON has it."""
    return {"error": [error.what, error.why, error.fix]}


def digest(outputs: Sequence[Output]) -> int:
    """A number by which two processes know whether a step gave them the same."""
    facts: list[object] = []
    for output in outputs:
        if isinstance(output, Failed):
            facts.append((output.request, str(output.error)))
        elif isinstance(output, Scores):
            facts.append((output.request, len(output.logprobs), output.last))
        else:
            facts.append((output.request, output.id, output.finish))
    return crc32(repr(facts).encode())
