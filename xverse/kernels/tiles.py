"""SHAPE -> TILE. How the products of a decode step are cut, and why that way."""

from math import gcd
from typing import NamedTuple

MOST_ROWS = 32  # tokens up to which our kernels stream weights; beyond, cuBLAS multiplies
FEW_BITS_ROWS = 64  # likewise where weights are quantized: cuBLAS would need them dequantized
MULTIPROCESSORS = 132  # of an H200; of other GPUs, programs are less even
NORM_ON_LOAD = 0  # tokens up to which a product normalizes its input itself, by ready squares


class Tile(NamedTuple):
    """The cut of one token's product: outputs and inputs a tile, tiles a program, warps."""

    outputs: int
    inputs: int
    tiles: int = 1
    warps: int = 4


class RowsTile(NamedTuple):
    """The cut of a product of 2 to 64 tokens.

    `stages`: tiles of weights in shared memory, all but one of them on their way. `splits`:
    programs that share the inputs of a tile and join their sums. `tma`: the copy engine fetches.
    `early`: weights are asked for before the kernel ahead has ended; otherwise after it, and x
    comes through shared memory side by side with them.
    """

    outputs: int
    inputs: int
    stages: int
    warps: int = 4
    splits: int = 1
    tma: bool = False
    early: bool = True


class WordsTile(NamedTuple):
    """The cut of one token's product with few bits: outputs, and words of 32 bits, a tile; tiles a
    program; warps; tiles that are on their way (gate and up are two). `near`: KiB of its
    weights that a program first asks to come into the cache, which has 50 MiB for all."""

    outputs: int
    words: int
    tiles: int = 1
    warps: int = 4
    ahead: int = 2
    near: int = 48


class FewBitsRowsTile(NamedTuple):
    """The cut of a product of 2 to 64 tokens with few bits; as in `RowsTile` and `WordsTile`."""

    outputs: int
    inputs: int
    stages: int
    warps: int = 4
    splits: int = 1
    near: int = 24


def choose_tile(outputs: int, inputs: int, *, gated: bool) -> Tile:
    """The cut of one token that streams best on an H200 (`bench/tune_decode.py`), and its like.

    GB/s of weights, launches included (copy: 4,270): q, k, v of 7B 4,260; output 4,020; gate and
    up 4,350; down 4,260; head 4,570.
    """
    width = _width(inputs)
    if outputs > 32768:
        return Tile(outputs=32768 // width, inputs=width, warps=8)
    if width < 4096:  # 13B: with tiles as large as 7B's, 139 tokens a second
        return Tile(outputs=4096 // width, inputs=width)
    if gated:
        return Tile(outputs=2, inputs=width, warps=8)
    if outputs <= 8192:
        return Tile(outputs=2, inputs=width, tiles=2)
    return Tile(outputs=4, inputs=2048)


def choose_words_tile(outputs: int, inputs: int, bits: int, *, gated: bool) -> WordsTile:
    """The cut of one token's product with few bits (`bench/quant_decode_gpu.py`); `outputs` as they
    come out. A thread has 32 columns of x, if a row has as many for all."""
    width = _width(inputs)
    warps, sides = max(1, width // 1024), 2 if gated else 1
    if bits == 8 and 4096 == width < inputs:  # too many registers: half of the columns a thread
        width = 2048
    blocks = -(-inputs // width)
    # Tiles and blocks are unrolled: not too many instructions.
    tiles = range(1, max(1, min(8, 16 // (blocks * sides))) + 1)
    best = min(tiles, key=lambda tiles: _longest(outputs, 4 * tiles, warps))
    crowded, _ = _longest(outputs, 4 * best, warps)
    ahead, near = 2 if bits == 4 else 1, 0 if crowded else 48
    return WordsTile(4, width * bits // 32, best, warps, ahead, near)


def _longest(outputs: int, each: int, warps: int) -> tuple[bool, int]:
    """How bad programs of `each` outputs are: with more than 12 warps a multiprocessor the next
    kernel's find no room beside them; then the most outputs that one of these has to do. Where
    there is never room, few programs are best."""
    programs = -(-outputs // each)
    programs = -(-programs // MULTIPROCESSORS)
    crowded = programs * warps > 12
    return crowded, -each if crowded else programs * each


def choose_rows_tile(tokens: int, outputs: int, inputs: int, *, gated: bool) -> RowsTile:
    """The cut of 2 to 64 tokens; `outputs` as they come out, half of the weight's if gated.

    As `bench/tune_rows.py` found on an H200, norms included. GB/s of weights at 8 and 32 tokens: q,
    k, v of 7B 3,700 and 3,550; output 3,050 and 2,920; gate and up 3,880 and 3,310; down 3,550 and
    3,450; head 4,320 and 4,120. Narrow outputs are split along the inputs.
    """
    splits = 2 if outputs <= 132 * 64 and inputs >= 1024 else 1
    return RowsTile(
        outputs=64,
        inputs=128 if inputs >= 128 else 64,
        stages=3 if gated else 5 if splits > 1 else 4,
        splits=splits,
        early=False,
    )


def choose_few_bits_rows_tile(
    tokens: int, outputs: int, inputs: int, group: int, *, gated: bool
) -> FewBitsRowsTile:
    """The cut of 2 to 64 tokens with few bits (`bench/quant_decode_gpu.py`); a chunk of inputs has
    one scale a row. Two sides of 128 outputs and 64 tokens are too much for the registers."""
    chunk = gcd(group, 128) if group else 128
    wide = 128 if tokens > 32 and outputs >= 132 * 128 and not gated else 64
    room = {16: (6, 4), 32: (4, 3), 64: (3, 2)}[16 if tokens <= 16 else 32 if tokens <= 32 else 64]
    tiles, at_once = -(-outputs // wide), MULTIPROCESSORS * room[gated]

    def slowness(splits: int) -> float:  # of a round of programs, and of joining their sums
        ragged = -(-inputs // chunk) % splits > 0  # the last one's loads have masks, and so all
        return -(-tiles * splits // at_once) / splits + splits / 50 + ragged / 20

    splits = min(range(1, max(1, min(8, inputs // 512)) + 1), key=slowness)
    return FewBitsRowsTile(wide, chunk, stages=3 if tokens > 32 else 4, splits=splits)


def block_of_rows(tokens: int) -> int:
    """Tokens that a program computes, used or not: 16, 32 or 64."""
    assert 1 <= tokens <= MOST_ROWS, "more tokens are for the tensor cores' own libraries"
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def _width(inputs: int) -> int:
    """The widest block of which the last one along a row is not too empty."""
    if inputs <= 1024:
        return max(128, 1 << (inputs - 1).bit_length())
    for width in (4096, 2048):
        if inputs >= 0.85 * width * -(-inputs // width):
            return width
    return 1024
