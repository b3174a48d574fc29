"""SIGTERM -> A FLAG. The wish that a run ends: noticed in every phase, met between steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from xverse.log import logger

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """While entered, SIGTERM and Ctrl-C are noted instead of ending the process.

    A second Ctrl-C is an ordinary one: it interrupts at once. Outside the main thread, which alone
    gets signals, nothing is noted unless `ask` is called.
    """

    def __init__(self) -> None:
        self.asked = ""
        self._before: dict[signal.Signals, object] = {}

    def ask(self, why: str) -> None:
        """End the run at the next boundary between steps."""
        if not self.asked:
            self.asked = why
            logger.warning("%s: the run ends after this step, and is saved", why)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)
