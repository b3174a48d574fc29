"""X, INTEGERS -> X @ W.T, WITH A GRADIENT. Products of frozen layers that adapters learn beside.

Plain autograd would keep the dequantized weights of the whole model until the backward pass. Here
some rows are numbers at a time, in the forward pass and again in the backward one. Both are
operators of their own, which torch.compile calls as they are and does not look into.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xverse.kernels import dispatch_quantized, reference_steps
from xverse.kernels.reference_few_bits import FewBits

if TYPE_CHECKING:
    from xverse.quant.linear import QuantizedLinear

NUMBERS = 2**24  # of a weight that are floating point at a time, 32 MiB in bf16: by PyTorch
# By the kernel, which takes no more memory than they. 128 MiB hold any layer of 7B whole: fewer
# launches, and nothing to add in the backward pass, whose parts are sums.
WIDENED_NUMBERS = 2**26


def multiply(layer: "QuantizedLinear", x_TD: Tensor, expert: int | None) -> Tensor:
    """x @ w.T of the layer, or of an expert of a stack, without its bias; [..., D] -> [..., N].

    x's columns are in the order of the stored ones. Only x has a gradient: the weight is frozen.
    """
    product: Tensor = multiply_frozen(x_TD, *layer.few_bits(expert))
    return product


def rows_of(layer: "QuantizedLinear", expert: int | None) -> Iterator[tuple[slice, Tensor]]:
    """The weight in its scale's dtype, some rows [n, D] at a time, and which ones they are; each
    part is gone when the next one comes."""
    yield from _widened(layer.few_bits(expert), layer.scale.dtype)


@torch.library.custom_op("xverse::multiply_frozen", mutates_args=())
def multiply_frozen(x_TD: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """x @ w.T, [..., D] -> [..., N], of the weight that `FewBits` makes of the other three."""
    flat_TD = x_TD.reshape(-1, x_TD.shape[-1])
    y_TN = x_TD.new_empty(len(flat_TD), len(weight))
    for rows, wide_ND in _widened(FewBits(weight, scale, zero), x_TD.dtype):
        torch.mm(flat_TD, wide_ND.T, out=y_TN[:, rows])
    return y_TN.view(*x_TD.shape[:-1], -1)


@torch.library.custom_op("xverse::multiply_frozen_back", mutates_args=())
def multiply_frozen_back(
    upstream_TN: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None
) -> Tensor:
    """The gradient of `multiply_frozen` by x, [..., N] -> [..., D]."""
    steps, dtype = FewBits(weight, scale, zero), upstream_TN.dtype
    flat_TN = upstream_TN.reshape(-1, upstream_TN.shape[-1])
    sums_TD: Tensor | None = None
    for rows, wide_ND in _widened(steps, dtype):
        part_TD = flat_TN[:, rows] @ wide_ND
        # Parts of a sum are added in fp32, as one product would add them.
        sums_TD = part_TD if sums_TD is None else sums_TD.float() + part_TD
    assert sums_TD is not None, "a layer has rows"
    return sums_TD.to(dtype).view(*upstream_TN.shape[:-1], -1)


def _widened(steps: FewBits, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in this dtype, some rows at a time, in the same memory, and which ones."""
    widen = dispatch_quantized.widen(steps.weight.device, dtype, steps.form.kind).call
    most = NUMBERS if widen is reference_steps.widen else WIDENED_NUMBERS
    count, columns = len(steps.weight), steps.inputs
    step = min(count, max(1, most // columns))
    wide_ND = steps.scale.new_empty(step, columns, dtype=dtype)
    for first in range(0, count, step):
        last = min(count, first + step)
        yield slice(first, last), widen(steps.rows(first, last), wide_ND[: last - first])


def _shaped(x: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _shaped_back(upstream: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    return upstream.new_empty(*upstream.shape[:-1], FewBits(weight, scale, zero).inputs)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])  # which the model holds anyhow


def _backward(ctx: Any, upstream_TN: Tensor) -> tuple[Tensor, None, None, None]:
    return multiply_frozen_back(upstream_TN, *ctx.saved_tensors), None, None, None


multiply_frozen.register_fake(_shaped)
multiply_frozen.register_autograd(_backward, setup_context=_keep)
multiply_frozen_back.register_fake(_shaped_back)
