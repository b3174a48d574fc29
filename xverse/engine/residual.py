"""X -> X + F(X). The residual stream of a decode step, and the products that read and feed it.

Up to 32 rows a product is a matter of memory (up to 64 with quantized weights): our kernels stream
the weights, and what stands around a product happens inside it. Beyond, it is a matter of
arithmetic: cuBLAS multiplies, and the sum and its norm, and SwiGLU, are one pass over memory each.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from xverse.kernels import dispatch, dispatch_quantized
from xverse.kernels.look_up import look_up
from xverse.kernels.reference import Norm
from xverse.kernels.tiles import FEW_BITS_ROWS, MOST_ROWS
from xverse.model.decoder import Decoder
from xverse.model.embedding import Embedding
from xverse.model.linear import Linear
from xverse.parallel.tensor import Reduce
from xverse.quant.linear import QuantizedLinear
from xverse.quant.scheme import Scheme

Matrix = Tensor | QuantizedLinear  # [N, D]; as a layer it has its own bias
Product = Callable[[Tensor, Matrix, Tensor | None], Tensor]  # x @ w.T + bias


def matrix(layer: nn.Module) -> Matrix:
    """What a step multiplies by, of a layer that it has: always the same object."""
    if isinstance(layer, QuantizedLinear):
        return layer
    assert isinstance(layer, Linear | Embedding), "`unfit` has looked"
    return layer.weight


class Residual(NamedTuple):
    """The stream between two products: `x_TD`, plus `more_TD` if that is not yet added."""

    x_TD: Tensor
    more_TD: Tensor | None = None


class Products(Protocol):
    """The three ways in which a decode step uses a matrix."""

    def embed(self, ids_T: Tensor, table_VD: Matrix) -> Residual:
        """The stream's beginning."""

    def read(
        self,
        stream: Residual,
        norm: Norm,
        weight_ND: Matrix,
        bias_N: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> tuple[Tensor, Residual]:
        """The product of the normalized stream, through SwiGLU if `gated`; and the stream."""

    def add(
        self,
        x_TD: Tensor,
        weight_ND: Matrix,
        bias_N: Tensor | None,
        stream: Residual,
        reduce: Reduce | None = None,
    ) -> Residual:
        """The stream with a product added to it; `reduce`: of the parts that ranks have of it."""


class FewRows:
    """Products of 1 to 64 rows; `schemes` are those of weights that are quantized."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, rows: int, schemes: Collection[Scheme] = ()
    ) -> None:
        self.embed_rows = dispatch.embed_rows(device, dtype).call
        self.multiply = dispatch.multiply_rows(device, dtype, rows).call
        if schemes:
            fp8 = any(scheme.kind == "float" for scheme in schemes)
            self.embed_few_bits = dispatch_quantized.embed_few_bits(device, dtype, fp8=fp8).call
            self.multiply_few_bits = dispatch_quantized.multiply_few_bits(
                device, dtype, fp8=fp8
            ).call

    def embed(self, ids_T: Tensor, table_VD: Matrix) -> Residual:
        if isinstance(table_VD, QuantizedLinear):
            return Residual(self.embed_few_bits(ids_T, table_VD.few_bits()))
        return Residual(self.embed_rows(ids_T, table_VD))

    def product(self, x_TD: Tensor, weight_ND: Matrix, bias_N: Tensor | None) -> Tensor:
        """x @ w.T + bias, with nothing around it."""
        if isinstance(weight_ND, QuantizedLinear):
            return self.multiply_few_bits(x_TD, weight_ND.few_bits(), bias_N=bias_N)
        return self.multiply(x_TD, weight_ND, bias_N=bias_N)

    def read(
        self,
        stream: Residual,
        norm: Norm,
        weight_ND: Matrix,
        bias_N: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> tuple[Tensor, Residual]:
        around = {"norm": norm, "bias_N": bias_N, "gated": gated}
        if isinstance(weight_ND, QuantizedLinear):
            return self.multiply_few_bits(stream.x_TD, weight_ND.few_bits(), **around), stream
        return self.multiply(stream.x_TD, weight_ND, **around), stream

    def add(
        self,
        x_TD: Tensor,
        weight_ND: Matrix,
        bias_N: Tensor | None,
        stream: Residual,
        reduce: Reduce | None = None,
    ) -> Residual:
        if isinstance(weight_ND, QuantizedLinear):
            multiply = partial(self.multiply_few_bits, x_TD, weight_ND.few_bits(), bias_N=bias_N)
        else:
            multiply = partial(self.multiply, x_TD, weight_ND, bias_N=bias_N)
        if reduce is not None:  # whose kernel adds the stream
            return Residual(reduce(multiply(), stream.x_TD))
        return Residual(multiply(residual_TN=stream.x_TD))


class ManyRows:
    """Products of more rows, each by `product`, which nothing is fused with."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, product: Product | None = None
    ) -> None:
        self.product = product or _linear
        self.add_norm = dispatch.add_norm(device, dtype).call
        self.swiglu_joined = dispatch.swiglu_joined(device, dtype).call

    def embed(self, ids_T: Tensor, table_VD: Matrix) -> Residual:
        if isinstance(table_VD, QuantizedLinear):
            return Residual(table_VD(ids_T))
        return Residual(look_up(ids_T, table_VD))

    def read(
        self,
        stream: Residual,
        norm: Norm,
        weight_ND: Matrix,
        bias_N: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> tuple[Tensor, Residual]:
        if stream.more_TD is None:
            sum_TD, normed_TD = self.add_norm(stream.x_TD, None, norm)
        else:
            sum_TD, normed_TD = self.add_norm(stream.more_TD, stream.x_TD, norm)
        y_TN = self.product(normed_TD, weight_ND, bias_N)
        return self.swiglu_joined(y_TN) if gated else y_TN, Residual(sum_TD)

    def add(
        self,
        x_TD: Tensor,
        weight_ND: Matrix,
        bias_N: Tensor | None,
        stream: Residual,
        reduce: Reduce | None = None,
    ) -> Residual:
        y_TD = self.product(x_TD, weight_ND, bias_N)
        return Residual(stream.x_TD, more_TD=y_TD if reduce is None else reduce(y_TD))


def _linear(x_TD: Tensor, weight_ND: Matrix, bias_N: Tensor | None) -> Tensor:
    if isinstance(weight_ND, QuantizedLinear):
        y_TN: Tensor = weight_ND(x_TD)
        return y_TN
    return functional.linear(x_TD, weight_ND, bias_N)


def products(decoder: Decoder, rows: int) -> FewRows | ManyRows:
    """The products of steps of so many rows."""
    device, dtype = decoder.device, decoder.dtype
    schemes = {m.scheme for m in decoder.modules() if isinstance(m, QuantizedLinear)}
    if rows <= (FEW_BITS_ROWS if schemes else MOST_ROWS):
        return FewRows(device, dtype, rows, schemes)
    return ManyRows(device, dtype)
