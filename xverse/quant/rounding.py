"""NUMBERS -> INTEGERS AND SCALES. How a matrix is rounded to a scheme."""

from typing import NamedTuple

import torch
from torch import Tensor

from xverse.quant.scheme import Scheme

TINY = 1e-30  # in the place of a scale of zero, that of a row of zeros
CLIPS = [1.0, *(1.08 - 0.03 * step for step in range(22))]  # down to 0.45; 1.0 wins where equal
CHUNK = 2**21  # weights that are rounded at a time: temporaries of 8 MB stay near the cores


class Rounded(NamedTuple):
    """w ~ (steps - zero) * scale. `steps` [..., N, D]: int8, or float8_e4m3fn for fp8.

    `scale`, and `zero` in the same shape (int8; None where symmetric): [..., N] for a scheme of
    rows, [..., N, G] for one of groups.
    """

    steps: Tensor
    scale: Tensor
    zero: Tensor | None


def nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype | None = None) -> Rounded:
    """The nearest numbers of the scheme, with scales that just hold the largest of each group.

    Scales come in `dtype`, the weight's own if none is given. Rows of zeros stay zeros.
    """
    return _joined([_nearest(rows, scheme, dtype) for rows in _parts(weight)], scheme)


def _nearest(weight: Tensor, scheme: Scheme, dtype: torch.dtype | None) -> Rounded:
    groups = grouped(weight.float(), scheme)
    scale, zero = _reach(groups, scheme, 1.0)
    stored = scale.to(dtype or weight.dtype)
    # The published scheme divides by the scale as it was before it was stored.
    divisor = scale if scheme.group_size is None and scheme.symmetric else stored.float()
    return Rounded(to_steps(groups, divisor, zero, scheme), *_shaped(stored, zero, scheme))


def searched(
    weight: Tensor,
    scheme: Scheme,
    importance_D: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Rounded:
    """As `nearest`, with the scale of each group that leaves the least squared error.

    Reaches from CLIPS times the largest are tried: where few weights are large, cutting them off
    makes the steps finer for all others. `importance_D` [..., D] weighs the errors of columns, as
    the mean square of their inputs; all alike if none is given. A deterministic choice: of equal
    ones the first. fp8, whose steps grow with the numbers, has nothing to gain.
    """
    if scheme.kind == "float":
        return nearest(weight, scheme, dtype)
    parts = [
        _searched(rows, scheme, importance_D, dtype or weight.dtype) for rows in _parts(weight)
    ]
    return _joined(parts, scheme)


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Some rows after others, of which none knows of another."""
    return weight.split(max(1, CHUNK // weight.shape[-1]), dim=-2)


def _joined(parts: list[Rounded], scheme: Scheme) -> Rounded:
    rows = -1 if scheme.group_size is None else -2
    zeros = [part.zero for part in parts if part.zero is not None]
    return Rounded(
        torch.cat([part.steps for part in parts], dim=-2),
        torch.cat([part.scale for part in parts], dim=rows),
        torch.cat(zeros, dim=rows) if zeros else None,
    )


def _searched(
    weight: Tensor, scheme: Scheme, importance_D: Tensor | None, dtype: torch.dtype
) -> Rounded:
    groups = grouped(weight.float(), scheme)
    importance = None
    if importance_D is not None:
        importance = grouped(importance_D.float()[..., None, :], scheme)
    best: Tensor | None = None
    for clip in CLIPS:
        scale, zero = _reach(groups, scheme, clip)
        scale = scale.to(dtype).float()
        error = (_rounded(groups, scale, zero, scheme) - groups).square_()
        if importance is not None:
            error *= importance
        loss = error.sum(-1)
        if best is None:
            best, best_scale, best_zero = loss, scale, zero
            continue
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    steps = to_steps(groups, best_scale, best_zero, scheme)
    return Rounded(steps, *_shaped(best_scale.to(dtype), best_zero, scheme))


def _rounded(groups: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """What groups of integers are worth after rounding; in fp32, nothing packed."""
    shift = 0 if zero is None else zero[..., None]
    steps = (groups / scale.clamp(min=TINY)[..., None]).round_()
    steps = torch.clamp(steps + shift, scheme.smallest, scheme.largest) - shift
    return steps * scale[..., None]


def _reach(groups: Tensor, scheme: Scheme, clip: float) -> tuple[Tensor, Tensor | None]:
    """Scales, in fp32, with which the steps reach `clip` times as far as the weights do."""
    if not scheme.symmetric:
        return _between(clip * groups.amin(-1), clip * groups.amax(-1), scheme)
    # Groups may reach half a step beyond the largest on either side; published rows do not.
    reach = scheme.largest if scheme.group_size is None else scheme.largest + 0.5
    # A tensor and not a number: dividing by a number, CUDA multiplies by its inverse, and
    # the same weights would round differently there.
    return clip * groups.abs().amax(-1) / groups.new_tensor(reach), None


def _between(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero of asymmetric groups that reach from `low` to `high`, 0 always among them."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / low.new_tensor(scheme.largest - scheme.smallest)
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


def worth(rounded: Rounded, scheme: Scheme) -> Tensor:
    """The weights that were rounded to these, [..., N, D] in fp32."""
    steps, scale, zero = rounded
    if scheme.group_size is None:
        scale, zero = scale[..., None], None if zero is None else zero[..., None]
    groups = steps.float().unflatten(-1, (scale.shape[-1], -1))
    if zero is not None:
        groups = groups - zero[..., None]
    return (groups * scale[..., None].float()).flatten(-2)


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[..., N, D] as [..., N, G, g]; a scheme of rows has one group."""
    return weight.unflatten(-1, (-1, scheme.group_size or weight.shape[-1]))


def _shaped(scale: Tensor, zero: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    if scheme.group_size is not None:
        return scale, zero
    return scale[..., 0], None if zero is None else zero[..., 0]
