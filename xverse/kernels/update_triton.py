"""GRADIENTS -> WEIGHTS, IN ONE PASS. AdamW on a GPU: all it needs is read once and written once."""

import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.reference_train import AdamW

BLOCK = 2048


def adamw(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rule: AdamW,
    copy: Tensor | None = None,
) -> None:
    """Twin: `reference_train.adamw`; weight and moments in fp32 or, rounded at random, in bf16."""
    parts = (weight, gradient, first, second, weight if copy is None else copy)
    assert all(part.is_contiguous() and part.numel() == weight.numel() for part in parts)
    size = weight.numel()
    if not size:  # a rank may hold nothing of a small weight
        return
    _adamw[(triton.cdiv(size, BLOCK),)](
        *parts,
        size,
        rule.scale,
        1 - rule.beta1,
        rule.beta2,
        1 - rule.beta2,
        1 / (1 - rule.beta2**rule.step),
        rule.epsilon,
        1 - rule.rate * rule.decay,
        rule.rate / (1 - rule.beta1**rule.step),
        *(((rule.seed + number) * 0x9E3779B1 & 0xFFFFFFFF) + rule.start for number in range(3)),
        COPY=copy is not None,
        BLOCK=BLOCK,
    )


@triton.jit(do_not_specialize=["seed_w", "seed_1", "seed_2"])
def _adamw(
    weight,
    gradient,
    first,
    second,
    copy,
    size,
    scale,
    share1,
    keep2,
    share2,
    unbias2,
    epsilon,
    keep,
    step_size,
    seed_w: tl.int64,
    seed_1: tl.int64,
    seed_2: tl.int64,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gradient + at, inside, 0.0).to(tl.float32) * scale
    m = tl.load(first + at, inside, 0.0).to(tl.float32)
    m += (g - m) * share1
    v = tl.load(second + at, inside, 0.0).to(tl.float32) * keep2 + share2 * g * g
    w = tl.load(weight + at, inside, 0.0).to(tl.float32) * keep
    w -= step_size * (m / (tl.sqrt(v * unbias2) + epsilon))
    _store(weight, at, inside, w, seed_w)
    _store(first, at, inside, m, seed_1)
    _store(second, at, inside, v, seed_2)
    if COPY:
        tl.store(copy + at, w.to(copy.dtype.element_ty), inside)


@triton.jit
def _store(pointer, at, inside, x, seed):
    """fp32 as it is; bf16 rounded at random by a hash of the place, as the reference does."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = (at + seed).to(tl.uint32)
        bits = (bits ^ (bits >> 16)) * 0x7FEB352D
        bits = (bits ^ (bits >> 15)) * 0x846CA68B
        bits = bits ^ (bits >> 16)
        whole = (x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
        tl.store(pointer + at, whole.to(tl.float32, bitcast=True).to(tl.bfloat16), inside)
    else:
        tl.store(pointer + at, x, inside)
