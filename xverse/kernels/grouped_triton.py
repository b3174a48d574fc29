"""X -> MIXTURE. The experts of many tokens on a GPU, their choices sorted by expert.

The choices are sorted by expert and cut into blocks, each of which belongs to one expert. The map
from block to expert is made on the GPU too, so that nothing waits for the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.multiply_triton import swiglu
from xverse.kernels.parts_triton import ExpertTile, sum_parts
from xverse.kernels.reference import Norm
from xverse.kernels.reference_experts import Experts, Mixture, Plain, add_shared
from xverse.kernels.route_triton import Scratch, route_rows


@triton.jit
def _sorted_rows(
    x_ptr, order_ptr, starts_ptr, weight_ptr, up_ptr, out_ptr,
    EXPERTS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, CHOSEN: tl.constexpr,
    GATED: tl.constexpr, ALL_X: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (outputs, block): a product of up to BLOCK_M choices of the same expert.

    Choice c of token t is number t * C + c; `order` [T * C] lists them by expert, and `starts`
    [X + 1] says from where on. GATED takes x [T, D] and leaves silu(gate) * up in that order; the
    other product takes this, and leaves its outputs by number.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    each = tl.arange(0, ALL_X)
    start = tl.load(starts_ptr + each, each < EXPERTS, 0)
    end = tl.load(starts_ptr + each + 1, each < EXPERTS, 0)
    blocks = (end - start + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(blocks, 0)
    block = tl.program_id(1)
    expert = tl.sum((ends <= block).to(tl.int32), 0)
    if expert < EXPERTS:  # there are as many blocks as there can be, and mostly fewer are needed
        first = start + (block - (ends - blocks)) * BLOCK_M
        place = tl.sum(tl.where(each == expert, first, 0), 0) + tl.arange(0, BLOCK_M)
        real = place < tl.sum(tl.where(each == expert, end, 0), 0)
        number = tl.load(order_ptr + place, real, 0).to(tl.int64)
        place = place.to(tl.int64)
        x_row = number // CHOSEN if GATED else place
        out_row = place if GATED else number
        row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_at = weight_ptr + expert.to(tl.int64) * (OUTPUTS * INPUTS) + row[None, :] * INPUTS
        up_at = up_ptr + expert.to(tl.int64) * (OUTPUTS * INPUTS) + row[None, :] * INPUTS
        x_at = x_ptr + x_row[:, None] * INPUTS
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        sums_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in tl.range(0, INPUTS, BLOCK_D, num_stages=STAGES):
            column = begin + tl.arange(0, BLOCK_D)
            x = tl.load(x_at + column[None, :], real[:, None] & (column < INPUTS)[None, :], 0.0)
            inside = (column < INPUTS)[:, None] & (row < OUTPUTS)[None, :]
            weights = tl.load(weight_at + column[:, None], inside, 0.0)
            sums = tl.dot(x, weights, sums, input_precision="ieee")
            if GATED:
                weights_up = tl.load(up_at + column[:, None], inside, 0.0)
                sums_up = tl.dot(x, weights_up, sums_up, input_precision="ieee")
        y = sums.to(dtype)
        if GATED:
            gate = y.to(tl.float32)
            y = swiglu(gate, sums_up.to(dtype).to(tl.float32), dtype).to(dtype)
        out_at = out_ptr + out_row[:, None] * OUTPUTS + row[None, :]
        tl.store(out_at, y, real[:, None] & (row < OUTPUTS)[None, :])


class Cut(NamedTuple):
    """How the sorted choices are cut: choices a block, and the tiles of the two products."""

    choices: int
    gate_up: ExpertTile
    down: ExpertTile


def choose_cut(choices: int, experts: int) -> Cut:
    """The larger the blocks, the less is read twice; the smaller, the less is computed in vain."""
    each = choices / experts
    if each <= 24:
        return Cut(16, ExpertTile(64, 128, stages=3), ExpertTile(64, 128, stages=4))
    if each <= 96:
        return Cut(64, ExpertTile(128, 64, stages=4), ExpertTile(128, 64, stages=4))
    return Cut(128, ExpertTile(128, 64, warps=8, stages=3), ExpertTile(256, 64, warps=8, stages=3))


def mix_experts(
    x_TD: Tensor,
    weights_TC: Tensor,
    chosen_TC: Tensor,
    experts: Experts,
    *,
    cut: Cut | None = None,
) -> Tensor:
    """What the chosen experts make of each token, weighed and summed; of any number of tokens.

    Twin: `reference_experts.mix_experts`. Reads the experts' stacks alone, contiguous and of x's
    dtype. Nothing here waits for the host.
    """
    gate_XFD, up_XFD, down_XDF = experts.stacks()
    count, width, hidden = gate_XFD.shape
    tokens, top_k = chosen_TC.shape
    choices = tokens * top_k
    cut = cut or choose_cut(choices, count)
    by_expert, order = chosen_TC.flatten().sort(stable=True)
    numbers = torch.arange(count + 1, dtype=by_expert.dtype, device=x_TD.device)
    starts = torch.searchsorted(by_expert, numbers, out_int32=True)
    inner = x_TD.new_empty(choices, width)
    parts_TCD = x_TD.new_empty(tokens, top_k, hidden)
    blocks = min(choices, (choices + count * (cut.choices - 1)) // cut.choices)
    common = {
        "EXPERTS": count,
        "CHOSEN": top_k,
        "ALL_X": triton.next_power_of_2(count),
        "BLOCK_M": cut.choices,
    }
    x_TD = x_TD.contiguous()
    _sorted_rows[(triton.cdiv(width, cut.gate_up.outputs), blocks)](
        x_TD, order, starts, gate_XFD, up_XFD, inner,
        OUTPUTS=width, INPUTS=hidden, GATED=True, **common, **_tiled(cut.gate_up),
    )  # fmt: skip
    _sorted_rows[(triton.cdiv(hidden, cut.down.outputs), blocks)](
        inner, order, starts, down_XDF, down_XDF, parts_TCD,
        OUTPUTS=hidden, INPUTS=width, GATED=False, **common, **_tiled(cut.down),
    )  # fmt: skip
    return sum_parts(parts_TCD, weights_TC, None)


def _tiled(tile: ExpertTile) -> dict[str, int]:
    return {
        "BLOCK_N": tile.outputs,
        "BLOCK_D": tile.inputs,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }


def mixture_rows(
    x_TD: Tensor, mixture: Mixture, norm: Norm, *, scratch: Scratch | None = None
) -> Tensor:
    """x + mixture(norm(x)) of any number of tokens. Twin: `reference_experts.mixture_rows`."""
    normed_TD, weights_TC, chosen_TC = route_rows(
        x_TD, mixture.router_XD, mixture.top_k, norm, scratch=scratch
    )
    mixed_TD = mix_experts(normed_TD, weights_TC, chosen_TC, Plain(mixture.stacks))
    return x_TD + add_shared(mixed_TD, normed_TD, mixture)
