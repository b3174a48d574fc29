"""NUMBERS -> INTEGERS AND SCALES. How a matrix is rounded to a scheme."""

from typing import NamedTuple

import torch
from torch import Tensor

from xverse.quant.scheme import Scheme

TINY = 1e-30  # in the place of a scale of zero, that of a row of zeros


class Rounded(NamedTuple):
    """w ~ (steps - zero) * scale. `steps` [..., N, D]: int8, or float8_e4m3fn for fp8.

    `scale`, and `zero` in the same shape (int8; None where symmetric): [..., N] for a scheme of
    rows, [..., N, G] for one of groups.
    """

    steps: Tensor
    scale: Tensor
    zero: Tensor | None


def nearest(weight: Tensor, scheme: Scheme) -> Rounded:
    """The nearest numbers of the scheme, with scales that just hold the largest of each group.

    Scales come in the weight's dtype. Rows of zeros stay zeros.
    """
    groups = grouped(weight.float(), scheme)
    # A tensor and not a number: dividing by a number, CUDA multiplies by its inverse, and
    # the same weights would round differently there.
    if scheme.symmetric:
        reach = groups.new_tensor(scheme.largest if scheme.group_size is None else _middle(scheme))
        scale, zero = groups.abs().amax(-1) / reach, None
    else:
        scale, zero = between(groups, groups.amin(-1), groups.amax(-1), scheme)
    stored = scale.to(weight.dtype)
    # The published scheme divides by the scale as it was before it was stored.
    divisor = scale if scheme.group_size is None and scheme.symmetric else stored.float()
    return Rounded(to_steps(groups, divisor, zero, scheme), *_shaped(stored, zero, scheme))


def between(groups: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero of asymmetric groups that reach from `low` to `high`, 0 always among them."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / groups.new_tensor(scheme.largest - scheme.smallest)
    zero = scheme.smallest - (low / scale.clamp(min=TINY)).round()
    return scale, zero.clamp(scheme.smallest, scheme.largest).to(torch.int8)


def to_steps(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Groups [..., N, G, g] (of one scale each, [..., N, G]) as steps [..., N, D]."""
    steps = groups / scale.clamp(min=TINY)[..., None]
    if scheme.kind == "float":
        limited = steps.clamp(scheme.smallest, scheme.largest)
        return limited.to(torch.float8_e4m3fn).flatten(-2)
    steps = steps.round()
    if zero is not None:
        steps = steps + zero[..., None]
    return steps.clamp(scheme.smallest, scheme.largest).to(torch.int8).flatten(-2)


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[..., N, D] as [..., N, G, g]; a scheme of rows has one group."""
    return weight.unflatten(-1, (-1, scheme.group_size or weight.shape[-1]))


def _shaped(scale: Tensor, zero: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    if scheme.group_size is not None:
        return scale, zero
    return scale[..., 0], None if zero is None else zero[..., 0]


def _middle(scheme: Scheme) -> float:
    """How far symmetric groups reach, in steps: half a step beyond the largest on either side."""
    return scheme.largest + 0.5
