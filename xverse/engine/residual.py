"""X -> X + F(X). The residual stream of a decode step, and the products that read and feed it.

Up to 64 rows a product is a matter of memory: our kernels stream the weights, and what stands
around a product happens inside it. Beyond, it is a matter of arithmetic: cuBLAS multiplies, and the
sum and its norm, and SwiGLU, are one pass over memory each.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from xverse.kernels import dispatch
from xverse.kernels.reference import Norm
from xverse.kernels.tiles import MOST_ROWS
from xverse.parallel.tensor import Reduce


class Residual(NamedTuple):
    """The stream between two products: `x_TD`, plus `more_TD` if that is not yet added.

    `squares_TP` are parts of the sums of squares of x, from whoever made it.
    """

    x_TD: Tensor
    squares_TP: Tensor | None = None
    more_TD: Tensor | None = None


class Products(Protocol):
    """The three ways in which a decode step uses a matrix."""

    def embed(self, ids_T: Tensor, table_VD: Tensor) -> Residual:
        """The stream's beginning."""

    def read(
        self,
        stream: Residual,
        norm: Norm,
        weight_ND: Tensor,
        bias_N: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> tuple[Tensor, Residual]:
        """The product of the normalized stream, through SwiGLU if `gated`; and the stream."""

    def add(
        self,
        x_TD: Tensor,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        stream: Residual,
        reduce: Reduce | None = None,
    ) -> Residual:
        """The stream with a product added to it; `reduce`: of the parts that ranks have of it."""


class FewRows:
    """Products of 1 to 64 rows."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rows: int) -> None:
        self.embed_rows = dispatch.embed_rows(device, dtype).call
        self.multiply = dispatch.multiply_rows(device, dtype, rows).call
        self.add_rows = dispatch.add_rows(device, dtype).call

    def embed(self, ids_T: Tensor, table_VD: Tensor) -> Residual:
        return Residual(*self.embed_rows(ids_T, table_VD))

    def read(
        self,
        stream: Residual,
        norm: Norm,
        weight_ND: Tensor,
        bias_N: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> tuple[Tensor, Residual]:
        y_TN = self.multiply(
            stream.x_TD,
            weight_ND,
            norm=norm,
            squares_TP=stream.squares_TP,
            bias_N=bias_N,
            gated=gated,
        )
        return y_TN, stream

    def add(
        self,
        x_TD: Tensor,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        stream: Residual,
        reduce: Reduce | None = None,
    ) -> Residual:
        if reduce is not None:  # whose kernel adds the stream, and leaves no sums of squares
            return Residual(reduce(self.multiply(x_TD, weight_ND, bias_N=bias_N), stream.x_TD))
        return Residual(*self.add_rows(x_TD, weight_ND, stream.x_TD, bias_N=bias_N))


class ManyRows:
    """Products of more rows."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.add_norm = dispatch.add_norm(device, dtype).call
        self.swiglu_joined = dispatch.swiglu_joined(device, dtype).call

    def embed(self, ids_T: Tensor, table_VD: Tensor) -> Residual:
        return Residual(functional.embedding(ids_T, table_VD))

    def read(
        self,
        stream: Residual,
        norm: Norm,
        weight_ND: Tensor,
        bias_N: Tensor | None = None,
        *,
        gated: bool = False,
    ) -> tuple[Tensor, Residual]:
        if stream.more_TD is None:
            sum_TD, normed_TD = self.add_norm(stream.x_TD, None, norm)
        else:
            sum_TD, normed_TD = self.add_norm(stream.more_TD, stream.x_TD, norm)
        y_TN = functional.linear(normed_TD, weight_ND, bias_N)
        return self.swiglu_joined(y_TN) if gated else y_TN, Residual(sum_TD)

    def add(
        self,
        x_TD: Tensor,
        weight_ND: Tensor,
        bias_N: Tensor | None,
        stream: Residual,
        reduce: Reduce | None = None,
    ) -> Residual:
        y_TD = functional.linear(x_TD, weight_ND, bias_N)
        return Residual(stream.x_TD, more_TD=y_TD if reduce is None else reduce(y_TD))


def products(device: torch.device, dtype: torch.dtype, rows: int) -> Products:
    """The products of steps of so many rows."""
    return FewRows(device, dtype, rows) if rows <= MOST_ROWS else ManyRows(device, dtype)
