"""A ROW'S SCORES -> AN ID. Which tokens the options leave, and the one among them at the point.

A group of tokens whose best is below the k-th best of all groups has none of the k best tokens. So
the tokens that count are found in a few groups and listed, and thresholds are searched in the list.
A row too flat for it is searched as a whole, until what is between two cuts can be listed.
"""

import triton
import triton.language as tl

from xverse.kernels.search_triton import (
    LEAST,
    find,
    gather,
    narrow,
    number_of,
    ordered,
    walk,
    weigh,
)


@triton.jit
def _floor(groups_ptr, groups, best, wanted, BLOCK: tl.constexpr):
    """The key of a score that `wanted` groups reach, or somewhat more; all of them if need be."""
    finite = 0.0
    least = best
    start = 0
    while start < groups:
        at = start + tl.arange(0, BLOCK)
        x = tl.load(groups_ptr + at, at < groups, float("-inf"))
        finite += tl.sum((x > float("-inf")).to(tl.float32), 0)
        least = tl.minimum(least, tl.min(tl.where(x > float("-inf"), x, best), 0))
        start += BLOCK
    low = ordered(least)
    if finite < wanted:
        low = ordered(tl.full([], LEAST, tl.float32))
    low, _, _, _ = narrow(
        groups_ptr, groups, 1.0, best, wanted, 1.5 * wanted + 16.0, low, ordered(best) + 1,
        finite, 1.0, True, False, BLOCK,
    )  # fmt: skip
    return low


