"""X -> PARTS -> SUM. The experts of 2 to 16 tokens on a GPU: weights read once for all who chose.

Each expert's programs find out who chose it, and leave a part for every choice of every token. The
parts are then summed in the order of the choices, so that equal inputs give equal bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.multiply import ROWS
from xverse.kernels.multiply_triton import swiglu, wait_for_input


class ExpertTile(NamedTuple):
    """How a product of experts is cut: outputs and inputs a tile, warps, loads in flight."""

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 1


@triton.jit
def weight_tile(at, row, place, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, stride):
    """A tile of weights, each of which is read once and not worth keeping."""
    inside = (row < OUTPUTS)[:, None] & (place < INPUTS)[None, :]
    return tl.load(
        at + row[:, None] * stride + place[None, :], inside, 0.0, eviction_policy="evict_first"
    )


@triton.jit(do_not_specialize=["tokens"])
def _some_rows(
    x_ptr, chosen_ptr, weight_ptr, up_ptr, shared_ptr, out_ptr, tokens,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    GATED: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr, ALL_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (outputs, expert): a product of one expert for all tokens that chose it.

    Where there are fewer choices than experts (PAIRS), a program is given one of the choices, and
    leaves its expert to the first that chose it. x is [T, D] if GATED, which leaves
    silu(gate) * up, and else [T, C + S, F]; out is [T, C + S, outputs]. All tokens are
    multiplied, those of others as zeros: the tensor cores take no fewer.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    slots: tl.constexpr = CHOSEN + SHARED
    size: tl.constexpr = OUTPUTS * INPUTS
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.program_id(1) - SHARED  # below zero is shared
    token = tl.arange(0, ROWS)
    choice = tl.arange(0, ALL_C)
    wait_for_input(PDL)
    chosen_at = chosen_ptr + token[:, None] * CHOSEN + choice[None, :]
    real = (token < tokens)[:, None] & (choice < CHOSEN)[None, :]
    asked = tl.load(chosen_at, real, -1)
    earlier = 0
    if PAIRS:  # noqa: SIM102 - what is known when compiling, apart from what is not
        if expert >= 0:
            before = token[:, None] * CHOSEN + choice[None, :] < expert
            expert = tl.load(chosen_ptr + expert)
            earlier = tl.sum(tl.where((asked == expert) & real & before, 1, 0))
    mine = (asked == expert) & real & (earlier == 0)
    slot = tl.max(tl.where(mine, choice[None, :], -1), 1)
    slot = tl.where((expert < 0) & (token < tokens), slots + expert, slot)
    if tl.max(slot, 0) >= 0:
        if expert < 0:
            number = (expert + SHARED).to(tl.int64)
            if GATED:
                at = shared_ptr + number * size
                up_at = at + SHARED * size
            else:
                at = shared_ptr + number * INPUTS
                up_at = at
        else:
            at = weight_ptr + expert.to(tl.int64) * size
            up_at = up_ptr + expert.to(tl.int64) * size
        stride = tl.where((expert < 0) & (not GATED), SHARED * INPUTS, INPUTS)
        x_row = token if GATED else token * slots + slot
        sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
        sums_up = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for start in tl.range(0, INPUTS, BLOCK_D, num_stages=STAGES):
            place = start + tl.arange(0, BLOCK_D)
            weights = weight_tile(at, row, place, OUTPUTS, INPUTS, stride)
            x_at = x_ptr + place[:, None] + x_row[None, :] * INPUTS
            x = tl.load(x_at, (place < INPUTS)[:, None] & (slot >= 0)[None, :], 0.0)
            sums = tl.dot(weights, x, sums, input_precision="ieee")
            if GATED:
                weights_up = weight_tile(up_at, row, place, OUTPUTS, INPUTS, stride)
                sums_up = tl.dot(weights_up, x, sums_up, input_precision="ieee")
        y = sums.to(dtype)
        if GATED:
            gate = y.to(tl.float32)
            y = swiglu(gate, sums_up.to(dtype).to(tl.float32), dtype).to(dtype)
        out_at = out_ptr + (token * slots + slot)[None, :] * OUTPUTS + row[:, None]
        tl.store(out_at, y, (row < OUTPUTS)[:, None] & (slot >= 0)[None, :])


@triton.jit
def _sum_parts(
    parts_ptr, weights_ptr, residual_ptr, out_ptr,
    OUTPUTS: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, outputs): the parts [C + S, outputs] of a token, weighed, in their order."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_input(PDL)
    total = tl.zeros([BLOCK_N], tl.float32)
    for slot in tl.static_range(CHOSEN + SHARED):
        at = parts_ptr + (token * (CHOSEN + SHARED) + slot) * OUTPUTS
        part = tl.load(at + column, column < OUTPUTS, 0.0).to(tl.float32)
        if slot < CHOSEN:
            part *= tl.load(weights_ptr + token * CHOSEN + slot).to(tl.float32)
        total += part
    y = total.to(dtype)
    if RESIDUAL:
        residual = tl.load(residual_ptr + token * OUTPUTS + column, column < OUTPUTS, 0.0)
        y = (y.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    tl.store(out_ptr + token * OUTPUTS + column, y, column < OUTPUTS)


def some_rows(
    x: Tensor,
    chosen_TC: Tensor,
    stacks: tuple[Tensor, ...],
    shared_ND: Tensor | None,
    tile: ExpertTile,
    *,
    shared: int,
    pdl: bool = False,
) -> Tensor:
    """A product of 1 to 16 tokens' experts, the chosen and then the shared ones: [T, C + S, N].

    `stacks` are gate and up [X, N, D] each, of x [T, D], and SwiGLU follows; or down [X, N, F]
    alone, of x [T, C + S, F]. `shared_ND` is the same of `shared` experts side by side. `chosen`
    int32; a token's choices differ from each other.
    """
    tokens, top_k = chosen_TC.shape
    experts, outputs, inputs = stacks[0].shape
    gated = len(stacks) == 2
    y_TCN = x.new_empty(tokens, top_k + shared, outputs)
    pairs = tokens * top_k < experts
    programs = shared + (tokens * top_k if pairs else experts)
    _some_rows[(triton.cdiv(outputs, tile.outputs), programs)](
        x, chosen_TC, stacks[0], stacks[-1], stacks[0] if shared_ND is None else shared_ND, y_TCN,
        tokens,
        OUTPUTS=outputs, INPUTS=inputs, CHOSEN=top_k, SHARED=shared, GATED=gated, PAIRS=pairs,
        ROWS=ROWS, ALL_C=triton.next_power_of_2(top_k), BLOCK_N=tile.outputs, BLOCK_D=tile.inputs,
        STAGES=tile.stages, PDL=pdl, num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return y_TCN


def sum_parts(
    parts_TCD: Tensor,
    weights_TC: Tensor,
    residual_TD: Tensor | None,
    *,
    pdl: bool = False,
) -> Tensor:
    """The parts of each token, the first C of them weighed; rounded, then the residual added."""
    tokens, slots, outputs = parts_TCD.shape
    chosen = weights_TC.shape[1]
    out_TD = parts_TCD.new_empty(tokens, outputs)
    block = min(1024, triton.next_power_of_2(outputs))
    _sum_parts[(tokens, triton.cdiv(outputs, block))](
        parts_TCD, weights_TC, residual_TD, out_TD,
        OUTPUTS=outputs, CHOSEN=chosen, SHARED=slots - chosen, RESIDUAL=residual_TD is not None,
        BLOCK_N=block, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out_TD
