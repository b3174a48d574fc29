"""Q, K, V -> MIXED V. Decode attention over a paged cache on a GPU, rope and store included.

One launch turns q and k, stores k and v, and reads the past once, cut into parts so that a few
long sequences fill the chip as well as many short ones (Dao et al. 2023, "Flash-Decoding"). The
part that finishes last joins them all, in order, so that equal inputs give equal bits.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.cuts import Scratch, check_pages
from xverse.kernels.multiply_triton import wait_for_input
from xverse.kernels.pages_triton import (
    fp8_scale,
    mix,
    mix_sums,
    page_of,
    places,
    row_scales,
    turn,
    widened,
)
from xverse.kernels.reference import Scales


@triton.jit
def _rows(
    keys_ptr, values_ptr, page, token, last, head, stride_page, stride_head, stride_slot,
    E: tl.constexpr, PAGE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Keys and values [..., BLOCK_E] of these tokens, zero from `last` on; each is read once."""
    element = tl.arange(0, BLOCK_E)
    place = places(page, token, head, stride_page, stride_head, stride_slot, PAGE)
    at = tl.expand_dims(place, -1) + element
    inside = tl.expand_dims(token < last, -1) & (element < E)
    keys = tl.load(keys_ptr + at, inside, 0.0, eviction_policy="evict_first")
    return keys, tl.load(values_ptr + at, inside, 0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["table_width"])
