"""SHAPE -> TILE. How the products of a decode step are cut, and why that way."""

from math import gcd
from typing import NamedTuple

MOST_ROWS = 32  # tokens up to which our kernels stream weights; beyond, cuBLAS multiplies
FEW_BITS_ROWS = 64  # likewise where weights are quantized: cuBLAS would need them dequantized


class Tile(NamedTuple):
    """The cut of one token's product: outputs and inputs a tile, tiles a program, warps."""

    outputs: int
    inputs: int
    tiles: int = 1
    warps: int = 4


class RowsTile(NamedTuple):
    """The cut of a product of 2 to 64 tokens.

    `stages`: tiles of weights in shared memory, all but one of them on their way. `splits`:
    programs that share the inputs of a tile and join their sums.
    """

    outputs: int
    inputs: int
    stages: int
    warps: int = 4
    splits: int = 1


class WordsTile(NamedTuple):
    """The cut of one token's product with few bits: outputs, and words of 32 bits, a tile; tiles a
    program; warps."""

    outputs: int
    words: int
    tiles: int = 1
    warps: int = 4


class FewBitsRowsTile(NamedTuple):
    """The cut of a product of 2 to 64 tokens with few bits; as in `RowsTile`."""

    outputs: int
    inputs: int
    stages: int
    warps: int = 4
    splits: int = 1


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


def choose_words_tile(outputs: int, words: int, *, gated: bool) -> WordsTile:
    """The cut of one token's product with few bits (`bench/quant_decode_gpu.py`); `outputs` as they
    come out, `words` of 32 bits a row."""
    block = next((w for w in (1024, 512, 256) if words >= 0.85 * w * -(-words // w)), 128)
    rows, programs = 4, 132 * (3 if gated else 4)  # what the chip holds at once
    # Tiles and blocks of words are unrolled: not too many instructions.
    most = max(1, 8 * block // words)
    tiles = max(1, min(most, -(-outputs // (rows * programs))))
    return WordsTile(rows, block, tiles, warps=block // 128)


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
    )


def choose_few_bits_rows_tile(
    tokens: int, outputs: int, inputs: int, group: int, *, gated: bool
) -> FewBitsRowsTile:
    """The cut of 2 to 64 tokens with few bits (`bench/quant_decode_gpu.py`); a chunk of inputs has
    one scale a row. Two sides of 128 outputs and 64 tokens are too much for the registers."""
    chunk = gcd(group, 128) if group else 128
    wide = 128 if tokens > 32 and outputs >= 132 * 128 and not gated else 64
    splits = min(4, max(1, 264 * 64 // outputs)) if inputs >= 1024 else 1
    return FewBitsRowsTile(wide, chunk, stages=4, warps=4, splits=splits)


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
