"""X, FEW BITS -> X @ W.T. Products of one token with quantized weights, at the speed of memory.

Four times fewer bytes leave four times less time for each weight: at 4 bits some three instructions
at the rate of an H200's memory. So a weight never becomes a number by a conversion. Its bits, cut
out of a word where they lie, are those of a float too small to be normal, which the multipliers
take as they take any other: n at bit p is n * 2**(p - 149), and x is made larger by as much. That
is one operation and one product for a weight. What the stored steps are too large by is a constant,
and taken off by a sum over x that all rows share. Scales are applied to sums of 16 bytes of
weights. Around it as in `multiply_triton.py`. More tokens: `few_bits_rows_triton.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.multiply_triton import rounded, rounding, swiglu, wait_for_input
from xverse.kernels.reference import Norm
from xverse.kernels.reference_few_bits import FewBits
from xverse.kernels.tiles import WordsTile, choose_words_tile

LOW = tl.constexpr(2.0**-80)  # of sums: far from both ends of what a float can be


@triton.jit
def _column(word, k: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """Column k of those in each word, plus `_added`, as a float that is `_lift(k)` too small.

    Of e4m3 sign and other bits go where those of a float are, whose exponent is 120 higher.
    """
    if FLOAT:
        bits = ((word << (24 - 8 * k)) >> 4) & -0x78100000  # 0x87F00000, as a signed number
    elif BITS == 8:
        bits = word if k < 2 else word >> 16
        bits = (bits ^ 0x8080) & (0xFF << (8 * (k % 2)))
    else:
        bits = word if k < 5 else word >> 12
        bits = bits & (0xF << _place(k))
    return bits.to(tl.float32, bitcast=True)


@triton.constexpr_function
def _place(k: int) -> int:
    """The bit at which `_column` has the lowest of 4; above bit 22 it would be an exponent's."""
    return 4 * k if k < 5 else 4 * k - 12


@triton.constexpr_function
def _lift(k: int, bits: int, is_float: bool) -> float:
    """What x is multiplied by, so that its product with `_column` is right but for LOW."""
    if is_float:
        return 2.0 ** (120 - 80)
    return 2.0 ** (149 - 80 - (8 * (k % 2) if bits == 8 else _place(k)))


@triton.constexpr_function
def _added(bits: int, is_float: bool) -> float:
    """What the steps in a word have too much, times LOW."""
    return 0.0 if is_float else 2.0 ** (bits - 1 - 80)


@triton.jit
def _four(quad):
    """Four bf16 that lie in 64 bits, each in fp32."""
    low = quad.to(tl.int32)
    high = (quad >> 32).to(tl.int32)
    a = (low << 16).to(tl.float32, bitcast=True)
    b = (low & -65536).to(tl.float32, bitcast=True)
    c = (high << 16).to(tl.float32, bitcast=True)
    d = (high & -65536).to(tl.float32, bitcast=True)
    return a, b, c, d


@triton.jit
def _normalized(x, weight, scale, NORM: tl.constexpr):
    """One column of x, rounded as `reference.rms_norm` rounds."""
    x = x * scale
    if NORM == 2:
        x = x.to(tl.bfloat16).to(tl.float32)
    return (x * weight).to(tl.bfloat16).to(tl.float32)


@triton.jit
def _four_of_x(x_ptr, norm_ptr, place, inside, scale, NORM: tl.constexpr):
    """Four columns of x, normalized if so wished; zero outside."""
    a, b, c, d = _four(tl.load(x_ptr + place, inside, 0))
    if NORM != 0:
        e, f, g, h = _four(tl.load(norm_ptr + place, inside, 0))
        a = _normalized(a, e, scale, NORM)
        b = _normalized(b, f, scale, NORM)
        c = _normalized(c, g, scale, NORM)
        d = _normalized(d, h, scale, NORM)
    return a, b, c, d


