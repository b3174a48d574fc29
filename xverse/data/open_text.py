"""FILE -> LINES. Plain, gzip and zstd; no line and no archive may grow beyond its bounds."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from xverse.data.report import Report, Unit
from xverse.errors import XverseError

MAX_LINE_BYTES = 32 << 20  # a book has about 1 MiB
# Text packs to a tenth, logs to a hundredth; beyond this part, and this size, it is no text.
MAX_EXPANSION = 300
FREE_EXPANSION = 256 << 20
BLOCK = 1 << 20
FEED = 1 << 10  # packed bytes unpacked at once: a block of 4 bytes may hold 128 KiB
MAX_WINDOW = 1 << 27  # a frame may ask for 2 GiB; this is the most that `zstd` makes by itself
UNPACK_ERRORS = (OSError, EOFError, zlib.error)


class Source(Protocol):
    """What bytes are read from."""

    def read(self, size: int = -1, /) -> bytes: ...


@contextmanager
def open_bytes(path: Path, start: int = 0) -> Iterator[Source]:
    """The unpacked bytes of `path`, or those of a plain file from `start` on.

    Raises XverseError where it can't be opened.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise XverseError(
            f"{path} can't be read.", str(error), "Check the name and the permissions."
        ) from error
    with raw:
        if path.suffix == ".gz":
            yield _Bounded(cast(Source, gzip.GzipFile(fileobj=raw)), path.stat().st_size)
        elif path.suffix == ".zst":
            yield _Bounded(_open_zstd(raw), path.stat().st_size)
        else:
            raw.seek(start)
            yield raw


def read_lines(
    source: Source, unit: Unit, report: Report, max_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, place in the file, bytes without its end) of every line of `source`.

    A line over `max_bytes` is reported and skipped without being held; so is the rest of a file
    that breaks off, is damaged, or expands without end.
    """
    number, place, held, too_long = 0, unit.start, b"", False
    while True:
        try:
            block = source.read(BLOCK)
        except UnpackError as error:
            why = f"the rest is left out: {error}"
            return report.skip(unit, number + 1, "damaged archive", why)
        *lines, held = (held + block).split(b"\n")
        if not block and (held or too_long):
            lines.append(held)
        for line in lines:
            number += 1
            if too_long or len(line) > max_bytes:
                report.skip(unit, number, "over-long line", f"more than {max_bytes:,} bytes")
            else:
                yield number, place, line
            place += len(line) + 1
            too_long = False
        if not block:
            return None
        if len(held) > max_bytes:  # what was seen of it is let go
            place += len(held)
            held, too_long = b"", True


class UnpackError(Exception):
    """The packed file is damaged, breaks off, or is a bomb."""


class _Bounded:
    """Unpacks, and stops where more comes out than any text could have been packed into."""

    def __init__(self, source: Source, packed: int) -> None:
        self._source, self._packed, self._unpacked = source, packed, 0

    def read(self, size: int = -1, /) -> bytes:
        try:
            block = self._source.read(size)
        except UNPACK_ERRORS as error:
            raise UnpackError(str(error)) from error
        self._unpacked += len(block)
        if self._unpacked > max(FREE_EXPANSION, MAX_EXPANSION * self._packed):
            raise UnpackError(f"{self._packed:,} bytes expand to more than {self._unpacked:,}")
        return block


def _open_zstd(raw: BinaryIO) -> Source:
    try:
        import zstandard
    except ImportError as error:
        raise XverseError(
            "A .zst file can't be read.",
            "The package zstandard is not installed.",
            'Run pip install "xverse-llm[data]".',
        ) from error
    return _Zstd(
        raw, lambda: zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()
    )


class _Frame(Protocol):
    """What `zstandard` unpacks one frame with."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Zstd:
    """Frame after frame of a .zst file. The library's own reader takes a broken end for the end."""

    def __init__(self, raw: BinaryIO, new_frame: Callable[[], _Frame]) -> None:
        self._raw, self._new_frame = raw, new_frame
        self._frame: _Frame | None = None

    def read(self, size: int = -1, /) -> bytes:
        unpacked: list[bytes] = []
        length = 0
        while length < max(size, 1) and (packed := self._raw.read(FEED)):
            while packed:
                self._frame = self._frame or self._new_frame()
                try:
                    unpacked.append(self._frame.decompress(packed))
                except Exception as error:  # ZstdError, which is nothing more special
                    raise OSError(str(error)) from error
                length += len(unpacked[-1])
                packed = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        if not unpacked and self._frame is not None:
            raise EOFError("the file breaks off within a frame")
        return b"".join(unpacked)
