"""X, WHOSE ROWS -> Y + B A X. What adapters add behind a layer, row by row, on a GPU.

Two launches for a layer, whatever is joined in it and whichever adapters its rows have (the idea of
Chen et al. 2023, "Punica"): A x as partial sums, which the second adds up in order and multiplies
by B. A program belongs to a slot and a block of rows; it ends at once where no row has that slot,
and otherwise computes all rows of the block and keeps those. So nothing is sorted, an adapter is
read once for a block of rows, and a row's bits do not depend on whose its neighbours are.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.multiply_triton import wait_for_input
from xverse.kernels.reference_adapt import JOINED, RANKS, Slots

FEW = 256  # rows of which inputs are split among programs; more have programs enough


class Cut(NamedTuple):
    """How the work is cut: rows and ranks a program, and inputs a split, a multiple of BLOCK_D."""

    rows: int
    ranks: int
    each: int
    splits: int


BLOCK_D, BLOCK_N = 128, 128
# One compiled form for all numbers of rows, and wherever these lie.
ANY = {
    "do_not_specialize": ["tokens"],
    "do_not_specialize_on_alignment": ["slot_ptr", "ranks_ptr"],
}


def choose_cut(tokens: int, inputs: int, rank: int) -> Cut:
    """Equal for all numbers of rows of a band, so that a row's bits are."""
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    if tokens > FEW:  # x is read again for every block of ranks
        return Cut(rows, min(64, rank & -rank), triton.cdiv(inputs, BLOCK_D) * BLOCK_D, 1)
    # 512 inputs a program, and no more than 16 partial sums.
    each = max(512, triton.cdiv(triton.cdiv(inputs, 16), BLOCK_D) * BLOCK_D)
    return Cut(rows, RANKS, each, triton.cdiv(inputs, each))


@triton.jit
def _own_rows(slot_ptr, tokens, ROWS: tl.constexpr):
    """The rows of this program's block (64 bits), and which of them have its slot."""
    token = tl.program_id(2).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_ptr + token, token < tokens, -1)
    return token, slot == tl.program_id(1)


