"""SCORES -> PLACES. Searches by one program: thresholds by weight, lists, places by running sums.

A source is a row of logits that a temperature divides (WHOLE), or a list of scores. The weight of
a score is its exponential relative to the best one, or 1 where COUNTING. Thresholds are searched as
keys, int64 numbers in the order of the fp32 numbers they stand for, so that a search ends.
"""

import triton
import triton.language as tl

# Searches begin with even cuts of the scores, which suits them, and end with cuts of the keys.
EVEN_STEPS = tl.constexpr(8)
EVEN_WIDTH = tl.constexpr(65536.0)
LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def ordered(x):
    """The key of an fp32 number."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def number_of(key):
    """The fp32 number of a key."""
    bits = key.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _scores(at, inside, temperature, WHOLE: tl.constexpr):
    """The scores there, minus infinity outside."""
    x = tl.load(at, inside, float("-inf")).to(tl.float32)
    if WHOLE:
        x = tl.div_rn(x, temperature)  # as exact as the reference, since ties are to stay ties
    return x


@triton.jit
def _weights(x, best, COUNTING: tl.constexpr):
    if COUNTING:
        return tl.full(x.shape, 1.0, tl.float32)
    else:
        return tl.exp(x - best)


@triton.jit
def weigh(
    source, count, temperature, best, floor,
    COUNTING: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight of all scores from `floor` on, which is finite."""
    sums = tl.zeros([BLOCK], tl.float32)
    offset = tl.arange(0, BLOCK)
    start = 0
    while start < count:
        x = _scores(source + start + offset, offset < count - start, temperature, WHOLE)
        sums += tl.where(x >= floor, _weights(x, best, COUNTING), 0.0)
        start += BLOCK
    return tl.sum(sums, 0)


