"""X, STEPS -> X @ W.T. Products of a few hundred rows, weights widened in registers.

For more rows than a decode step has and fewer than fill the chip: weights come from memory as they
are held, a quarter or half of bf16, and each is widened once for every block of rows.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.dequantize_triton import integers
from xverse.kernels.reference_few_bits import FewBits, Form

MULTIPROCESSORS = 132  # of an H100 or H200


class StepsTile(NamedTuple):
    """How a product is cut: outputs, rows and inputs a tile, warps, tiles in flight."""

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["tokens"])
def _multiply_steps(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, out_ptr, tokens,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr, NIBBLES: tl.constexpr,
    FLOATS: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (outputs, rows). GROUP 0: one scale a row, applied to the sums; the steps are exact
    in 16 bits. Otherwise weights are rounded as `reference_steps.dequantize` rounds them."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    groups: tl.constexpr = INPUTS // GROUP if GROUP else 1
    bytes: tl.constexpr = INPUTS // 2 if NIBBLES else INPUTS
    wide: tl.constexpr = BLOCK_D // 2 if NIBBLES else BLOCK_D
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < OUTPUTS
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = token < tokens
    weight_at = weight_ptr + row.to(tl.int64)[:, None] * bytes + tl.arange(0, wide)[None, :]
    x_at = x_ptr + token.to(tl.int64)[None, :] * INPUTS + tl.arange(0, BLOCK_D)[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in tl.range(0, INPUTS, BLOCK_D, num_stages=STAGES):
        begin = start // 2 if NIBBLES else start
        inside = live[:, None] & (begin + tl.arange(0, wide) < bytes)[None, :]
        packed = tl.load(weight_at + begin, inside, 0.0 if FLOATS else 0)
        column = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_at + start, (column < INPUTS)[:, None] & real[None, :], 0.0)
        if FLOATS:
            weights = packed.to(tl.float32)
        else:
            weights = integers(packed, NIBBLES, BLOCK_N, BLOCK_D)
        if GROUP:
            at = row * groups + start // GROUP
            if ZERO:
                weights -= tl.load(zero_ptr + at, live, 0).to(tl.float32)[:, None]
            weights *= tl.load(scale_ptr + at, live, 0.0).to(tl.float32)[:, None]
        elif ZERO:
            weights -= tl.load(zero_ptr + row, live, 0).to(tl.float32)[:, None]
        sums = tl.dot(weights.to(dtype), x, sums, input_precision="ieee")
    if not GROUP:
        sums *= tl.load(scale_ptr + row, live, 0.0).to(tl.float32)[:, None]
    out_at = out_ptr + token.to(tl.int64)[None, :] * OUTPUTS + row[:, None]
    tl.store(out_at, sums.to(dtype), live[:, None] & real[None, :])


def multiply_steps(x_TD: Tensor, steps: FewBits, tile: StepsTile | None = None) -> Tensor:
    """x @ w.T, [T, N] in x's dtype. Twin: `reference_steps.multiply_steps`.

    `why_not` is empty for the weight's form; all contiguous, any number of rows. A row's result
    does not depend on the others but for the tile, which is chosen by how many there are.
    """
    x_TD = x_TD.contiguous()
    (tokens, inputs), (weight, scale, zero), form = x_TD.shape, steps, steps.form
    assert not why_not(form), "such a weight is not for this kernel"
    assert all(x is None or x.is_contiguous() for x in steps), "laid out row by row"
    tile = tile or choose_tile(tokens, form)
    y_TN = x_TD.new_empty(tokens, form.outputs)
    _multiply_steps[(triton.cdiv(form.outputs, tile.outputs), triton.cdiv(tokens, tile.rows))](
        x_TD, weight, scale, scale if zero is None else zero, y_TN, tokens,
        OUTPUTS=form.outputs, INPUTS=inputs, GROUP=form.group, NIBBLES=form.kind == "int4",
        FLOATS=form.kind == "fp8", ZERO=zero is not None, BLOCK_N=tile.outputs, BLOCK_T=tile.rows,
        BLOCK_D=tile.inputs, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return y_TN


def why_not(form: Form) -> str:
    """Why a weight of this form has no such product; empty where it has one."""
    if form.group % 32:
        return f"groups of {form.group} columns are no multiple of a tile's 32"
    return ""


def choose_tile(tokens: int, form: Form) -> StepsTile:
    """As wide as the chip still has enough programs."""
    rows = min(128, max(16, triton.next_power_of_2(tokens)))
    inputs = 64 if form.group % 64 == 0 else 32
    tiles = triton.cdiv(tokens, rows)
    outputs = 128 if triton.cdiv(form.outputs, 128) * tiles >= MULTIPROCESSORS else 64
    if rows == 128 and triton.cdiv(form.outputs, outputs) * tiles < MULTIPROCESSORS:
        rows = 64
    return StepsTile(outputs, rows, inputs, warps=8 if outputs * rows > 8192 else 4, stages=4)
