"""LINEAR -> SMALLER LINEAR. Integer weights, and their packing on disk."""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from xverse.errors import XverseError
from xverse.model.linear import Linear, StackedLinear, span
from xverse.quant.scheme import Scheme


class QuantizedLinear(nn.Module):
    """A `Linear` or `StackedLinear` whose weight is held as integers with a scale per row.

    `weight`: int8 [..., N, D], or for 4 bits uint8 [..., N, D/2] with the even column in the low
    half, each plus 8. `scale`: [..., N] in the dtype that the layer computes in.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.weight: Tensor
        self.scale: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, layer: Linear | StackedLinear, scheme: Scheme) -> Self:
        """The layer, rounded to the scheme; rows of zeros stay zeros."""
        weight = layer.weight.float()
        # A tensor and not a number: dividing by a number, CUDA multiplies by its inverse, and
        # the same weights would round differently there.
        scale = weight.abs().amax(dim=-1) / weight.new_tensor(scheme.largest)
        steps = (weight / scale.clamp(min=1e-30)[..., None]).round()
        integers = steps.clamp(-scheme.largest, scheme.largest).to(torch.int8)
        bias = layer.bias if isinstance(layer, Linear) else None
        packed = pack_nibbles(integers) if scheme.bits == 4 else integers
        return cls(packed, scale.to(layer.weight.dtype), bias, scheme)

    @classmethod
    def join(cls, *parts: Self) -> Self:
        """One layer whose outputs are those of the parts, one after another."""
        biases = [part.bias.data for part in parts if part.bias is not None]
        return cls(
            torch.cat([part.weight for part in parts], dim=-2),
            torch.cat([part.scale for part in parts], dim=-1),
            torch.cat(biases) if biases else None,
            parts[0].scheme,
        )

    def keep_outputs(self, first: int, last: int, of: int) -> Self:
        """As `Linear.keep_outputs`."""
        kept = span(self.scale.shape[-1], first, last, of)
        bias = None if self.bias is None else self.bias.data[kept]
        return type(self)(self.weight[..., kept, :], self.scale[..., kept], bias, self.scheme)

    def keep_inputs(self, first: int, last: int, of: int) -> Self:
        """As `Linear.keep_inputs`."""
        per_byte = 8 // self.scheme.bits
        kept = span(self.weight.shape[-1] * per_byte, first, last, of)
        if kept.start % per_byte or kept.stop % per_byte:
            raise XverseError(
                f"A layer of {self.scheme.bits} bits cannot be cut at input {kept.stop}.",
                "Two of its weights share a byte.",
                "Spread the model over fewer devices, or quantize it to 8 bits.",
            )
        bias = None if self.bias is None or first else self.bias.data
        weight = self.weight[..., kept.start // per_byte : kept.stop // per_byte]
        return type(self)(weight, self.scale, bias, self.scheme)

    def integers(self) -> Tensor:
        """The weight as int8 [..., N, D]."""
        return unpack_nibbles(self.weight) if self.scheme.bits == 4 else self.weight

    def forward(self, x_TD: Tensor, expert: int | None = None) -> Tensor:
        weight, scale = self.weight, self.scale
        if expert is not None:
            weight, scale = weight[expert], scale[expert]
        if self.scheme.bits == 4:
            weight = unpack_nibbles(weight)
        y_TN = functional.linear(x_TD, weight.to(x_TD.dtype)) * scale
        return y_TN if self.bias is None else y_TN + self.bias


def pack_nibbles(integers: Tensor) -> Tensor:
    """int8 [..., D] in -8..7 -> uint8 [..., D/2]."""
    shifted = (integers + 8).to(torch.uint8)
    return shifted[..., ::2] | shifted[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1)
    return halves.flatten(-2).to(torch.int8) - 8


def to_disk(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of a layer as compressed-tensors' pack-quantized stores them.

    `weight_packed` int32 [N, D * bits / 32]: integers made positive, the first in the lowest bits;
    `weight_scale` [N, 1]; `weight_shape` [2]; and the bias where there is one.
    """
    bits = layer.scheme.bits
    integers = layer.integers()
    positive = (integers.int() + 2 ** (bits - 1)).unflatten(-1, (-1, 32 // bits)).long()
    words = (positive << torch.arange(0, 32, bits)).sum(-1)
    tensors = {
        "weight_packed": torch.where(words >= 2**31, words - 2**32, words).int(),
        "weight_scale": layer.scale[..., None],
        "weight_shape": torch.tensor(integers.shape[-2:]),
    }
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return tensors


def integers_from_disk(packed: Tensor, scheme: Scheme) -> Tensor:
    """`weight_packed` as a layer of `scheme` holds its weight."""
    shifts = torch.arange(0, 32, scheme.bits, dtype=torch.int32)
    positive = packed[..., None] >> shifts & (2**scheme.bits - 1)
    integers = (positive - 2 ** (scheme.bits - 1)).to(torch.int8).flatten(-2)
    return pack_nibbles(integers) if scheme.bits == 4 else integers