@triton.jit
def _lifted(a, b, c, d, k: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """Columns k to k + 3 of x, each as its weight's place asks."""
    a *= _lift(k, BITS, FLOAT)
    b *= _lift(k + 1, BITS, FLOAT)
    c *= _lift(k + 2, BITS, FLOAT)
    d *= _lift(k + 3, BITS, FLOAT)
    return a, b, c, d


@triton.jit
def _x_by_words(
    x_ptr, norm_ptr, start, scale,
    WORDS: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, NORM: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """x for a block of words: four columns of each [BLOCK_W], with 4 bits four more; what
    `_column` adds to their sum [BLOCK_W]; and the sum of x itself, as small."""
    word = start + tl.arange(0, BLOCK_W)
    inside = word < WORDS
    quads: tl.constexpr = 8 // BITS  # of columns in a word
    a, b, c, d = _four_of_x(x_ptr, norm_ptr, word * quads, inside, scale, NORM)
    total = a + b + c + d
    xs = _lifted(a, b, c, d, 0, BITS, FLOAT)
    more = xs
    if BITS == 4:
        a, b, c, d = _four_of_x(x_ptr, norm_ptr, word * quads + 1, inside, scale, NORM)
        total += a + b + c + d
        more = _lifted(a, b, c, d, 4, BITS, FLOAT)
    return xs, more, total * _added(BITS, FLOAT), total * LOW


@triton.jit
def _norm_scale(
    x_ptr, eps, INPUTS: tl.constexpr, NORM: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """The norm's factor, by a first look at all of x."""
    scale = 1.0
    if NORM != 0:
        squares = tl.zeros([BLOCK_Q], tl.float32)
        place = tl.arange(0, BLOCK_Q)
        for start in tl.static_range(0, INPUTS // 4, BLOCK_Q):
            a, b, c, d = _four(tl.load(x_ptr + start + place, start + place < INPUTS // 4, 0))
            squares += a * a + b * b + c * c + d * d
        scale = tl.rsqrt(tl.sum(squares) / INPUTS + eps)
    return scale


@triton.jit
def _weights(
    weight_ptr, scale_ptr, zero_ptr, row, outputs, start,
    WORDS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Words of weights from `start` on, and what they are multiplied by, each read once.

    Rows past the last are the last one again: what they give is never stored.
    """
    row = tl.minimum(row, outputs - 1)
    word = start + tl.arange(0, BLOCK_W)
    inside = word < WORDS
    at = weight_ptr + row[:, None] * WORDS + word[None, :]
    words = tl.load(at, inside[None, :], 0, eviction_policy="evict_first")
    scale = 1.0
    zero = 0.0
    if GROUP != 0:
        span = start // 4 + tl.arange(0, BLOCK_W // 4)
        live = span < WORDS // 4
        group = span * (128 // BITS) // GROUP
        at = row[:, None] * (WORDS * 32 // BITS // GROUP) + group[None, :]
        scale = tl.load(scale_ptr + at, live[None, :], 0.0)
        if ZEROS:
            zero = tl.load(zero_ptr + at, live[None, :], 0)
    return words, scale, zero


@triton.jit
def _sums(
    weights, x,
    BITS: tl.constexpr, FLOAT: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_N, BLOCK_W / 4] of the products with all columns of four words, scaled."""
    words, scale, zero = weights
    xs, more, added, total = x
    sums = tl.zeros([BLOCK_N, BLOCK_W], tl.float32) - added[None, :]
    for k in tl.static_range(4):
        sums += _column(words, k, BITS, FLOAT) * xs[k][None, :]
    if BITS == 4:
        for k in tl.static_range(4):
            sums += _column(words, k + 4, BITS, FLOAT) * more[k][None, :]
    sums = tl.sum(tl.reshape(sums, [BLOCK_N, BLOCK_W // 4, 4]), 2)
    if ZEROS:
        spans = tl.sum(tl.reshape(total, [BLOCK_W // 4, 4]), 1)
        sums -= zero.to(tl.float32) * spans[None, :]
    if GROUP != 0:
        sums *= scale.to(tl.float32)
    return sums


@triton.jit
def _one_row(
    x_ptr, norm_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, out_ptr,
    outputs, eps,
    INPUTS: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, NORM: tl.constexpr,
    BIASED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [N] of one token. Next to the tile in use, the next one is always on its way."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    WORDS: tl.constexpr = INPUTS * BITS // 32
    chunks: tl.constexpr = (WORDS + BLOCK_W - 1) // BLOCK_W
    row = tl.program_id(0) * (BLOCK_N * TILES) + tl.arange(0, BLOCK_N)
    sides: tl.constexpr = 2 if GATED else 1  # gate above, up below
    rows = outputs * sides
    weights = _weights(
        weight_ptr, scale_ptr, zero_ptr, row, rows, 0, WORDS, BITS, GROUP, ZEROS, BLOCK_W
    )
    if GATED:
        weights_up = _weights(
            weight_ptr, scale_ptr, zero_ptr, row + outputs, rows, 0,
            WORDS, BITS, GROUP, ZEROS, BLOCK_W,
        )  # fmt: skip
    wait_for_input(PDL)

    factor = _norm_scale(x_ptr, eps, INPUTS, NORM, 256)
    if chunks == 1:
        x = _x_by_words(x_ptr, norm_ptr, 0, factor, WORDS, BITS, FLOAT, NORM, BLOCK_W)
    for tile in tl.static_range(TILES):
        sums = tl.zeros([BLOCK_N, BLOCK_W // 4], tl.float32)
        sums_up = tl.zeros([BLOCK_N, BLOCK_W // 4], tl.float32)
        # Unrolled: across the end of a loop the assembler asks for weights late, to save registers.
        for chunk in tl.static_range(chunks):
            now = weights
            if GATED:
                now_up = weights_up
            if chunk + 1 < chunks or tile + 1 < TILES:
                if chunk + 1 < chunks:
                    next_row, start = row, (chunk + 1) * BLOCK_W
                else:
                    next_row, start = row + BLOCK_N, 0
                weights = _weights(
                    weight_ptr, scale_ptr, zero_ptr, next_row, rows, start,
                    WORDS, BITS, GROUP, ZEROS, BLOCK_W,
                )  # fmt: skip
                if GATED:
                    weights_up = _weights(
                        weight_ptr, scale_ptr, zero_ptr, next_row + outputs, rows, start,
                        WORDS, BITS, GROUP, ZEROS, BLOCK_W,
                    )  # fmt: skip
            if chunks > 1:
                x = _x_by_words(
                    x_ptr, norm_ptr, chunk * BLOCK_W, factor, WORDS, BITS, FLOAT, NORM, BLOCK_W
                )
            sums += _sums(now, x, BITS, FLOAT, GROUP, ZEROS, BLOCK_N, BLOCK_W)
            if GATED:
                sums_up += _sums(now_up, x, BITS, FLOAT, GROUP, ZEROS, BLOCK_N, BLOCK_W)

        live = row < outputs
        y = tl.sum(sums, 1) / LOW
        if GROUP == 0:
            y *= tl.load(scale_ptr + row, live, 0.0).to(tl.float32)
        y = rounded(y, bias_ptr, row, live, dtype, BIASED)
        if GATED:
            up = tl.sum(sums_up, 1) / LOW
            if GROUP == 0:
                up *= tl.load(scale_ptr + row + outputs, live, 0.0).to(tl.float32)
            up = rounded(up, bias_ptr, row + outputs, live, dtype, BIASED)
            y = swiglu(y, up, dtype)
        if RESIDUAL:
            y += tl.load(residual_ptr + row, live, 0.0).to(tl.float32)
        tl.store(out_ptr + row, y.to(dtype), live)
        row += BLOCK_N


def one_row(
    x_TD: Tensor,
    weight: FewBits,
    *,
    norm: Norm | None = None,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    gated: bool = False,
    pdl: bool = False,
    tile: WordsTile | None = None,
) -> Tensor:
    """x @ weight.T of one token with its surroundings. Twin: `reference_few_bits.multiply_rows`.

    x and all that is not weights in bf16, contiguous, on one device; `pdl` as in
    `multiply_triton.one_row`.
    """
    tokens, inputs = x_TD.shape
    packed, scale, zero = weight
    sides = 2 if gated else 1
    outputs = len(packed) // sides
    assert tokens == 1, "more tokens are multiplied by the tensor cores"
    assert x_TD.dtype == torch.bfloat16, "whose bits are the upper half of a float's"
    assert inputs == weight.inputs
    assert packed.numel() < 2**31, "offsets are 32 bits wide"
    y_TN = x_TD.new_empty(1, outputs)
    words_ND = packed.view(torch.int32)
    tile = tile or choose_words_tile(outputs, words_ND.shape[1], gated=gated)
    weight_D, eps = (x_TD, 0.0) if norm is None else (norm.weight_D, norm.eps)
    _one_row[(triton.cdiv(outputs, tile.outputs * tile.tiles),)](
        x_TD.view(torch.int64), weight_D.view(torch.int64), words_ND, scale, zero,
        bias_N, residual_TN, y_TN, outputs, eps,
        INPUTS=inputs, BITS=weight.bits, FLOAT=packed.dtype == torch.float8_e4m3fn,
        # A zero of a whole row is that of one long group.
        GROUP=weight.group or (0 if zero is None else inputs), ZEROS=zero is not None,
        NORM=rounding(norm),
        BIASED=bias_N is not None, GATED=gated, RESIDUAL=residual_TN is not None,
        BLOCK_N=tile.outputs, BLOCK_W=tile.words, TILES=tile.tiles, PDL=pdl,
        num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return y_TN
