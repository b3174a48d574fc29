"""X -> X IN 8 BITS. Rows rounded to e4m3 by a scale each, with what makes them, in one pass.

The inputs of products in 8 bits: as they are, or fresh from the norm, or from SwiGLU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.between_triton import sum_and_norm
from xverse.kernels.multiply_triton import rounding, swiglu, wait_for_input
from xverse.kernels.reference import Norm
from xverse.kernels.reference_steps import FP8, RoundedRows


@triton.jit
def _keep_rounded(x, values_at, scale_at, inside):
    """A row in fp32 as `reference_steps.round_rows` rounds it."""
    scale = tl.maximum(tl.max(tl.abs(x), 0) * (1 / 448), 7.888609052210118e-31)  # 2 ** -100
    tl.store(values_at, (x * (1 / scale)).to(tl.float8e4nv), inside)
    tl.store(scale_at, scale)


@triton.jit
def _round_rows(x_ptr, values_ptr, scale_ptr, INPUTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < INPUTS
    at = token * INPUTS + column
    x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    _keep_rounded(x, values_ptr + at, scale_ptr + token, inside)


@triton.jit
def _add_norm_rounded(
    x_ptr, residual_ptr, norm_ptr, sum_ptr, values_ptr, scale_ptr, eps,
    INPUTS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: `add_norm`, of which only 8 bits are kept."""
    dtype = sum_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < INPUTS
    at = token * INPUTS + column
    weight = tl.load(norm_ptr + column, inside, 0.0).to(tl.float32)
    wait_for_input(PDL)
    normed = sum_and_norm(
        x_ptr, residual_ptr, sum_ptr, weight, at, inside, eps, dtype, INPUTS, RESIDUAL, NORM
    )
    _keep_rounded(normed.to(tl.float32), values_ptr + at, scale_ptr + token, inside)


@triton.jit
def _swiglu_rounded(
    joined_ptr, values_ptr, scale_ptr, WIDTH: tl.constexpr, BLOCK_F: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: `swiglu_joined`, of which only 8 bits are kept."""
    dtype = joined_ptr.dtype.element_ty
    wait_for_input(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_F)
    inside = column < WIDTH
    at = joined_ptr + token * (2 * WIDTH) + column
    gate = tl.load(at, inside, 0.0).to(tl.float32)
    up = tl.load(at + WIDTH, inside, 0.0).to(tl.float32)
    inner = swiglu(gate, up, dtype)
    _keep_rounded(inner, values_ptr + token * WIDTH + column, scale_ptr + token, inside)


def round_rows(x_TD: Tensor) -> RoundedRows:
    """Each row in 8 bits. Twin: `reference_steps.round_rows`."""
    x_TD = x_TD.contiguous()
    rounded = _room(x_TD, x_TD.shape[1])
    block, warps = _block(x_TD.shape[1])
    _round_rows[(len(x_TD),)](
        x_TD, *rounded, INPUTS=x_TD.shape[1], BLOCK_D=block, num_warps=warps
    )  # fmt: skip
    return rounded


def add_norm_rounded(
    x_TD: Tensor, residual_TD: Tensor | None, norm: Norm, *, pdl: bool = False
) -> tuple[Tensor, RoundedRows]:
    """`between_triton.add_norm`, the norm in 8 bits. Twin: `reference_steps.add_norm_rounded`."""
    assert x_TD.is_contiguous()
    assert residual_TD is None or residual_TD.is_contiguous()
    sum_TD = x_TD if residual_TD is None else torch.empty_like(x_TD)
    rounded = _room(x_TD, x_TD.shape[1])
    block, warps = _block(x_TD.shape[1])
    _add_norm_rounded[(len(x_TD),)](
        x_TD, residual_TD, norm.weight_D, sum_TD, *rounded, norm.eps,
        INPUTS=x_TD.shape[1], RESIDUAL=residual_TD is not None, NORM=rounding(norm), BLOCK_D=block,
        PDL=pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return sum_TD, rounded


def swiglu_rounded(joined_TF2: Tensor, *, pdl: bool = False) -> RoundedRows:
    """`between_triton.swiglu_joined` in 8 bits. Twin: `reference_steps.swiglu_rounded`."""
    width = joined_TF2.shape[1] // 2
    assert joined_TF2.is_contiguous()
    rounded = _room(joined_TF2, width)
    block, warps = _block(width)
    _swiglu_rounded[(len(joined_TF2),)](
        joined_TF2, *rounded, WIDTH=width, BLOCK_F=block, PDL=pdl, num_warps=warps, launch_pdl=pdl
    )
    return rounded


def _room(x_TD: Tensor, width: int) -> RoundedRows:
    values = torch.empty(len(x_TD), width, dtype=FP8, device=x_TD.device)
    return RoundedRows(values, torch.empty(len(x_TD), device=x_TD.device))


def _block(width: int) -> tuple[int, int]:
    """Columns and warps of a program that has a whole row: 16 or 32 numbers a thread."""
    block = triton.next_power_of_2(width)
    return block, 4 if block <= 2048 else 8 if block <= 4096 else 16
