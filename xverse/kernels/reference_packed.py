"""THE SPECIFICATION of products with integer weights on a CPU, as plain PyTorch."""

import torch
from torch import Tensor

from xverse.kernels.reference import Norm, rms_norm, swiglu_joined


def round_rows(x_TD: Tensor, group: int, terms: int) -> tuple[Tensor, Tensor]:
    """x in steps from -127 to 127, and a scale for each group of inputs: [T, G, S] fp64, [T, G].

    One term: steps are whole. Two: what is left is rounded to 254ths of a step. A group's largest
    becomes 127; one that is not finite gives NaN as its scale.
    """
    groups = x_TD.float().unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1)
    # Divided by tensors: PyTorch would multiply by the inverse of a number.
    inverse = torch.where(largest < 1e-30, 0, torch.full_like(largest, 127) / largest)
    exact = groups * inverse[..., None]
    steps = exact.round().double()
    if terms == 2:
        steps = steps + ((exact - exact.round()) * 254).round().double() / 254
    sound = largest.isfinite()
    scale = torch.where(sound, largest / torch.full_like(largest, 127), torch.nan)
    return torch.where(sound[..., None], steps, 0), scale


def multiply_packed(
    x_TD: Tensor,
    steps_ND: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor | None = None,
    bias_N: Tensor | None = None,
    *,
    group: int,
    terms: int,
    norm: Norm | None = None,
    residual_TN: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """x @ w.T + bias with w = (steps - zero) * scale, x rounded by `round_rows` first.

    `norm`: RMSNorm of x before that. `gated`: the outputs are gates, then ups, and go through
    SwiGLU. `residual` is added. `terms` is 1 for weights of 4 bits, 2 of 8. `group` divides the
    scales' own groups.
    """
    if norm is not None:
        x_TD = rms_norm(x_TD, norm.weight_D, norm.eps, weight_in_fp32=norm.weight_in_fp32)
    rounded, x_scale = round_rows(x_TD, group, terms)
    steps = steps_ND.double().unflatten(-1, (scale_NG.shape[-1], -1))
    if zero_NG is not None:
        steps = steps - zero_NG.double()[..., None]
    weight_ND = (steps * scale_NG.double()[..., None]).flatten(-2)
    y = (rounded * x_scale.double()[..., None]).flatten(-2) @ weight_ND.T
    if bias_N is not None:
        y = y + bias_N.double()
    y_TN = y.to(x_TD.dtype)
    if gated:
        y_TN = swiglu_joined(y_TN)
    return y_TN if residual_TN is None else residual_TN + y_TN
