"""Packing: every input once, no row over its size, little padding; shuffles are permutations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xverse.data.packing import pack, shuffled


@given(lengths=st.lists(st.integers(0, 50), max_size=60), row_tokens=st.integers(1, 20))
def test_every_input_stands_in_exactly_one_row(lengths: list[int], row_tokens: int) -> None:
    rows = pack(range(len(lengths)), lengths, row_tokens)
    seen: dict[int, list[int]] = {}
    for row in rows:
        assert 0 < sum(piece.length for piece in row) <= row_tokens
        for document, start, length in row:
            seen.setdefault(document, []).extend(range(start, start + length))
    wanted = {i: list(range(n - 1)) for i, n in enumerate(lengths) if n > 1}
    assert {document: sorted(inputs) for document, inputs in seen.items()} == wanted


@given(lengths=st.lists(st.integers(2, 21), min_size=1, max_size=60))
def test_what_fits_in_a_row_is_never_cut(lengths: list[int]) -> None:
    pieces = [piece for row in pack(range(len(lengths)), lengths, 20) for piece in row]
    assert len(pieces) == len(lengths)


def test_a_window_of_real_lengths_has_little_padding() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 4096).astype(int) + 2
    rows = pack(range(len(lengths)), lengths.tolist(), 4096)
    assert 1 - (lengths - 1).sum() / (4096 * len(rows)) < 0.005


@given(size=st.integers(1, 500), seed=st.integers(0, 2**32), cut=st.floats(0, 1, allow_nan=False))
def test_a_shuffle_is_a_permutation_however_it_is_asked_for(
    size: int, seed: int, cut: float
) -> None:
    middle = round(size * cut)
    parts = [shuffled(0, middle, size, [seed]), shuffled(middle, size, size, [seed])]
    whole = np.concatenate(parts)
    assert sorted(whole) == list(range(size))
    assert (whole == shuffled(0, size, size, [seed])).all()


def test_another_seed_is_another_order() -> None:
    orders = {tuple(shuffled(0, 100, 100, [seed, 0])) for seed in range(20)}
    assert len(orders) == 20


@pytest.mark.parametrize("size", [10_000, 65_537])
def test_neighbours_do_not_stay_together(size: int) -> None:
    order = shuffled(0, size, size, [3])
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
    assert (np.diff(order) == 1).mean() < 0.01