def _rotate_store_attend(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, table_ptr, keys_ptr, values_ptr,
    key_scales_ptr, value_scales_ptr, out_ptr, mixed_ptr, sums_ptr, arrived_ptr,
    table_width, stride_page, stride_head, stride_slot, scale_page, scale_head, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, LANES: tl.constexpr,
    PARTS: tl.constexpr, LEAST: tl.constexpr, STAGES: tl.constexpr,
    FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (key/value head, token, part): one part of a sequence for one group of heads.

    Neighbours read neighbouring heads, which lie side by side in a page.
    """
    head, token, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    member = tl.arange(0, BLOCK_G)
    element = tl.arange(0, BLOCK_E)
    known = element < E

    position = tl.load(positions_ptr + token)
    table = table_ptr + token.to(tl.int64) * table_width
    if PARTS == 1:  # known before the position is, and so is the first block's place
        first, last, used = 0, position, 1
    else:
        each = tl.maximum(tl.cdiv(tl.cdiv(position, PARTS), BLOCK_S) * BLOCK_S, LEAST)
        used = tl.maximum(tl.cdiv(position, each), 1)
        if part >= used:
            return
        first = part * each
        last = tl.minimum(first + each, position)
    if LANES > 0:
        within = tl.arange(0, LANES)[:, None] + tl.arange(0, BLOCK_S // LANES)[None, :] * LANES
    else:
        within = tl.arange(0, BLOCK_S)
    # The past is not written by the kernel ahead, so it is fetched before that one has ended.
    page = page_of(table, first + within, table_width, PAGE)
    next_page = page_of(table, first + BLOCK_S + within, table_width, PAGE)
    if STAGES == 1:
        keys, values = _rows(
            keys_ptr, values_ptr, page, first + within, last, head,
            stride_page, stride_head, stride_slot, E, PAGE, BLOCK_E,
        )  # fmt: skip
    key_scales, value_scales = row_scales(
        key_scales_ptr, value_scales_ptr, page, first + within, last, head,
        scale_page, scale_head, PAGE, FP8,
    )  # fmt: skip
    cos = tl.load(cos_ptr + position * E + element, known, 0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * E + element, known, 0.0).to(tl.float32)[None, :]
    wait_for_input(PDL)

    start = qkv_ptr + token * ((HEADS + 2 * KV_HEADS) * E)
    q_at = start + (head * group + member)[:, None] * E + element[None, :]
    q = turn(q_at, cos, sin, (member < group)[:, None] & known[None, :], E, BLOCK_E)
    # The new token belongs to the last part, which takes it from here and not from the cache.
    newest = part == used - 1
    k_at = start + (HEADS + head) * E + element[None, :]
    k_new = turn(k_at, cos, sin, known[None, :] & newest, E, BLOCK_E)
    v_new = tl.load(k_at + KV_HEADS * E, known[None, :] & newest, 0.0)
    own_page = tl.load(table + position // PAGE)
    slot = places(own_page, position, head, stride_page, stride_head, stride_slot, PAGE)
    own_scale = scale
    if FP8:
        k_scale = fp8_scale(tl.max(tl.abs(k_new.to(tl.float32))))
        v_scale = fp8_scale(tl.max(tl.abs(v_new.to(tl.float32))))
        k_new = (k_new.to(tl.float32) * tl.div_rn(1.0, k_scale)).to(keys_ptr.dtype.element_ty)
        v_new = (v_new.to(tl.float32) * tl.div_rn(1.0, v_scale)).to(keys_ptr.dtype.element_ty)
        at = places(own_page, position, head, scale_page, scale_head, 1, PAGE)
        tl.store(key_scales_ptr + at, k_scale.to(tl.bfloat16), newest)
        tl.store(value_scales_ptr + at, v_scale.to(tl.bfloat16), newest)
        own_scale = scale * k_scale
    tl.store(keys_ptr + slot + element[None, :], k_new, known[None, :] & newest)
    tl.store(values_ptr + slot + element[None, :], v_new, known[None, :] & newest)
    own = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * own_scale
    v_own = v_new.to(tl.float32)
    if FP8:
        v_own *= v_scale

    streams: tl.constexpr = LANES if LANES > 0 else BLOCK_G
    if LANES > 0:
        q = q.to(tl.float32)
    largest = tl.full([streams], -1e30, tl.float32)  # finite, so that none less none is not NaN
    total = tl.zeros([streams], tl.float32)
    mixed = tl.zeros([streams, BLOCK_E], tl.float32)
    for begin in tl.range(first, last, BLOCK_S, num_stages=STAGES):
        if STAGES > 1:  # asked for ahead by the compiler
            keys, values = _rows(
                keys_ptr, values_ptr, page, begin + within, last, head,
                stride_page, stride_head, stride_slot, E, PAGE, BLOCK_E,
            )  # fmt: skip
        k, v, k_scales, v_scales = keys, values, key_scales, value_scales
        ahead = begin + BLOCK_S + within
        if STAGES == 1:
            keys, values = _rows(
                keys_ptr, values_ptr, next_page, ahead, last, head,
                stride_page, stride_head, stride_slot, E, PAGE, BLOCK_E,
            )  # fmt: skip
        key_scales, value_scales = row_scales(
            key_scales_ptr, value_scales_ptr, next_page, ahead, last, head,
            scale_page, scale_head, PAGE, FP8,
        )  # fmt: skip
        # Two loads in the place of passing one on, which the compiler's pipelining does not take.
        page = page_of(table, ahead, table_width, PAGE)
        next_page = page_of(table, ahead + BLOCK_S, table_width, PAGE)
        seen = begin + within < last
        if LANES > 0:
            largest, total, mixed = mix_sums(
                q, k, v, k_scales, v_scales, seen, scale, largest, total, mixed, FP8
            )  # fmt: skip
        else:
            largest, total, mixed = mix(
                q, widened(k, k_scales, dtype, FP8), widened(v, v_scales, dtype, FP8),
                seen[None, :], scale, largest, total, mixed, True,
            )  # fmt: skip
    if LANES > 0:  # the lanes become one
        top = tl.max(largest, 0)
        share = tl.exp2(largest - top)
        largest = tl.full([BLOCK_G], 0.0, tl.float32) + top
        total = tl.full([BLOCK_G], 0.0, tl.float32) + tl.sum(total * share, 0)
        mixed = tl.expand_dims(tl.sum(mixed * share[:, None], 0), 0)

    larger = tl.where(newest, tl.maximum(largest, own), largest)
    shrink = tl.exp2(largest - larger)
    weight = tl.where(newest, tl.exp2(own - larger), 0.0)
    total = total * shrink + weight
    mixed = mixed * shrink[:, None] + weight[:, None] * v_own
    out_at = out_ptr + (token * HEADS + head * group + member)[:, None] * E + element[None, :]
    inside = (member < group)[:, None] & known[None, :]
    if used == 1:
        tl.store(out_at, (mixed / total[:, None]).to(dtype), inside)
    else:
        lead = (token * KV_HEADS + head) * PARTS
        mixed_at = mixed_ptr + member[:, None] * E + element[None, :]
        sums_at = sums_ptr + member
        tl.store(mixed_at + (lead + part) * (group * E), mixed, inside)
        tl.store(sums_at + (lead + part) * (2 * group), larger, member < group)
        tl.store(sums_at + (lead + part) * (2 * group) + group, total, member < group)
        tl.debug_barrier()  # all of the program's stores, before the one that announces them
        if tl.atomic_add(arrived_ptr + token * KV_HEADS + head, 1, sem="acq_rel") == used - 1:
            _join(
                mixed_at + lead * (group * E), sums_at + lead * (2 * group), out_at, inside,
                member < group, used, dtype, group, E, BLOCK_G, BLOCK_E, PARTS,
            )  # fmt: skip
            tl.store(arrived_ptr + token * KV_HEADS + head, 0)


@triton.jit
def _join(
    mixed_at, sums_at, out_at, inside, member, used, dtype: tl.constexpr,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Weigh the parts by their sums. Read past the first-level cache, which may hold old ones."""
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        at = sums_at + part * (2 * GROUP)
        there = member & (part < used)
        largest = tl.maximum(largest, tl.load(at, there, float("-inf"), cache_modifier=".cg"))
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    for part in tl.static_range(PARTS):
        at = sums_at + part * (2 * GROUP)
        there = member & (part < used)
        # Of a row without a head every score is -inf, and its weights are NaN, which nobody stores.
        weight = tl.exp2(tl.load(at, there, float("-inf"), cache_modifier=".cg") - largest)
        total += tl.load(at + GROUP, there, 0.0, cache_modifier=".cg") * weight
        share_at = mixed_at + part * (GROUP * E)
        share = tl.load(share_at, inside & (part < used), 0.0, cache_modifier=".cg")
        mixed += share * weight[:, None]
    tl.store(out_at, (mixed / total[:, None]).to(dtype), inside)


def rotate_store_attend(
    qkv_TN: Tensor,
    cos_SE: Tensor,
    sin_SE: Tensor,
    positions_T: Tensor,
    pages_TP: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
    scales: Scales | None = None,
    *,
    scratch: Scratch | None = None,
    pdl: bool = False,
) -> Tensor:
    """Rope, store and attention of one new token of each sequence. -> [T, H * E].

    Twin: `reference.rotate_store_attend`. Positions and pages int32; keys and values any view of
    [P, K, S, E] whose last dimension is dense. `pdl` as in `multiply_rows`; the kernel ahead may
    write `qkv_TN` alone, since the rest is read before it ends.
    """
    _, kv_heads, page_size, size = keys_PKSE.shape
    tokens = qkv_TN.shape[0]
    heads = qkv_TN.shape[1] // size - 2 * kv_heads
    fp8 = scales is not None
    check_pages(keys_PKSE, values_PKSE, scales)
    mixed = qkv_TN.new_empty(tokens, heads * size)
    scratch = scratch or Scratch.reserve(tokens, heads, kv_heads, size, qkv_TN.device, fp8=fp8)
    cut = scratch.cut
    block_E = triton.next_power_of_2(size)
    assert cut.dots or heads == kv_heads, "several query heads are for the tensor cores"
    lanes = 0 if cut.dots else min(cut.block, cut.warps * 512 // (block_E * keys_PKSE.itemsize))
    key_scales, value_scales = scales or (mixed, mixed)
    _rotate_store_attend[(kv_heads, tokens, cut.parts)](
        qkv_TN, cos_SE, sin_SE, positions_T, pages_TP, keys_PKSE, values_PKSE,
        key_scales, value_scales, mixed, scratch.mixed, scratch.sums, scratch.arrived,
        pages_TP.stride(0), *keys_PKSE.stride()[:3], *key_scales.stride()[:2],
        size**-0.5 * math.log2(math.e),
        HEADS=heads, KV_HEADS=kv_heads, E=size, PAGE=page_size,
        BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)) if cut.dots else 1,
        BLOCK_S=cut.block, BLOCK_E=block_E, LANES=lanes,
        PARTS=cut.parts, LEAST=max(cut.least, cut.block), STAGES=cut.stages, FP8=fp8, PDL=pdl,
        num_warps=cut.warps, maxnreg=cut.registers, launch_pdl=pdl,
    )  # fmt: skip
    return mixed
