"""X -> X, ELEMENT BY ELEMENT. What stands between the matrix products, each in one pass on a GPU.

The residual stream made and normalized, gate and up joined: memory is read and written once, which
is all that there is to do, for one token as for a prompt of many thousands.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.multiply_triton import rounding, swiglu, wait_for_input
from xverse.kernels.reference import Norm


@triton.jit
def sum_and_norm(
    x_ptr, residual_ptr, sum_ptr, weight, at, inside, eps,
    dtype: tl.constexpr, INPUTS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Store the sum of a token at `at`, rounded; its RMSNorm as `reference.rms_norm` rounds."""
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)
        x = x.to(dtype)
        tl.store(sum_ptr + at, x, inside)
        x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x) / INPUTS + eps)
    if NORM == 2:
        x = x.to(dtype).to(tl.float32)
    return (x * weight).to(dtype)


@triton.jit
def _add_norm(
    x_ptr, residual_ptr, norm_ptr, sum_ptr, out_ptr, eps,
    INPUTS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: the sum, rounded, and its RMSNorm as `reference.rms_norm` rounds."""
    dtype = out_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_D)
    inside = column < INPUTS
    at = tl.program_id(0).to(tl.int64) * INPUTS + column
    weight = tl.load(norm_ptr + column, inside, 0.0).to(tl.float32)
    wait_for_input(PDL)
    normed = sum_and_norm(
        x_ptr, residual_ptr, sum_ptr, weight, at, inside, eps, dtype, INPUTS, RESIDUAL, NORM
    )
    tl.store(out_ptr + at, normed, inside)


def add_norm(
    x_TD: Tensor, residual_TD: Tensor | None, norm: Norm, *, pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """x + residual, rounded, and its RMSNorm; without residual the sum is x itself.

    Twin: `reference.add_norm`. Tensors [T, D] contiguous, of one dtype; any number of tokens.
    """
    tokens, inputs = x_TD.shape
    assert x_TD.is_contiguous()
    assert residual_TD is None or residual_TD.is_contiguous()
    sum_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    normed_TD = torch.empty_like(x_TD)
    block = triton.next_power_of_2(inputs)
    _add_norm[(tokens,)](
        x_TD, residual_TD, norm.weight_D, sum_TD, normed_TD, norm.eps,
        INPUTS=inputs, RESIDUAL=residual_TD is not None, NORM=rounding(norm), BLOCK_D=block,
        PDL=pdl, num_warps=4 if block <= 4096 else 8, launch_pdl=pdl,
    )  # fmt: skip
    return sum_TD, normed_TD


@triton.jit
def _swiglu_joined(
    joined_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr, PDL: tl.constexpr
):
    """A block of one token's inner values."""
    dtype = out_ptr.dtype.element_ty
    wait_for_input(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < WIDTH
    at = joined_ptr + token * (2 * WIDTH) + column
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    up = tl.load(at + WIDTH, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + column, swiglu(gate, up, dtype).to(dtype), inside)


def swiglu_joined(joined_TF2: Tensor, *, pdl: bool = False) -> Tensor:
    """silu(gate) * up of [T, 2F], whose first half is gate. -> [T, F].

    Twin: `reference.swiglu_joined`. Contiguous; any number of tokens.
    """
    tokens, width = joined_TF2.shape[0], joined_TF2.shape[1] // 2
    assert joined_TF2.is_contiguous()
    out_TF = joined_TF2.new_empty(tokens, width)
    block = 1024  # one load of 16 bytes a thread and side
    _swiglu_joined[(tokens, triton.cdiv(width, block))](
        joined_TF2, out_TF, WIDTH=width, BLOCK_F=block, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return out_TF


@triton.jit
def _embed_rows(
    ids_ptr, table_ptr, out_ptr,
    INPUTS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: its row of the table."""
    column = tl.arange(0, BLOCK_D)
    token = tl.program_id(0)
    wait_for_input(PDL)
    row = tl.load(ids_ptr + token).to(tl.int64)
    x = tl.load(table_ptr + row * INPUTS + column, column < INPUTS, 0.0)
    tl.store(out_ptr + token * INPUTS + column, x, column < INPUTS)


def embed_rows(ids_T: Tensor, table_VD: Tensor, *, pdl: bool = False) -> Tensor:
    """Rows `ids` (int64) of the table. Twin: `reference.embed_rows`.

    Ids are not checked: they are the decoder's own choices. The table may lie in the host's memory.
    """
    tokens, inputs = ids_T.shape[0], table_VD.shape[1]
    x_TD = table_VD.new_empty(tokens, inputs, device=ids_T.device)
    block = triton.next_power_of_2(inputs)
    _embed_rows[(tokens,)](
        ids_T, table_VD, x_TD,
        INPUTS=inputs, BLOCK_D=block, PDL=pdl, num_warps=4 if block <= 4096 else 8, launch_pdl=pdl,
    )  # fmt: skip
    return x_TD