@triton.jit(**ANY)
def _shrink(
    x_ptr, slot_ptr, a_ptr, ranks_ptr, low_ptr, tokens,
    INPUTS: tl.constexpr, JOINED: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, EACH: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial sums [SPLITS, T, PARTS * RANK] of A x: program (split of inputs, ranks, part; slot;
    rows). Past an adapter's own rank they are zero, or not written."""
    split = tl.program_id(0) % SPLITS
    block = tl.program_id(0) // SPLITS
    part = block // (RANK // BLOCK_R)
    rank = (block % (RANK // BLOCK_R)) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = tl.program_id(1)
    wait_for_input(PDL)
    ranks = tl.load(ranks_ptr + slot * JOINED + part)
    token, mine = _own_rows(slot_ptr, tokens, ROWS)
    if (tl.min(rank, 0) < ranks) & (tl.max(mine.to(tl.int32), 0) > 0):
        a_at = a_ptr + ((slot * PARTS + part) * RANK + rank).to(tl.int64)[:, None] * INPUTS
        x_at = x_ptr + token[:, None] * INPUTS
        sums = tl.zeros([ROWS, BLOCK_R], tl.float32)
        for chunk in tl.range(0, EACH // BLOCK_D, num_stages=3):
            column = split * EACH + chunk * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = column < INPUTS
            a = tl.load(a_at + column[None, :], inside[None, :], 0.0)
            x = tl.load(x_at + column[None, :], mine[:, None] & inside[None, :], 0.0)
            sums = tl.dot(x, tl.trans(a), sums, input_precision="ieee")
        low_at = low_ptr + (split * tokens + token)[:, None] * (PARTS * RANK)
        tl.store(low_at + part * RANK + rank[None, :], sums, mine[:, None])


@triton.jit(**ANY)
def _expand(
    y_ptr, slot_ptr, low_ptr, b_ptr, gain_ptr, bias_ptr, ranks_ptr, tokens,
    OUTPUTS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, JOINED: tl.constexpr,
    PARTS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, BIASED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y and what B makes of A x, in place: program (tile of outputs; slot; rows). A tile lies
    within one part; the first ends at FIRST, the second at SECOND."""
    dtype = y_ptr.dtype.element_ty
    tiles_1: tl.constexpr = (FIRST + BLOCK_N - 1) // BLOCK_N
    tiles_2: tl.constexpr = tiles_1 + (SECOND - FIRST + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    part = (tile >= tiles_1).to(tl.int32) + (tile >= tiles_2).to(tl.int32)
    start = tl.where(part == 0, 0, tl.where(part == 1, FIRST, SECOND))
    end = tl.where(part == 0, FIRST, tl.where(part == 1, SECOND, OUTPUTS))
    before = tl.where(part == 0, 0, tl.where(part == 1, tiles_1, tiles_2))
    row = start + (tile - before) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < end
    slot = tl.program_id(1)
    wait_for_input(PDL)
    ranks = tl.load(ranks_ptr + slot * JOINED + part)
    token, mine = _own_rows(slot_ptr, tokens, ROWS)
    if (ranks > 0) & (tl.max(mine.to(tl.int32), 0) > 0):
        sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for first in tl.range(0, ranks, BLOCK_R, num_stages=1):  # else all parts wait in memory
            rank = first + tl.arange(0, BLOCK_R)
            low_at = low_ptr + token[:, None] * (PARTS * RANK) + part * RANK + rank[None, :]
            low = tl.zeros([ROWS, BLOCK_R], tl.float32)
            for split in tl.static_range(SPLITS):
                at = low_at + split * tokens.to(tl.int64) * (PARTS * RANK)
                low += tl.load(at, mine[:, None], 0.0)
            b_at = b_ptr + (slot * RANK + rank).to(tl.int64)[:, None] * OUTPUTS + row[None, :]
            b = tl.load(b_at, live[None, :], 0.0)
            sums = tl.dot(low.to(dtype), b, sums, input_precision="ieee")
        inside = mine[:, None] & live[None, :]
        y_at = y_ptr + token[:, None] * OUTPUTS + row[None, :]
        y = tl.load(y_at, inside, 0.0).to(tl.float32)
        gain = tl.load(gain_ptr + slot.to(tl.int64) * OUTPUTS + row, live, 0.0).to(tl.float32)
        if BIASED:
            bias = tl.load(bias_ptr + row, live, 0.0).to(tl.float32)[None, :]
            y = (y - bias + sums) * gain[None, :] + bias
        else:
            y = (y + sums) * gain[None, :]
        tl.store(y_at, y.to(dtype), inside)


def add_adapters(
    y_TN: Tensor,
    x_TD: Tensor,
    slot_T: Tensor,
    slots: Slots,
    bias_N: Tensor | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Add to y in place what the adapter in each row's slot makes of x.

    Twin: `reference_adapt.add_adapters`. Tensors contiguous, of one dtype, `slot` int32. `pdl` as
    in `multiply_triton.one_row`.
    """
    tokens, (outputs, inputs) = len(slot_T), (y_TN.shape[1], x_TD.shape[1])
    assert tokens <= min(len(y_TN), len(x_TD))
    assert y_TN.is_contiguous(), "changed in place"
    x_TD = x_TD.contiguous()
    count, parts, rank, _ = slots.a_SLRD.shape
    cut = choose_cut(tokens, inputs, rank)
    low = torch.empty(cut.splits, tokens, parts * rank, dtype=torch.float32, device=x_TD.device)
    blocks = triton.cdiv(tokens, cut.rows)
    common = {"JOINED": JOINED, "PARTS": parts, "RANK": rank, "ROWS": cut.rows}
    common |= {"SPLITS": cut.splits, "PDL": pdl, "num_warps": 4, "launch_pdl": pdl}
    _shrink[(cut.splits * parts * (rank // cut.ranks), count, blocks)](
        x_TD, slot_T, slots.a_SLRD, slots.ranks_SL, low, tokens,
        INPUTS=inputs, BLOCK_R=cut.ranks, BLOCK_D=BLOCK_D, EACH=cut.each, **common,
    )  # fmt: skip
    first, second = (*slots.ends, outputs, outputs)[:2]
    widths = (first, second - first, outputs - second)
    _expand[(sum(triton.cdiv(width, BLOCK_N) for width in widths), count, blocks)](
        y_TN, slot_T, low, slots.b_SRN, slots.gain_SN, bias_N, slots.ranks_SL, tokens,
        OUTPUTS=outputs, FIRST=first, SECOND=second, BLOCK_R=RANKS, BLOCK_N=BLOCK_N,
        BIASED=bias_N is not None, **common,
    )  # fmt: skip
