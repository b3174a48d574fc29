"""X, W -> X @ W.T. Matrix products of 1 to 16 tokens on a GPU, at the speed of its memory.

Decoding reads every weight once for a handful of tokens, so these kernels are made to stream: each
program asks for a whole tile of weights before it needs any of it, and, launched as a programmatic
dependent (Hopper and later), before the kernel ahead of it has ended. What stands before the
product (RMSNorm) and after it (bias, SwiGLU, residual) happens on the way.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from xverse.kernels.multiply import ROWS
from xverse.kernels.reference import Norm

NO_NORM, NORM_IN_FP32, NORM_ROUNDED = 0, 1, 2


class Tile(NamedTuple):
    """How the work is cut: outputs and inputs a tile, tiles a program, warps, loads in flight."""

    outputs: int
    inputs: int
    tiles: int = 1
    warps: int = 4
    stages: int = 1


@triton.jit
def wait_for_input(pdl: tl.constexpr):
    """Wait for the kernel ahead, then let the one behind start; from here on x may be read."""
    if pdl:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def _rounded(sums, bias, rows, live, dtype: tl.constexpr, BIASED: tl.constexpr):
    """The sums as the plain linear layer gives them: in x's dtype, widened again."""
    if BIASED:
        sums += tl.load(bias + rows, live, 0.0).to(tl.float32)
    return sums.to(dtype).to(tl.float32)


@triton.jit
def _swiglu(gate, up, dtype: tl.constexpr):
    silu = gate / (1.0 + tl.exp(-gate))
    return (silu.to(dtype).to(tl.float32) * up).to(dtype).to(tl.float32)


@triton.jit
def _weights(weight_ptr, row, live, place, more, INPUTS: tl.constexpr):
    """A tile of weights, each of which is read once and not worth keeping."""
    at = weight_ptr + row[:, None] * INPUTS + place[None, :]
    inside = live[:, None] & ((place < INPUTS) & more)[None, :]
    return tl.load(at, inside, 0.0, eviction_policy="evict_first")


