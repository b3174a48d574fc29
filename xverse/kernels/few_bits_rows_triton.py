"""X, FEW BITS -> X @ W.T. Products of 2 to 64 tokens with quantized weights, on a GPU.

As `multiply_rows_triton.py`, but weights become bf16 in registers, between shared memory and the
tensor cores, and groups are scaled as sums. Two columns share a byte at 4 bits, and are apart as
two tiles: so x comes with its even columns first, which a kernel ahead sees to, with the norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.between_triton import add_norm
from xverse.kernels.few_bits_triton import one_row
from xverse.kernels.multiply_rows_triton import Scratch, finish
from xverse.kernels.multiply_triton import rounding, wait_for_input
from xverse.kernels.reference import Norm
from xverse.kernels.reference_few_bits import FewBits
from xverse.kernels.tiles import FEW_BITS_ROWS, FewBitsRowsTile, choose_few_bits_rows_tile

# Four bytes: their low halves and their high ones, less 8, as bf16. Bits below the exponent of 128
# are whole numbers, and 136 is taken off again.
_HALVES = tl.constexpr("""
{
    .reg .b32 low, high, one, less;
    mov.b32 one, 0x3F803F80;
    mov.b32 less, 0xC308C308;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, 0x43434343, 0x4140;
    prmt.b32 $1, low, 0x43434343, 0x4342;
    prmt.b32 $2, high, 0x43434343, 0x4140;
    prmt.b32 $3, high, 0x43434343, 0x4342;
    fma.rn.bf16x2 $0, $0, one, less;
    fma.rn.bf16x2 $1, $1, one, less;
    fma.rn.bf16x2 $2, $2, one, less;
    fma.rn.bf16x2 $3, $3, one, less;
}
""")


@triton.jit
def _halves(packed, ASM: tl.constexpr):
    """The even and the odd columns of bytes of two."""
    if ASM:
        return tl.inline_asm_elementwise(
            _HALVES, "=r,=r,=r,=r,r", [packed],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (packed & 15).to(tl.int8) - 8, (packed >> 4).to(tl.int8) - 8


@triton.jit
def _numbers(steps, zero, dtype: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr):
    """steps - zero, which all 16 bit floats have exactly."""
    if ASM:
        steps = steps.to(dtype)
        if ZEROS:
            steps -= zero.to(dtype)[:, None]
        return steps
    else:  # the interpreter computes with bf16 by way of fp32 alone
        steps = steps.to(tl.float32)
        if ZEROS:
            steps -= zero.to(tl.float32)[:, None]
        return steps.to(dtype)


@triton.jit
def _columns_apart(
    x_ptr, norm_ptr, out_ptr, eps,
    INPUTS: tl.constexpr, NORM: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: its even columns, then its odd ones, normalized if so wished."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    pair = tl.arange(0, BLOCK_P)
    inside = pair < INPUTS // 2
    row = tl.program_id(0) * INPUTS
    wait_for_input(PDL)
    even = tl.load(x_ptr + row + 2 * pair, inside, 0.0).to(tl.float32)
    odd = tl.load(x_ptr + row + 2 * pair + 1, inside, 0.0).to(tl.float32)
    if NORM != 0:
        scale = tl.rsqrt(tl.sum(even * even + odd * odd) / INPUTS + eps)
        even *= scale
        odd *= scale
        if NORM == 2:
            even = even.to(dtype).to(tl.float32)
            odd = odd.to(dtype).to(tl.float32)
        even *= tl.load(norm_ptr + 2 * pair, inside, 0.0).to(tl.float32)
        odd *= tl.load(norm_ptr + 2 * pair + 1, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + row + pair, even.to(dtype), inside)
    tl.store(out_ptr + row + INPUTS // 2 + pair, odd.to(dtype), inside)


def columns_apart(x_TD: Tensor, norm: Norm | None = None, *, pdl: bool = False) -> Tensor:
    """x, normalized if so wished, its even columns first. [T, D], contiguous, D even."""
    tokens, inputs = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    weight_D, eps = (x_TD, 0.0) if norm is None else (norm.weight_D, norm.eps)
    block = triton.next_power_of_2(inputs // 2)
    _columns_apart[(tokens,)](
        x_TD, weight_D, out_TD, eps, INPUTS=inputs, NORM=rounding(norm), BLOCK_P=block, PDL=pdl,
        num_warps=4 if block <= 2048 else 8, launch_pdl=pdl,
    )  # fmt: skip
    return out_TD


@triton.jit
def _tokens(
    x_ptr, tokens, start, inside,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """x [ROWS, BLOCK] from column `start` on; zero from column `inside` on."""
    token = tl.arange(0, ROWS)
    place = start + tl.arange(0, BLOCK)
    at = x_ptr + token[:, None] * INPUTS + place[None, :]
    live = (token < tokens)[:, None]
    if not WHOLE:
        live = live & (place < inside)[None, :]
    return tl.load(at, live, 0.0)


@triton.jit
def _packed(
    weight_ptr, row, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Stored weights [BLOCK_N, BLOCK] of rows that there are."""
    place = start + tl.arange(0, BLOCK)
    at = weight_ptr + row[:, None] * WIDTH + place[None, :]
    if WHOLE:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, (place < WIDTH)[None, :], 0.0, eviction_policy="evict_first")


