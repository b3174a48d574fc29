"""TEXTS -> WORDS AND HOW OFTEN. One pass over a corpus of any size, in arrays, on every core."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xverse.log import logger
from xverse.text.pieces import BOUNDARY, Codes, Form, encode_codes, find_starts

CHUNK_CHARACTERS = 1 << 21
MAX_WORD = 256  # characters; longer pieces are no words of any language, and teach no merge
MAX_WORDS = 1 << 25  # different ones; 4 GB of them, and the rare ones decide nothing

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class WordTable:
    """Different words, by a 64-bit hash: how often each came, and its characters."""

    hashes: Keys  # ascending
    counts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    codes: Codes  # of all words, one behind the other

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each word begins in `codes`."""
        return np.cumsum(self.lengths) - self.lengths


@dataclass
class WordCounts:
    """What has been counted so far: words of two characters and more, and every character."""

    form: Form
    characters: NDArray[np.int64]  # by code point

    def __init__(self, form: Form) -> None:
        self.form = form
        self.characters = np.zeros(BOUNDARY + 1, np.int64)
        self._tables: list[WordTable] = []

    def add(self, texts: Iterable[str], *, threads: int) -> None:
        """Count `texts`; the same texts in the same order always give the same counts."""
        waiting: deque[Future[tuple[WordTable, NDArray[np.int64]]]] = deque()
        with ThreadPoolExecutor(threads) as pool:  # NumPy computes outside the interpreter's lock
            for chunk in _chunks(texts):
                waiting.append(pool.submit(_count, chunk, self.form))
                if len(waiting) > threads:
                    self._take(*waiting.popleft().result())
            while waiting:
                self._take(*waiting.popleft().result())

    def table(self) -> WordTable:
        """All words."""
        if len(self._tables) != 1:
            self._tables = [_join(self._tables)]
        return self._tables[0]

    def _take(self, table: WordTable, characters: NDArray[np.int64]) -> None:
        self.characters[: len(characters)] += characters
        self._tables.append(table)
        # Joined when as large as what was joined before: each word is moved log(size) times.
        sizes = [len(table.hashes) for table in self._tables]
        if sum(sizes[1:]) > sizes[0]:
            self._tables = [_join(self._tables)]
            if len(self._tables[0].hashes) > MAX_WORDS:
                self._tables = [_without_single(self._tables[0])]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        for start in range(0, len(text), CHUNK_CHARACTERS):
            part = text[start : start + CHUNK_CHARACTERS]
            chunk.append(part)
            size += len(part)
            if size >= CHUNK_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def _count(texts: list[str], form: Form) -> tuple[WordTable, NDArray[np.int64]]:
    codes = encode_codes(texts)
    edges = np.flatnonzero(find_starts(codes, form))
    lengths = np.diff(edges, append=len(codes))
    kept = (lengths > 1) & (lengths <= MAX_WORD)
    starts, lengths = edges[kept], lengths[kept]
    order, firsts, counts = _group(_hash(codes, starts, lengths))
    chosen = order[firsts]
    table = WordTable(
        _hash(codes, starts[chosen], lengths[chosen]),
        counts,
        lengths[chosen],
        _gather(codes, starts[chosen], lengths[chosen]),
    )
    return table, np.bincount(codes[codes != BOUNDARY]).astype(np.int64)


def _hash(codes: Codes, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Keys:
    """Polynomial hashes of the words at `starts`, from one running sum over all of `codes`.

    The sum of mix(code[i]) * P**i between two places, times P**-start, depends on the word alone;
    all is modulo 2**64. Each code is mixed first, since sums of plain codes collide.
    """
    mixed = codes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    power, inverse = 0x5851F42D4C957F2D, pow(0x5851F42D4C957F2D, -1, 1 << 64)
    powers = _powers(power, len(codes))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed * powers)])
    return (sums[starts + lengths] - sums[starts]) * _powers(inverse, len(codes))[starts]


def _powers(base: int, count: int) -> Keys:
    factors = np.full(count, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)


def _group(hashes: Keys) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(order that sorts, first place of each different one in that order, how many of each)."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    firsts = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))
    return order, firsts, np.diff(firsts, append=len(ordered))


def _gather(codes: Codes, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Codes:
    """The stretches of `codes` at `starts`, one behind the other."""
    shifts = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return codes[np.arange(int(lengths.sum())) + shifts]


def _join(tables: list[WordTable]) -> WordTable:
    if not tables:
        none = np.zeros(0, np.int64)
        return WordTable(none.astype(np.uint64), none, none, none.astype(np.uint32))
    hashes, counts, lengths, codes = (
        np.concatenate([getattr(table, name) for table in tables])
        for name in ("hashes", "counts", "lengths", "codes")
    )
    order, firsts, _ = _group(hashes)
    chosen = order[firsts]
    sums = np.add.reduceat(counts[order], firsts) if len(firsts) else counts
    starts = np.cumsum(lengths) - lengths
    words = _gather(codes, starts[chosen], lengths[chosen])
    return WordTable(hashes[chosen], sums, lengths[chosen], words)


def _without_single(table: WordTable) -> WordTable:
    kept = table.counts > 1
    logger.warning(
        "%d words that came once so far are forgotten: more than %d different ones don't fit",
        int((~kept).sum()),
        MAX_WORDS,
    )
    codes = _gather(table.codes, table.starts[kept], table.lengths[kept])
    return WordTable(table.hashes[kept], table.counts[kept], table.lengths[kept], codes)