@triton.jit
def _threshold(
    source, count, temperature, best, target, low, from_low,
    logits, groups_ptr, hot, listed, listed_ids, vocab, groups,
    COUNTING: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """The key of the score at which the weight reaches `target`; or one that keeps the same.

    A row is first narrowed down to what can be listed. Where rounding lets more through, they weigh
    so little that the rest of them does not matter. -> key, the next key looked at, weight there.
    """
    high = ordered(best) + 1
    few = LIST // 2 if WHOLE else 1
    low, high, from_low, above = narrow(
        source, count, temperature, best, target, target, low, high, from_low, few,
        COUNTING, WHOLE, BLOCK,
    )  # fmt: skip
    if WHOLE:  # noqa: SIM102 (known when this is compiled, and the next is not)
        if (high - low > 1) & (from_low > target):
            inside = gather(
                logits, groups_ptr, hot, listed, listed_ids, vocab, groups, temperature,
                number_of(low), number_of(high), GROUP, GROUPS, BLOCK, LIST,
            )  # fmt: skip
            rest = target - above
            low, high, _, more = narrow(
                listed, tl.minimum(inside, LIST), 1.0, best, rest, rest, low, high,
                from_low - above, 1, COUNTING, False, PART,
            )  # fmt: skip
            above += more
    return low, high, above


@triton.jit
def _draw(
    source, count, temperature, best, total, low, top_k, top_p, min_p, point,
    logits, groups_ptr, hot, listed, listed_ids, vocab, groups,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """The place in the source that the options and the point choose. `total` is the weight of
    the row; what is below the key `low` is known not to count."""
    start = tl.full([], 0, tl.int32)
    cut = start
    zero = tl.full([], 0.0, tl.float64)
    if top_k > 0.0:
        if WHOLE:  # there `low` may be the least of all numbers, from which the way is long
            near = ordered(tl.maximum(best - 64.0, LEAST))
            if weigh(source, count, temperature, best, number_of(near), True, True, BLOCK) >= top_k:
                low = tl.maximum(low, near)
        from_low = weigh(source, count, temperature, best, number_of(low), True, WHOLE, BLOCK)
        low, _, _ = _threshold(
            source, count, temperature, best, top_k, low, from_low,
            logits, groups_ptr, hot, listed, listed_ids, vocab, groups,
            True, WHOLE, BLOCK, PART, GROUP, GROUPS, LIST,
        )  # fmt: skip
        total = weigh(source, count, temperature, best, number_of(low), False, WHOLE, BLOCK)
    if top_p < 1.0:
        target = tl.maximum(top_p * total, 1e-30)
        # Even if all tokens were that weak, they would not make up the share that is left out.
        weak = best + tl.log((1.0 - top_p) * total / vocab) - 0.01
        low = tl.maximum(low, ordered(tl.maximum(weak, LEAST)))
        low, high, above = _threshold(
            source, count, temperature, best, target, low, total,
            logits, groups_ptr, hot, listed, listed_ids, vocab, groups,
            False, WHOLE, BLOCK, PART, GROUP, GROUPS, LIST,
        )  # fmt: skip
        if high - low == 1:  # several may be equal there, of which the last ones are kept
            floor = number_of(low)
            needed = tl.maximum(tl.ceil((target - above) / tl.exp(floor - best)), 1.0)
            _, _, ties = walk(
                source, start, count, temperature, best, floor, 0, 0.0, zero, float("inf"),
                True, WHOLE, BLOCK,
            )  # fmt: skip
            if needed < ties:
                cut = find(
                    source, start, count, temperature, best, floor, 0, 0.0, zero,
                    ties - needed, True, WHOLE, BLOCK,
                )  # fmt: skip
    floor = number_of(low)
    _, _, kept = walk(
        source, start, count, temperature, best, floor, cut, min_p, zero, float("inf"),
        False, WHOLE, BLOCK,
    )  # fmt: skip
    return find(
        source, start, count, temperature, best, floor, cut, min_p, zero, point * kept,
        False, WHOLE, BLOCK,
    )  # fmt: skip


@triton.jit
def sampled(
    logits, best, temperature, top_k, top_p, min_p, point,
    bests_ptr, sums_ptr, groups_ptr, hot, listed, listed_ids, vocab, tiles, groups,
    TILE: tl.constexpr, TILES: tl.constexpr, NUCLEUS: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """The id of a row that is not greedy and has a finite best score."""
    best = tl.where(best == 0.0, 0.0, best)  # and not -0.0, whose key is another
    top_k = tl.where(top_k < vocab, top_k, 0.0)
    tile = tl.arange(0, TILES)
    sums = tl.load(sums_ptr + tile, tile < tiles, 0.0)
    bests = tl.load(bests_ptr + tile, tile < tiles, float("-inf"))
    sums = tl.where(sums > 0.0, sums * tl.exp(bests - best), 0.0)
    total = tl.sum(sums, 0)
    if (top_k > 0.0) | (top_p < 1.0) | (min_p > 0.0):
        low = ordered(tl.full([], LEAST, tl.float32))
        if (top_k > 0.0) | (top_p < 1.0):
            wanted = tl.where(top_k > 0.0, top_k, NUCLEUS)
            low = _floor(groups_ptr, groups, best, wanted, PART)
        else:  # a little lower than min_p says, for what rounding does
            low = ordered(tl.maximum(best + tl.log(min_p) - 0.01, LEAST))
        count = gather(
            logits, groups_ptr, hot, listed, listed_ids, vocab, groups, temperature,
            number_of(low), float("inf"), GROUP, GROUPS, BLOCK, LIST,
        )  # fmt: skip
        fits = count <= LIST
        if fits & (top_k == 0.0) & (top_p < 1.0):
            weight = weigh(listed, count, 1.0, best, number_of(low), False, False, PART)
            fits = weight >= top_p * total
        if fits:
            place = _draw(
                listed, count, 1.0, best, total, low, top_k, top_p, min_p, point,
                logits, groups_ptr, hot, listed, listed_ids, vocab, groups,
                False, PART, PART, GROUP, GROUPS, LIST,
            )  # fmt: skip
            id = tl.load(listed_ids + place)
        else:
            low = tl.where(top_k > 0.0, low, ordered(tl.full([], LEAST, tl.float32)))
            id = _draw(
                logits, vocab, temperature, best, total, low, top_k, top_p,
                min_p, point, logits, groups_ptr, hot, listed, listed_ids, vocab, groups,
                True, BLOCK, PART, GROUP, GROUPS, LIST,
            )  # fmt: skip
    else:
        # The tile that holds the point, and then the place in it.
        running = tl.cumsum(sums.to(tl.float64), 0)
        target = point * tl.sum(sums.to(tl.float64), 0)
        mine = tl.min(tl.where((running > target) & (sums > 0.0), tile, TILES), 0)
        mine = tl.minimum(mine, tl.max(tl.where(sums > 0.0, tile, 0), 0))
        before = tl.sum(tl.where(tile < mine, sums.to(tl.float64), 0.0), 0)
        id = find(
            logits, mine * TILE, tl.minimum(mine * TILE + TILE, vocab), temperature, best,
            float("-inf"), 0, 0.0, before, target, False, True, BLOCK,
        )  # fmt: skip
    return id
