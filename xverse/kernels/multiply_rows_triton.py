"""X, W -> X @ W.T. Matrix products of 2 to 64 tokens on a GPU, at the speed of its memory.

Weights are the tall side of the tensor cores' tiles and are read once. The inputs of narrow
products are split among programs; the one that arrives last adds all sums, in order, so that equal
inputs give equal bits. The norm ahead is a kernel of its own: here every program would repeat it.
"""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.between_triton import add_norm
from xverse.kernels.multiply_triton import one_row, rounded, swiglu, wait_for_input
from xverse.kernels.reference import Norm
from xverse.kernels.tiles import RowsTile, block_of_rows, choose_rows_tile


@dataclass
class Scratch:
    """Where the splits of a product meet; one for each stream that runs steps.

    Grows to what the widest product needs, when that is first multiplied: before a capture, run
    the step once. `arrived` is zero between launches.
    """

    sums: Tensor = field(default_factory=lambda: torch.empty(0))  # fp32
    arrived: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    def room(self, sums: int, tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Memory for that many partial sums and tiles."""
        if self.sums.numel() < sums or self.sums.device != device:
            self.sums = torch.empty(sums, dtype=torch.float32, device=device)
        if self.arrived.numel() < tiles or self.arrived.device != device:
            self.arrived = torch.zeros(tiles, dtype=torch.int32, device=device)
        return self.sums, self.arrived


@triton.jit
def _weights(
    weight_ptr, first, outputs, start,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INPUTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_N, BLOCK_D] from row `first` and column `start`; zero past the last.

    Rows past the last are the last one again: what they give is never stored.
    """
    row = tl.minimum(first + tl.arange(0, BLOCK_N), outputs - 1)
    place = start + tl.arange(0, BLOCK_D)
    at = weight_ptr + row[:, None] * INPUTS + place[None, :]
    if WHOLE:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, (place < INPUTS)[None, :], 0.0, eviction_policy="evict_first")