@triton.jit
def _products(weights, x, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products summed over the eight that one thread loads at once, which saves registers."""
    products = weights.to(tl.float32) * x[None, :]
    return tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_D // 8, 8]), 2)


@triton.jit
def _input(x_ptr, norm_ptr, place, scale, INPUTS: tl.constexpr, NORM: tl.constexpr):
    """A part of x, normalized if so wished, rounded as `reference.rms_norm` rounds."""
    x = tl.load(x_ptr + place, place < INPUTS, 0.0)
    dtype: tl.constexpr = x.dtype
    x = x.to(tl.float32)
    if NORM != 0:
        weight = tl.load(norm_ptr + place, place < INPUTS, 0.0).to(tl.float32)
        x = x * scale
        if NORM == 2:
            x = x.to(dtype).to(tl.float32)
        x = (x * weight).to(dtype).to(tl.float32)
    return x


@triton.jit
def _one_row(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, outputs, eps,
    INPUTS: tl.constexpr, NORM: tl.constexpr,
    BIASED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] of one token. Next to the tile in use, the next one is always on its way."""
    dtype = out_ptr.dtype.element_ty
    chunks: tl.constexpr = (INPUTS + BLOCK_D - 1) // BLOCK_D
    column = tl.arange(0, BLOCK_D)
    row = tl.program_id(0) * (BLOCK_N * TILES) + tl.arange(0, BLOCK_N)
    live = row < outputs
    weights = _weights(weight_ptr, row, live, column, True, INPUTS)
    if GATED:  # gate above, up below
        weights_up = _weights(weight_ptr, row + outputs, live, column, True, INPUTS)
    wait_for_input(PDL)

    scale = 1.0
    if NORM != 0:
        squares = tl.zeros([BLOCK_D], tl.float32)
        for chunk in tl.static_range(chunks):
            x = _input(x_ptr, norm_ptr, chunk * BLOCK_D + column, 1.0, INPUTS, 0)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares) / INPUTS + eps)

    for tile in range(TILES):
        sums = tl.zeros([BLOCK_N, BLOCK_D // 8], tl.float32)
        sums_up = tl.zeros([BLOCK_N, BLOCK_D // 8], tl.float32)
        for chunk in tl.static_range(chunks):
            now = weights
            if GATED:
                now_up = weights_up
            if chunk + 1 < chunks or TILES > 1:
                if chunk + 1 < chunks:
                    next_row, more = row, True
                    place = (chunk + 1) * BLOCK_D + column
                else:
                    next_row, more = row + BLOCK_N, tile + 1 < TILES
                    place = column
                next_live = next_row < outputs
                weights = _weights(weight_ptr, next_row, next_live, place, more, INPUTS)
                if GATED:
                    next_row += outputs
                    weights_up = _weights(weight_ptr, next_row, next_live, place, more, INPUTS)
            x = _input(x_ptr, norm_ptr, chunk * BLOCK_D + column, scale, INPUTS, NORM)
            sums += _products(now, x, BLOCK_N, BLOCK_D)
            if GATED:
                sums_up += _products(now_up, x, BLOCK_N, BLOCK_D)

        live = row < outputs
        y = _rounded(tl.sum(sums, 1), bias_ptr, row, live, dtype, BIASED)
        if GATED:
            up = _rounded(tl.sum(sums_up, 1), bias_ptr, row + outputs, live, dtype, BIASED)
            y = _swiglu(y, up, dtype)
        if RESIDUAL:
            y += tl.load(residual_ptr + row, live, 0.0).to(tl.float32)
        tl.store(out_ptr + row, y.to(dtype), live)
        row += BLOCK_N


@triton.jit
def _some_rows(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, tokens, outputs,
    INPUTS: tl.constexpr,
    BIASED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [T, N] of up to ROWS tokens, transposed: weights are the tall side of the tensor cores."""
    dtype = out_ptr.dtype.element_ty
    token = tl.arange(0, ROWS)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < outputs
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    sums_up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    wait_for_input(PDL)
    for start in tl.range(0, INPUTS, BLOCK_D, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK_D)
        weights = _weights(weight_ptr, row, live, place, True, INPUTS)
        x_at = x_ptr + place[:, None] + token[None, :] * INPUTS
        x = tl.load(x_at, (place < INPUTS)[:, None] & (token < tokens)[None, :], 0.0)
        sums = tl.dot(weights, x, sums, input_precision="ieee")
        if GATED:
            weights_up = _weights(weight_ptr, row + outputs, live, place, True, INPUTS)
            sums_up = tl.dot(weights_up, x, sums_up, input_precision="ieee")
    row = row[:, None]
    live = live[:, None]
    y = _rounded(sums, bias_ptr, row, live, dtype, BIASED)
    if GATED:
        up = _rounded(sums_up, bias_ptr, row + outputs, live, dtype, BIASED)
        y = _swiglu(y, up, dtype)
    place = token[None, :] * outputs + row
    inside = live & (token < tokens)[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + place, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(dtype), inside)


@triton.jit
def _norm_rows(
    x_ptr, norm_ptr, out_ptr, eps,
    INPUTS: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm of one token a program."""
    column = tl.arange(0, BLOCK_D)
    wait_for_input(PDL)
    start = tl.program_id(0) * INPUTS
    x = _input(x_ptr + start, norm_ptr, column, 1.0, INPUTS, 0)
    scale = tl.rsqrt(tl.sum(x * x) / INPUTS + eps)
    x = _input(x_ptr + start, norm_ptr, column, scale, INPUTS, NORM)
    tl.store(out_ptr + start + column, x.to(out_ptr.dtype.element_ty), column < INPUTS)


def multiply_rows(
    x_TD: Tensor,
    weight_ND: Tensor,
    *,
    norm: Norm | None = None,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    gated: bool = False,
    pdl: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """x @ weight.T of 1 to 16 tokens with its surroundings. Twin: `reference.multiply_rows`.

    Tensors contiguous, of one dtype, on one device. With `pdl` the kernel starts, and fetches
    weights, while the one ahead of it ends, and lets the next one do so.
    """
    tokens, inputs = x_TD.shape
    outputs = weight_ND.shape[0] // 2 if gated else weight_ND.shape[0]
    assert 1 <= tokens <= ROWS, "more tokens are for the tensor cores' own libraries"
    assert weight_ND.numel() < 2**31, "offsets are 32 bits wide"
    y_TN = x_TD.new_empty(tokens, outputs)
    tile = tile or choose_tile(tokens, outputs, inputs, gated=gated)
    common = {
        "INPUTS": inputs,
        "BIASED": bias_N is not None,
        "GATED": gated,
        "RESIDUAL": residual_TN is not None,
        "BLOCK_N": tile.outputs,
        "BLOCK_D": tile.inputs,
        "PDL": pdl,
        "num_warps": tile.warps,
        "launch_pdl": pdl,
    }
    rounding = NO_NORM if norm is None else NORM_IN_FP32 if norm.weight_in_fp32 else NORM_ROUNDED
    if tokens == 1:
        programs = triton.cdiv(outputs, tile.outputs * tile.tiles)
        weight_D, eps = (x_TD, 0.0) if norm is None else (norm.weight_D, norm.eps)
        _one_row[(programs,)](
            x_TD, weight_D, weight_ND, bias_N, residual_TN, y_TN, outputs, eps,
            NORM=rounding, TILES=tile.tiles, **common,
        )  # fmt: skip
        return y_TN
    if norm is not None:
        x_TD = _normed(x_TD, norm, rounding, pdl)
    _some_rows[(triton.cdiv(outputs, tile.outputs),)](
        x_TD, weight_ND, bias_N, residual_TN, y_TN, tokens, outputs,
        ROWS=ROWS, STAGES=tile.stages, **common,
    )  # fmt: skip
    return y_TN


def _normed(x_TD: Tensor, norm: Norm, rounding: int, pdl: bool) -> Tensor:
    out = torch.empty_like(x_TD)
    tokens, inputs = x_TD.shape
    _norm_rows[(tokens,)](
        x_TD, norm.weight_D, out, norm.eps,
        INPUTS=inputs, NORM=rounding, BLOCK_D=triton.next_power_of_2(inputs), PDL=pdl,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out


def choose_tile(tokens: int, outputs: int, inputs: int, *, gated: bool) -> Tile:
    """The cut that streams best on an H200 (`bench/tune_decode.py`), and its like for other sizes.

    GB/s of weights at 1 token, launches included (copy: 4,270): q, k, v of 7B 4,260; output 4,020;
    gate and up 4,350; down 4,260; head 4,570. At 8 tokens: 3,740, 3,170, 3,700, 3,560, 4,310;
    asking for weights further ahead, through the second-level cache, won nothing there.
    """
    if tokens > 1:
        return Tile(outputs=64, inputs=128, stages=6 if outputs <= 8192 else 4)
    width = _width(inputs)
    if outputs > 32768:
        return Tile(outputs=32768 // width, inputs=width, warps=8)
    if width < 4096:  # 13B: with tiles as large as 7B's, 139 tokens a second
        return Tile(outputs=4096 // width, inputs=width)
    if gated:
        return Tile(outputs=2, inputs=width, warps=8)
    if outputs <= 8192:
        return Tile(outputs=2, inputs=width, tiles=2)
    return Tile(outputs=4, inputs=2048)


def _width(inputs: int) -> int:
    """The widest block of which the last one along a row is not too empty."""
    if inputs <= 1024:
        return max(128, triton.next_power_of_2(inputs))
    for width in (4096, 2048):
        if inputs >= 0.85 * width * triton.cdiv(inputs, width):
            return width
    return 1024
