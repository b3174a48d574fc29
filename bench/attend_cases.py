"""WHAT IS TUNED. Decode steps, prompts and stores at XVERSE-7B's shape, cuts to try, and pages.

For `bench/tune_attend.py`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.check_attend import Check
from xverse.kernels.cuts import ChunkCut, Cut
from xverse.kernels.reference import Scales

HEADS, SIZE = 32, 128  # of XVERSE-7B: as many key heads as query heads
BYTES = 2**30  # of keys and values that a graph reads at least
CONTEXTS = {1: 1024, 8: 1024, 16: 1024, 64: 192, 256: 0, 512: 192, 1024: 192}  # 0: 100 to 2,048


class Decode(NamedTuple):
    """A decode step: sequences, page size, FP8 or not, and how it is cut."""

    rows: int
    page: int
    fp8: bool
    cut: Cut


class Prompt(NamedTuple):
    """Attention of so many prompts of `tokens`."""

    prompts: int
    tokens: int
    fp8: bool
    cut: ChunkCut


class Store(NamedTuple):
    """Rope and store of 8,192 tokens: heads a program, warps."""

    fp8: bool
    block: int
    warps: int


Job = Check | Decode | Prompt | Store


def few_cuts(rows: int) -> list[Cut]:
    """For steps of few sequences, which several programs share."""
    kinds = (Cut(warps=8), Cut(warps=4), Cut(block=32, dots=False), Cut(block=32, warps=8),
             Cut(block=32, dots=False, stages=3), Cut(block=64, warps=8, dots=False))  # fmt: skip
    parts = {1: (4, 8), 8: (1, 2, 4), 16: (1, 2)}[rows]
    return [kind._replace(parts=count) for kind in kinds for count in parts]


def many_cuts(*, fp8: bool) -> list[Cut]:
    sums = Cut(block=32, dots=False)
    cuts = [sums, sums._replace(warps=2), sums._replace(stages=2), sums._replace(stages=3),
            sums._replace(stages=4), sums._replace(stages=3, registers=80),
            sums._replace(block=64, stages=2), Cut(), Cut(block=32, stages=3)]  # fmt: skip
    if fp8:
        cuts += [sums._replace(block=64), sums._replace(block=64, stages=3),
                 sums._replace(block=64, stages=3, registers=96)]  # fmt: skip
    else:
        cuts += [sums._replace(block=16, stages=4), sums._replace(block=16, stages=6)]
    for cut in (sums, sums._replace(stages=3)):
        cuts += [cut._replace(parts=2, least=512), cut._replace(parts=4, least=512)]
    return cuts


def decodes() -> Iterator[Decode]:
    for rows in CONTEXTS:
        for fp8 in (False, True):
            if rows <= 16:
                yield from (Decode(rows, 16, fp8, cut) for cut in few_cuts(rows))
                continue
            yield from (Decode(rows, 16, fp8, cut) for cut in many_cuts(fp8=fp8))
            for page in (32, 64):
                for stages in (1, 3):
                    yield Decode(rows, page, fp8, Cut(block=32, dots=False, stages=stages))


def prompts() -> Iterator[Prompt]:
    cuts = [ChunkCut(128, 64, 8, 3), ChunkCut(128, 64, 8, 2), ChunkCut(128, 128, 8, 2),
            ChunkCut(128, 64, 8, 2, 128), ChunkCut(64, 64, 4, 2), ChunkCut(64, 64, 4, 3),
            ChunkCut(128, 32, 8, 4), ChunkCut(128, 32, 8, 3, 128)]  # fmt: skip
    for count, tokens in ((1, 2048), (1, 8192), (16, 512)):
        for fp8 in (False, True):
            yield from (Prompt(count, tokens, fp8, cut) for cut in cuts)


def stores() -> Iterator[Store]:
    for fp8 in (False, True):
        yield from (Store(fp8, block, warps) for block, warps in ((8, 2), (16, 4), (32, 4)))


def lengths(rows: int) -> Tensor:
    if CONTEXTS[rows]:
        return torch.full((rows,), CONTEXTS[rows])
    return torch.randint(100, 2049, (rows,), generator=torch.Generator().manual_seed(0))


class Pages:
    """Layers of keys and values for sequences of these lengths, in pages in random order."""

    def __init__(self, tokens_B: Tensor, page: int, *, fp8: bool, at_least: int) -> None:
        counts = (tokens_B + page) // page
        count = int(counts.sum())
        row = SIZE * (1 if fp8 else 2) + 2 * fp8
        self.bytes = 2 * int(tokens_B.sum()) * HEADS * row
        self.layers = -(-at_least // self.bytes)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).int()
        tables = torch.zeros(len(tokens_B), int(counts.max()), dtype=torch.int32)
        for row_P, pages in zip(tables, order.split(counts.tolist()), strict=True):
            row_P[: len(pages)] = pages
        self.tables = tables.cuda()
        lead = (count, HEADS, page)
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        some = torch.randn(*lead, SIZE, dtype=torch.bfloat16, device="cuda").to(dtype)
        self.keys, self.values = ([some.clone() for _ in range(self.layers)] for _ in range(2))
        scales = (torch.full(lead, 2.0**-6, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self.scales: Scales | None = tuple(scales) if fp8 else None  # type: ignore[assignment]


def tables_of_rope(tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, SIZE, device="cuda")
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def alike(job: Job) -> object:
    """Jobs that are alike share their compiled kernel."""
    if isinstance(job, Decode):
        return job.page, job.fp8, job.cut, job.rows <= 16
    if isinstance(job, Prompt):
        return job.fp8, job.cut, job.prompts
    return job