@triton.jit
def _product(
    packed, zero, x, x_odd, BITS: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """(steps - zero) @ x.T of one chunk, in fp32."""
    dtype: tl.constexpr = x.dtype
    if BITS == 4:
        even, odd = _halves(packed, ASM)
        even = _numbers(even, zero, dtype, ZEROS, ASM)
        odd = _numbers(odd, zero, dtype, ZEROS, ASM)
        sums = tl.dot(even, tl.trans(x), input_precision="ieee")
        return tl.dot(odd, tl.trans(x_odd), sums, input_precision="ieee")
    else:
        steps = _numbers(packed, zero, dtype, ZEROS, ASM)
        return tl.dot(steps, tl.trans(x), input_precision="ieee")


@triton.jit
def _scale_of(
    scale_ptr, row, group, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A scale or zero for each row, of a group that may lie behind the last."""
    if GROUPS == 0:
        return tl.full([BLOCK_N], 1.0, tl.float32)
    else:
        return tl.load(scale_ptr + row * GROUPS + tl.minimum(group, GROUPS - 1))


@triton.jit(do_not_specialize=["tokens"])
def _some_rows(
    x_ptr, weight_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, arrived_ptr,
    tokens, outputs,
    INPUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BIASED: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EACH: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [T, N] of up to ROWS tokens, transposed: program (tile of outputs, split of inputs).

    A split takes EACH inputs, a multiple of BLOCK_D, of which GROUP (0: none but the row) is one.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    PER_BYTE: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = INPUTS // PER_BYTE
    BLOCK: tl.constexpr = BLOCK_D // PER_BYTE
    GROUPS: tl.constexpr = 0 if GROUP == 0 else INPUTS // GROUP
    whole: tl.constexpr = SPLITS * EACH == INPUTS
    sides: tl.constexpr = 2 if GATED else 1
    row = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), outputs - 1)
    row_up = row + outputs * (sides - 1)
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    sums_up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    # Asked for a chunk ahead: the compiler does not do so with what is not multiplied by x.
    first = 0 if GROUP == 0 else split * EACH // GROUP
    scale = _scale_of(scale_ptr, row, first, GROUPS, BLOCK_N)
    scale_up = _scale_of(scale_ptr, row_up, first, GROUPS, BLOCK_N)
    wait_for_input(PDL)
    for chunk in tl.range(0, EACH // BLOCK_D, num_stages=STAGES):
        column = split * EACH + chunk * BLOCK_D
        start = column // PER_BYTE
        packed = _packed(weight_ptr, row, start, WIDTH, BLOCK, whole)
        if GATED:
            packed_up = _packed(weight_ptr, row_up, start, WIDTH, BLOCK, whole)
        x = _tokens(x_ptr, tokens, start, WIDTH, INPUTS, ROWS, BLOCK, whole)
        x_odd = x
        if BITS == 4:
            x_odd = _tokens(x_ptr + WIDTH, tokens, start, WIDTH, INPUTS, ROWS, BLOCK, whole)
        zero = 0.0
        zero_up = 0.0
        if ZEROS:
            zero = _scale_of(zero_ptr, row, column // GROUP, GROUPS, BLOCK_N)
            zero_up = _scale_of(zero_ptr, row_up, column // GROUP, GROUPS, BLOCK_N)
        product = _product(packed, zero, x, x_odd, BITS, ZEROS, ASM)
        if GATED:
            product_up = _product(packed_up, zero_up, x, x_odd, BITS, ZEROS, ASM)
        if GROUP == 0:
            sums += product
            if GATED:
                sums_up += product_up
        else:
            now = scale
            scale = _scale_of(scale_ptr, row, (column + BLOCK_D) // GROUP, GROUPS, BLOCK_N)
            sums += product * now.to(tl.float32)[:, None]
            if GATED:
                now_up = scale_up
                group = (column + BLOCK_D) // GROUP
                scale_up = _scale_of(scale_ptr, row_up, group, GROUPS, BLOCK_N)
                sums_up += product_up * now_up.to(tl.float32)[:, None]
    if GROUP == 0:
        sums *= tl.load(scale_ptr + row).to(tl.float32)[:, None]
        if GATED:
            sums_up *= tl.load(scale_ptr + row_up).to(tl.float32)[:, None]
    finish(
        sums, sums_up, bias_ptr, residual_ptr, out_ptr, sums_ptr, arrived_ptr,
        tokens, outputs, BIASED, GATED, RESIDUAL, ROWS, BLOCK_N, SPLITS,
    )  # fmt: skip


def some_rows(
    x_TD: Tensor,
    weight: FewBits,
    *,
    norm: Norm | None = None,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    gated: bool = False,
    scratch: Scratch | None = None,
    pdl: bool = False,
    tile: FewBitsRowsTile | None = None,
) -> Tensor:
    """x @ weight.T of 1 to 64 tokens with its surroundings. -> y [T, N].

    Twin: `reference_few_bits.multiply_rows`. Tensors contiguous, all that is not weights of one
    dtype, on one device. `pdl` as in `multiply_triton.one_row`.
    """
    tokens, inputs = x_TD.shape
    packed, scale, zero = weight
    outputs = len(packed) // 2 if gated else len(packed)
    assert tokens <= FEW_BITS_ROWS
    assert inputs == weight.inputs
    assert packed.numel() < 2**31, "offsets are 32 bits wide"
    if weight.bits == 4:
        x_TD = columns_apart(x_TD, norm, pdl=pdl)
    elif norm is not None:
        _, x_TD = add_norm(x_TD, None, norm, pdl=pdl)
    group = weight.group or (0 if zero is None else inputs)
    tile = tile or choose_few_bits_rows_tile(tokens, outputs, inputs, group, gated=gated)
    assert group % tile.inputs == 0, "a chunk has one scale"
    rows = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    tiles = triton.cdiv(outputs, tile.outputs)
    each = triton.cdiv(triton.cdiv(inputs, tile.inputs), tile.splits) * tile.inputs
    splits = triton.cdiv(inputs, each)
    y_TN = x_TD.new_empty(tokens, outputs)
    sums, arrived = x_TD, x_TD  # touched by splits alone
    if splits > 1:
        size = tiles * splits * tile.outputs * rows * (2 if gated else 1)
        sums, arrived = (scratch or Scratch()).room(size, tiles, x_TD.device)
    _some_rows[(tiles, splits)](
        x_TD, packed, scale, zero, bias_N, residual_TN, y_TN, sums, arrived, tokens, outputs,
        INPUTS=inputs, BITS=weight.bits, GROUP=group, ZEROS=zero is not None,
        BIASED=bias_N is not None, GATED=gated, RESIDUAL=residual_TN is not None,
        ROWS=rows, BLOCK_N=tile.outputs, BLOCK_D=tile.inputs, EACH=each, SPLITS=splits,
        STAGES=tile.stages, ASM=x_TD.is_cuda and x_TD.dtype == torch.bfloat16, PDL=pdl,
        num_warps=tile.warps, launch_pdl=pdl,
    )  # fmt: skip
    return y_TN


def multiply_rows(
    x_TD: Tensor,
    weight: FewBits,
    *,
    norm: Norm | None = None,
    bias_N: Tensor | None = None,
    residual_TN: Tensor | None = None,
    gated: bool = False,
    scratch: Scratch | None = None,
    pdl: bool = False,
) -> Tensor:
    """x @ weight.T of 1 to 64 tokens. Twin: `reference_few_bits.multiply_rows`."""
    if len(x_TD) == 1 and x_TD.dtype == torch.bfloat16:
        return one_row(
            x_TD, weight, norm=norm, bias_N=bias_N, residual_TN=residual_TN, gated=gated, pdl=pdl
        )
    return some_rows(
        x_TD, weight, norm=norm, bias_N=bias_N, residual_TN=residual_TN, gated=gated,
        scratch=scratch, pdl=pdl,
    )  # fmt: skip


@triton.jit
def _embed_rows(
    ids_ptr, table_ptr, scale_ptr, zero_ptr, out_ptr,
    INPUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token a program: its row of the table, dequantized."""
    column = tl.arange(0, BLOCK_D)
    inside = column < INPUTS
    token = tl.program_id(0)
    wait_for_input(PDL)
    row = tl.load(ids_ptr + token).to(tl.int64)
    PER_BYTE: tl.constexpr = 8 // BITS
    at = table_ptr + row * (INPUTS // PER_BYTE) + column // PER_BYTE
    steps = tl.load(at, inside, 0.0)
    if BITS == 4:
        steps = ((steps >> (column % 2 * 4).to(tl.uint8)) & 15).to(tl.int8) - 8
    x = steps.to(tl.float32)
    group = row * (INPUTS // GROUP) + column // GROUP
    if ZEROS:
        x -= tl.load(zero_ptr + group, inside, 0).to(tl.float32)
    x *= tl.load(scale_ptr + group, inside, 0.0).to(tl.float32)
    tl.store(out_ptr + token * INPUTS + column, x.to(out_ptr.dtype.element_ty), inside)


def embed_rows(ids_T: Tensor, table: FewBits, *, pdl: bool = False) -> Tensor:
    """Rows `ids` (int64) of the table. Twin: `reference_few_bits.embed_rows`.

    Ids are not checked: they are the decoder's own choices.
    """
    packed, scale, zero = table
    x_TD = scale.new_empty(len(ids_T), table.inputs)
    block = triton.next_power_of_2(table.inputs)
    _embed_rows[(len(ids_T),)](
        ids_T, packed, scale, zero, x_TD, INPUTS=table.inputs, BITS=table.bits,
        GROUP=table.group or table.inputs, ZEROS=zero is not None, BLOCK_D=block, PDL=pdl,
        num_warps=4 if block <= 4096 else 8, launch_pdl=pdl,
    )  # fmt: skip
    return x_TD
