"""CHUNKS OF PROMPTS -> MIXED V. Rope and store of many tokens, then causal attention over pages.

Flash attention (Dao et al. 2022, 2023) of a flat row of chunks, each against its own pages, in
which its own keys and values lie already.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.cuts import ChunkCut, check_pages, choose_chunk_cut
from xverse.kernels.pages_triton import fp8_scale, mix, page_of, places, row_scales, widened
from xverse.kernels.reference import Scales


@triton.jit
def _rotate_store(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, slots_ptr, keys_ptr, values_ptr,
    key_scales_ptr, value_scales_ptr, out_ptr, out_stride,
    stride_page, stride_head, stride_slot, scale_page, scale_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr, FP8: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Program (token, block): some heads of the queries, or of the keys, or of the values."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = E // 2
    of_queries: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    of_keys: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    is_query, is_value = block < of_queries, block >= of_queries + of_keys
    element = tl.arange(0, BLOCK_E)[None, :]
    known = element < half
    within = tl.arange(0, BLOCK_H)[:, None]
    if is_query:
        head, first, heads = block * BLOCK_H + within, 0, HEADS
    elif is_value:
        head, first = (block - of_queries - of_keys) * BLOCK_H + within, HEADS + KV_HEADS
        heads = KV_HEADS
    else:
        head, first, heads = (block - of_queries) * BLOCK_H + within, HEADS, KV_HEADS
    inside = (head < heads) & known
    start = qkv_ptr + token * ((HEADS + 2 * KV_HEADS) * E)
    x_at = start + (first + head) * E + element
    lower, upper = tl.load(x_at, inside, 0.0), tl.load(x_at + half, inside, 0.0)
    if not is_value:
        angle = tl.load(positions_ptr + token).to(tl.int64) * E + element
        x = _turned(lower, upper, cos_ptr + angle, sin_ptr + angle, -1.0, known)
        upper = _turned(upper, lower, cos_ptr + angle + half, sin_ptr + angle + half, 1.0, known)
        lower = x
    if is_query:
        q_at = out_ptr + token * out_stride + head * E + element
        tl.store(q_at, lower, inside)
        tl.store(q_at + half, upper, inside)
    else:
        slot = tl.load(slots_ptr + token)
        page, place = slot // PAGE, slot % PAGE
        offset = page * stride_page + head * stride_head + place * stride_slot + element
        scale_offset = page * scale_page + head * scale_head + place
        live = head < heads
        if is_value:
            at, scale_at = values_ptr + offset, value_scales_ptr + scale_offset
            _keep(at, scale_at, lower, upper, inside, live, half, FP8)
        else:
            if IN_PLACE:
                tl.store(x_at, lower, inside)
                tl.store(x_at + half, upper, inside)
            at, scale_at = keys_ptr + offset, key_scales_ptr + scale_offset
            _keep(at, scale_at, lower, upper, inside, live, half, FP8)


@triton.jit
def _turned(x, paired, cos_at, sin_at, sign, known):
    """x * cos + sign * paired * sin, rounded where `reference.rotate` rounds."""
    cos = tl.load(cos_at, known, 0.0).to(tl.float32)
    sin = tl.load(sin_at, known, 0.0).to(tl.float32)
    straight = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    across = (paired.to(tl.float32) * sin).to(x.dtype).to(tl.float32)
    return (straight + sign * across).to(x.dtype)


@triton.jit
def _keep(at, scale_at, lower, upper, inside, live, HALF: tl.constexpr, FP8: tl.constexpr):
    """Store the halves [H, E/2] of rows, as FP8 with their scales if the pages are."""
    dtype: tl.constexpr = at.dtype.element_ty
    if FP8:
        lower, upper = lower.to(tl.float32), upper.to(tl.float32)
        scale = fp8_scale(tl.max(tl.maximum(tl.abs(lower), tl.abs(upper)), 1))[:, None]
        tl.store(scale_at, scale.to(tl.bfloat16), live)
        shrink = tl.div_rn(1.0, scale)
        lower, upper = lower * shrink, upper * shrink
    tl.store(at, lower.to(dtype), inside)
    tl.store(at + HALF, upper.to(dtype), inside)


def rotate_store(
    qkv_TN: Tensor,
    cos_SE: Tensor,
    sin_SE: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
    scales: Scales | None = None,
    *,
    in_place: bool = False,
    block: int = 16,
    warps: int = 4,
) -> Tensor:
    """Rope on q and k of many tokens, k and v into their pages. -> q, rotated, [T, H, E].

    Twin: `reference.rotate_store`. Positions int32, slots int64; all dense but the pages, of which
    the last dimension is. `block` heads are one program's, so that it may work in place.
    """
    _, kv_heads, page_size, size = keys_PKSE.shape
    tokens = qkv_TN.shape[0]
    heads = qkv_TN.shape[1] // size - 2 * kv_heads
    check_pages(keys_PKSE, values_PKSE, scales)
    q_THE = qkv_TN[:, : heads * size].unflatten(1, (heads, size))
    if not in_place:
        q_THE = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
    key_scales, value_scales = scales or (q_THE, q_THE)
    block = min(block, triton.next_power_of_2(heads))
    programs = triton.cdiv(heads, block) + 2 * triton.cdiv(kv_heads, block)
    if tokens == 0:
        return q_THE
    _rotate_store[(tokens, programs)](
        qkv_TN, cos_SE, sin_SE, positions_T, slots_T, keys_PKSE, values_PKSE,
        key_scales, value_scales, q_THE, q_THE.stride(0),
        *keys_PKSE.stride()[:3], *key_scales.stride()[:2], IN_PLACE=in_place,
        HEADS=heads, KV_HEADS=kv_heads, E=size, PAGE=page_size,
        BLOCK_H=block, BLOCK_E=triton.next_power_of_2(size // 2), FP8=scales is not None,
        num_warps=warps,
    )  # fmt: skip
    return q_THE


@triton.jit
def _rows(
    keys_ptr, values_ptr, page, token, end, head, stride_page, stride_head, stride_slot,
    E: tl.constexpr, PAGE: tl.constexpr, BLOCK_E: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys and values [S, BLOCK_E] of these tokens; if masked, zero from `end` on."""
    element = tl.arange(0, BLOCK_E)[None, :]
    at = places(page, token, head, stride_page, stride_head, stride_slot, PAGE)[:, None] + element
    if MASKED or E != BLOCK_E:
        inside = (token < end)[:, None] & (element < E)
        k, v = tl.load(keys_ptr + at, inside, 0.0), tl.load(values_ptr + at, inside, 0.0)
    else:
        k, v = tl.load(keys_ptr + at), tl.load(values_ptr + at)
    return k, v


