"""TENSORS -> LAYER. What every format of quantized folders has in common: its door, and its words.

A format packs small integers into 32-bit words, the first in the lowest bits. A layer holds 4 bits
as bytes of two, so that both are the same bytes on the machines we run on, all little-endian.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from xverse.errors import XverseError
from xverse.quant.scheme import Scheme


class LayerTensors(Protocol):
    """The stored tensors of one layer, by what stands behind the layer's name."""

    dtype: torch.dtype  # that the layer will compute in

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of the tensor `name`; None where there is none."""
        ...

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor `name` on the CPU; XverseError unless it has this shape, and is of integers
        where `dtype` is."""
        ...


class Parts(NamedTuple):
    """What a `QuantizedLinear` of [N, D] is made of, as that describes it."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    order: Tensor | None = None


class Layout(Protocol):
    """A format of quantized folders, as one folder uses it."""

    method: str  # its name in a quantization_config
    mark: str  # the tensor that a layer has where it is quantized, and else has not

    def scheme_of(self, name: str, module: nn.Module) -> Scheme | None:
        """How the module `name` of a decoder is quantized, if it is at all."""
        ...

    def read(self, scheme: Scheme, rows: int, columns: int, tensors: LayerTensors) -> Parts:
        """The layer of [rows, columns] that `tensors` hold."""
        ...


def to_words(values: Tensor, bits: int) -> Tensor:
    """uint8 [..., D] below 2^bits -> int32 [..., D * bits / 32], rounded up; bits is 4 or 8."""
    values = nn.functional.pad(values, (0, -values.shape[-1] % (32 // bits)))
    packed = values[..., ::2] | values[..., 1::2] << 4 if bits == 4 else values
    # Flat first: a dimension of one may have a stride that words can't have.
    return packed.reshape(-1).view(torch.int32).view(*packed.shape[:-1], -1)


def from_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `to_words`: uint8 [..., count]."""
    packed = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], -1)
    if bits == 4:
        packed = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return packed[..., :count]


def signed(values: Tensor, bits: int) -> Tensor:
    """uint8 0..2^bits-1 -> int8, where the middle is 0."""
    return (values.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def unsigned(values: Tensor, bits: int) -> Tensor:
    """The inverse of `signed`."""
    return (values.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


def number(config: Mapping[str, object], key: str, *allowed: object, default: object) -> object:
    """The value of `key` in a quantization_config, if it is one that is read; else XverseError."""
    value = config.get(key, default)
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise not_read(config, f"{key} = {value!r:.60}, and read is {_listed(allowed)}")
    return value


def group_size_of(config: Mapping[str, object], key: str = "group_size") -> int | None:
    """Columns that share a scale; None (stored as -1 or null) for a whole row."""
    size = config.get(key)
    if size in (None, -1):
        return None
    if type(size) is not int or size < 8 or size % 8:
        raise not_read(config, f"{key} = {size!r:.60}, and read are multiples of 8")
    return size


def not_read(config: Mapping[str, object], why: str) -> XverseError:
    """The error for a quantized folder in a form that this version does not read."""
    return XverseError(
        f"The folder is quantized by {config.get('quant_method')!r:.60} in a form that this "
        "version does not read.",
        f"Its quantization_config has {why}.",
        "Take the unquantized checkpoint, and quantize it with `xverse quantize`.",
    )


def _listed(values: tuple[object, ...]) -> str:
    return " or ".join(repr(value) for value in values)
