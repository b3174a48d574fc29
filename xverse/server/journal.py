"""REQUESTS -> LINES. One JSON object a request on a stream; what was said is never in it."""

import sys
from datetime import UTC, datetime
from typing import IO

import msgspec


class Journal:
    """Where the server writes what it did. Control characters come escaped, as JSON has them."""

    def __init__(self, stream: IO[str] | None) -> None:
        """`stream` None writes nothing."""
        self._stream = stream

    @classmethod
    def on_stderr(cls) -> "Journal":
        """The usual place."""
        return cls(sys.stderr)

    def write(self, event: str, **facts: object) -> None:
        """One line with the time, the event, and the facts."""
        if self._stream is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = msgspec.json.encode({"time": now, "event": event, **facts})
        self._stream.write(line.decode() + "\n")
        self._stream.flush()
