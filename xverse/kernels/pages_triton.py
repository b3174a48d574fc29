"""PAGES <-> REGISTERS. What the attention kernels share: rope, FP8 rows, a block of softmax."""

import triton
import triton.language as tl


@triton.jit
def turn(at, cos, sin, inside, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rotate what `at` [..., BLOCK_E] points to, rounding where `reference.rotate` rounds."""
    element = tl.arange(0, BLOCK_E)
    away = tl.where(element < E // 2, E // 2, -(E // 2))[None, :]
    sign = tl.where(element < E // 2, -1.0, 1.0)[None, :]
    x = tl.load(at, inside, 0.0)
    paired = tl.load(at + away, inside, 0.0).to(tl.float32) * sign
    straight = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    across = (paired * sin).to(x.dtype).to(tl.float32)
    return (straight + across).to(x.dtype)


@triton.jit
def fp8_scale(largest):
    """What a row is divided by so that its largest magnitude fits; as `reference.quantize_kv`."""
    scale = tl.maximum(largest * (1 / 448), 7.888609052210118e-31)  # 2 ** -100
    bits = (scale.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def places(page, token, head, stride_page, stride_head, stride_slot, PAGE: tl.constexpr):
    """Offsets (int64) of a head's row for each token, whose page is given; any shape."""
    return page.to(tl.int64) * stride_page + head * stride_head + (token & (PAGE - 1)) * stride_slot


@triton.jit
def page_of(table, token, table_width, PAGE: tl.constexpr):
    """The page of each token; past the table's end page 0, which no mask lets anybody read."""
    bits: tl.constexpr = PAGE.bit_length() - 1
    return tl.load(table + (token >> bits), token < table_width * PAGE, 0)


@triton.jit
def row_scales(
    keys_ptr, values_ptr, page, token, last, head, stride_page, stride_head,
    PAGE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Scales of keys and of values of these tokens, zero from `last` on; ones of other pages.

    Offsets of 32 bits, or the compiler thinks it cheaper to load in one layout, wait, and change it
    through shared memory.
    """
    if FP8:
        at = page * stride_page + (head * stride_head + (token & (PAGE - 1)))
        keys = tl.load(keys_ptr + at, token < last, 0.0).to(tl.float32)
        values = tl.load(values_ptr + at, token < last, 0.0).to(tl.float32)
    else:
        keys = tl.full(token.shape, 1.0, tl.float32)
        values = keys
    return keys, values


@triton.jit
def widened(rows, scales, dtype: tl.constexpr, FP8: tl.constexpr):
    """Rows [S, E] as the tensor cores take them: FP8 as `reference.dequantize_kv` gives it."""
    if FP8:
        rows = (rows.to(tl.float32) * scales[:, None]).to(dtype)
    return rows


@triton.jit
def mix(q, k, v, seen, scale, largest, total, mixed, MASKED: tl.constexpr):
    """One block of online softmax (Milakov and Gimelshein 2018) in the tensor cores.

    q [G, E], k and v [S, E], `seen` [G or 1, S]; the state is the largest score [G] in powers of
    two, the sum of exponentials [G] and what is mixed [G, E]. `scale` is that of the scores.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - larger[:, None])
    shrink = tl.exp2(largest - larger)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
    return larger, total, mixed


@triton.jit
def mix_sums(
    q, k, v, k_scale, v_scale, seen, scale, largest, total, mixed, FP8: tl.constexpr
):  # fmt: skip
    """A block of softmax for one query head, q [1, E], without the tensor cores.

    k and v are [L, N, E]: L lanes of threads, each with a softmax [L] of its own over N tokens, so
    that nothing crosses between threads but the sum along E.
    """
    scores = tl.sum(k.to(tl.float32) * q[None, :, :], 2) * scale
    if FP8:
        scores *= k_scale
    scores = tl.where(seen, scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(largest - larger)
    total = total * shrink + tl.sum(weights, 1)
    if FP8:
        weights *= v_scale
    mixed = mixed * shrink[:, None] + tl.sum(weights[:, :, None] * v.to(tl.float32), 1)
    return larger, total, mixed
