"""LESSONS -> ONE ARRAY. Samples and preference pairs, compact, as a loader reads them."""

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Self, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from xverse.data.loader import Loader
from xverse.errors import XverseError

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


class Sample(NamedTuple):
    """Something to read and what of it to learn.

    `ids` are [T] int32; `learned` is [T] bool: whether the model shall learn to say this token.
    """

    ids: IntArray
    learned: BoolArray


class Pair(NamedTuple):
    """Two answers to the same, the better one first. What is learned is the answer alone."""

    chosen: Sample
    rejected: Sample


Item = TypeVar("Item", Sample, Pair)


class _Table(NamedTuple):
    """Samples one behind another: 5 bytes a token, 20 bytes a sample."""

    ids: IntArray
    learned: BoolArray
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int32]  # which row of the data each is from


class _Lessons(Sequence[Item], Generic[Item]):
    """Items of `together` samples each, over a table that parts of it share."""

    together: int

    def __init__(self, table: _Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table.starts) // self.together

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        first = index % len(self) * self.together
        return self._item([self._sample(first + at) for at in range(self.together)])

    @property
    def documents(self) -> int:
        """How many documents a loader finds here: samples, or two for each pair."""
        return len(self._table.starts)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return self._table.lengths

    def document(self, index: int) -> IntArray:
        """Ids of a document."""
        return self._sample(index).ids

    def learned(self, index: int) -> BoolArray:
        """Which of them are to be said."""
        return self._sample(index).learned

    def split(self, share: float, seed: int) -> tuple[Self, Self]:
        """(what to learn from, what to hold out): `share` of the rows if below 1, else so many,
        drawn by `seed`. What one row of the data gave stays together.

        Raises XverseError where nothing would be left to learn from.
        """
        rows = np.unique(self._table.rows)
        count = round(share * len(rows)) if share < 1 else int(share)
        if share < 0 or (share and not 1 <= count < len(rows)):
            raise XverseError(
                f"{share:g} of the data cannot be held out.",
                f"There are {len(rows):,} rows, and some are needed on both sides.",
                "Hold out a part between 0 and 1, or a smaller number of rows.",
            )
        drawn = np.random.default_rng([seed, len(rows)]).permutation(rows)[:count]
        held = np.isin(self._table.rows, drawn)
        return self._part(~held), self._part(held)

    def _part(self, chosen: BoolArray) -> Self:
        ids, learned, starts, lengths, rows = self._table
        return type(self)(_Table(ids, learned, starts[chosen], lengths[chosen], rows[chosen]))

    def _sample(self, index: int) -> Sample:
        start = self._table.starts[index]
        here = slice(start, start + self._table.lengths[index])
        return Sample(self._table.ids[here], self._table.learned[here])

    @abstractmethod
    def _item(self, samples: Sequence[Sample]) -> Item:
        """What `together` samples in turn are."""


class Samples(_Lessons[Sample]):
    """Samples, each a document."""

    together = 1

    def _item(self, samples: Sequence[Sample]) -> Sample:
        return samples[0]


class Pairs(_Lessons[Pair]):
    """Pairs, each two documents: pair k is document 2k, the chosen, and 2k + 1, the rejected."""

    together = 2

    def _item(self, samples: Sequence[Sample]) -> Pair:
        return Pair(*samples)


class Growing:
    """Samples as they come, to be one table in the end."""

    def __init__(self) -> None:
        self._ids, self._learned = array("i"), bytearray()
        self._lengths, self._rows = array("q"), array("i")

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, samples: Iterable[Sample], row: int) -> None:
        """Take what row number `row` of the data gave."""
        for ids, learned in samples:
            self._ids.frombytes(ids.astype(np.int32).tobytes())
            self._learned += learned.tobytes()
            self._lengths.append(len(ids))
            self._rows.append(row)

    def finish(self, *, pairs: bool) -> Samples | Pairs:
        """All that was added; `pairs` where two samples in turn are one."""
        lengths = np.frombuffer(self._lengths, dtype=np.int64)
        table = _Table(
            np.frombuffer(self._ids, dtype=np.int32),
            np.frombuffer(self._learned, dtype=np.bool_),
            np.cumsum(lengths) - lengths,
            lengths,
            np.frombuffer(self._rows, dtype=np.int32),
        )
        return Pairs(table) if pairs else Samples(table)


def samples_of(items: Iterable[Sample] | Iterable[Pair]) -> Samples | Pairs:
    """The same items as one table; each counts as a row of its own."""
    growing, pairs = Growing(), False
    for row, item in enumerate(items):
        pairs = isinstance(item, Pair)
        growing.add(cast(Iterable[Sample], item if pairs else [item]), row)
    return growing.finish(pairs=pairs)


def loader_of(
    samples: Samples | Pairs,
    *,
    row_tokens: int,
    rows_per_step: int,
    rows_per_pass: int,
    rank: int = 0,
    ranks: int = 1,
    seed: int = 0,
    packing: bool = True,
) -> Loader:
    """The loader of these samples, each whole in one row.

    With `packing` a row has as many samples (or pairs) as fit into `row_tokens` inputs, which don't
    see each other; else it has one. Rows of packed samples are filled up to `row_tokens`; all
    others are as long as what they hold.

    Raises XverseError as Loader, and for a sample, or a pair, that no row has room for.
    """
    lengths = samples.lengths() - 1
    longest = int(lengths.reshape(-1, samples.together).sum(axis=1).max(initial=0))
    if longest > row_tokens:
        what = "pair" if samples.together == 2 else "sample"
        raise XverseError(
            f"A {what} has {longest:,} tokens to read, and a row {row_tokens:,}.",
            "What is learned in conversations would be cut from what it answers.",
            f"Take rows of {longest:,} tokens, or cut the samples shorter with --cutoff.",
        )
    return Loader(
        samples,
        row_tokens=row_tokens,
        rows_per_step=rows_per_step,
        rows_per_pass=rows_per_pass,
        rank=rank,
        ranks=ranks,
        seed=seed,
        learned=samples.learned,
        together=samples.together,
        packing=packing,
    )
