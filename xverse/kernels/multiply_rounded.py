"""X, W IN 8 BITS -> X @ W.T. Products of many rows with fp8 weights, x rounded by a scale a row.

FP8 tensor cores multiply twice as fast as bf16 ones. Only where rows are many: with few, reading
the weights is what takes the time, and x may stay as it is.
"""

import torch
from torch import Tensor

from xverse.kernels.reference_few_bits import FewBits, Form
from xverse.kernels.reference_steps import RoundedRows

# Below, a product is bound by reading weights, which 8 bits already halve, and x need not be
# rounded: on an H200 1,320 TFLOP/s and 4.3 TB/s meet at 154 rows.
LEAST_ROWS = 256


def multiply_rounded(x: RoundedRows, steps: FewBits) -> Tensor:
    """x @ w.T, [T, N] in the dtype of w's scales, by cuBLAS. Twin:
    `reference_steps.multiply_rounded`.

    Scales belong to rows of x and of w, and go onto the sums. These are fp32, of which the tensor
    cores keep fewer bits between their own steps (`use_fast_accum`): 14 of the mantissa, where a
    product of two e4m3 numbers has 7.
    """
    scale_1N = steps.scale.float()[None]
    return torch._scaled_mm(
        x.values, steps.weight.t(), scale_a=x.scale[:, None], scale_b=scale_1N,
        out_dtype=steps.scale.dtype, use_fast_accum=True,
    )  # fmt: skip


def why_not(form: Form) -> str:
    """Why a weight of this form is not multiplied in 8 bits; empty where it is."""
    if form.kind != "fp8":
        return f"its weights are {form.kind}, and 8-bit tensor cores take fp8"
    if form.outputs % 16 or form.inputs % 16:
        return f"{form.outputs} x {form.inputs} are no multiples of 16"
    return ""
