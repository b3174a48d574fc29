"""X, W -> X @ W.T. Matrix products of one token on a GPU, at the speed of its memory.

Decoding reads every weight once, so the kernel is made to stream: each program asks for a whole
tile of weights before it needs any of it, and, launched as a programmatic dependent (Hopper and
later), before the kernel ahead of it has ended. What stands before the product (RMSNorm) and after
it (bias, SwiGLU, residual) happens on the way. More tokens: `multiply_rows_triton.py`.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from xverse.kernels.reference import Norm
from xverse.kernels.tiles import Tile, choose_tile

NO_NORM, NORM_IN_FP32, NORM_ROUNDED = 0, 1, 2


@triton.jit
def wait_for_input(pdl: tl.constexpr):
    """Wait for the kernel ahead, then let the one behind start; from here on x may be read."""
    if pdl:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def rounded(sums, bias, rows, live, dtype: tl.constexpr, BIASED: tl.constexpr):
    """The sums as the plain linear layer gives them: in x's dtype, widened again."""
    if BIASED:
        sums += tl.load(bias + rows, live, 0.0).to(tl.float32)
    return sums.to(dtype).to(tl.float32)


@triton.jit
def swiglu(gate, up, dtype: tl.constexpr):
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
        y = rounded(tl.sum(sums, 1), bias_ptr, row, live, dtype, BIASED)
        if GATED:
            up = rounded(tl.sum(sums_up, 1), bias_ptr, row + outputs, live, dtype, BIASED)
            y = swiglu(y, up, dtype)
        if RESIDUAL:
            y += tl.load(residual_ptr + row, live, 0.0).to(tl.float32)
        tl.store(out_ptr + row, y.to(dtype), live)
        row += BLOCK_N


def one_row(
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
    """x @ weight.T of one token with its surroundings. Twin: `reference.multiply_rows`.

    Tensors contiguous, of one dtype, on one device. With `pdl` the kernel starts, and fetches
    weights, while the one ahead of it ends, and lets the next one do so.
    """
    tokens, inputs = x_TD.shape
    outputs = weight_ND.shape[0] // 2 if gated else weight_ND.shape[0]
    assert tokens == 1, "more tokens are multiplied by the tensor cores"
    assert weight_ND.numel() < 2**31, "offsets are 32 bits wide"
    y_TN = x_TD.new_empty(1, outputs)
    tile = tile or choose_tile(outputs, inputs, gated=gated)
    weight_D, eps = (x_TD, 0.0) if norm is None else (norm.weight_D, norm.eps)
    _one_row[(triton.cdiv(outputs, tile.outputs * tile.tiles),)](
        x_TD, weight_D, weight_ND, bias_N, residual_TN, y_TN, outputs, eps,
        INPUTS=inputs, NORM=rounding(norm),
        BIASED=bias_N is not None, GATED=gated, RESIDUAL=residual_TN is not None,
        BLOCK_N=tile.outputs, BLOCK_D=tile.inputs, TILES=tile.tiles, PDL=pdl,
        num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return y_TN


def rounding(norm: Norm | None) -> int:
    """Where a norm rounds, as the kernels are told."""
    if norm is None:
        return NO_NORM
    return NORM_IN_FP32 if norm.weight_in_fp32 else NORM_ROUNDED
