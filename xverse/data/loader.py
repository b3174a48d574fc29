"""SHARDS -> BATCHES. Rows for the steps of a run: the same for a seed, whoever asks, whenever."""

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from queue import Empty, Full, Queue
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xverse.data.packing import Piece, Row, pack, row_order, shuffled
from xverse.errors import XverseError

Item = TypeVar("Item")
WINDOW = 16_384  # documents that are packed together: under 0.5 % of padding (decision 0022)


class Documents(Protocol):
    """What a loader reads: tokenized documents, by number."""

    @property
    def documents(self) -> int: ...

    def lengths(self) -> NDArray[np.integer]: ...

    def document(self, index: int) -> NDArray[np.integer]: ...


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: the next row to be read. It holds for any number of ranks."""

    epoch: int = 0
    window: int = 0
    row: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Rows for one pass of the model, flat: T tokens in all.

    `ids`, `targets` and `positions` are [T] int64, `mask` [T] bool: whether a target counts.
    `documents` are the lengths of what must not see each other, in order; they add up to T.
    """

    ids: Tensor
    targets: Tensor
    mask: Tensor
    positions: Tensor
    documents: tuple[int, ...]

    def to(self, device: torch.device) -> "Batch":
        def move(part: Tensor) -> Tensor:
            pinned = part.pin_memory() if device.type == "cuda" else part
            return pinned.to(device, non_blocking=True)

        inputs = (move(self.ids), move(self.targets), move(self.mask), move(self.positions))
        return Batch(*inputs, self.documents)


@dataclass(frozen=True)
class Step:
    """What one rank reads in one step of the optimizer.

    `units` is how many targets that count (or pairs) all ranks together have in it, by which the
    loss is divided; `tokens` how many inputs they read, padding left out. `after` is the position
    behind it.
    """

    passes: tuple[Batch, ...]
    units: int
    tokens: int
    after: Position


