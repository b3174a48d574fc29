"""VALUE -> SIZE. What a template may make and how much it has: the limits, and the counting."""

import time
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    Sequence,
    ValuesView,
)
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

MAX_TEXT = 4 << 20  # characters of one value; a prompt of 256K tokens has about one million
MAX_ITEMS = 200_000  # values in one container, with all that is nested in it
MAX_DEPTH = 64
MAX_NUMBER = 10_000  # widths, lengths and precisions given to filters and methods
MAX_STEPS = 2_000_000  # in one rendering, as is all below
MAX_MADE = 64 << 20  # characters of text made
MAX_SECONDS = 1.0  # of this thread's processor time

CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)

Value = TypeVar("Value")


@dataclass
class Spent:
    """What one rendering has used so far, and the sizes of the containers in it."""

    known: dict[int, tuple[object, tuple[int, int, int]]] = field(default_factory=dict)
    made: int = 0
    steps: int = 0
    started: float = field(default_factory=time.thread_time)

    def step(self, count: int = 1) -> None:
        """Count work done; raises SecurityError when there was too much of it."""
        self.steps += count
        if self.steps > MAX_STEPS or time.thread_time() - self.started > MAX_SECONDS:
            raise SecurityError("the template takes too long")

    def make(self, length: int) -> None:
        """Count a text of `length` characters that is about to be made, or just was."""
        self.made += length
        if length > MAX_TEXT or self.made > MAX_MADE:
            raise SecurityError("the template makes too much text")


_spent: ContextVar[Spent] = ContextVar("spent")


@contextmanager
def counting() -> Iterator[None]:
    """Count from zero inside."""
    token = _spent.set(Spent())
    try:
        yield
    finally:
        _spent.reset(token)


def spent() -> Spent:
    """What the rendering that runs here has used."""
    return _spent.get()


def made(value: Value) -> Value:
    """`value`, just made, counted if it is a text, and listed if it is lazy."""
    if isinstance(value, str):
        spent().make(len(value))
    return listed(value)


def listed(value: Value) -> Value:
    """An iterator's values as a list, so that they can be measured; any other value as it is."""
    if not isinstance(value, Iterator) or isinstance(value, LoopContext):
        return value
    values = list(islice(value, MAX_ITEMS + 1))
    count_items(len(values))
    return values  # type: ignore[return-value]


def check_arguments(args: Iterable[object], kwargs: Mapping[str, object], numbers: bool) -> None:
    """Measure arguments; with `numbers`, large ones are refused."""
    named = [value for key, value in kwargs.items() if key not in {"_loop_vars", "_block_vars"}]
    for value in (*args, *named):
        measure(value)
        if numbers and isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise SecurityError(f"{value} is too large a number")


def check_product(left: object, right: object) -> None:
    """Refuse a product that would be too large: of a text or a list, or of numbers."""
    if isinstance(left, str) and isinstance(right, int):
        spent().make(len(left) * max(right, 0))
    elif isinstance(left, list | tuple) and isinstance(right, int):
        count_items(len(left) * right)
    elif isinstance(left, int) and not small(left, 1 << 128):
        raise SecurityError("the number is too large")


def small(value: object, limit: int) -> bool:
    """Whether `value` is a number of at most this size."""
    return isinstance(value, int | float) and abs(value) <= limit


def count_items(count: int) -> None:
    """Count a list of this length that is about to be made, or just was."""
    if count > MAX_ITEMS:
        raise SecurityError("a list is too long")
    spent().step(max(count, 0))


def measure(value: object) -> None:
    """Raise SecurityError for a value whose written form would be too large."""
    if isinstance(value, str):
        items, text, depth = 1, len(value), 0
    elif isinstance(value, CONTAINERS):
        items, text, depth = _size(value, spent())
    else:
        return
    if items > MAX_ITEMS or text > MAX_TEXT or depth > MAX_DEPTH:
        raise SecurityError("a value is too large or nested too deep")


def check_writable(value: object) -> None:
    """Measure, and refuse what may contain itself."""
    measure(value)
    if isinstance(value, Namespace):
        raise SecurityError("a namespace can't be written")


def _size(value: object, counted: Spent) -> tuple[int, int, int]:
    """(values, characters, depth) of all that `value` contains, what occurs twice counted twice.

    Sizes of containers are kept: the time is that of what is in memory, which may be little where
    the written form is endless. Containers can't change while a template runs.
    """
    if isinstance(value, str):
        return 1, len(value), 0
    if isinstance(value, Namespace):
        raise SecurityError("a namespace can't be in a list")
    if not isinstance(value, CONTAINERS):
        return 1, 0, 0
    if id(value) not in counted.known:
        counted.step(len(value))
        parts = value.items() if isinstance(value, dict) else value
        sizes = [_size(part, counted) for part in parts]
        items, text = 1 + sum(size[0] for size in sizes), sum(size[1] for size in sizes)
        depth = 1 + max((size[2] for size in sizes), default=0)
        counted.known[id(value)] = (value, (items, text, depth))  # kept, so that no id comes again
    return counted.known[id(value)][1]


def _replaced(value: object, old: object, new: object, count: object = None) -> int:
    text, found, written = str(value), str(old), str(new)
    return len(text) + (text.count(found) if found else len(text) + 1) * len(written)


def _joined(separator: str, items: Sequence[object]) -> int:
    return len(separator) * len(items)


def _joined_by_filter(value: Sequence[object], d: str = "", attribute: object = None) -> int:
    return len(str(d)) * len(value)


def _indented(s: object, width: object = 4, first: bool = False, blank: bool = False) -> int:
    text, by = str(s), len(width) if isinstance(width, str) else abs(int(str(width)))
    return len(text) + (text.count("\n") + 1) * by


# How long a text will be at most, for what can make much out of little.
METHOD_LENGTHS: dict[str, Callable[..., int]] = {"replace": _replaced, "join": _joined}
FILTER_LENGTHS: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "join": _joined_by_filter,
    "indent": _indented,
}
