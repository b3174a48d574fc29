"""Decode attention on a GPU against its plain twin, in Triton's interpreter, on the CPU."""

import os

import pytest
import torch

from tests.kernels.paged_case import Pool, close, seeded
from xverse.kernels import cuts, reference
from xverse.kernels.cuts import Cut, Scratch, choose_cut

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are checks by Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed, and its interpreter is the test")

from xverse.kernels import attend_triton

STORED = [0, 5, 16, 70]
DOTS = [Cut(block=16), Cut(block=16, parts=4, least=16), Cut(block=32, parts=2, least=48, stages=3)]
SUMS = [cut._replace(dots=False, warps=1) for cut in DOTS]


def check(cut: Cut, dtype: torch.dtype, heads: int, kv_heads: int, size: int, *, fp8: bool) -> None:
    pool = Pool.of(STORED, kv_heads, size, dtype, fp8=fp8)
    twin = pool.copy()
    positions = torch.tensor(STORED, dtype=torch.int32)
    angles = seeded(80, size)
    qkv = seeded(len(STORED), (heads + 2 * kv_heads) * size, dtype=dtype)
    given = (qkv, angles.cos().to(dtype), angles.sin().to(dtype), positions, pool.tables)
    scratch = Scratch.reserve(len(STORED), heads, kv_heads, size, "cpu", cut=cut)
    for again in range(2):
        fast = attend_triton.rotate_store_attend(
            *given, pool.keys, pool.values, pool.scales, scratch=scratch
        )
        expected = reference.rotate_store_attend(*given, twin.keys, twin.values, twin.scales)
        assert close(fast, expected), again
        assert pool.equals(twin)
        assert not scratch.arrived.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(2, 2, 16), (6, 2, 40)])
@pytest.mark.parametrize("cut", DOTS)
def test_attention_in_the_tensor_cores(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, cut: Cut
) -> None:
    check(cut, dtype, heads, kv_heads, size, fp8=False)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 64), (torch.bfloat16, 40)])
@pytest.mark.parametrize("cut", SUMS)
def test_attention_by_sums(dtype: torch.dtype, size: int, cut: Cut) -> None:
    check(cut, dtype, 2, 2, size, fp8=False)


@pytest.mark.parametrize("cut", DOTS)
def test_fp8_in_the_tensor_cores(cut: Cut) -> None:
    check(cut, torch.float16, 1, 1, 40, fp8=True)  # the interpreter's dot knows no bf16


@pytest.mark.parametrize("cut", SUMS)
def test_fp8_by_sums(cut: Cut) -> None:
    check(cut, torch.bfloat16, 1, 1, 64, fp8=True)


def test_a_group_over_fp8() -> None:
    check(DOTS[1], torch.float32, 6, 2, 16, fp8=True)


def test_short_sequences_are_not_cut_into_many_parts() -> None:
    """A part takes `least` tokens: what other parts left in the scratch is not joined."""
    pool = Pool.of(STORED, 2, 64, torch.float32, fp8=False)
    scratch = Scratch.reserve(4, 2, 2, 64, "cpu", cut=Cut(block=16, parts=8, least=32))
    scratch.mixed.fill_(torch.nan)
    scratch.sums.fill_(torch.nan)
    table = torch.ones(80, 64)
    positions = torch.tensor(STORED, dtype=torch.int32)
    given = (seeded(4, 6 * 64), table, 0 * table, positions, pool.tables)
    twin = pool.copy()
    fast = attend_triton.rotate_store_attend(*given, pool.keys, pool.values, scratch=scratch)
    assert close(fast, reference.rotate_store_attend(*given, twin.keys, twin.values))
    assert scratch.mixed[2].isnan().all(), "16 tokens are one part, which needs no scratch"
    assert not scratch.mixed[3, :, :3].isnan().any(), "70 tokens are three"
    assert scratch.mixed[3, :, 3:].isnan().all()


def test_rows_without_a_sequence_share_a_page() -> None:
    pool = Pool.of([0, 20, 0], 2, 64, torch.float32, fp8=True)
    tables = pool.tables.clone()
    tables[2] = tables[0]
    table = torch.ones(30, 64)
    positions = torch.tensor([0, 20, 0], dtype=torch.int32)
    given = (seeded(3, 6 * 64), table, 0 * table, positions, tables)
    twin = pool.copy()
    fast = attend_triton.rotate_store_attend(*given, pool.keys, pool.values, pool.scales)
    expected = reference.rotate_store_attend(*given, twin.keys, twin.values, twin.scales)
    assert close(fast[1], expected[1])


def test_several_query_heads_want_the_tensor_cores() -> None:
    pool = Pool.of([3], 1, 16, torch.float32, fp8=False)
    scratch = Scratch.reserve(1, 2, 1, 16, "cpu", cut=Cut(dots=False))
    table, positions = torch.ones(9, 16), torch.tensor([3], dtype=torch.int32)
    with pytest.raises(AssertionError, match="tensor cores"):
        attend_triton.rotate_store_attend(
            seeded(1, 64), table, table, positions, pool.tables, pool.keys, pool.values,
            scratch=scratch,
        )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 3, 16, 1024])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (9, 3), (64, 1)])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_cut_suits_its_kernel(tokens: int, heads: int, kv_heads: int, fp8: bool) -> None:
    cut = choose_cut(tokens, heads, kv_heads, fp8=fp8)
    assert cut.dots or heads == kv_heads
    assert 1 <= cut.parts <= cuts.MOST_PARTS
    assert cut.least >= cut.block or cut.parts == 1
