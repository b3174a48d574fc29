"""LOGITS -> LOGITS, ON A GPU. What is not allowed, what was seen before, and the count of that."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
COUNTED_AT_ONCE = 128
MOST = tl.constexpr(0x7FFF)  # as in `reference_sample`


@triton.jit
def _mask(logits_ptr, stride, masks_ptr, masks_stride, vocab, BLOCK: tl.constexpr):
    """Program (row, block): logits are only written, and only where they are not allowed."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(masks_ptr + row * masks_stride + place // 32, place < vocab, -1)
    barred = (words >> (place % 32)) & 1 == 0
    tl.store(logits_ptr + row * stride + place, float("-inf"), barred & (place < vocab))


@triton.jit
def _penalize(
    logits_ptr, stride, counts_ptr, slots_ptr, repetition_ptr, presence_ptr, frequency_ptr, vocab,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block): of the logits only those of what was seen are read and written."""
    row = tl.program_id(0).to(tl.int64)
    repetition = tl.load(repetition_ptr + row).to(tl.float32)
    presence = tl.load(presence_ptr + row).to(tl.float64)
    frequency = tl.load(frequency_ptr + row).to(tl.float64)
    if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        counts = tl.load(counts_ptr + slot * vocab + place, place < vocab, 0).to(tl.int32)
        at = logits_ptr + row * stride + place
        x = tl.load(at, counts != 0, 0.0)
        x = tl.where(x < 0.0, x * repetition, tl.div_rn(x, repetition))
        answer = counts & MOST
        change = (-presence - frequency * answer.to(tl.float64)).to(tl.float32)
        tl.store(at, tl.where(answer > 0, x + change, x), counts != 0)


@triton.jit
def _count(counts_ptr, slots_ptr, ids_ptr, rows, vocab, BLOCK: tl.constexpr):
    """Program: BLOCK rows, each of another slot."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids_ptr + row, row < rows, -1)
    slot = tl.load(slots_ptr + row, row < rows, 0).to(tl.int64)
    at = counts_ptr + slot * vocab + id
    old = tl.load(at, id >= 0, 0).to(tl.int32)
    tl.store(at, (old + 1).to(tl.int16), (id >= 0) & (old & MOST < MOST))


def mask_rows(logits_BV: Tensor, masks_BW: Tensor) -> Tensor:
    """Minus infinity, in place, where a bit of the int32 mask is 0.

    Twin: `reference_sample.mask_rows`."""
    rows, vocab = logits_BV.shape
    assert masks_BW.dtype == torch.int32, "32 bits a word"
    assert masks_BW.shape[1] * 32 >= vocab, "a bit for each token"
    assert logits_BV.stride(1) == masks_BW.stride(1) == 1, "rows are dense"
    _mask[(rows, triton.cdiv(vocab, BLOCK))](
        logits_BV, logits_BV.stride(0), masks_BW, masks_BW.stride(0), vocab, BLOCK=BLOCK
    )
    return logits_BV


def penalize_rows(
    logits_BV: Tensor,
    counts_SV: Tensor,
    slots_B: Tensor,
    repetition_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
) -> Tensor:
    """Penalties on fp32 logits, in place. Twin: `reference_sample.penalize_rows`.

    Counts int16; slots int64; penalties of any floating dtype, dense."""
    rows, vocab = logits_BV.shape
    assert logits_BV.dtype == torch.float32, "what is added to bf16 gets lost"
    assert logits_BV.stride(1) == 1, "rows are dense"
    assert counts_SV.is_contiguous(), "slots lie one after another"
    assert counts_SV.shape[1] == vocab, "a count for each token"
    _penalize[(rows, triton.cdiv(vocab, BLOCK))](
        logits_BV, logits_BV.stride(0), counts_SV, slots_B,
        repetition_B, presence_B, frequency_B, vocab, BLOCK=BLOCK,
        enable_fp_fusion=False,  # the reference rounds the product
    )  # fmt: skip
    return logits_BV


def count_rows(counts_SV: Tensor, slots_B: Tensor, ids_B: Tensor) -> Tensor:
    """One more of each id in its slot, in place. Twin: `reference_sample.count_rows`."""
    assert counts_SV.is_contiguous(), "slots lie one after another"
    rows = len(ids_B)
    _count[(triton.cdiv(rows, COUNTED_AT_ONCE),)](
        counts_SV, slots_B, ids_B, rows, counts_SV.shape[1], BLOCK=COUNTED_AT_ONCE, num_warps=4
    )
    return counts_SV
