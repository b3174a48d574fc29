"""NUMBERS -> PACKED BLOCKS. The GGUF kinds we write, each the inverse of its reading.

The layouts are those of `gguf_blocks`. Q8_0, Q5_0 and Q4_0 round as ggml's reference does, bit for
bit. The K kinds leave the choice of scales to the packer; here it is the one of least squared
error among a few stretches of each group's range, refitted by least squares.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# How far beyond (or short of) the last integer a group's largest value may fall.
STRETCHES_Q4_K = tuple(0.15 * step for step in range(-7, 8))
STRETCHES_Q6_K = tuple(step / 2 for step in range(-4, 5))
EMPTY = 1e-30  # a range below it is taken for none


def pack(kind: str, values: Tensor) -> Tensor:
    """fp32 [blocks, elements of one] as uint8 [blocks, bytes of one] of the kind named `kind`."""
    return PACKERS[kind](values)


def _f32(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _f16(x: Tensor) -> Tensor:
    return x.half().contiguous().view(torch.uint8)


def _bf16(x: Tensor) -> Tensor:
    return x.bfloat16().contiguous().view(torch.uint8)


def _q8_0(x: Tensor) -> Tensor:
    """d = max|x| / 127; q is rounded half away from zero."""
    scale = x.abs().amax(dim=1, keepdim=True) / x.new_tensor(127.0)
    steps = x * _inverse(scale)
    size = steps.abs()
    whole = size.floor()
    rounded = (whole + (size - whole >= 0.5)).copysign(steps)
    return torch.cat((_half(scale), rounded.to(torch.int8).view(torch.uint8)), dim=1)


def _q4_0(x: Tensor) -> Tensor:
    scale, q = _from_the_largest(x, 8)
    return torch.cat((_half(scale), _nibbles(q, 16)), dim=1)


def _q5_0(x: Tensor) -> Tensor:
    scale, q = _from_the_largest(x, 16)
    fifth = ((q >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8)).sum(2)
    parts = (_half(scale), fifth.to(torch.uint8), _nibbles(q & 15, 16))
    return torch.cat(parts, dim=1)


def _from_the_largest(x: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """ggml's rule for Q4_0 and Q5_0: the value of largest size is the integer -zero exactly."""
    largest = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    scale = largest / x.new_tensor(float(-zero))
    q = (x * _inverse(scale) + (zero + 0.5)).trunc().clamp(0, 2 * zero - 1)
    return scale, q.to(torch.uint8)


def _q4_k(x: Tensor) -> Tensor:
    """Eight groups of 32, w = d * scale * q - dmin * minimum; scale and minimum have six bits."""
    groups = x.view(-1, 8, 32)
    scale, minimum = _affine(groups, 15, STRETCHES_Q4_K)
    d, scale6 = _six_bits(scale)
    step = d * scale6
    # A range too small beside the block's others is one number: its mean.
    minimum = torch.where(step == 0, (-groups.mean(-1)).clamp(min=0), minimum)
    dmin, minimum6 = _six_bits(minimum)
    offset = dmin * minimum6
    q = ((groups + offset[..., None]) * _inverse(step)[..., None]).round_().clamp_(0, 15)
    s, m = scale6.to(torch.uint8), minimum6.to(torch.uint8)
    first, second = s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6
    third = s[:, 4:] & 15 | m[:, 4:] << 4
    packed = _nibbles(q.to(torch.uint8).view(-1, 256), 32)
    return torch.cat((_half(d), _half(dmin), first, second, third, packed), dim=1)


def _q6_k(x: Tensor) -> Tensor:
    """Sixteen groups of 16, w = d * scale * q; scale is an int8, q is in -32..31."""
    groups = x.view(-1, 16, 16)
    wanted = _symmetric(groups, 32, STRETCHES_Q6_K)
    largest = wanted.gather(1, wanted.abs().argmax(dim=1, keepdim=True))
    d = (largest / -128.0).half().float()
    scale = (wanted * _inverse(d)).round_().clamp_(-128, 127)
    q = (groups * _inverse(d * scale)[..., None]).round_().clamp_(-32, 31) + 32
    q = q.to(torch.uint8).view(-1, 2, 4, 32)
    upper = (q >> 4 << torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]).sum(2).to(torch.uint8)
    lower = _nibbles((q & 15).view(-1, 256), 64)
    parts = (lower, upper.flatten(1), scale.to(torch.int8).view(torch.uint8), _half(d))
    return torch.cat(parts, dim=1)


def _affine(groups: Tensor, top: int, stretches: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Scale and minimum, both >= 0, that fit w = scale * q - minimum, q in 0..top, best."""
    low = groups.amin(-1, keepdim=True).clamp_(max=0)
    span = groups.amax(-1, keepdim=True) - low
    sum_x, count = groups.sum(-1), groups.shape[-1]
    best = (torch.zeros_like(sum_x), -low[..., 0])
    least = torch.full_like(sum_x, torch.inf)
    for stretch in stretches:
        q = ((groups - low) * ((top + stretch) * _inverse(span))).round_().clamp_(0, top)
        sum_q, sum_qq, sum_qx = q.sum(-1), q.square().sum(-1), (q * groups).sum(-1)
        spread = count * sum_qq - sum_q.square()
        scale = (count * sum_qx - sum_q * sum_x) * _inverse(spread)
        base = (sum_x - scale * sum_q) / count
        # A minimum can't be negative: where it would be, the line goes through zero.
        upward = base > 0
        scale = torch.where(upward, sum_qx * _inverse(sum_qq), scale)
        base = base.clamp(max=0)
        error = (q * scale[..., None] + base[..., None]).sub_(groups).square_().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, -base, best[1]))
    return best


def _symmetric(groups: Tensor, top: int, stretches: tuple[float, ...]) -> Tensor:
    """The scale that fits w = scale * q, q in -top..top-1, best; its sign is free."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.zeros_like(largest[..., 0])
    most = torch.zeros_like(best)
    for stretch in stretches:
        q = (groups * (-(top + stretch) * _inverse(largest))).round_().clamp_(-top, top - 1)
        product, size = (q * groups).sum(-1), q.square().sum(-1)
        scale = product * _inverse(size)
        explained = scale * product  # the squares that this scale takes off the error
        better = explained > most
        most = torch.where(better, explained, most)
        best = torch.where(better, scale, best)
    return best


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers >= 0 [blocks, 8] as d * n: d is what f16 holds [blocks, 1], n is in 0..63."""
    d = (values.amax(dim=1, keepdim=True) / 63).half().float()
    return d, (values * _inverse(d)).round_().clamp_(0, 63)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is as good as none."""
    return torch.where(x.abs() > EMPTY, x.reciprocal(), 0.0)


def _half(numbers: Tensor) -> Tensor:
    """fp32 [blocks, 1] as the two bytes of an f16."""
    return numbers.half().contiguous().view(torch.uint8)


def _nibbles(q: Tensor, group: int) -> Tensor:
    """Of every 2 * `group` numbers 0..15, the first half in the low bits, the rest in the high."""
    low, high = q.view(len(q), -1, 2, group).unbind(2)
    return (low | high << 4).flatten(1)


PACKERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}
