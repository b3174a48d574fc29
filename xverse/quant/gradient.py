"""X, INTEGERS -> X @ W.T, WITH A GRADIENT. Products of frozen layers that adapters learn beside.

Plain autograd would keep the dequantized weights of the whole model until the backward pass. Here
some rows are numbers at a time, in the forward pass and again in the backward one.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from xverse.quant.linear import QuantizedLinear

NUMBERS = 2**24  # of a weight that are floating point at a time: 32 MiB in bf16


@torch.compiler.disable  # type: ignore[untyped-decorator]
def multiply(layer: "QuantizedLinear", x_TD: Tensor, expert: int | None) -> Tensor:
    """x @ w.T of the layer, or of an expert of a stack, without its bias; [..., D] -> [..., N].

    x's columns are in the order of the stored ones. Only x has a gradient: the weight is frozen.
    """
    return _Product.apply(x_TD, layer, expert)  # type: ignore[no-untyped-call]


def rows_of(layer: "QuantizedLinear", expert: int | None) -> Iterator[tuple[slice, Tensor]]:
    """The weight in its scale's dtype, some rows [n, D] at a time, and which ones they are."""
    count, columns = layer.weight.shape[-2], layer.inputs
    step = max(1, NUMBERS // columns)
    for first in range(0, count, step):
        rows = slice(first, min(count, first + step))
        yield rows, layer.dequantized(rows if expert is None else (expert, rows))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, layer: "QuantizedLinear", expert: int | None) -> Tensor:
        ctx.layer, ctx.expert = layer, expert
        parts = [
            functional.linear(x_TD, weight_ND.to(x_TD.dtype))
            for _, weight_ND in rows_of(layer, expert)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, upstream_TN: Tensor) -> tuple[Tensor, None, None]:
        sums_TD: Tensor | None = None
        for rows, weight_ND in rows_of(ctx.layer, ctx.expert):
            part_TD = upstream_TN[..., rows] @ weight_ND.to(upstream_TN.dtype)
            # Parts of a sum are added in fp32, as one product would add them.
            sums_TD = part_TD if sums_TD is None else sums_TD.float() + part_TD
        assert sums_TD is not None, "a layer has rows"
        return sums_TD.to(upstream_TN.dtype), None, None
