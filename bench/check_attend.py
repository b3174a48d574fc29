"""DO THE ATTENTION KERNELS COMPUTE WHAT THEIR TWINS SAY? On a GPU; bf16 and FP8 pages, NaN in
free slots, tables in random order. The twins run on the CPU; what is stored must have their bits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.paged_case import Pool, seeded
from xverse.kernels import attend_triton, chunks_triton, reference
from xverse.kernels.cuts import ChunkCut, Cut, Scratch

SHAPES = ((32, 32, 128, 16), (32, 8, 128, 64), (9, 3, 64, 16), (4, 4, 80, 32))
STORED = [0, 1, 31, 32, 300, 700]
CUTS: tuple[Cut | None, ...] = (None, Cut(), Cut(parts=3, stages=3, block=32))
SUMS = (Cut(block=32, dots=False), Cut(block=32, dots=False, parts=5, stages=3))
CHUNKS = (None, ChunkCut(rows=64, block=64, warps=4, stages=2), ChunkCut(rows=128, block=128))
LIMIT = 8e-3  # of |kernel - twin| / |twin|; each rounds weights and sums to bf16 in its own way


class Check(NamedTuple):
    """One shape: query heads, key heads, size, page size, and whether pages are FP8."""

    heads: int
    kv_heads: int
    size: int
    page: int
    fp8: bool


def checks() -> list[Check]:
    return [Check(*shape, fp8) for shape in SHAPES for fp8 in (False, True)]


def distance(fast: Tensor, twin: Tensor) -> float:
    """|fast - twin| / |twin|; NaN anywhere gives NaN, which no limit passes."""
    twin = twin.double()
    return float((fast.cpu().double() - twin).norm() / twin.norm())


def run(check: Check) -> list[str]:
    """What is wrong, one line each."""
    return [f"{check}: {line}" for part in (_decode, _chunks) for line in part(check)]


def _tables(size: int) -> tuple[Tensor, Tensor]:
    angles = seeded(1024, size // 2).repeat(1, 2)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def _decode(check: Check) -> Iterator[str]:
    heads, kv_heads, size = check[:3]
    pool = Pool.of(STORED, kv_heads, size, torch.bfloat16, fp8=check.fp8, page=check.page)
    there, positions = pool.copy("cuda"), torch.tensor(STORED, dtype=torch.int32)
    qkv = seeded(len(STORED), (heads + 2 * kv_heads) * size, dtype=torch.bfloat16)
    given = (qkv, *_tables(size), positions)
    twin = reference.rotate_store_attend(*given, pool.tables, pool.keys, pool.values, pool.scales)
    qkv, cos, sin, positions = (tensor.cuda() for tensor in given)
    cuts = (*CUTS, *(SUMS if heads == kv_heads else ()))
    for cut, pdl in ((cut, bool(i % 2)) for i, cut in enumerate(cuts)):
        scratch = Scratch.reserve(
            len(STORED), heads, kv_heads, size, "cuda", cut=cut, fp8=check.fp8
        )
        found = [
            attend_triton.rotate_store_attend(
                qkv, cos, sin, positions, there.tables, there.keys, there.values, there.scales,
                scratch=scratch, pdl=pdl,
            )
            for _ in range(3)
        ]  # fmt: skip
        error = distance(found[0], twin)
        if not error < LIMIT:
            yield f"decode {cut} pdl={pdl}: {error:.1e} from its twin"
        if not all(torch.equal(found[0], other) for other in found):
            yield f"decode {cut} pdl={pdl}: not the same bits again"
        if not there.copy().equals(pool):
            yield f"decode {cut} pdl={pdl}: other bits are stored"


def _chunks(check: Check) -> Iterator[str]:
    heads, kv_heads, size = check[:3]
    held, counts = [0, 33, 700, 64, 0], [300, 1, 130, 0, 17]
    stored = [past + count for past, count in zip(held, counts, strict=True)]
    pool = Pool.of(stored, kv_heads, size, torch.bfloat16, fp8=check.fp8, page=check.page)
    there = pool.copy("cuda")
    ranges = list(zip(held, stored, strict=True))
    slots = torch.cat([pool.slots(b, *between) for b, between in enumerate(ranges)])
    positions = torch.cat([torch.arange(*between) for between in ranges])
    qkv = seeded(sum(counts), (heads + 2 * kv_heads) * size, dtype=torch.bfloat16)
    given = (qkv, *_tables(size), positions.int(), slots)
    q = reference.rotate_store(*given, pool.keys, pool.values, pool.scales)
    qkv, cos, sin, positions, slots = (tensor.cuda() for tensor in given)
    fast = chunks_triton.rotate_store(
        qkv, cos, sin, positions, slots, there.keys, there.values, there.scales
    )
    if not (torch.equal(fast.cpu(), q) and there.copy().equals(pool)):
        yield "rotate_store: other bits than its twin"
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    q = torch.cat((q, q[:3] * torch.nan))  # rows of no sequence
    held_B = torch.tensor(held, dtype=torch.int32)
    twin = reference.attend_chunks(
        q, pool.keys, pool.values, pool.tables, offsets, held_B, pool.scales
    )
    there = pool.copy("cuda")
    for cut in CHUNKS:
        fast = chunks_triton.attend_chunks(
            q.cuda(), there.keys, there.values, there.tables, offsets.cuda(), held_B.cuda(),
            there.scales, most=max(counts), cut=cut,
        )  # fmt: skip
        error = distance(fast, twin)
        if not error < LIMIT:
            yield f"chunks {cut}: {error:.1e} from their twin"


def main() -> None:
    wrong = [line for check in checks() for line in run(check)]
    print("\n".join(wrong) or "all equal")
    assert not wrong, "a kernel computes otherwise than its twin"


if __name__ == "__main__":
    main()
