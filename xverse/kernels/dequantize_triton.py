"""STEPS -> NUMBERS -> PRODUCTS. Quantized weights widened into memory that many rows multiply.

For thousands of tokens, some rows of a weight at a time become bf16 in one pass, small enough to
stay in the second-level cache until cuBLAS has read them: that costs a few hundredths of the
products. For hundreds, whose products are done before the host has launched the next, it is all
rows of a weight at once. See `multiply_steps_triton` for fewer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.reference_few_bits import FewBits

NUMBERS = 2**24  # widened at a time: 32 MiB, of the 50 to 60 that the cache of an H100 or H200 has
MOST_NUMBERS = 2**27  # for few rows: 256 MiB, of which the widest weight of 7B takes 172
AT_ONCE = 4096  # rows of x; 8,191 tokens of 7B in bf16 take an H200 175 ms so, and 188 in one piece
EVEN = 128  # outputs are computed in multiples of it


@triton.jit
def integers(packed, NIBBLES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Steps [ROWS, COLUMNS] in fp32, of int8 or of uint8 [ROWS, COLUMNS / 2].

    By their bits, in place of conversions, of which a multiprocessor does 16 a clock: 2 ** 23 + n
    has n in its last places.
    """
    if NIBBLES:
        low = (packed & 15).to(tl.int32)
        high = (packed >> 4).to(tl.int32)
        shifted = tl.reshape(tl.join(low, high), (ROWS, COLUMNS))
        steps = (shifted | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    else:
        shifted = packed.to(tl.int32) + 128
        steps = (shifted | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return steps


@triton.jit
def _dequantize(
    weight_ptr, scale_ptr, zero_ptr, out_ptr, rows,
    COLUMNS: tl.constexpr, NIBBLES: tl.constexpr, FLOATS: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (rows, columns) of a matrix [M, C] that has one scale a row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    scale = tl.load(scale_ptr + row, live, 0.0).to(tl.float32)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if NIBBLES:
        half = tl.program_id(1) * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
        inside = live[:, None] & (half < COLUMNS // 2)[None, :]
        at = weight_ptr + row[:, None] * (COLUMNS // 2) + half[None, :]
        packed = tl.load(at, inside, 0, eviction_policy="evict_first")
        steps = integers(packed, True, BLOCK_M, BLOCK_C)
    else:
        inside = live[:, None] & (column < COLUMNS)[None, :]
        at = weight_ptr + row[:, None] * COLUMNS + column[None, :]
        packed = tl.load(at, inside, 0.0 if FLOATS else 0, eviction_policy="evict_first")
        if FLOATS:
            steps = packed.to(tl.float32)
        else:
            steps = integers(packed, False, BLOCK_M, BLOCK_C)
    if ZERO:
        steps -= tl.load(zero_ptr + row, live, 0).to(tl.float32)[:, None]
    wide = (steps * scale[:, None]).to(out_ptr.dtype.element_ty)
    inside = live[:, None] & (column < COLUMNS)[None, :]
    tl.store(out_ptr + row[:, None] * COLUMNS + column[None, :], wide, inside)


def dequantize(steps: FewBits, out_ND: Tensor | None = None) -> Tensor:
    """(q - zero) * scale, [N, D] in the dtype of `out`, or else of the scales.

    Twin: `reference_few_bits.dequantize`, rounded. All contiguous; any even number of columns.
    """
    weight, scale, zero = steps
    outputs, inputs = len(weight), steps.inputs
    if out_ND is None:
        out_ND = scale.new_empty(outputs, inputs)
    assert out_ND.shape == (outputs, inputs)
    assert all(x is None or x.is_contiguous() for x in (*steps, out_ND)), "laid out row by row"
    # Groups follow each other in memory: each is a row of a narrower matrix.
    rows, columns = scale.numel(), outputs * inputs // scale.numel()
    block = min(1024, triton.next_power_of_2(columns))
    tall = 8192 // block
    nibbles, floats = weight.dtype == torch.uint8, weight.dtype.is_floating_point
    _dequantize[(triton.cdiv(rows, tall), triton.cdiv(columns, block))](
        weight, scale, scale if zero is None else zero, out_ND, rows,
        COLUMNS=columns, NIBBLES=nibbles, FLOATS=floats, ZERO=zero is not None,
        BLOCK_M=tall, BLOCK_C=block, num_warps=4,
    )  # fmt: skip
    return out_ND


def multiply_widened(x_TD: Tensor, steps: FewBits, numbers: int = NUMBERS) -> Tensor:
    """x @ w.T, [T, N] in x's dtype, of any number of rows. Twin: `reference_steps.multiply_steps`.

    `numbers` of the weight are widened at a time, or a few more.

    Weights are rounded to x's dtype, scales taken in. The memory that they are widened into comes
    from PyTorch's allocator, which gives every layer the same and counts it; no layer keeps it.
    """
    (tokens, inputs), outputs = x_TD.shape, len(steps.weight)
    odd = outputs % 8  # as a vocabulary is: cuBLAS is a third as fast where rows begin off 16 bytes
    y_TN = x_TD.new_empty(tokens, triton.cdiv(outputs, EVEN) * EVEN if odd else outputs)
    y_TN = y_TN[:, :outputs]
    at_once = rows_at_once(outputs, inputs, numbers)
    wide = x_TD.new_empty(at_once, inputs)
    for first in range(0, outputs, at_once):
        last = min(outputs, first + at_once)
        wide_ND = dequantize(steps.rows(first, last), wide[: last - first])
        parts = zip(x_TD.split(AT_ONCE), y_TN[:, first:last].split(AT_ONCE), strict=True)
        for x, y in parts:
            torch.mm(x, wide_ND.T, out=y)
    return y_TN.contiguous()


def rows_at_once(outputs: int, inputs: int, numbers: int) -> int:
    """Rows of a weight that are widened together: parts of about one size, within `numbers`."""
    most = max(EVEN, numbers // inputs)
    parts = triton.cdiv(outputs, most)
    return min(outputs, triton.cdiv(triton.cdiv(outputs, parts), EVEN) * EVEN)
