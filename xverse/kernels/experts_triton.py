"""X -> X + MIXTURE. The experts of 1 to 16 tokens on a GPU, at the speed of its memory.

Three launches for one token: the router; gate and up of the experts it chose; their down, weighed
and summed with the shared expert and the residual. Which experts those are is read from device
memory, so nothing waits for the host, and only the chosen weights are streamed. Programs of the
shared expert need no choice: they come first, and start while the router is still at work.

More tokens take a fourth launch: each expert's programs find out who chose it, stream its weights
once for them all, and leave parts, which the last launch sums in the order of the choices.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from xverse.kernels.multiply import ROWS
from xverse.kernels.multiply_triton import _products, swiglu, wait_for_input
from xverse.kernels.parts_triton import ExpertTile, some_rows, sum_parts, weight_tile
from xverse.kernels.reference import Norm
from xverse.kernels.reference_experts import Mixture
from xverse.kernels.route_triton import Scratch, route_rows, scaled


class Tiles(NamedTuple):
    """How the two products of the experts are cut."""

    gate_up: ExpertTile
    down: ExpertTile


@triton.jit
def _x_and_gain(source, norm_ptr, place, shared, INPUTS: tl.constexpr):
    """x, and the norm's weight for the shared expert; the router's x has it in, so ones for it.

    Programs that don't wait can only be sure of the second-level cache.
    """
    x = tl.load(source + place, place < INPUTS, 0.0, cache_modifier=".cg")
    return x, tl.load(norm_ptr + place, (place < INPUTS) & shared, 1.0)


@triton.jit
def _one_gate_up(
    x_ptr, normed_ptr, norm_ptr, chosen_ptr, gate_ptr, up_ptr, shared_ptr, out_ptr, eps,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ROUNDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of one token: of the chosen experts, then of the shared ones. [C + S, F].

    The shared expert is S experts side by side. Its programs don't wait for the router, the kernel
    ahead, but normalize x themselves: x is complete once the router has begun to work on it.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    blocks: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    chunks: tl.constexpr = (INPUTS + BLOCK_D - 1) // BLOCK_D
    size: tl.constexpr = OUTPUTS * INPUTS
    slot = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    shared = slot < SHARED
    if shared:
        gate_at = shared_ptr + slot.to(tl.int64) * size
        up_at = gate_at + SHARED * size
        source = x_ptr
    else:
        if PDL:
            cuda.gdc_wait()
        expert = tl.load(chosen_ptr + slot - SHARED).to(tl.int64)
        gate_at = gate_ptr + expert * size
        up_at = up_ptr + expert * size
        source = normed_ptr
    if PDL:
        cuda.gdc_launch_dependents()
    gate = weight_tile(gate_at, row, column, OUTPUTS, INPUTS, INPUTS)
    up = weight_tile(up_at, row, column, OUTPUTS, INPUTS, INPUTS)
    x, gain = _x_and_gain(source, norm_ptr, column, shared, INPUTS)

    scale = 1.0
    if shared:
        squares = tl.zeros([BLOCK_D], tl.float32)
        for chunk in tl.static_range(chunks):
            place = chunk * BLOCK_D + column
            part = tl.load(source + place, place < INPUTS, 0.0, cache_modifier=".cg")
            squares += part.to(tl.float32) * part.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, 0) / INPUTS + eps)

    sums = tl.zeros([BLOCK_N, BLOCK_D // 8], tl.float32)
    sums_up = tl.zeros([BLOCK_N, BLOCK_D // 8], tl.float32)
    for chunk in tl.static_range(chunks):
        now, now_up, x_now, gain_now = gate, up, x, gain
        if chunk + 1 < chunks:
            place = (chunk + 1) * BLOCK_D + column
            gate = weight_tile(gate_at, row, place, OUTPUTS, INPUTS, INPUTS)
            up = weight_tile(up_at, row, place, OUTPUTS, INPUTS, INPUTS)
            x, gain = _x_and_gain(source, norm_ptr, place, shared, INPUTS)
        x_now = scaled(x_now, scale, gain_now.to(tl.float32), dtype, ROUNDED)
        sums += _products(now, x_now, BLOCK_N, BLOCK_D)
        sums_up += _products(now_up, x_now, BLOCK_N, BLOCK_D)
    y = tl.sum(sums, 1).to(dtype).to(tl.float32)
    y = swiglu(y, tl.sum(sums_up, 1).to(dtype).to(tl.float32), dtype)
    out_at = out_ptr + (slot + CHOSEN) % (CHOSEN + SHARED) * OUTPUTS  # the chosen ones first
    tl.store(out_at + row, y.to(dtype), row < OUTPUTS)


@triton.jit
def _down_tile(
    step, chosen, down_ptr, shared_ptr, row,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ALL_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ExpertTile `step` of those that one program of `_one_down` reads; zeros after the last."""
    chunks: tl.constexpr = (INPUTS + BLOCK_D - 1) // BLOCK_D
    slot = step // chunks
    place = step % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    if slot < CHOSEN:
        expert = tl.sum(tl.where(tl.arange(0, ALL_C) == slot, chosen, 0), 0).to(tl.int64)
        at = down_ptr + expert * (OUTPUTS * INPUTS)
    else:
        at = shared_ptr + (slot - CHOSEN).to(tl.int64) * INPUTS
    stride = tl.where(slot < CHOSEN, INPUTS, SHARED * INPUTS)
    more = slot < CHOSEN + SHARED
    return weight_tile(at, tl.where(more, row, OUTPUTS), place, OUTPUTS, INPUTS, stride)


