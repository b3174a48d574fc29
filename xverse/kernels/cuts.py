"""SIZES -> CUT. How the attention kernels cut up their work, and the memory where parts meet."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xverse.kernels.reference import Scales

PROGRAMS = 132  # about one for each multiprocessor of the large chips; more measured slower
MOST_PARTS = 32


class Cut(NamedTuple):
    """How the past of a sequence is cut up.

    `block` tokens are read at once, by `warps`; `parts` programs share a sequence, but none takes
    fewer than `least` tokens while another has some. `stages` 1 keeps the next block on its way, in
    registers; more keep that many less one, in shared memory. Without `dots`, one query head for
    each key head is multiplied and summed outside the tensor cores, which want sixteen.
    `registers` caps those of a thread, so that more programs fit.
    """

    block: int = 64
    warps: int = 4
    parts: int = 1
    least: int = 64
    stages: int = 1
    dots: bool = True
    registers: int | None = None


def choose_cut(tokens: int, heads: int, kv_heads: int, *, fp8: bool) -> Cut:
    """The cut for a step of so many sequences, whatever their lengths; `bench/tune_attend.py`.

    GB/s of 7B's keys and values on an H200 (copy: 4,240), bf16 and fp8: 256 sequences of 100 to
    2,048 tokens 4,500 and 4,110; 1,024 of 192 tokens 4,300 and 3,040.
    """
    pairs, alone = tokens * kv_heads, heads == kv_heads
    if 2 * pairs <= PROGRAMS:
        parts = min(MOST_PARTS, 2 * PROGRAMS // pairs)
        if fp8 and alone:
            return Cut(block=32, parts=parts, stages=3, dots=False)
        return Cut(parts=parts)
    if not alone:
        return Cut(block=32, parts=4, least=512, stages=4 if fp8 else 3)
    # Among few sequences one that is long would be waited for; among many its programs start
    # beside others, and those that find nothing to do cost 2 to 5 %.
    parts, least = (2, 4096) if tokens < 32 else (1, 64)
    registers = 80 if fp8 else None
    return Cut(32, parts=parts, least=least, stages=3, dots=False, registers=registers)


@dataclass(frozen=True)
class Scratch:
    """Where the parts meet; one for all layers of a step. `arrived` is zero between launches."""

    mixed: Tensor  # [T, K, parts, G, E] fp32
    sums: Tensor  # [T, K, parts, 2, G] fp32: the largest score, and the sum of exponentials
    arrived: Tensor  # [T, K] int32
    cut: Cut

    @classmethod
    def reserve(
        cls,
        tokens: int,
        heads: int,
        kv_heads: int,
        size: int,
        device: torch.device | str,
        *,
        cut: Cut | None = None,
        fp8: bool = False,
    ) -> "Scratch":
        """Room for `tokens` sequences; by default in as many parts as fill the chip."""
        cut = cut or choose_cut(tokens, heads, kv_heads, fp8=fp8)
        lead = (tokens, kv_heads, cut.parts)
        return cls(
            mixed=torch.empty(*lead, heads // kv_heads, size, device=device),
            sums=torch.empty(*lead, 2, heads // kv_heads, device=device),
            arrived=torch.zeros(tokens, kv_heads, dtype=torch.int32, device=device),
            cut=cut,
        )


class ChunkCut(NamedTuple):
    """How attention is cut up: rows of queries and of keys a block, warps, blocks in flight."""

    rows: int = 128
    block: int = 64
    warps: int = 8
    stages: int = 3
    registers: int | None = None


def choose_chunk_cut(most: int, *, fp8: bool) -> ChunkCut:
    """The cut for chunks of at most so many tokens; `bench/tune_attend.py`."""
    if most <= 16:
        return ChunkCut(rows=16, block=64, warps=4)
    if most <= 1024:
        return ChunkCut(rows=64, block=64, warps=4, stages=2 if fp8 else 3)
    return ChunkCut(stages=2, registers=128)


def check_pages(keys_PKSE: Tensor, values_PKSE: Tensor, scales: Scales | None) -> None:
    """What the kernels take for granted of the pages and their scales."""
    assert keys_PKSE.stride() == values_PKSE.stride(), "keys and values lie alike"
    assert keys_PKSE.stride(3) == 1, "the elements of a head lie side by side"
    assert (scales is not None) == (keys_PKSE.dtype == torch.float8_e4m3fn), "FP8 has scales"
    if scales is not None:
        assert scales[0].shape == scales[1].shape == keys_PKSE.shape[:3], "one a token and head"
        assert scales[0].stride() == scales[1].stride(), "scales of keys and values lie alike"
        assert scales[0].stride(2) == 1, "the scales of a page lie side by side"
