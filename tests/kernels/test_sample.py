"""The kernels that choose tokens against their plain twins, in Triton's interpreter, on the CPU."""

import os

import pytest
import torch
from torch import Tensor

from xverse.kernels import reference_sample as reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are checks by Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed, and its interpreter is the test")

from xverse.kernels import change_triton, sample_triton
from xverse.kernels.sample_triton import Cut, Scratch

# A list of 64 tokens is too short for flat rows, which are then searched as a whole.
SMALL = Cut(tile=128, group=16, block=512, part=512, list=64, warps=4)
PIECES = Cut(tile=64, group=8, block=32, part=16, list=16, warps=1)
NAN, INF = float("nan"), float("inf")
ROUNDING = 1e-5


def seeded(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + seed))


def sampled(
    logits: Tensor, options: list[tuple[float, int, float, float]], points: list[float], cut: Cut
) -> list[int]:
    """What the kernels choose, after a check against the twin: the same, or within rounding."""
    rows, vocab = logits.shape
    temperature, top_k, top_p, min_p = (
        torch.tensor(column) for column in zip(*options, strict=True)
    )
    points_B = torch.tensor(points, dtype=torch.float64)
    arguments = (logits, temperature, top_k, top_p, min_p, points_B)
    scratch = Scratch.reserve(rows, vocab, "cpu", cut)
    fast = sample_triton.sample_rows(*arguments, scratch=scratch)
    twin = reference.sample_rows(*arguments)
    assert fast.dtype == torch.int64
    for row, (ours, theirs) in enumerate(zip(fast.tolist(), twin.tolist(), strict=True)):
        assert ours == theirs or near_an_edge(logits[row], options[row], points[row], ours), row
    return fast.tolist()


def near_an_edge(
    logits_V: Tensor, options: tuple[float, int, float, float], point: float, id: int
) -> bool:
    """Whether a point so little away that it is rounding would choose this id."""
    return id in {
        reference.choose_row(logits_V, *options, point + d) for d in (-ROUNDING, ROUNDING)
    }


OPTIONS = [
    (0.0, 0, 1.0, 0.0),
    (1.3, 0, 1.0, 0.0),
    (0.5, 30, 0.8512, 0.0),
    (1.0, 0, 0.6234, 0.0),
    (1.0, 0, 0.9876, 0.0),
    (0.7, 0, 1.0, 0.0523),
    (1.0, 3, 1.0, 0.0),
    (2.0, 150, 0.7321, 0.0),
    (2.0, 10**6, 0.9321, 0.5),
    (3.0, 40, 0.9523, 0.6),
]


@pytest.mark.parametrize(
    ("dtype", "options"), [(torch.float32, OPTIONS), (torch.bfloat16, OPTIONS[2:4])]
)
def test_rows_with_options_of_their_own(
    dtype: torch.dtype, options: list[tuple[float, int, float, float]]
) -> None:
    logits = (seeded(len(options), 300) * 3).to(dtype)
    points = torch.rand(len(options), generator=torch.Generator().manual_seed(1)).tolist()
    sampled(logits, options, points, SMALL)


@pytest.mark.parametrize("option", [OPTIONS[2], OPTIONS[3], OPTIONS[7]])
def test_searches_in_many_small_pieces(option: tuple[float, int, float, float]) -> None:
    logits = seeded(2, 150, seed=3) * torch.tensor([[6.0], [0.5]])  # in a list, and as a whole
    sampled(logits, [option] * 2, [0.31, 0.94], PIECES)


@pytest.mark.parametrize("option", [(1.0, 20, 1.0, 0.0), (1.5, 0, 0.7171, 0.0), (0.9, 40, 0.51, 0)])
def test_equals_are_kept_by_top_k_and_left_by_top_p_from_the_first(
    option: tuple[float, int, float, float],
) -> None:
    """Hundreds of tokens share seven logits."""
    logits = seeded(2, 300, seed=5).round().bfloat16()
    sampled(logits, [option] * 2, [0.0, 0.999], SMALL)


