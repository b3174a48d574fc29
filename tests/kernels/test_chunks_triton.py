"""Rope, store and attention of prompt chunks against their twins, in Triton's interpreter."""

import os

import pytest
import torch

from tests.kernels.paged_case import Pool, close, seeded
from xverse.kernels import reference
from xverse.kernels.cuts import ChunkCut

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are checks by Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed, and its interpreter is the test")

from xverse.kernels import chunks_triton

CUT = ChunkCut(rows=16, block=32, warps=1, stages=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (9, 3, 40)])
@pytest.mark.parametrize("fp8", [False, True])
def test_rope_and_store(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, fp8: bool
) -> None:
    pool = Pool.of([0, 20], kv_heads, size, dtype, fp8=fp8)
    twin = pool.copy()
    slots = torch.cat((pool.slots(1, 20, 25), pool.slots(0, 14, 18)))
    positions = torch.cat((torch.arange(20, 25), torch.arange(14, 18))).int()
    angles = seeded(40, size)
    qkv = seeded(9, (heads + 2 * kv_heads) * size, dtype=dtype)
    qkv[7] = 0  # a row of zeros has a scale too
    given = (qkv, angles.cos().to(dtype), angles.sin().to(dtype), positions, slots)
    fast = chunks_triton.rotate_store(*given, pool.keys, pool.values, pool.scales, block=4)
    expected = reference.rotate_store(*given, twin.keys, twin.values, twin.scales)
    assert torch.equal(fast, expected)
    assert pool.equals(twin)


@pytest.mark.parametrize(
    ("dtype", "fp8", "heads", "kv_heads", "size"),
    [
        (torch.float32, False, 2, 2, 16),
        (torch.float16, False, 3, 1, 40),
        (torch.float16, True, 2, 2, 16),
        (torch.float32, True, 3, 1, 40),
    ],
)
@pytest.mark.parametrize(
    ("held", "counts"),
    [([0], [37]), ([40], [1]), ([0, 33, 7, 64], [16, 1, 30, 17]), ([3, 0, 9], [5, 0, 33])],
)
def test_chunks(
    dtype: torch.dtype,
    fp8: bool,
    heads: int,
    kv_heads: int,
    size: int,
    held: list[int],
    counts: list[int],
) -> None:
    stored = [past + count for past, count in zip(held, counts, strict=True)]
    pool = Pool.of(stored, kv_heads, size, dtype, fp8=fp8)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows = sum(counts) + 19  # and some of no sequence
    q = seeded(rows, heads, size, dtype=dtype)
    q[sum(counts) :] = torch.nan
    given = (q, pool.keys, pool.values, pool.tables, offsets, torch.tensor(held).int(), pool.scales)
    fast = chunks_triton.attend_chunks(*given, most=max(counts), cut=CUT)
    expected = reference.attend_chunks(*given)
    assert close(fast, expected)
    assert not fast[sum(counts) :].any(), "no sequence, no answer"


def test_a_chunk_is_attended_to_as_a_whole_prompt_is() -> None:
    """The twin itself, against attention without pages."""
    pool = Pool.of([30], 2, 16, torch.float32, fp8=False)
    q = seeded(10, 4, 16)
    offsets, held = torch.tensor([0, 10]), torch.tensor([20])
    mixed = reference.attend_chunks(q, pool.keys, pool.values, pool.tables, offsets, held)
    used = pool.tables[0, :2].long()
    k, v = (pages[used].transpose(1, 2).flatten(0, 1)[:30] for pages in (pool.keys, pool.values))
    assert torch.equal(mixed, reference.attend(q, k, v))


def test_nothing_to_do() -> None:
    pool = Pool.of([3], 2, 16, torch.float32, fp8=False)
    q, one = seeded(0, 2, 16), torch.zeros(1, dtype=torch.int32)
    pages = (pool.keys, pool.values)
    assert chunks_triton.attend_chunks(q, *pages, pool.tables, one.repeat(2), one).shape == q.shape
    none = torch.zeros(0, dtype=torch.int32)
    qkv, table = seeded(0, 96), torch.ones(9, 16)
    stored = chunks_triton.rotate_store(qkv, table, table, none, none.long(), *pages)
    assert stored.shape == (0, 2, 16)
