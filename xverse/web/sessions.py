"""WHO IS BEING ANSWERED. One answer at a time for each page, and the wish that it ends."""

import html
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import gradio as gr

from xverse.errors import XverseError


@dataclass
class Running:
    """An answer that is being made. `forgotten`: the page was emptied meanwhile."""

    stopped: bool = False
    forgotten: bool = False


class Sessions:
    """The answers that are being made, by the page (Gradio's session) that waits for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Running] = {}

    @contextmanager
    def answering(self, session: str | None) -> Iterator[Running]:
        """While an answer is made. Raises XverseError where that page waits for one already."""
        running = Running()
        name = session or f"alone-{id(running)}"  # a plain HTTP call has no session
        with self._lock:
            if name in self._running:
                raise _busy()
            self._running[name] = running
        try:
            yield running
        finally:
            with self._lock:
                del self._running[name]

    def refuse_if_busy(self, session: str | None) -> None:
        """Raise XverseError where that page waits for an answer."""
        if session in self._running:
            raise _busy()

    def stop(self, session: str | None, *, forget: bool = False) -> None:
        """Let the page's answer, if one is being made, end at its next piece."""
        with self._lock:
            running = self._running.get(session or "")
            if running is not None:
                running.stopped = True
                running.forgotten = running.forgotten or forget

    def __len__(self) -> int:
        """How many answers are being made."""
        return len(self._running)


@contextmanager
def told() -> Iterator[None]:
    """What a person can mend is shown on the page in words; all else is ours to mend."""
    try:
        yield
    except XverseError as error:
        message = f"{error.what} {error.why} {error.fix}"
        raise gr.Error(html.escape(message), print_exception=False) from error


def _busy() -> XverseError:
    return XverseError(
        "An answer is still being written.",
        "A page has one conversation, and it goes turn by turn.",
        "Wait for it, or press Stop.",
    )