@triton.jit
def _inner(
    step, inner_ptr, INPUTS: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """What tile `step` is multiplied by."""
    chunks: tl.constexpr = (INPUTS + BLOCK_D - 1) // BLOCK_D
    place = step % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    return tl.load(
        inner_ptr + step // chunks * INPUTS + place, (place < INPUTS) & (step < STEPS), 0.0
    )


@triton.jit
def _one_down(
    inner_ptr, weights_ptr, chosen_ptr, down_ptr, shared_ptr, residual_ptr, out_ptr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, CHOSEN: tl.constexpr, SHARED: tl.constexpr,
    ALL_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some outputs of one token, over all its experts: the sum has one order and one owner."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    chunks: tl.constexpr = (INPUTS + BLOCK_D - 1) // BLOCK_D
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    choice = tl.arange(0, ALL_C)
    # The router has ended: the kernel ahead has waited for it. So weights can come before x.
    chosen = tl.load(chosen_ptr + choice, choice < CHOSEN, 0, cache_modifier=".cg")
    shares = tl.load(weights_ptr + choice, choice < CHOSEN, 0.0, cache_modifier=".cg")
    tile = _down_tile(
        0, chosen, down_ptr, shared_ptr, row, OUTPUTS, INPUTS, CHOSEN, SHARED, ALL_C, BLOCK_D
    )
    wait_for_input(PDL)
    x = _inner(0, inner_ptr, INPUTS, BLOCK_D, (CHOSEN + SHARED) * chunks)
    sums = tl.zeros([BLOCK_N, BLOCK_D // 8], tl.float32)
    for step in range((CHOSEN + SHARED) * chunks):
        now, x_now = tile, x
        tile = _down_tile(
            step + 1, chosen, down_ptr, shared_ptr, row,
            OUTPUTS, INPUTS, CHOSEN, SHARED, ALL_C, BLOCK_D,
        )  # fmt: skip
        slot = step // chunks
        share = tl.sum(tl.where(choice == slot, shares.to(tl.float32), 0.0), 0)
        share = tl.where(slot < CHOSEN, share, 1.0)
        x = _inner(step + 1, inner_ptr, INPUTS, BLOCK_D, (CHOSEN + SHARED) * chunks)
        sums += _products(now, x_now.to(tl.float32) * share, BLOCK_N, BLOCK_D)
    y = tl.sum(sums, 1).to(dtype).to(tl.float32)
    y += tl.load(residual_ptr + row, row < OUTPUTS, 0.0).to(tl.float32)
    tl.store(out_ptr + row, y.to(dtype), row < OUTPUTS)


def mixture_rows(
    x_TD: Tensor,
    mixture: Mixture,
    norm: Norm,
    *,
    scratch: Scratch | None = None,
    pdl: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """x + mixture(norm(x)) of 1 to 16 tokens. Twin: `reference_experts.mixture_rows`.

    Tensors contiguous, on one device, of one dtype, which the router's may differ from. `pdl` as in
    `multiply_triton.multiply_rows`; the kernel ahead may write x alone.
    """
    tokens, hidden = x_TD.shape
    assert 1 <= tokens <= ROWS, "more tokens are sorted by expert"
    router_XD, (gate_XFD, up_XFD, down_XDF), shared_gate_up_ND, shared_down_DF, top_k = mixture
    normed_TD, weights_TC, chosen_TC = route_rows(
        x_TD, router_XD, top_k, norm, scratch=scratch, pdl=pdl
    )
    width = gate_XFD.shape[1]
    shared = 0 if shared_down_DF is None else shared_down_DF.shape[1] // width
    tiles = tiles or choose_tiles(tokens, hidden, width)
    if tokens > 1:
        inner_TCF = some_rows(
            normed_TD, chosen_TC, (gate_XFD, up_XFD), shared_gate_up_ND, tiles.gate_up,
            shared=shared, pdl=pdl,
        )  # fmt: skip
        parts_TCD = some_rows(
            inner_TCF, chosen_TC, (down_XDF,), shared_down_DF, tiles.down, shared=shared, pdl=pdl
        )
        return sum_parts(parts_TCD, weights_TC, x_TD, pdl=pdl)
    inner_TCF = x_TD.new_empty(1, top_k + shared, width)
    y_TD = torch.empty_like(x_TD)
    counts = {"CHOSEN": top_k, "SHARED": shared}
    _one_gate_up[(triton.cdiv(width, tiles.gate_up.outputs) * (top_k + shared),)](
        x_TD, normed_TD, norm.weight_D, chosen_TC, gate_XFD, up_XFD,
        gate_XFD if shared_gate_up_ND is None else shared_gate_up_ND, inner_TCF, norm.eps,
        OUTPUTS=width, INPUTS=hidden, ROUNDED=not norm.weight_in_fp32, **counts,
        **_cut(tiles.gate_up, pdl),
    )  # fmt: skip
    _one_down[(triton.cdiv(hidden, tiles.down.outputs),)](
        inner_TCF, weights_TC, chosen_TC, down_XDF,
        down_XDF if shared_down_DF is None else shared_down_DF, x_TD, y_TD,
        OUTPUTS=hidden, INPUTS=width, ALL_C=triton.next_power_of_2(top_k), **counts,
        **_cut(tiles.down, pdl),
    )  # fmt: skip
    return y_TD


def choose_tiles(tokens: int, hidden: int, width: int) -> Tiles:
    """The cuts that should stream best on an H200; `bench/tune_moe.py` tries others."""
    if tokens > 1:
        return Tiles(ExpertTile(64, 128, stages=3), ExpertTile(64, 128, stages=4))
    return Tiles(_one_row_tile(hidden), _one_row_tile(width))


def _one_row_tile(inputs: int) -> ExpertTile:
    """The widest block of which the last one along a row is not too empty: 32 weights a thread.

    With 8 weights side by side, a row takes all threads, so that each has its x at hand.
    """
    widths = (2048, 1024, 512, 256)
    fitting = (wide for wide in widths if inputs >= 0.84 * wide * triton.cdiv(inputs, wide))
    width = next(fitting, 128)
    warps = min(4, max(1, width // 256))
    return ExpertTile(outputs=warps * 1024 // width, inputs=width, warps=warps)


def _cut(tile: ExpertTile, pdl: bool) -> dict[str, object]:
    return {
        "BLOCK_N": tile.outputs,
        "BLOCK_D": tile.inputs,
        "PDL": pdl,
        "num_warps": tile.warps,
        "launch_pdl": pdl,
    }