@triton.jit
def narrow(
    source, count, temperature, best, target, enough, low, high, from_low, few,
    COUNTING: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Raise the key `low` and lower `high`, while the weight from `low` on reaches `target`, and
    the weight from `high` on (0 at first) does not.

    Ends where at most `few` scores lie between them, or `from_low`, the weight from `low` on, is
    within `enough`, or they are neighbours. -> low, high, from_low, weight from `high` on.
    """
    offset = tl.arange(0, BLOCK)
    above = from_low * 0.0
    inside = above + float("inf")
    step = 0
    while (from_low > enough) & (inside > few) & (high - low > 1):
        gap = high - low
        a, b, c = low + (gap >> 2), low + (gap >> 1), low + (gap * 3 >> 2)
        if step < EVEN_STEPS:
            lowest = number_of(low)
            width = number_of(high) - lowest
            if width < EVEN_WIDTH:
                a = ordered(lowest + 0.25 * width)
                b = ordered(lowest + 0.5 * width)
                c = ordered(lowest + 0.75 * width)
        a = tl.minimum(tl.maximum(a, low + 1), high - 1)
        b = tl.minimum(tl.maximum(b, low + 1), high - 1)
        c = tl.minimum(tl.maximum(c, low + 1), high - 1)
        from_a, from_b, from_c = number_of(a), number_of(b), number_of(c)
        sums_a = tl.zeros([BLOCK], tl.float32)
        sums_b = tl.zeros([BLOCK], tl.float32)
        sums_c = tl.zeros([BLOCK], tl.float32)
        start = 0
        while start < count:
            x = _scores(source + start + offset, offset < count - start, temperature, WHOLE)
            weights = _weights(x, best, COUNTING)
            sums_a += tl.where(x >= from_a, weights, 0.0)
            sums_b += tl.where(x >= from_b, weights, 0.0)
            sums_c += tl.where(x >= from_c, weights, 0.0)
            start += BLOCK
        weight_a, weight_b, weight_c = tl.sum(sums_a, 0), tl.sum(sums_b, 0), tl.sum(sums_c, 0)
        over_a, over_b, over_c = weight_a >= target, weight_b >= target, weight_c >= target
        low = tl.where(over_c, c, tl.where(over_b, b, tl.where(over_a, a, low)))
        high = tl.where(over_c, high, tl.where(over_b, c, tl.where(over_a, b, a)))
        from_low = tl.where(
            over_c, weight_c, tl.where(over_b, weight_b, tl.where(over_a, weight_a, from_low))
        )
        above = tl.where(
            over_c, above, tl.where(over_b, weight_c, tl.where(over_a, weight_b, weight_a))
        )
        inside = from_low - above
        if not COUNTING:  # none between them weighs less than `low`
            inside /= tl.maximum(tl.exp(number_of(low) - best), 1e-37)
        step += 1
    return low, high, from_low, above


@triton.jit
def gather(
    logits, groups_ptr, hot_ptr, listed_ptr, ids_ptr, vocab, groups, temperature, low, high,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """List the scores in [low, high) and their ids, in the order of ids. -> how many there are.

    `groups_ptr` has the best score of each group of GROUP tokens: others are not looked at. Ends
    soon after LIST, for which there is room.
    """
    tl.debug_barrier()  # who reads an earlier list has done so
    group = tl.arange(0, GROUPS)
    is_hot = tl.load(groups_ptr + group, group < groups, float("-inf")) >= low
    number = tl.sum(is_hot.to(tl.int32), 0)
    tl.store(hot_ptr + tl.cumsum(is_hot.to(tl.int32), 0) - 1, group, is_hot)
    tl.debug_barrier()
    found = 0
    start = 0
    while (start < number) & (found <= LIST):
        entry = tl.arange(0, BLOCK)
        which = start + entry // GROUP
        place = tl.load(hot_ptr + which, which < number, 0) * GROUP + entry % GROUP
        live = (which < number) & (place < vocab)
        x = _scores(logits + place, live, temperature, True)
        inside = live & (x >= low) & (x < high)
        at = found + tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(listed_ptr + at, x, inside & (at < LIST))
        tl.store(ids_ptr + at, place, inside & (at < LIST))
        found += tl.sum(inside.to(tl.int32), 0)
        start += BLOCK // GROUP
    tl.debug_barrier()
    return found


@triton.jit
def _kept(
    source, start, last, temperature, best, threshold, cut, min_p,
    TIES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights of the block from `start`: of what is above the threshold, or equal to it at `cut`
    or later; and at least `min_p`. With TIES: 1 for each that equals the threshold."""
    offset = tl.arange(0, BLOCK)
    inside = offset < last - start
    x = _scores(source + start + offset, inside, temperature, WHOLE)
    if TIES:
        return ((x == threshold) & inside).to(tl.float32)
    else:
        weights = tl.exp(x - best)
        kept = (x > threshold) | ((x == threshold) & (offset >= cut - start))
        return tl.where(kept & (weights >= min_p), weights, 0.0)


@triton.jit
def walk(
    source, start, last, temperature, best, threshold, cut, min_p, running, target,
    TIES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add weights, block by block, to the fp64 `running` until it exceeds `target`.

    -> the last block that weighed anything, the sum before it, the sum after it.
    """
    found = start
    before = running
    while (start < last) & (running <= target):
        weights = _kept(
            source, start, last, temperature, best, threshold, cut, min_p, TIES, WHOLE, BLOCK
        )
        weight = tl.sum(weights, 0).to(tl.float64)
        found = tl.where(weight > 0, start, found)
        before = tl.where(weight > 0, running, before)
        running += weight
        start += BLOCK
    return found, before, running


@triton.jit
def find(
    source, start, last, temperature, best, threshold, cut, min_p, running, target,
    TIES: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first place from `start` on where the running sum of weights exceeds `target`; if none
    does, by rounding, the last one with a weight."""
    block, before, _ = walk(
        source, start, last, temperature, best, threshold, cut, min_p, running, target,
        TIES, WHOLE, BLOCK,
    )  # fmt: skip
    place = block + tl.arange(0, BLOCK)
    weights = _kept(
        source, block, last, temperature, best, threshold, cut, min_p, TIES, WHOLE, BLOCK
    )
    exceeds = (weights > 0.0) & (before + tl.cumsum(weights, 0).to(tl.float64) > target)
    first = tl.min(tl.where(exceeds, place, 0x7FFFFFFF), 0)
    final = tl.max(tl.where(weights > 0.0, place, block), 0)
    return tl.minimum(first, final)
