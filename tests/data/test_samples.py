"""The table of samples and its loader: whole samples, shared steps, units, pairs side by side."""

from itertools import islice

import numpy as np
import pytest
import torch

from xverse.data import loader as module
from xverse.data.loader import Batch, Loader, Position
from xverse.data.samples import Growing, Pair, Pairs, Sample, Samples, loader_of, samples_of
from xverse.errors import XverseError


def sample(number: int, length: int, learned: int) -> Sample:
    """Ids that tell which sample it is; its last tokens are learned."""
    mask = np.arange(length) >= length - learned
    return Sample(np.full(length, number, dtype=np.int32), mask)


def many(count: int = 40, seed: int = 0) -> Samples:
    sizes = np.random.default_rng(seed).integers(3, 20, count).tolist()
    samples = samples_of([sample(at, size, size // 2) for at, size in enumerate(sizes)])
    assert isinstance(samples, Samples)
    return samples


def pairs(count: int = 12) -> Pairs:
    sizes = np.random.default_rng(1).integers(3, 12, (count, 2)).tolist()
    made = samples_of(
        [Pair(sample(2 * at, a, 2), sample(2 * at + 1, b, 2)) for at, (a, b) in enumerate(sizes)]
    )
    assert isinstance(made, Pairs)
    return made


def whole(batch: Batch) -> list[tuple[int, int, int]]:
    """(sample, its inputs, targets that count) of every document that is no padding."""
    found = []
    start = 0
    for length in batch.documents:
        here = slice(start, start + length)
        if batch.mask[here].any():
            assert len(set(batch.ids[here].tolist())) == 1
            assert batch.positions[here].tolist() == list(range(length))
            found.append((int(batch.ids[start]), length, int(batch.mask[here].sum())))
        start += length
    assert start == len(batch.ids)
    return found


def test_items_come_back_as_they_were() -> None:
    samples = many()
    assert len(samples) == samples.documents == 40
    assert samples[3].ids.tolist() == sample(3, len(samples[3].ids), 1).ids.tolist()
    assert samples[-1].ids[0] == 39
    assert [item.ids[0] for item in samples[2:4]] == [2, 3]
    with pytest.raises(IndexError):
        samples[40]
    made = pairs()
    assert (len(made), made.documents) == (12, 24)
    assert made[5].chosen.ids[0] == 10
    assert made[5].rejected.ids[0] == 11


def test_a_split_keeps_rows_together_and_loses_none() -> None:
    growing = Growing()
    for row in range(50):
        growing.add([sample(row, 4, 1)] * (row % 3 + 1), row)
    samples = growing.finish(pairs=False)
    learn, held = samples.split(0.2, seed=3)
    rows = [{int(one.document(at)[0]) for at in range(one.documents)} for one in (learn, held)]
    assert rows[0] | rows[1] == set(range(50))
    assert not rows[0] & rows[1]
    assert len(rows[1]) == 10
    assert len(learn) + len(held) == len(samples)
    again = samples.split(0.2, seed=3)[1]
    assert again.lengths().tolist() == held.lengths().tolist()
    assert len({int(held.document(at)[0]) for at in range(5)} ^ rows[1]) > 0
    assert len(samples.split(7, seed=0)[1].split(0, seed=0)[1]) == 0
    for share in (-0.1, 50, 0.001, 1000):
        with pytest.raises(XverseError, match="cannot be held out"):
            samples.split(share, seed=0)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_reads_each_sample_once_and_whole(packing: bool) -> None:
    samples = many()
    loader = loader_of(samples, row_tokens=32, rows_per_step=4, rows_per_pass=2, packing=packing)
    wanted = sorted((at, len(one.ids) - 1, int(one.learned[1:].sum())) for at, one in
                    enumerate(samples))  # fmt: skip
    steps = list(loader.once())
    assert len(steps) == loader.steps_in(1.0)
    assert sorted(one for step in steps for batch in step.passes for one in whole(batch)) == wanted
    for step in steps:
        assert len(step.passes) == 2
        assert step.units == sum(int(batch.mask.sum()) for batch in step.passes)
        for batch in step.passes:
            assert len(batch.ids) == 64 or not packing
    assert sum(step.tokens for step in steps) == int((samples.lengths() - 1).sum())
    assert loader.steps_in(2.0) in (2 * len(steps), 2 * len(steps) - 1)


def test_rows_alone_have_no_padding() -> None:
    samples = many()
    loader = loader_of(samples, row_tokens=32, rows_per_step=4, rows_per_pass=4, packing=False)
    for step in islice(loader.steps(Position()), 10):
        (batch,) = step.passes
        assert len(batch.documents) == 4
        assert len(batch.ids) == step.tokens
        assert len(whole(batch)) == 4


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_the_steps_of_one(packing: bool) -> None:
    samples = many()
    alone = loader_of(
        samples, row_tokens=32, rows_per_step=4, rows_per_pass=1, packing=packing, seed=4
    )
    both = [
        loader_of(
            samples, row_tokens=32, rows_per_step=4, rows_per_pass=1, rank=rank, ranks=2,
            packing=packing, seed=4,
        )
        for rank in range(2)
    ]  # fmt: skip
    for one, left, right in islice(
        zip(*(loader.steps(Position()) for loader in (alone, *both)), strict=True), 12
    ):
        assert one.units == left.units == right.units
        assert one.after == left.after == right.after
        ids = [batch.ids.tolist() for batch in one.passes]
        assert ids == [batch.ids.tolist() for batch in (*left.passes, *right.passes)]


def test_going_on_gives_the_same_and_epochs_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 16)
    loader = loader_of(many(), row_tokens=32, rows_per_step=2, rows_per_pass=2, packing=False)
    steps = list(islice(loader.steps(Position()), 60))
    later = next(iter(loader.steps(steps[37].after)))
    assert torch.equal(later.passes[0].ids, steps[38].passes[0].ids)
    first, second = ([s.passes[0].ids.tolist() for s in steps[a : a + 20]] for a in (0, 20))
    assert steps[19].after == Position(1)
    assert first != second


@pytest.mark.parametrize("packing", [True, False])
def test_pairs_stay_side_by_side(packing: bool) -> None:
    made = pairs()
    loader = loader_of(made, row_tokens=48, rows_per_step=2, rows_per_pass=1, packing=packing)
    seen = []
    for step in loader.once():
        real = 0
        for batch in step.passes:
            assert len(batch.documents) % 2 == 0
            marks = batch.mask.split(batch.documents)
            ids = batch.ids.split(batch.documents)
            for at in range(0, len(ids), 2):
                if not marks[at].any():
                    assert not marks[at + 1].any()
                    assert batch.documents[at : at + 2] == (1, 1)
                    continue
                number = int(ids[at][0])
                assert number % 2 == 0
                assert ids[at + 1][0] == number + 1
                assert len(ids[at]) == len(made[number // 2].chosen.ids) - 1
                seen.append(number // 2)
                real += 1
        assert step.units == real
    assert sorted(seen) == list(range(12))
    assert packing == (loader.steps_in(1) < 6)


def test_what_no_row_has_room_for_is_refused() -> None:
    with pytest.raises(XverseError, match="sample has 9 tokens to read, and a row 8"):
        loader_of(samples_of([sample(0, 10, 2)]), row_tokens=8, rows_per_step=1, rows_per_pass=1)  # type: ignore[arg-type]
    two = samples_of([Pair(sample(0, 6, 2), sample(1, 6, 2))])
    with pytest.raises(XverseError, match="pair has 10 tokens to read, and a row 8"):
        loader_of(two, row_tokens=8, rows_per_step=1, rows_per_pass=1)
    assert isinstance(loader_of(two, row_tokens=10, rows_per_step=1, rows_per_pass=1), Loader)


def test_a_table_takes_five_bytes_a_token() -> None:
    growing = Growing()
    for row in range(1000):
        growing.add([sample(row % 99, 100, 50)], row)
    samples = growing.finish(pairs=False)
    held = sum(part.nbytes for part in samples._table)
    assert held == 1000 * (100 * 5 + 20)
    assert samples.document(5).base is not None  # a view