@triton.jit(do_not_specialize=["rows", "sequences", "table_width"])
def _attend_chunks(
    q_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, tables_ptr, offsets_ptr,
    held_ptr, out_ptr, rows, sequences, table_width,
    stride_page, stride_head, stride_slot, scale_page, scale_head, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Program (query head, tile): a tile of BLOCK_T rows of one sequence, the last tiles first.

    Tiles are numbered without a pause for the host: sequence b has those from
    `offsets[b] // BLOCK_T + b`, which leaves room for one more than its whole ones. The rows after
    all sequences are one more, and zeroed.
    """
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first: a short tail
    kv_head = head // (HEADS // KV_HEADS)
    sequence = sequences * 0 - 1
    for base in tl.range(0, sequences + 1, BLOCK_B):
        number = base + tl.arange(0, BLOCK_B)
        starts = tl.load(offsets_ptr + number, number <= sequences, 0) // BLOCK_T + number
        sequence += tl.sum(((starts <= tile) & (number <= sequences)).to(tl.int32), 0)
    start = tl.load(offsets_ptr + sequence)
    stop = rows
    if sequence < sequences:
        stop = tl.load(offsets_ptr + sequence + 1)
    first = (tile - start // BLOCK_T - sequence) * BLOCK_T
    count = stop - start
    if first >= count:
        return
    row = first + tl.arange(0, BLOCK_T)
    element = tl.arange(0, BLOCK_E)
    place = ((start + row).to(tl.int64) * HEADS + head)[:, None] * E + element[None, :]
    inside = (row < count)[:, None] & (element < E)[None, :]
    if sequence == sequences:
        tl.store(out_ptr + place, tl.zeros([BLOCK_T, BLOCK_E], out_ptr.dtype.element_ty), inside)
        return

    q = tl.load(q_ptr + place, inside, 0.0)
    held = tl.load(held_ptr + sequence)
    table = tables_ptr + sequence.to(tl.int64) * table_width
    largest = tl.full([BLOCK_T], -1e30, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    mixed = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    within = tl.arange(0, BLOCK_S)
    end = held + tl.minimum(first + BLOCK_T, count)
    whole = (held + first + 1) // BLOCK_S * BLOCK_S  # what all rows of the tile see
    page = page_of(table, within, table_width, PAGE)
    next_page = page_of(table, BLOCK_S + within, table_width, PAGE)
    k_scales, v_scales = row_scales(
        key_scales_ptr, value_scales_ptr, page, within, end, kv_head,
        scale_page, scale_head, PAGE, FP8,
    )  # fmt: skip
    for begin in tl.range(0, whole, BLOCK_S, num_stages=STAGES):
        token = begin + within
        k, v = _rows(
            keys_ptr, values_ptr, page, token, end, kv_head,
            stride_page, stride_head, stride_slot, E, PAGE, BLOCK_E, False,
        )  # fmt: skip
        k, v = widened(k, k_scales, q.dtype, FP8), widened(v, v_scales, q.dtype, FP8)
        largest, total, mixed = mix(
            q, k, v, within[None, :] >= 0, scale, largest, total, mixed, False
        )  # fmt: skip
        # One block ahead, since what is so small is not asked for ahead by the compiler; two loads
        # of pages in the place of passing one on, which its pipelining does not take.
        k_scales, v_scales = row_scales(
            key_scales_ptr, value_scales_ptr, next_page, token + BLOCK_S, end, kv_head,
            scale_page, scale_head, PAGE, FP8,
        )  # fmt: skip
        page = page_of(table, token + BLOCK_S, table_width, PAGE)
        next_page = page_of(table, token + 2 * BLOCK_S, table_width, PAGE)
    for begin in tl.range(whole, end, BLOCK_S, num_stages=1):
        token = begin + within
        page = page_of(table, token, table_width, PAGE)
        k, v = _rows(
            keys_ptr, values_ptr, page, token, end, kv_head,
            stride_page, stride_head, stride_slot, E, PAGE, BLOCK_E, True,
        )  # fmt: skip
        k_scales, v_scales = row_scales(
            key_scales_ptr, value_scales_ptr, page, token, end, kv_head,
            scale_page, scale_head, PAGE, FP8,
        )  # fmt: skip
        k, v = widened(k, k_scales, q.dtype, FP8), widened(v, v_scales, q.dtype, FP8)
        seen = token[None, :] <= (held + row)[:, None]
        largest, total, mixed = mix(q, k, v, seen, scale, largest, total, mixed, True)
    mixed /= total[:, None]
    tl.store(out_ptr + place, mixed.to(out_ptr.dtype.element_ty), inside)


def attend_chunks(
    q_THE: Tensor,
    keys_PKSE: Tensor,
    values_PKSE: Tensor,
    tables_BP: Tensor,
    offsets_B1: Tensor,
    held_B: Tensor,
    scales: Scales | None = None,
    *,
    most: int | None = None,
    cut: ChunkCut | None = None,
) -> Tensor:
    """Causal attention of chunks of many sequences over their pages. -> [T, H, E].

    Twin: `reference.attend_chunks`. Tables, offsets and held int32 on the device; q dense. `most`
    is the largest count if the host knows it, by which the cut is chosen.
    """
    _, kv_heads, page_size, size = keys_PKSE.shape
    rows, heads, _ = q_THE.shape
    sequences = len(held_B)
    check_pages(keys_PKSE, values_PKSE, scales)
    assert q_THE.is_contiguous(), "queries lie side by side"
    cut = cut or choose_chunk_cut(rows if most is None else most, fp8=scales is not None)
    out = torch.empty_like(q_THE)
    if rows == 0:
        return out
    key_scales, value_scales = scales or (out, out)
    _attend_chunks[(heads, rows // cut.rows + sequences + 1)](
        q_THE, keys_PKSE, values_PKSE, key_scales, value_scales, tables_BP, offsets_B1,
        held_B, out, rows, sequences, tables_BP.stride(0),
        *keys_PKSE.stride()[:3], *key_scales.stride()[:2], size**-0.5 * math.log2(math.e),
        HEADS=heads, KV_HEADS=kv_heads, E=size, PAGE=page_size,
        BLOCK_B=64,
        BLOCK_T=cut.rows, BLOCK_S=cut.block, BLOCK_E=triton.next_power_of_2(size),
        STAGES=cut.stages, FP8=scales is not None,
        num_warps=cut.warps, maxnreg=cut.registers,
    )  # fmt: skip
    return out
