"""The loader: targets follow inputs, any place can be gone on from, ranks share every step."""

from itertools import islice

import numpy as np
import pytest
import torch

from tests.train.tiny import Documents
from xverse.data import loader as module
from xverse.data.loader import Batch, Loader, Position, Prefetch, Step
from xverse.errors import XverseError


def make(documents: Documents | None = None, **changes: int) -> Loader:
    sizes = {"row_tokens": 64, "rows_per_step": 4, "rows_per_pass": 2, "seed": 5} | changes
    return Loader(documents or Documents(), **sizes)


def take(loader: Loader, count: int, start: Position | None = None) -> list[Step]:
    return list(islice(loader.steps(start or Position()), count))


def same(one: Batch, other: Batch) -> bool:
    names = ("ids", "targets", "mask", "positions")
    equal = all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    return equal and one.documents == other.documents


def test_targets_are_what_follows_and_positions_begin_anew() -> None:
    stride_seen = set()
    for step in take(make(), 6):
        for batch in step.passes:
            assert sum(batch.documents) == len(batch.ids) == 128
            start = 0
            for length in batch.documents:
                here = slice(start, start + length)
                assert batch.positions[here].tolist() == list(range(length))
                if batch.mask[start]:
                    assert torch.equal(batch.ids[here][1:], batch.targets[here][:-1])
                    strides = (batch.targets[here] - batch.ids[here]) % 64
                    assert len(set(strides.tolist())) == 1, "one document has one stride"
                    stride_seen.add(strides[0].item())
                else:
                    assert not batch.mask[here].any()
                start += length
            assert step.units == sum(int(batch.mask.sum()) for batch in step.passes)
    assert stride_seen == {1, 2, 3}


def test_an_epoch_reads_every_input_once_and_the_next_in_another_order() -> None:
    documents = Documents(count=50)
    loader = make(documents, rows_per_step=1, rows_per_pass=1)
    epochs: dict[int, list[tuple[int, ...]]] = {0: [], 1: []}
    place = Position()
    for step in loader.steps(Position()):
        if place.epoch > 1:
            break
        (batch,) = step.passes
        pieces = torch.stack((batch.ids, batch.targets)).split(batch.documents, dim=1)
        live = batch.mask.split(batch.documents)
        epochs[place.epoch] += [
            tuple(piece.flatten().tolist())
            for piece, mask in zip(pieces, live, strict=True)
            if mask[0]
        ]
        place = step.after
    wanted = sorted(
        (*documents.document(i)[:-1].tolist(), *documents.document(i)[1:].tolist())
        for i in range(50)
    )
    assert sorted(epochs[0]) == sorted(epochs[1]) == wanted
    assert epochs[0] != epochs[1]


def test_going_on_from_any_place_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 32)
    whole = take(make(), 40)
    assert whole[-1].after.epoch >= 1
    assert any(step.after.window > 1 for step in whole)
    for index in (0, 7, 23):
        for old, new in zip(whole[index + 1 :], take(make(), 20, whole[index].after), strict=False):
            assert old.after == new.after
            assert all(map(same, old.passes, new.passes))


def test_ranks_share_a_step() -> None:
    alone = take(make(rows_per_step=8), 5)
    for ranks in (2, 4):
        shares = [take(make(rows_per_step=8, rank=r, ranks=ranks), 5) for r in range(ranks)]
        for step, *parts in zip(alone, *shares, strict=True):
            passes = [batch for part in parts for batch in part.passes]
            assert all(map(same, step.passes, passes))
            assert {part.units for part in parts} == {step.units}
            assert {part.after for part in parts} == {step.after}


def test_a_document_longer_than_a_row_is_continued_in_another() -> None:
    documents = Documents(count=1)
    documents._documents = [np.arange(150).astype(np.uint16) % 64]
    steps = take(make(documents, rows_per_step=1, rows_per_pass=1), 3)
    pairs = sorted(
        (int(i), int(t))
        for step in steps
        for i, t, m in zip(
            step.passes[0].ids, step.passes[0].targets, step.passes[0].mask, strict=True
        )
        if m
    )
    whole = documents.document(0).astype(int)
    assert pairs == sorted(zip(whole[:-1].tolist(), whole[1:].tolist(), strict=True))


def test_what_cannot_be_shared_or_learned_is_refused() -> None:
    with pytest.raises(XverseError, match="cannot be shared"):
        make(rows_per_step=6, ranks=2)
    empty = Documents(count=3)
    empty._documents = [np.array([3], dtype=np.uint16)] * 3
    with pytest.raises(XverseError, match="nothing to learn"):
        make(empty)


def test_prefetch_gives_the_same_and_ends_and_tells_what_failed() -> None:
    assert list(Prefetch(iter(range(10)))) == list(range(10))

    def broken(_: int) -> int:
        raise OSError("the disk is gone")

    ahead = Prefetch(map(broken, range(1)))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    endless = Prefetch(iter(int, 1))
    assert next(endless) == 0
    endless.close()
    assert not endless._thread.is_alive()
