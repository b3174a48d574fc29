"""LINEAR -> SMALLER LINEAR. Weights in few bits, computed with as they are held."""

from dataclasses import replace
from math import gcd
from typing import Self

import torch
from torch import Tensor, nn

from xverse.errors import XverseError
from xverse.kernels import dispatch_quantized
from xverse.kernels.multiply_rounded import LEAST_ROWS, multiply_rounded
from xverse.kernels.reference_few_bits import (
    FewBits,
    dequantize,
    pack_nibbles,
    unpack_nibbles,
)
from xverse.kernels.reference_steps import RoundedRows
from xverse.model.linear import Linear, span
from xverse.quant import gradient
from xverse.quant.rounding import Rounded, nearest
from xverse.quant.scheme import Scheme


class QuantizedLinear(nn.Module):
    """A `Linear` or `StackedLinear` whose weight is held as w = (q - zero) * scale.

    `weight`: int8 [..., N, D], for 4 bits uint8 [..., N, D/2] with the even column in the low half,
    each plus 8, or float8_e4m3fn [..., N, D]. `scale`, in the dtype that the layer computes in:
    [..., N] for one a row, or [..., N, G] for groups of D/G columns. `zero`: int8 in the scale's
    shape; None where symmetric. `order`: int64 [..., D], column i multiplies x[order[i]]; None but
    for checkpoints of others that sort their columns.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        scheme: Scheme,
        zero: Tensor | None = None,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("order", order)
        self.weight: Tensor
        self.scale: Tensor
        self.zero: Tensor | None
        self.order: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module, scheme: Scheme) -> Self:
        """The layer (linear, a stack, or an embedding), each weight rounded to the nearest step."""
        weight = layer.weight
        assert isinstance(weight, Tensor), "a layer of weights"
        return cls.of_rounded(layer, nearest(weight.detach(), scheme), scheme)

    @classmethod
    def of_rounded(cls, layer: nn.Module, rounded: Rounded, scheme: Scheme) -> Self:
        """The layer with the weights that are given, and its own bias."""
        steps, scale, zero = rounded
        bias = layer.bias if isinstance(layer, Linear) else None
        packed = pack_nibbles(steps) if scheme.bits == 4 else steps
        return cls(packed, scale, None if bias is None else bias.detach(), scheme, zero)

    @property
    def inputs(self) -> int:
        """D, of which 4 bits have two in a byte."""
        return self.weight.shape[-1] * 8 // self.scheme.bits

    def alike(self, other: nn.Module) -> bool:
        """Whether `join` can make one layer of the two."""
        if not isinstance(other, QuantizedLinear) or self.scheme != other.scheme:
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return torch.equal(self.order, other.order)

    @classmethod
    def join(cls, *parts: Self) -> Self:
        """One layer whose outputs are those of the parts (all `alike`), one after another."""
        first = parts[0]
        biases = [part.bias.data for part in parts if part.bias is not None]
        zeros = [part.zero for part in parts if part.zero is not None]
        rows = -1 if first.scheme.group_size is None else -2
        return cls(
            torch.cat([part.weight for part in parts], dim=-2),
            torch.cat([part.scale for part in parts], dim=rows),
            torch.cat(biases) if biases else None,
            first.scheme,
            torch.cat(zeros, dim=rows) if zeros else None,
            first.order,
        )

    def keep_outputs(self, first: int, last: int, of: int) -> Self:
        """As `Linear.keep_outputs`."""
        kept = span(self.weight.shape[-2], first, last, of)
        rows = kept if self.scheme.group_size is None else (kept, slice(None))
        index = (..., *(rows if isinstance(rows, tuple) else (rows,)))
        bias = None if self.bias is None else self.bias.data[kept]
        zero = None if self.zero is None else self.zero[index]
        weight = self.weight[..., kept, :]
        return type(self)(weight, self.scale[index], bias, self.scheme, zero, self.order)

    def keep_inputs(self, first: int, last: int, of: int) -> Self:
        """As `Linear.keep_inputs`. A cut through groups makes groups of a smaller size of them."""
        per_byte = 8 // self.scheme.bits
        kept = span(self.weight.shape[-1] * per_byte, first, last, of)
        if kept.start % per_byte or kept.stop % per_byte:
            raise XverseError(
                f"A layer of {self.scheme.bits} bits cannot be cut at input {kept.stop}.",
                "Two of its weights share a byte.",
                "Spread the model over fewer devices, or quantize it to 8 bits.",
            )
        if self.order is not None:
            raise XverseError(
                "A layer with sorted columns (GPTQ's desc_act) cannot be cut by its inputs.",
                "The columns that a device keeps take inputs that others have.",
                "Run the model on one device, or quantize the original with `xverse quantize`.",
            )
        scheme, scale, zero = self.scheme, self.scale, self.zero
        if scheme.group_size is not None:
            size = gcd(scheme.group_size, kept.start, kept.stop)
            groups = slice(kept.start // size, kept.stop // size)
            times = scheme.group_size // size
            scale = scale.repeat_interleave(times, dim=-1)[..., groups]
            zero = None if zero is None else zero.repeat_interleave(times, dim=-1)[..., groups]
            scheme = replace(scheme, group_size=size)
        bias = None if self.bias is None or first else self.bias.data
        weight = self.weight[..., kept.start // per_byte : kept.stop // per_byte]
        return type(self)(weight, scale, bias, scheme, zero)

    def integers(self) -> Tensor:
        """The weight as int8 [..., N, D]; of fp8 as it is."""
        return unpack_nibbles(self.weight) if self.scheme.bits == 4 else self.weight

    def few_bits(self, expert: int | None = None) -> FewBits:
        """The weight as the kernels take it; of a stack, that of an expert."""
        if expert is None:
            return FewBits(self.weight, self.scale, self.zero)
        zero = None if self.zero is None else self.zero[expert]
        return FewBits(self.weight[expert], self.scale[expert], zero)

    def order_of(self, expert: int | None = None) -> Tensor | None:
        """Which input each column multiplies [D]; of a stack, that of an expert."""
        return self.order if self.order is None or expert is None else self.order[expert]

    def dequantized(self, rows: Tensor | int | slice | tuple[int, slice] | None = None) -> Tensor:
        """(q - zero) * scale in the scale's dtype: of all, or of those of the first dimension (of a
        stack: of the first two) that `rows` names; columns as they are stored."""
        weight, scale, zero = self.weight, self.scale, self.zero
        if rows is not None:
            weight, scale = weight[rows], scale[rows]
            zero = None if zero is None else zero[rows]
        return dequantize(FewBits(weight, scale, zero)).to(scale.dtype)

    def forward(self, x_TD: Tensor, expert: int | None = None) -> Tensor:
        """x @ w.T + bias; of a stack, by the layer of that expert."""
        order = self.order_of(expert)
        if order is not None:
            x_TD = x_TD[..., order]
        # Compiled training calls what the compiler leaves alone, and not kernels chosen on the way.
        learning = torch.is_grad_enabled() and x_TD.requires_grad
        if learning or torch.compiler.is_compiling():
            y_TN = gradient.multiply(self, x_TD, expert)
        else:
            weight, flat_TD = self.few_bits(expert), x_TD.flatten(0, -2)
            rows = min(len(flat_TD), dispatch_quantized.ROWS_APART)
            chosen = dispatch_quantized.multiply_steps(x_TD.device, x_TD.dtype, rows, weight.form)
            y_TN = chosen.call(flat_TD, weight).unflatten(0, x_TD.shape[:-1])
        return y_TN if self.bias is None else y_TN + self.bias

    def rounds(self, rows: int) -> bool:
        """Whether products of so many rows are made in 8 bits, by `multiply_rounded`."""
        device, dtype = self.weight.device, self.scale.dtype
        if rows < LEAST_ROWS or self.weight.dim() != 2:
            return False
        return not dispatch_quantized.why_not_rounded(device, dtype, self.few_bits().form)

    def multiply_rounded(self, x: RoundedRows) -> Tensor:
        """As `forward`, of rows in 8 bits; for inference."""
        y_TN = multiply_rounded(x, self.few_bits())
        return y_TN if self.bias is None else y_TN + self.bias
