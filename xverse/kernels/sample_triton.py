"""LOGITS -> IDS, ON A GPU. One token for each row, by options that lie on the device.

Two launches. `_scan` reads the logits once, a tile a program: the best of each tile and of each
group of 64 tokens, and the sum of exponentials. `_choose`, a program a row, needs little more than
that: a group whose best is below the k-th best of all groups has none of the k best tokens, so the
tokens that count are found in a few groups and listed, and thresholds are searched in that list.
Rows that are too flat for the list are searched as a whole, four cuts at a time, until what is
between two cuts fits. Nothing depends on the order in which programs run: equal inputs, equal bits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.draw_triton import sampled

NUCLEUS = 256  # tokens listed at first where only top_p says how many; chats need fewer


class Cut(NamedTuple):
    """How the work is cut: elements of a tile, of a group, a block of the row, one of a list."""

    tile: int = 4096
    tile_warps: int = 8
    group: int = 64
    block: int = 2048
    part: int = 1024
    list: int = 4096  # tokens that a row can list
    warps: int = 8


@dataclass(frozen=True)
class Scratch:
    """What the launches tell each other; for one stream. `arrived` is zero between launches."""

    bests: Tensor  # [B, tiles] fp32: the best score of each tile
    places: Tensor  # [B, tiles] int32: the first id that has it; -1 where a logit is NaN
    sums: Tensor  # [B, tiles] fp32: exponentials, relative to that best one
    arrived: Tensor  # [B] int32
    groups: Tensor  # [B, groups] fp32: the best score of each group
    hot: Tensor  # [B, groups] int32: the groups that are looked at
    listed: Tensor  # [B, list] fp32: scores of the tokens that count, in the order of ids
    listed_ids: Tensor  # [B, list] int32: and which tokens these are
    cut: Cut

    @classmethod
    def reserve(
        cls,
        rows: int,
        vocab_size: int,
        device: torch.device | str,
        cut: Cut | None = None,
        *,
        greedy: bool = False,
    ) -> "Scratch":
        """Room for `rows` rows: about 45 KB each, and 0.3 KB for `best_rows` alone."""
        cut = cut or Cut()
        tiles, groups = triton.cdiv(vocab_size, cut.tile), triton.cdiv(vocab_size, cut.group)

        lists = 0 if greedy else 1

        def room(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, width, dtype=dtype, device=device)

        return cls(
            bests=room(tiles, torch.float32),
            places=room(tiles, torch.int32),
            sums=room(tiles, torch.float32),
            arrived=torch.zeros(rows, dtype=torch.int32, device=device),
            groups=room(lists * groups, torch.float32),
            hot=room(lists * groups, torch.int32),
            listed=room(lists * cut.list, torch.float32),
            listed_ids=room(lists * cut.list, torch.int32),
            cut=cut,
        )


@triton.jit
def _join(bests_ptr, places_ptr, tiles, TILES: tl.constexpr):
    """The best score of a row and the first place that has it; a place below 0 means NaN.

    Read past the first-level cache, which may hold old ones."""
    tile = tl.arange(0, TILES)
    bests = tl.load(bests_ptr + tile, tile < tiles, float("-inf"), cache_modifier=".cg")
    places = tl.load(places_ptr + tile, tile < tiles, 0x7FFFFFFF, cache_modifier=".cg")
    best = tl.max(bests, 0)
    first = tl.min(tl.where((bests == best) | (places < 0), places, 0x7FFFFFFF), 0)
    return best, first


@triton.jit
def _scan(
    logits_ptr, stride, temperature_ptr, ids_ptr,
    bests_ptr, places_ptr, sums_ptr, groups_ptr, arrived_ptr, vocab, tiles, groups,
    GREEDY: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (row, tile). Where all is GREEDY, the last one of a row writes its id."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = tl.arange(0, TILE // GROUP)
    offset = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    start = tile * TILE
    x = tl.load(logits_ptr + row * stride + start + offset, offset < vocab - start, float("-inf"))
    x = x.to(tl.float32)
    tops = tl.max(x, 1)
    best = tl.max(x) if GREEDY else tl.max(tops, 0)
    first = tl.min(tl.where(x != x, -1, tl.where(x == best, offset, TILE)))
    first = tl.where(first < 0, -1, start + first)
    mine = row * tiles + tile
    if GREEDY:
        if TILES == 1:
            tl.store(ids_ptr + row, first.to(tl.int64))
        else:
            tl.store(bests_ptr + mine, best)
            tl.store(places_ptr + mine, first)
            tl.debug_barrier()  # both stores, before the one that announces them
            if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == tiles - 1:
                _, first = _join(bests_ptr + row * tiles, places_ptr + row * tiles, tiles, TILES)
                tl.store(ids_ptr + row, first.to(tl.int64))
                tl.store(arrived_ptr + row, 0)
    else:
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        if temperature > 0.0:
            best = tl.div_rn(best, temperature)
            groups_at = groups_ptr + row * groups + tile * (TILE // GROUP) + group
            inside = tile * (TILE // GROUP) + group < groups
            tl.store(groups_at, tl.div_rn(tops, temperature), inside)
            shifted = tl.div_rn(x, temperature) - best
            weights = tl.where(best > float("-inf"), tl.exp(shifted), 0.0)
            tl.store(sums_ptr + mine, tl.sum(weights))
        tl.store(bests_ptr + mine, best)
        tl.store(places_ptr + mine, first)


@triton.jit
def _choose(
    logits_ptr, stride, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, points_ptr, ids_ptr,
    bests_ptr, places_ptr, sums_ptr, groups_ptr, hot_ptr, listed_ptr, listed_ids_ptr,
    vocab, tiles, groups,
    TILE: tl.constexpr, TILES: tl.constexpr, NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """Program row: from what `_scan` found to the id."""
    row = tl.program_id(0).to(tl.int64)
    bests_ptr += row * tiles
    best, id = _join(bests_ptr, places_ptr + row * tiles, tiles, TILES)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    if (temperature > 0.0) & (id >= 0):
        if (best > float("-inf")) & (best < float("inf")):
            id = sampled(
                logits_ptr + row * stride, best, temperature,
                tl.load(top_k_ptr + row).to(tl.float32), tl.load(top_p_ptr + row).to(tl.float32),
                tl.load(min_p_ptr + row).to(tl.float32),
                tl.load(points_ptr + row).to(tl.float64),
                bests_ptr, sums_ptr + row * tiles, groups_ptr + row * groups,
                hot_ptr + row * groups, listed_ptr + row * LIST, listed_ids_ptr + row * LIST,
                vocab, tiles, groups,
                TILE, TILES, NUCLEUS, BLOCK, PART, GROUP, GROUPS, LIST,
            )  # fmt: skip
        else:
            id = -1
    tl.store(ids_ptr + row, id.to(tl.int64))


def best_rows(logits_BV: Tensor, *, scratch: Scratch | None = None) -> Tensor:
    """The best logit of each row, -1 where one is NaN. Twin: `reference_sample.best_rows`."""
    ids_B, _ = _scanned(logits_BV, None, scratch)
    return ids_B


def sample_rows(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    points_B: Tensor,
    *,
    scratch: Scratch | None = None,
) -> Tensor:
    """One token for each row, -1 where one is NaN. Twin: `reference_sample.sample_rows`.

    Logits bf16, fp16 or fp32, each row dense; rows that begin at multiples of 16 bytes are read
    faster. Options of any dtype, on the device, dense. At most 2**24 tokens are known.
    """
    options = (top_k_B, top_p_B, min_p_B, points_B)
    assert all(option.is_contiguous() for option in (temperature_B, *options)), "options lie dense"
    ids_B, scratch = _scanned(logits_BV, temperature_B, scratch)
    cut, vocab = scratch.cut, logits_BV.shape[1]
    tiles, groups = scratch.bests.shape[1], scratch.groups.shape[1]
    _choose[(len(logits_BV),)](
        logits_BV, logits_BV.stride(0), temperature_B, *options, ids_B,
        scratch.bests, scratch.places, scratch.sums, scratch.groups, scratch.hot,
        scratch.listed, scratch.listed_ids, vocab, tiles, groups,
        TILE=cut.tile, TILES=triton.next_power_of_2(tiles), NUCLEUS=min(NUCLEUS, cut.list // 4),
        BLOCK=cut.block, PART=cut.part, GROUP=cut.group, GROUPS=triton.next_power_of_2(groups),
        LIST=cut.list, num_warps=cut.warps,
    )  # fmt: skip
    return ids_B


def _scanned(
    logits_BV: Tensor, temperature_B: Tensor | None, scratch: Scratch | None
) -> tuple[Tensor, Scratch]:
    """Launch the scan; without temperatures its ids are the answer."""
    rows, vocab = logits_BV.shape
    greedy = temperature_B is None
    scratch = scratch or Scratch.reserve(rows, vocab, logits_BV.device, greedy=greedy)
    cut, tiles, groups = scratch.cut, scratch.bests.shape[1], scratch.groups.shape[1]
    assert logits_BV.stride(1) == 1, "the logits of a row lie side by side"
    assert rows <= len(scratch.bests), "there is room for all rows"
    assert tiles == triton.cdiv(vocab, cut.tile), "the scratch is for this vocabulary"
    assert greedy or groups == triton.cdiv(vocab, cut.group), "the scratch has lists"
    ids_B = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    _scan[(rows, tiles)](
        logits_BV, logits_BV.stride(0), temperature_B, ids_B,
        scratch.bests, scratch.places, scratch.sums, scratch.groups, scratch.arrived,
        vocab, tiles, groups,
        GREEDY=greedy, TILE=cut.tile, GROUP=cut.group,
        TILES=triton.next_power_of_2(tiles), num_warps=cut.tile_warps,
    )  # fmt: skip
    return ids_B, scratch
