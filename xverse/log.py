"""EVENTS -> LINES. One logger on standard error, spoken by rank 0 only, and progress bars."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

Item = TypeVar("Item")

logger = logging.getLogger("xverse")


def setup(level: str = "WARNING", rank: int = 0) -> None:
    """Send `xverse` records of `level` and above to standard error; ranks above 0 only errors."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("xverse: %(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(level if rank == 0 else "ERROR")


@lru_cache(maxsize=1024)
def warn_once(message: str) -> None:
    """Warn, and stay silent when the same words come again in this process."""
    logger.warning(message)


def progress(items: Iterable[Item], *, total: int | None, label: str) -> Iterator[Item]:
    """Yield `items` behind a progress bar; no bar where standard error is not a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(
        items, description=label, total=total, console=Console(stderr=True), transient=True
    )


@contextmanager
def counter(total: int | None, label: str) -> Iterator[Callable[[], None]]:
    """A progress bar for work that is no iteration: call what you get once for each thing done."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda: bar.advance(task)
