"""X, W -> X @ W.T IN 8 BITS. Linear layers of training: values in e4m3, gradients in e5m2."""

from typing import Any

import torch
from torch import Tensor

from xverse.kernels.reference import FP8_LARGEST
from xverse.kernels.reference_train import FP8, quantize_tensor

GRADIENT = torch.float8_e5m2
GRADIENT_LARGEST = 57344.0


def linear_fp8(x_TD: Tensor, weight_ND: Tensor) -> Tensor:
    """x @ weight.T in x's dtype; forward and both backward products in FP8, one scale a tensor.

    Twin: `reference_train.multiply_fp8`. T, N and D are multiples of 16 on a GPU.
    """
    y_TN: Tensor = _Linear.apply(x_TD, weight_ND)  # type: ignore[no-untyped-call]
    return y_TN


class _Linear(torch.autograd.Function):
    """Keeps x in 8 bits for the backward pass, half of what a plain layer keeps."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ND: Tensor) -> Tensor:
        x_fp8, x_scale = quantize_tensor(x_TD, FP8, FP8_LARGEST)
        w_fp8, w_scale = quantize_tensor(weight_ND, FP8, FP8_LARGEST)
        ctx.save_for_backward(x_fp8, x_scale, weight_ND, w_scale)
        return _product(x_fp8, w_fp8, x_scale * w_scale, x_TD.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, upstream_TN: Tensor) -> tuple[Tensor, Tensor]:
        x_fp8, x_scale, weight_ND, w_scale = ctx.saved_tensors
        g_fp8, g_scale = quantize_tensor(upstream_TN, GRADIENT, GRADIENT_LARGEST)
        # The product reads both operands along their rows; these two are turned for it.
        w_fp8 = (weight_ND.float() / w_scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8)
        x_gradient = _product(g_fp8, _turned(w_fp8), g_scale * w_scale, upstream_TN.dtype)
        w_gradient = _product(_turned(g_fp8), _turned(x_fp8), g_scale * x_scale, upstream_TN.dtype)
        return x_gradient, w_gradient.to(weight_ND.dtype)


def _product(
    x_TD: Tensor, w_ND: Tensor, scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """x @ w.T * scale of 8-bit operands, summed in fp32; on a CPU the same numbers in fp32.

    `fast`: summed in Hopper's accumulators all along, of about 14 bits, and not carried over into
    fp32 now and then. Values bear it, gradients less so.
    """
    if x_TD.is_cuda:
        one = torch.ones_like(scale)
        return torch._scaled_mm(
            x_TD, w_ND.t(), scale_a=scale, scale_b=one, out_dtype=dtype, use_fast_accum=fast
        )
    return ((x_TD.float() @ w_ND.float().T) * scale).to(dtype)


def _turned(x: Tensor) -> Tensor:
    """The transpose, laid out anew."""
    return x.t().contiguous()
