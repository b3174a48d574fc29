"""WORDS -> MERGES. Byte-pair encoding learnt over characters, exactly and in arrays.

All words lie in one array of symbols, linked to their neighbours, with a wall between words. A pair
is known by the places where it was seen when it arose. Merging can only take places away from it,
so that a count once told is never too low: the pair on top of the heap is counted anew, and either
still leads, and is merged, or goes back with what it is worth now. Nothing else is kept up to date.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xverse.text.word_count import WordTable

WALL = -1  # between words, and in place of characters that have no token
GONE = -2  # a symbol that was merged into the one before it
SHIFT = 24  # a pair (a, b) is the number a << SHIFT | b
MIN_COUNT = 2

Places = NDArray[np.int32]


def learn_merges(
    words: WordTable,
    symbol_of: NDArray[np.int32],
    alphabet: list[str],
    wanted: int,
    on_merge: Callable[[], None] = lambda: None,
) -> list[tuple[str, str]]:
    """The `wanted` most frequent merges, in order; fewer where no pair comes twice.

    `symbol_of` gives the place in `alphabet` of every code point, or WALL. Of pairs that are
    equally frequent, the one whose symbols are older (or of lower code point) goes first. A merge
    that would spell a token that there already is, is not made: merge k is always token k.
    """
    tokens = list(alphabet)
    known = set(tokens)
    line = _Line(words, symbol_of)
    merges: list[tuple[str, str]] = []
    while len(merges) < wanted:
        found = line.pop()
        if found is None:
            break
        left, right, places = found
        spelled = tokens[left] + tokens[right]
        if spelled in known:
            continue
        line.merge(places, len(tokens))
        tokens.append(spelled)
        known.add(spelled)
        merges.append((tokens[left], tokens[right]))
        on_merge()
    return merges


@dataclass(frozen=True)
class _Later:
    """Pairs too rare to be looked at yet: keys, what they counted, and where each one's places are.

    `places[starts[i] : starts[i + 1]]` are those of pair i.
    """

    keys: NDArray[np.int64]
    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    places: Places


class _Line:
    """All words as one line of symbols, and the pairs in it, most frequent first."""

    def __init__(self, words: WordTable, symbol_of: NDArray[np.int32]) -> None:
        size = len(words.codes) + len(words.lengths) + 1
        assert size < 1 << 31, "places are 32-bit numbers"
        walls = np.concatenate([[0], np.cumsum(words.lengths + 1)])
        self._symbols = np.full(size, WALL, np.int32)
        inside = np.ones(size, np.bool_)
        inside[walls] = False
        self._symbols[inside] = symbol_of[words.codes]
        self._weights = np.zeros(size, np.int64)
        self._weights[inside] = np.repeat(words.counts, words.lengths)
        self._next = np.arange(1, size + 1, dtype=np.int32)
        self._before = np.arange(-1, size - 1, dtype=np.int32)
        self._heap: list[tuple[int, int]] = []  # (-count, key)
        self._places: dict[int, Places] = {}
        self._later: list[_Later] = []
        pairs = np.flatnonzero((self._symbols[:-1] >= 0) & (self._symbols[1:] >= 0))
        self._least = 1 << 62  # pairs that count less wait in _later
        self._offer(self._keys(pairs), pairs.astype(np.int32))
        self._lower()

    def pop(self) -> tuple[int, int, Places] | None:
        """(left, right, where) of the most frequent pair, taken out; None if none comes twice."""
        while True:
            while not self._heap or -self._heap[0][0] < self._least:
                if self._least <= MIN_COUNT:
                    return None
                self._lower()
            told, key = heapq.heappop(self._heap)
            left, right = key >> SHIFT, key & ((1 << SHIFT) - 1)
            seen = self._places.pop(key)
            places = self._valid(seen, left, right)
            count = int(self._weights[places].sum())
            if count < MIN_COUNT:
                continue
            leads = not self._heap or (-count, key) < self._heap[0]
            if count == -told or (leads and count >= self._least):
                return left, right, places
            heapq.heappush(self._heap, (-count, key))
            # Of "aaa" the first two are counted; when a merge takes the first, the others count.
            self._places[key] = seen if left == right else places

    def merge(self, places: Places, new: int) -> None:
        """Make the pairs that begin at `places` the symbol `new`; pairs with it are offered."""
        gone = self._next[places]
        behind = self._next[gone]
        self._symbols[places], self._symbols[gone] = new, GONE
        self._next[places], self._before[behind] = behind, places
        before = self._before[places]
        right, left = self._symbols[behind], self._symbols[before]
        # Where two merged pairs stand side by side, (new, new) is seen from the first one only.
        has_right, has_left = right >= 0, (left >= 0) & (left != new)
        keys = np.concatenate(
            [
                (new << SHIFT) | right[has_right].astype(np.int64),
                (left[has_left].astype(np.int64) << SHIFT) | new,
            ]
        )
        self._offer(keys, np.concatenate([places[has_right], before[has_left]]))

    def _valid(self, places: Places, left: int, right: int) -> Places:
        """Those of `places` where the pair still is; in "aaa", (a, a) is there once."""
        same = (self._symbols[places] == left) & (self._symbols[self._next[places]] == right)
        places = places[same]
        if left != right or len(places) < 2:
            return places
        places = np.sort(places)
        follows = np.concatenate([[False], self._next[places[:-1]] == places[1:]])
        heads = np.flatnonzero(~follows)
        ranks = np.arange(len(places)) - np.repeat(heads, np.diff(heads, append=len(places)))
        return places[ranks % 2 == 0]

    def _keys(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return (self._symbols[places].astype(np.int64) << SHIFT) | self._symbols[places + 1]

    def _offer(self, keys: NDArray[np.int64], places: Places) -> None:
        """Take up pairs that arose: `keys`, one for each of `places`."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, places = keys[order], places[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        counts = np.add.reduceat(self._weights[places], starts)
        self._sort_in(_Later(keys[starts], counts, np.append(starts, len(places)), places))

    def _sort_in(self, pairs: _Later) -> None:
        """Put the frequent ones of `pairs` on the heap, and keep the others for later."""
        frequent = np.flatnonzero(pairs.counts >= self._least)
        keys, counts = pairs.keys[frequent].tolist(), pairs.counts[frequent].tolist()
        for index, key, count in zip(frequent.tolist(), keys, counts, strict=True):
            self._places[key] = pairs.places[pairs.starts[index] : pairs.starts[index + 1]]
            heapq.heappush(self._heap, (-count, key))
        rest = pairs.counts.copy()
        rest[frequent] = 0
        if rest.max() >= MIN_COUNT:
            self._later.append(_Later(pairs.keys, rest, pairs.starts, pairs.places))

    def _lower(self) -> None:
        """Look at rarer pairs too: down to a quarter of the count of the most frequent one left."""
        most = max((int(pairs.counts.max()) for pairs in self._later), default=0)
        self._least = max(MIN_COUNT, min(self._least, most) // 4)
        waiting, self._later = self._later, []
        for pairs in waiting:
            self._sort_in(pairs)
