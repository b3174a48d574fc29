"""REQUESTS -> LINES. One JSON object a request on a stream; what was said only where one asks."""

import sys
from datetime import UTC, datetime
from typing import IO

import msgspec


class Journal:
    """Where the server writes what it did. Control characters come escaped, as JSON has them."""

    def __init__(self, stream: IO[str] | None, *, prompts: bool = False) -> None:
        """`stream` None writes nothing. With `prompts` a request's line has all that it asked."""
        self._stream, self.prompts = stream, prompts

    @classmethod
    def on_stderr(cls, *, prompts: bool = False) -> "Journal":
        """The usual place."""
        return cls(sys.stderr, prompts=prompts)

    def write(self, event: str, **facts: object) -> None:
        """One line with the time, the event, and the facts."""
        if self._stream is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = msgspec.json.encode({"time": now, "event": event, **facts})
        self._stream.write(line.decode() + "\n")
        self._stream.flush()
