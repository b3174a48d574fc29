"""X, STEPS -> PRODUCTS, plainly. Quantized weights: what they are worth, and products with them.

The specification of the kernels that serve many rows with weights of 4 and 8 bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from xverse.kernels.reference import FP8_LARGEST, SCALE_LEAST, Norm, add_norm, swiglu_joined
from xverse.kernels.reference_few_bits import FewBits, dequantize, unpack_nibbles

FP8 = torch.float8_e4m3fn


class RoundedRows(NamedTuple):
    """Rows of x in 8 bits: x is about values * scale. values [T, D] e4m3, scale [T] fp32."""

    values: Tensor
    scale: Tensor


def multiply_steps(x_TD: Tensor, steps: FewBits) -> Tensor:
    """x @ w.T, [..., D] -> [..., N] in x's dtype."""
    if steps.scale.dim() == 1 and steps.zero is None:
        # Steps are exact in 16 bits, and their scale is better applied to the sum.
        weight = steps.weight
        exact = unpack_nibbles(weight) if weight.dtype == torch.uint8 else weight
        return functional.linear(x_TD, exact.to(x_TD.dtype)) * steps.scale
    weight_ND = dequantize(steps).to(steps.scale.dtype)
    return functional.linear(x_TD, weight_ND.to(x_TD.dtype))


def widen(steps: FewBits, out_ND: Tensor) -> Tensor:
    """(q - zero) * scale, rounded to the dtype of the scales, in `out`."""
    return out_ND.copy_(dequantize(steps).to(steps.scale.dtype))


def round_rows(x_TD: Tensor) -> RoundedRows:
    """Each row in e4m3, its largest element as 448; a row of zeros stays one."""
    x = x_TD.float()
    scale_T = (x.abs().amax(-1) * (1 / FP8_LARGEST)).clamp_min(SCALE_LEAST)
    return RoundedRows((x * (1 / scale_T)[:, None]).to(FP8), scale_T)


def multiply_rounded(x: RoundedRows, steps: FewBits) -> Tensor:
    """x @ w.T of x and w in 8 bits, sums in fp32 and then both scales; in the dtype of w's."""
    sums_TN = x.values.float() @ steps.weight.float().T
    return (sums_TN * x.scale[:, None] * steps.scale.float()).to(steps.scale.dtype)


def add_norm_rounded(
    x_TD: Tensor, residual_TD: Tensor | None, norm: Norm
) -> tuple[Tensor, RoundedRows]:
    """x + residual, and its norm in 8 bits."""
    sum_TD, normed_TD = add_norm(x_TD, residual_TD, norm)
    return sum_TD, round_rows(normed_TD)


def swiglu_rounded(joined_TF2: Tensor) -> RoundedRows:
    """silu(gate) * up of [T, 2F], whose first half is gate, in 8 bits."""
    return round_rows(swiglu_joined(joined_TF2))