class Loader:
    """Steps of `rows_per_step` rows of `row_tokens` tokens, in passes of `rows_per_pass`.

    Documents are shuffled anew in each epoch, packed in windows, and the rows of a window shuffled.

    `learned` gives, of a document, which tokens count as targets; without it all do. With
    `together` 2, documents 2k and 2k + 1 are a pair that stays side by side, and units are pairs.
    Without `packing` a row is one document (or pair). Rows are filled up to `row_tokens` unless
    they are pairs or not packed.
    """

    def __init__(
        self,
        documents: Documents,
        *,
        row_tokens: int,
        rows_per_step: int,
        rows_per_pass: int,
        rank: int = 0,
        ranks: int = 1,
        seed: int = 0,
        learned: Callable[[int], NDArray[np.bool_]] | None = None,
        together: int = 1,
        packing: bool = True,
    ) -> None:
        if rows_per_step % (ranks * rows_per_pass):
            raise XverseError(
                f"A step of {rows_per_step} rows cannot be shared by {ranks} processes.",
                f"Each takes {rows_per_pass} rows in a pass, and all of them equally many passes.",
                f"Take a multiple of {ranks * rows_per_pass} rows for a step.",
            )
        self.source = documents
        self.lengths = documents.lengths()
        if not (self.lengths > 1).any():
            raise XverseError(
                "There is nothing to learn from in these documents.",
                f"None of their {len(self.lengths)} documents has two tokens or more.",
                "Prepare the data again, and look at what it reports as skipped.",
            )
        self.row_tokens, self.rows_per_step = row_tokens, rows_per_step
        self.rows_per_pass, self.rank, self.ranks, self.seed = rows_per_pass, rank, ranks, seed
        self.learned, self.together, self.packing = learned, together, packing
        self.items = len(self.lengths) // together
        self._rows = lru_cache(maxsize=2)(self._pack_window)

    def steps(self, start: Position) -> Iterator[Step]:
        """Steps from `start` on, without an end."""
        place = start
        while True:
            rows: list[Row] = []
            while len(rows) < self.rows_per_step:
                window = self._rows(place.epoch, place.window)
                taken = window[place.row : place.row + self.rows_per_step - len(rows)]
                rows += taken
                place = self._behind(place, len(taken), len(window))
            yield self._step(rows, place)

    def once(self) -> Iterator[Step]:
        """The steps of one epoch that read every row once; the last is filled up with empty rows,
        in which nothing counts as a target."""
        rows: list[Row] = []
        for window in range(self._windows):
            rows += self._rows(0, window)
            while len(rows) >= self.rows_per_step:
                yield self._step(rows[: self.rows_per_step], Position())
                rows = rows[self.rows_per_step :]
        if rows:
            yield self._step(rows + [[]] * (self.rows_per_step - len(rows)), Position(1))

    def steps_in(self, epochs: float) -> int:
        """Steps that read all documents `epochs` times, the last of them whole. Epochs of more than
        one window are taken to have as many rows as the first one, which they have but for some
        in 10,000."""
        rows = sum(len(self._rows(0, window)) for window in range(self._windows))
        return max(1, math.ceil(round(epochs * rows, 6) / self.rows_per_step))

    @property
    def _windows(self) -> int:
        return -(-self.items // WINDOW)

    def _behind(self, place: Position, taken: int, rows: int) -> Position:
        if place.row + taken < rows:
            return Position(place.epoch, place.window, place.row + taken)
        if place.window + 1 < self._windows:
            return Position(place.epoch, place.window + 1, 0)
        return Position(place.epoch + 1, 0, 0)

    def _pack_window(self, epoch: int, window: int) -> list[Row]:
        last = min(self.items, (window + 1) * WINDOW)
        chosen = shuffled(window * WINDOW, last, self.items, seed=(self.seed, epoch))
        if not self.packing:
            return [self._row(item) for item in chosen.tolist()]
        # A pair has two last tokens that are no inputs, and `pack` leaves out one.
        lengths = self.lengths.reshape(-1, self.together)[chosen].sum(axis=1) - (self.together - 1)
        rows = pack(chosen.tolist(), lengths.tolist(), self.row_tokens)
        if self.together > 1:
            rows = [[piece for item in row for piece in self._row(item.document)] for row in rows]
        return [rows[i] for i in row_order(len(rows), (self.seed, epoch, window))]

    def _row(self, item: int) -> Row:
        """A document, or the two of a pair, whole."""
        numbers = range(item * self.together, (item + 1) * self.together)
        return [Piece(number, 0, int(self.lengths[number]) - 1) for number in numbers]

    def _step(self, rows: list[Row], after: Position) -> Step:
        pieces = [piece for row in rows for piece in row]
        tokens = sum(piece.length for piece in pieces)
        units = tokens if self.together == 1 else len(pieces) // self.together
        if self.learned is not None and self.together == 1:
            units = sum(int(self._targets(piece).sum()) for piece in pieces)
        share = self.rows_per_step // self.ranks
        mine = rows[self.rank * share : (self.rank + 1) * share]
        passes = tuple(
            self._batch(mine[first : first + self.rows_per_pass])
            for first in range(0, share, self.rows_per_pass)
        )
        return Step(passes, units=units, tokens=tokens, after=after)

    def _targets(self, piece: Piece) -> NDArray[np.bool_]:
        """Whether what follows each input of a piece counts, [length]."""
        if self.learned is None:
            return np.ones(piece.length, dtype=np.bool_)
        return self.learned(piece.document)[piece.start + 1 : piece.start + piece.length + 1]

    def _room(self, row: Row) -> int:
        """Tokens of a row in a batch, padding included. An empty row is one for each document that
        an item has: no pass is without tokens."""
        if self.packing and self.together == 1:
            return self.row_tokens
        return sum(piece.length for piece in row) or self.together

    def _batch(self, rows: list[Row]) -> Batch:
        """Every input of a piece has a target: what follows it in its document."""
        rooms = [self._room(row) for row in rows]
        ids, targets, positions = (np.zeros(sum(rooms), dtype=np.int64) for _ in range(3))
        mask = np.zeros(sum(rooms), dtype=np.bool_)
        documents: list[int] = []
        end = 0
        for row, room in zip(rows, rooms, strict=True):
            place, end = end, end + room
            for piece in row:
                index, start, length = piece
                tokens = self.source.document(index)[start : start + length + 1]
                here = slice(place, place + length)
                ids[here], targets[here] = tokens[:-1], tokens[1:]
                mask[here] = self._targets(piece)
                positions[here] = np.arange(length)
                documents.append(length)
                place += length
            # Padding is a document of its own; of an empty row of pairs, as many as a pair has.
            for rest in [end - place] if self.together == 1 else [1] * (end - place):
                positions[place : place + rest] = np.arange(rest)
                documents += [rest] if rest else []
                place += rest
        ids_T, targets_T, mask_T, positions_T = map(
            torch.from_numpy, (ids, targets, mask, positions)
        )
        return Batch(ids_T, targets_T, mask_T, positions_T, tuple(documents))


class Prefetch(Iterator[Item]):
    """The same items, made ahead by a thread; `close` ends it. What it raises is raised here."""

    def __init__(self, items: Iterator[Item], ahead: int = 2) -> None:
        self._items, self._closed = items, threading.Event()
        self._made: Queue[Item | Exception] = Queue(ahead)
        self._thread = threading.Thread(target=self._make, name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> Item:
        item = self._made.get()
        if isinstance(item, Exception):
            self._put(item)  # whoever asks again gets the same answer
            raise item
        return item

    def close(self) -> None:
        self._closed.set()
        while self._thread.is_alive():
            try:  # room for a thread that waits to put
                self._made.get(timeout=0.01)
            except Empty:
                continue

    def _make(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(StopIteration())
        except Exception as error:  # handed to whoever asks for the next item
            self._put(error)

    def _put(self, item: Item | Exception) -> bool:
        while not self._closed.is_set():
            try:
                self._made.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False
