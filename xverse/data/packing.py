"""DOCUMENTS -> ROWS. Which piece of which document stands in which row, so that little is cut."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6  # of the Feistel network; four are enough for a permutation that looks random
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Piece(NamedTuple):
    """`length` tokens of a document, from its token `start` on, that a model reads in one row."""

    document: int
    start: int
    length: int


Row = list[Piece]


def pack(documents: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[Row]:
    """Rows of at most `row_tokens` that hold all inputs of these documents, each of `lengths`.

    A document of n tokens has n - 1 inputs: its last token is only ever a target. Whole pieces of
    `row_tokens` come first, and what is left is put where it fits best, the longest first (best-fit
    decreasing; Ding et al. 2024 for language models): no document is cut that fits in a row.
    """
    rows: list[Row] = []
    rest: list[Piece] = []
    for document, tokens in zip(documents, lengths, strict=True):
        inputs = max(0, tokens - 1)
        for start in range(0, inputs - row_tokens + 1, row_tokens):
            rows.append([Piece(document, start, row_tokens)])
        start = inputs // row_tokens * row_tokens
        if inputs > start:
            rest.append(Piece(document, start, inputs - start))
    rest.sort(key=lambda piece: -piece.length)
    room = _Room(row_tokens)
    for piece in rest:
        index, free = room.take(piece.length)
        if index is None:
            index, free = len(rows), row_tokens
            rows.append([])
        rows[index].append(piece)
        room.give(index, free - piece.length)
    return rows


class _Room:
    """Rows by the tokens still free in them; the bits of one number say which counts there are."""

    def __init__(self, row_tokens: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(row_tokens)]
        self._counts = 0

    def take(self, length: int) -> tuple[int | None, int]:
        """A row with the least room of `length` or more, and that room; or None."""
        enough = self._counts >> length
        if not enough:
            return None, 0
        free = length + (enough & -enough).bit_length() - 1
        index = self._rows[free].pop()
        if not self._rows[free]:
            self._counts &= ~(1 << free)
        return index, free

    def give(self, index: int, free: int) -> None:
        if free:
            self._rows[free].append(index)
            self._counts |= 1 << free


def shuffled(first: int, last: int, size: int, seed: Sequence[int]) -> NDArray[np.int64]:
    """Places first..last of a permutation of 0..size-1 that `seed` names; nothing is kept.

    A Feistel network over the next power of four, walked on from numbers that are not below
    `size` (Black and Rogaway 2002), so that an epoch of any number of documents needs no memory.
    """
    assert 0 <= first <= last <= size
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.default_rng([*seed, size]).integers(1, 2**63, ROUNDS, dtype=np.uint64)
    numbers = np.arange(first, last, dtype=np.uint64)
    outside = np.ones(len(numbers), dtype=bool)
    while outside.any():
        left, right = numbers[outside] >> half, numbers[outside] & mask
        for key in keys:
            mixed = (right + key) * _MIX
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        numbers[outside] = (left << half) | right
        outside = numbers >= size
    return numbers.astype(np.int64)


def row_order(rows: int, seed: Sequence[int]) -> Iterator[int]:
    """0..rows-1 shuffled: packing leaves rows in the order of their pieces' lengths."""
    yield from np.random.default_rng(list(seed)).permutation(rows).tolist()
