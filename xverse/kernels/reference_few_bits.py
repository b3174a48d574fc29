"""THE SPECIFICATION, OF QUANTIZED WEIGHTS. What a decode step does with few bits, in plain PyTorch.

Letters as in `reference.py`; G groups of columns that share a scale.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xverse.kernels import reference
from xverse.kernels.reference import Norm

LEAST_GROUP = 32  # columns: what one thread unpacks of 4 bits, and the shortest product of tiles


class Form(NamedTuple):
    """What decides which kernel a matrix can have: whether it is "int4", "int8" or "fp8", the
    columns that share a scale (0: all of a row), and rows and columns."""

    kind: str
    group: int
    outputs: int
    inputs: int


class FewBits(NamedTuple):
    """A matrix [N, D] in few bits: w = (q - zero) * scale.

    `weight`: int8 [N, D]; uint8 [N, D/2], two columns a byte, the even one in its low half, each
    plus 8; or float8_e4m3fn [N, D]. `scale`: [N], or [N, G] of groups of D/G columns. `zero`: int8
    in the scale's shape, or None.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def bits(self) -> int:
        """Of a weight, 4 or 8."""
        return 4 if self.weight.dtype == torch.uint8 else 8

    @property
    def inputs(self) -> int:
        """D."""
        return self.weight.shape[1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 where all of a row do."""
        return 0 if self.scale.dim() == 1 else self.inputs // self.scale.shape[1]

    @property
    def form(self) -> Form:
        """What decides which kernel it can have."""
        kinds = {torch.uint8: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
        return Form(kinds[self.weight.dtype], self.group, len(self.weight), self.inputs)

    def rows(self, first: int, last: int) -> "FewBits":
        """Some of the rows; views."""
        zero = None if self.zero is None else self.zero[first:last]
        return FewBits(self.weight[first:last], self.scale[first:last], zero)


def why_not(weight: FewBits) -> str:
    """Why the kernels do not read a matrix; empty where they do."""
    if weight.inputs % LEAST_GROUP:
        return f"its {weight.inputs} inputs are not a multiple of {LEAST_GROUP}"
    if weight.group % LEAST_GROUP:
        return f"its groups of {weight.group} columns are not a multiple of {LEAST_GROUP}"
    return ""


def dequantize(weight: FewBits, rows_T: Tensor | None = None) -> Tensor:
    """(q - zero) * scale in fp32, of all rows or of those that are named. -> [N, D]."""
    packed, scale, zero = weight
    if rows_T is not None:
        packed, scale = packed[rows_T], scale[rows_T]
        zero = None if zero is None else zero[rows_T]
    if weight.bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
    groups = packed.float().unflatten(-1, (1 if scale.dim() == 1 else scale.shape[1], -1))
    if zero is not None:
        groups = groups - zero.float().view(*groups.shape[:2], 1)
    return (groups * scale.float().view(*groups.shape[:2], 1)).flatten(-2)


def multiply_rows(
    x_TD: Tensor,
    weight: FewBits,
    *,
    norm: Norm | None = None,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """As `reference.multiply_rows`; a product of x with exact weights, summed in fp32, rounded."""
    if norm is not None:
        weight_D, eps, in_fp32 = norm
        x_TD = reference.rms_norm(x_TD, weight_D, eps, weight_in_fp32=in_fp32)
    y_TN = x_TD.float() @ dequantize(weight).T
    if bias_N is not None:
        y_TN = y_TN + bias_N.float()
    y_TN = y_TN.to(x_TD.dtype)
    if gated:
        y_TN = reference.swiglu_joined(y_TN)
    return y_TN if residual_TN is None else residual_TN + y_TN


def embed_rows(ids_T: Tensor, table: FewBits) -> Tensor:
    """Rows `ids` of the table, [T, D] in the dtype of its scales."""
    return dequantize(table, ids_T).to(table.scale.dtype)
