"""Q, K, V -> MIXED V. Decode attention over a paged cache on a GPU, rope and store included.

One launch turns q and k, stores k and v, and reads the past once, cut into parts so that a few
long sequences fill the chip as well as many short ones (Dao et al. 2023, "Flash-Decoding"). The
part that finishes last joins them all, in order, so that equal inputs give equal bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.multiply_triton import wait_for_input

PROGRAMS = 132  # about one for each multiprocessor of the large chips; more measured slower
MOST_PARTS = 32


@dataclass(frozen=True)
class Scratch:
    """Where the parts meet; one for all layers of a step. `arrived` is zero between launches."""

    mixed: Tensor  # [T, K, parts, G, E] fp32
    sums: Tensor  # [T, K, parts, 2, G] fp32: the largest score, and the sum of exponentials
    arrived: Tensor  # [T, K] int32
    parts: int

    @classmethod
    def reserve(
        cls,
        tokens: int,
        heads: int,
        kv_heads: int,
        size: int,
        device: torch.device | str,
        *,
        parts: int | None = None,
    ) -> "Scratch":
        """Room for `tokens` sequences; by default as many parts as fill the chip."""
        parts = parts or min(MOST_PARTS, max(1, PROGRAMS // (tokens * kv_heads)))
        lead = (tokens, kv_heads, parts)
        return cls(
            mixed=torch.empty(*lead, heads // kv_heads, size, device=device),
            sums=torch.empty(*lead, 2, heads // kv_heads, device=device),
            arrived=torch.zeros(tokens, kv_heads, dtype=torch.int32, device=device),
            parts=parts,
        )


@triton.jit
def _turn(at, cos, sin, inside, E: tl.constexpr, BLOCK_E: tl.constexpr):
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
def _slots(
    table_ptr, keys_ptr, values_ptr, first, last, head,
    stride_page, stride_head, stride_slot,
    E: tl.constexpr, PAGE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Keys and values [BLOCK_S, BLOCK_E] of the tokens from `first`, zero from `last` on."""
    token = first + tl.arange(0, BLOCK_S)
    element = tl.arange(0, BLOCK_E)
    page = tl.load(table_ptr + token // PAGE, token < last, 0).to(tl.int64)
    place = page * stride_page + head * stride_head + (token % PAGE) * stride_slot
    offset = place[:, None] + element[None, :]
    inside = (token < last)[:, None] & (element < E)[None, :]
    return tl.load(keys_ptr + offset, inside, 0.0), tl.load(values_ptr + offset, inside, 0.0)


@triton.jit
def _rotate_store_attend(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, table_ptr, keys_ptr, values_ptr, out_ptr,
    mixed_ptr, sums_ptr, arrived_ptr,
    table_width, stride_page, stride_head, stride_slot, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, key/value head, part): one part of a sequence for one group of heads."""
    token, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group: tl.constexpr = HEADS // KV_HEADS
    dtype = out_ptr.dtype.element_ty
    member = tl.arange(0, BLOCK_G)
    element = tl.arange(0, BLOCK_E)
    known = element < E

    position = tl.load(positions_ptr + token)
    table = table_ptr + token * table_width
    each = tl.cdiv(tl.cdiv(position, PARTS), BLOCK_S) * BLOCK_S
    first = part * each
    last = tl.minimum(first + each, position)
    # The past is not written by the kernel ahead, so it is fetched before that one has ended.
    keys, values = _slots(
        table, keys_ptr, values_ptr, first, last, head,
        stride_page, stride_head, stride_slot, E, PAGE, BLOCK_S, BLOCK_E,
    )  # fmt: skip
    cos = tl.load(cos_ptr + position * E + element, known, 0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * E + element, known, 0.0).to(tl.float32)[None, :]
    wait_for_input(PDL)

    start = qkv_ptr + token * ((HEADS + 2 * KV_HEADS) * E)
    q_at = start + (head * group + member)[:, None] * E + element[None, :]
    q = _turn(q_at, cos, sin, (member < group)[:, None] & known[None, :], E, BLOCK_E)
    # The new token belongs to the last part, which takes it from here and not from the cache.
    newest = part == PARTS - 1
    k_at = start + (HEADS + head) * E + element[None, :]
    k_new = _turn(k_at, cos, sin, known[None, :] & newest, E, BLOCK_E)
    v_new = tl.load(k_at + KV_HEADS * E, known[None, :] & newest, 0.0)
    page = tl.load(table + position // PAGE).to(tl.int64)
    slot = page * stride_page + head * stride_head + (position % PAGE) * stride_slot
    tl.store(keys_ptr + slot + element[None, :], k_new, known[None, :] & newest)
    tl.store(values_ptr + slot + element[None, :], v_new, known[None, :] & newest)

    own = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale
    largest = tl.where(newest, own, float("-inf"))
    total = tl.where(newest, 1.0, 0.0) + tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_E], tl.float32) + v_new.to(tl.float32)

    begin = first
    while begin < last:
        k, v = keys, values
        keys, values = _slots(
            table, keys_ptr, values_ptr, begin + BLOCK_S, last, head,
            stride_page, stride_head, stride_slot, E, PAGE, BLOCK_S, BLOCK_E,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = begin + tl.arange(0, BLOCK_S) < last
        scores = tl.where(seen[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(dtype), v, mixed * shrink[:, None], input_precision="ieee")
        largest = larger
        begin += BLOCK_S

    out_at = out_ptr + (token * HEADS + head * group + member)[:, None] * E + element[None, :]
    inside = (member < group)[:, None] & known[None, :]
    if PARTS == 1:
        tl.store(out_at, (mixed / total[:, None]).to(dtype), inside)
    else:
        lead = (token * KV_HEADS + head) * PARTS
        mixed_at = mixed_ptr + member[:, None] * E + element[None, :]
        sums_at = sums_ptr + member
        tl.store(mixed_at + (lead + part) * (group * E), mixed, inside)
        tl.store(sums_at + (lead + part) * (2 * group), largest, member < group)
        tl.store(sums_at + (lead + part) * (2 * group) + group, total, member < group)
        tl.debug_barrier()  # all of the program's stores, before the one that announces them
        if tl.atomic_add(arrived_ptr + token * KV_HEADS + head, 1, sem="acq_rel") == PARTS - 1:
            _join(
                mixed_at + lead * (group * E), sums_at + lead * (2 * group), out_at, inside,
                member < group, dtype, group, E, BLOCK_G, BLOCK_E, PARTS,
            )  # fmt: skip
            tl.store(arrived_ptr + token * KV_HEADS + head, 0)


@triton.jit
def _join(
    mixed_at, sums_at, out_at, inside, member, dtype: tl.constexpr,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Weigh the parts by their sums. Read past the first-level cache, which may hold old ones."""
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    for part in tl.static_range(PARTS):
        at = sums_at + part * (2 * GROUP)
        largest = tl.maximum(largest, tl.load(at, member, 0.0, cache_modifier=".cg"))
    total = tl.zeros([BLOCK_G], tl.float32)
    mixed = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    for part in tl.static_range(PARTS):
        at = sums_at + part * (2 * GROUP)
        weight = tl.exp(tl.load(at, member, 0.0, cache_modifier=".cg") - largest)
        total += tl.load(at + GROUP, member, 1.0, cache_modifier=".cg") * weight
        share = tl.load(mixed_at + part * (GROUP * E), inside, 0.0, cache_modifier=".cg")
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
    *,
    scratch: Scratch | None = None,
    pdl: bool = False,
    block: int = 64,
) -> Tensor:
    """Rope, store and attention of one new token of each sequence. -> [T, H * E].

    Twin: `reference.rotate_store_attend`. Positions and pages int32; keys and values any view of
    [P, K, S, E] whose last dimension is dense. `pdl` as in `multiply_rows`; the kernel ahead may
    write `qkv_TN` alone, since the rest is read before it ends.
    """
    _, kv_heads, page_size, size = keys_PKSE.shape
    tokens = qkv_TN.shape[0]
    heads = qkv_TN.shape[1] // size - 2 * kv_heads
    assert keys_PKSE.stride() == values_PKSE.stride(), "keys and values lie alike"
    assert keys_PKSE.stride(3) == 1, "the elements of a head lie side by side"
    mixed = qkv_TN.new_empty(tokens, heads * size)
    scratch = scratch or Scratch.reserve(tokens, heads, kv_heads, size, qkv_TN.device)
    _rotate_store_attend[(tokens, kv_heads, scratch.parts)](
        qkv_TN, cos_SE, sin_SE, positions_T, pages_TP, keys_PKSE, values_PKSE, mixed,
        scratch.mixed, scratch.sums, scratch.arrived,
        pages_TP.stride(0), *keys_PKSE.stride()[:3], size**-0.5,
        HEADS=heads, KV_HEADS=kv_heads, E=size, PAGE=page_size,
        BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_S=block, BLOCK_E=triton.next_power_of_2(size),
        PARTS=scratch.parts, PDL=pdl, num_warps=4 if scratch.parts == 1 else 8, launch_pdl=pdl,
        enable_fp_fusion=False,  # rope rounds its products, which a fused add would not
    )  # fmt: skip
    return mixed