@triton.jit
def _finish(
    sums, sums_up, bias_ptr, residual_ptr, out_ptr, tokens, outputs, tile,
    BIASED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What follows the product: bias, SwiGLU, residual."""
    dtype = out_ptr.dtype.element_ty
    token = tl.arange(0, ROWS)
    row = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    live = row < outputs
    y = rounded(sums, bias_ptr, row, live, dtype, BIASED)
    if GATED:
        up = rounded(sums_up, bias_ptr, row + outputs, live, dtype, BIASED)
        y = swiglu(y, up, dtype)
    place = token[None, :] * outputs + row
    inside = live & (token < tokens)[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + place, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(dtype), inside)


@triton.jit
def finish(
    sums, sums_up, bias_ptr, residual_ptr, out_ptr, sums_ptr, arrived_ptr, tokens, outputs,
    BIASED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """What follows the sums of program (tile of outputs, split): the last of the splits to arrive
    adds all of them, in order."""
    tile, split = tl.program_id(0), tl.program_id(1)
    if SPLITS == 1:
        _finish(
            sums, sums_up, bias_ptr, residual_ptr, out_ptr, tokens, outputs, tile,
            BIASED, GATED, RESIDUAL, ROWS, BLOCK_N,
        )  # fmt: skip
    else:
        size: tl.constexpr = BLOCK_N * ROWS
        halves: tl.constexpr = 2 if GATED else 1
        within = tl.arange(0, BLOCK_N)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        lead = sums_ptr + tile * (SPLITS * halves * size) + within
        tl.store(lead + split * (halves * size), sums)
        if GATED:
            tl.store(lead + split * (halves * size) + size, sums_up)
        tl.debug_barrier()  # all of the program's stores, before the one that announces them
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
            sums_up = tl.zeros([BLOCK_N, ROWS], tl.float32)
            for other in tl.static_range(SPLITS):  # past the first-level cache, which may be old
                at = lead + other * (halves * size)
                sums += tl.load(at, cache_modifier=".cg")
                if GATED:
                    sums_up += tl.load(at + size, cache_modifier=".cg")
            _finish(
                sums, sums_up, bias_ptr, residual_ptr, out_ptr, tokens, outputs, tile,
                BIASED, GATED, RESIDUAL, ROWS, BLOCK_N,
            )  # fmt: skip
            tl.store(arrived_ptr + tile, 0)


@triton.jit(do_not_specialize=["tokens"])
def _some_rows(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, arrived_ptr, tokens, outputs,
    INPUTS: tl.constexpr, BIASED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EACH: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [T, N] of up to ROWS tokens, transposed: program (tile of outputs, split of inputs).

    A split takes EACH inputs, a multiple of BLOCK_D.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    first = tile * BLOCK_N
    whole: tl.constexpr = SPLITS * EACH == INPUTS
    token = tl.arange(0, ROWS)
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    sums_up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    wait_for_input(PDL)
    for chunk in tl.range(0, EACH // BLOCK_D, num_stages=STAGES):
        start = split * EACH + chunk * BLOCK_D
        now = _weights(weight_ptr, first, outputs, start, BLOCK_N, BLOCK_D, INPUTS, whole)
        if GATED:
            now_up = _weights(
                weight_ptr, first + outputs, 2 * outputs, start, BLOCK_N, BLOCK_D, INPUTS, whole
            )
        place = start + tl.arange(0, BLOCK_D)
        inside = (token < tokens)[:, None] & (place < INPUTS)[None, :]
        x = tl.load(x_ptr + token[:, None] * INPUTS + place[None, :], inside, 0.0)
        sums = tl.dot(now, tl.trans(x), sums, input_precision="ieee")
        if GATED:
            sums_up = tl.dot(now_up, tl.trans(x), sums_up, input_precision="ieee")

    finish(
        sums, sums_up, bias_ptr, residual_ptr, out_ptr, sums_ptr, arrived_ptr,
        tokens, outputs, BIASED, GATED, RESIDUAL, ROWS, BLOCK_N, SPLITS,
    )  # fmt: skip


def some_rows(
    x_TD: Tensor,
    weight_ND: Tensor,
    *,
    norm: Norm | None = None,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    gated: bool = False,
    scratch: Scratch | None = None,
    pdl: bool = False,
    tile: RowsTile | None = None,
) -> Tensor:
    """x @ weight.T of 1 to 64 tokens with its surroundings. -> y [T, N].

    Twin: `reference.multiply_rows`. Tensors contiguous, of one dtype, on one device. `pdl` as in
    `multiply_triton.one_row`.
    """
    tokens, inputs = x_TD.shape
    outputs = weight_ND.shape[0] // 2 if gated else weight_ND.shape[0]
    assert weight_ND.numel() < 2**31, "offsets are 32 bits wide"
    if norm is not None:
        _, x_TD = add_norm(x_TD, None, norm, pdl=pdl)
    tile = tile or choose_rows_tile(tokens, outputs, inputs, gated=gated)
    rows, tiles = block_of_rows(tokens), triton.cdiv(outputs, tile.outputs)
    each = triton.cdiv(triton.cdiv(inputs, tile.inputs), tile.splits) * tile.inputs
    splits = triton.cdiv(inputs, each)
    y_TN = x_TD.new_empty(tokens, outputs)
    sums, arrived = x_TD, x_TD  # touched by splits alone
    if splits > 1:
        size = tiles * splits * tile.outputs * rows * (2 if gated else 1)
        sums, arrived = (scratch or Scratch()).room(size, tiles, x_TD.device)
    _some_rows[(tiles, splits)](
        x_TD, weight_ND, bias_N, residual_TN, y_TN, sums, arrived, tokens, outputs,
        INPUTS=inputs, BIASED=bias_N is not None, GATED=gated, RESIDUAL=residual_TN is not None,
        ROWS=rows, BLOCK_N=tile.outputs, BLOCK_D=tile.inputs, EACH=each, SPLITS=splits,
        STAGES=tile.stages, PDL=pdl, num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return y_TN


def multiply_rows(
    x_TD: Tensor,
    weight_ND: Tensor,
    *,
    norm: Norm | None = None,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    gated: bool = False,
    scratch: Scratch | None = None,
    pdl: bool = False,
) -> Tensor:
    """x @ weight.T of 1 to 64 tokens with its surroundings. Twin: `reference.multiply_rows`."""
    if x_TD.shape[0] == 1:
        return one_row(
            x_TD, weight_ND, norm=norm, bias_N=bias_N, residual_TN=residual_TN, gated=gated, pdl=pdl
        )
    return some_rows(
        x_TD, weight_ND, norm=norm, bias_N=bias_N, residual_TN=residual_TN, gated=gated,
        scratch=scratch, pdl=pdl,
    )  # fmt: skip