def test_a_few_equals_at_the_edge_of_top_p_in_a_row_too_flat_to_list() -> None:
    """Thirty steps of ten tokens each: some of one step are kept, and others left."""
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    logits = (order // 10).float()[None] * 0.02
    options = [(1.0, 0, top_p, 0.0) for top_p in (0.35, 0.5, 0.55, 0.72)]
    sampled(logits.repeat(4, 1), options, [0.93] * 4, SMALL)


def test_of_equal_best_ones_top_p_keeps_the_last() -> None:
    logits = torch.zeros(3, 200)
    logits[1] = -0.0
    logits[2, [3, 70, 190]] = 4.0
    assert sampled(logits, [(1.0, 0, 0.0, 0.0)] * 3, [0.5] * 3, SMALL) == [199, 199, 190]


def test_rows_with_little_in_them() -> None:
    logits = torch.full((8, 200), -INF)
    logits[0, 150] = -3.0  # one token is possible
    logits[1, [7, 150]] = 2.0
    logits[3] = seeded(200)
    logits[3, 199] = NAN
    logits[4, 5] = INF
    logits[5, 60] = 1e30
    logits[5, 61] = 0.0
    logits[6, :70] = seeded(70)  # fewer than top_k, more than the list holds
    logits[7] = seeded(200) * 1e-30
    options = [(0.5, 30, 0.85, 0.0), (1.0, 1, 1.0, 0.0), *[(1.0, 5, 0.9, 0.0)] * 3]
    options += [(0.01, 0, 0.5, 0.0), (1.0, 100, 0.9123, 0.0), (1.0, 0, 0.5432, 0.0)]
    ids = sampled(logits, options, [0.7] * 8, SMALL)
    assert ids[:6] == [150, 150, -1, -1, -1, 60]


def test_the_ends_of_the_range() -> None:
    logits = seeded(1, 300, seed=9).repeat(4, 1)
    options = [(1.0, 0, 1.0, 0.0)] * 2 + [(1.0, 0, 1.0, 1e-9)] * 2
    ids = sampled(logits, options, [0.0, 1 - 2**-53] * 2, SMALL)
    assert ids == [0, 299, 0, 299]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cut", [SMALL, Cut(tile=512)])
def test_greedy(dtype: torch.dtype, cut: Cut) -> None:
    wide = (seeded(7, 320) * 2).to(dtype)
    logits = wide[:, :300]  # rows lie further apart than they are long
    wide[:, 300:] = 1000.0
    logits[1, [250, 40, 260]] = 100.0
    logits[2] = -INF
    logits[3] = seeded(300).abs().neg().to(dtype)
    logits[3, [130, 140]] = torch.tensor([-0.0, 0.0], dtype=dtype)
    logits[4, 299] = NAN
    logits[5, 200] = INF
    scratch = Scratch.reserve(7, 300, "cpu", cut, greedy=True)
    for _ in range(2):  # what the first launch leaves behind serves the second
        ids = sample_triton.best_rows(logits, scratch=scratch)
        assert torch.equal(ids, reference.best_rows(logits))
    assert ids.tolist()[1:6] == [40, 0, 130, -1, 200]


def test_masks() -> None:
    masks = torch.randint(-(2**31), 2**31, (3, 3), generator=torch.Generator().manual_seed(0))
    masks = masks.int()
    for dtype in (torch.float32, torch.bfloat16):
        logits = seeded(3, 70).to(dtype)
        twin = reference.mask_rows(logits.clone(), masks)
        assert torch.equal(change_triton.mask_rows(logits, masks), twin)
    allowed = [bool(int(masks[2, v // 32]) >> (v % 32) & 1) for v in range(70)]
    assert (twin[2] > -INF).tolist() == allowed


def test_penalties_and_counts() -> None:
    counts = torch.zeros(5, 50, dtype=torch.int16)
    reference.mark_prompt(counts, 3, torch.tensor([1, 1, 4, 9]))
    counts[3, [4, 20]] += torch.tensor([2, 7], dtype=torch.int16)
    counts[1, :] = 5
    counts[0, 8] = 0x7FFF  # counted no further
    slots = torch.tensor([3, 1, 0])
    twins = counts.clone()
    for ids in ([4, -1, 8], [30, 2, 8]):
        for count, table in ((change_triton.count_rows, counts), (reference.count_rows, twins)):
            count(table, slots, torch.tensor(ids))
    assert torch.equal(counts, twins)
    assert counts[3, [1, 4, 20, 30]].tolist() == [-0x8000, 3 - 0x8000, 7, 1]
    assert counts[0, 8] == 0x7FFF
    assert counts[1, [1, 2]].tolist() == [5, 6]

    logits = seeded(3, 50)
    options = [
        torch.tensor([1.3, 1.0, 0.7]),
        torch.tensor([0.5, 0.0, 0]),
        torch.tensor([0.1, 0, 2]),
    ]
    penalties = [option.double() for option in options]
    twin = reference.penalize_rows(logits.clone(), twins, slots, *penalties)
    found = change_triton.penalize_rows(logits.clone(), counts, slots, *penalties)
    assert torch.equal(found, twin)
    assert torch.equal(found[1], logits[1])  # whatever its slot has seen
    assert (found[0] != logits[0]).nonzero()[:, 0].tolist() == [1, 4, 9, 20, 30]


def test_a_prompt_takes_the_place_of_what_was_seen_before() -> None:
    counts = torch.full((2, 6), 7, dtype=torch.int16)
    reference.mark_prompt(counts, 1, torch.tensor([2, 5]))
    assert counts.tolist() == [[7] * 6, [0, 0, -0x8000, 0, 0, -0x8000]]
