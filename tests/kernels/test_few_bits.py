"""Products of a decode step with quantized weights against their twins, in Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

from xverse.kernels import reference_few_bits
from xverse.kernels.reference import Norm
from xverse.kernels.reference_few_bits import FewBits

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are checks by Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed, and its interpreter is the test")

from xverse.kernels import few_bits_rows_triton
from xverse.kernels.few_bits_rows_triton import some_rows
from xverse.kernels.few_bits_triton import one_row
from xverse.kernels.multiply_rows_triton import Scratch
from xverse.kernels.tiles import (
    FewBitsRowsTile,
    WordsTile,
    choose_few_bits_rows_tile,
    choose_words_tile,
)

KINDS = ("int4", "int8", "fp8")
CASES = [  # kind, columns of a group (0: the row), with zeros
    ("int4", 0, False),
    ("int4", 0, True),
    ("int4", 64, False),
    ("int4", 32, True),
    ("int8", 0, False),
    ("int8", 96, False),
    ("int8", 32, True),
    ("fp8", 0, False),
]


def matrix(kind: str, group: int, *, zeros: bool, outputs: int = 26, inputs: int = 192) -> FewBits:
    """Every step that can be stored, scales that differ, and products of about 1."""
    drawn = torch.Generator().manual_seed(outputs + inputs + group)
    size = (outputs, inputs)
    weight = torch.randint(-128, 128, size, generator=drawn, dtype=torch.int8)
    if kind == "int4":
        weight = weight.view(torch.uint8)[:, : inputs // 2].clone()
    elif kind == "fp8":
        weight[(weight & 127) == 127] = 1  # instead of NaN the smallest, which is not normal
        weight = weight.view(torch.float8_e4m3fn)
    groups = (outputs, inputs // group) if group else (outputs,)
    largest = {"int4": 8, "int8": 128, "fp8": 448}[kind]
    scale = (0.5 + torch.rand(groups, generator=drawn)) / largest / 8
    zero = torch.randint(-8, 8, groups, generator=drawn, dtype=torch.int8) if zeros else None
    return FewBits(weight, scale.bfloat16(), zero)


def around(tokens: int, dtype: torch.dtype, *, gated: bool, in_fp32: bool) -> dict[str, object]:
    drawn = torch.Generator().manual_seed(tokens)
    norm_D = (1 + torch.randn(192, generator=drawn) / 4).to(dtype)
    return {
        "norm": Norm(norm_D, 1e-5, in_fp32),
        "bias_N": torch.randn(26, generator=drawn).to(dtype),
        "residual_TN": torch.randn(tokens, 13 if gated else 26, generator=drawn).to(dtype),
        "gated": gated,
    }


def seeded(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, 192, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def close(fast: Tensor, twin: Tensor) -> bool:
    """Equal but for a few that were rounded to the other side."""
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-9}[twin.dtype]
    return torch.allclose(fast, twin, rtol=step, atol=step)


@pytest.mark.parametrize(("kind", "group", "zeros"), CASES)
@pytest.mark.parametrize("gated", [False, True])
def test_one_row(kind: str, group: int, zeros: bool, gated: bool) -> None:
    """Tiles that end in the middle of a row, and behind the last."""
    weight, x = matrix(kind, group, zeros=zeros), seeded(1, torch.bfloat16)
    for tile in (WordsTile(16, 16), WordsTile(8, 64, tiles=2)):
        args = around(1, torch.bfloat16, gated=gated, in_fp32=tile.outputs == 8)
        assert close(
            one_row(x, weight, tile=tile, **args),
            reference_few_bits.multiply_rows(x, weight, **args),
        )


def test_one_row_is_summed_as_exactly_as_fp32_can() -> None:
    """Large sums that cancel, and inputs near both ends of what activations are."""
    for kind in KINDS:
        weight = matrix(kind, 0, zeros=False)
        for size in (2.0**-20, 1.0, 2.0**20):
            x = (seeded(1, torch.bfloat16).float() * size + 8 * size).bfloat16()
            exact = (x.double() @ reference_few_bits.dequantize(weight).double().T).float()
            fast = one_row(x, weight, tile=WordsTile(32, 32)).float()
            assert (fast - exact).norm() < 2**-8 * exact.norm(), (kind, size)


@pytest.mark.parametrize(("kind", "group", "zeros"), CASES)
@pytest.mark.parametrize(
    ("tokens", "tile", "gated"),
    [
        (2, FewBitsRowsTile(16, 32, stages=2), False),
        (17, FewBitsRowsTile(16, 32, stages=3, splits=4), True),
        (40, FewBitsRowsTile(32, 32, stages=2, splits=2), False),
    ],
)
def test_some_rows(
    kind: str, group: int, zeros: bool, tokens: int, tile: FewBitsRowsTile, gated: bool
) -> None:
    """In fp16: the interpreter cannot multiply matrices of bf16."""
    weight, x = matrix(kind, group, zeros=zeros), seeded(tokens, torch.float16)
    weight = weight._replace(scale=weight.scale.half())
    args = around(tokens, torch.float16, gated=gated, in_fp32=tokens == 2)
    assert close(
        some_rows(x, weight, tile=tile, **args), reference_few_bits.multiply_rows(x, weight, **args)
    )


def test_splits_give_equal_bits_again() -> None:
    weight, x, scratch = matrix("int4", 32, zeros=False), seeded(5, torch.float16), Scratch()
    tile = FewBitsRowsTile(16, 32, stages=2, splits=3)
    first, again = (some_rows(x, weight, tile=tile, scratch=scratch) for _ in range(2))
    assert torch.equal(first, again)
    assert not scratch.arrived.any()


@pytest.mark.parametrize(("kind", "group", "zeros"), CASES)
def test_embedding(kind: str, group: int, zeros: bool) -> None:
    table = matrix(kind, group, zeros=zeros)
    ids = torch.tensor([3, 25, 0, 3])
    fast = few_bits_rows_triton.embed_rows(ids, table)
    assert torch.equal(fast, reference_few_bits.embed_rows(ids, table))


def test_even_columns_come_first() -> None:
    x = torch.arange(12.0).half().view(2, 6)
    assert few_bits_rows_triton.columns_apart(x).tolist() == [
        [0, 2, 4, 1, 3, 5],
        [6, 8, 10, 7, 9, 11],
    ]


def test_what_the_kernels_do_not_read_is_said() -> None:
    assert not reference_few_bits.why_not(matrix("int4", 32, zeros=True))
    assert "48 inputs" in reference_few_bits.why_not(matrix("int8", 0, zeros=False, inputs=48))
    assert "groups of 16" in reference_few_bits.why_not(matrix("int4", 16, zeros=False))


@pytest.mark.parametrize("inputs", [64, 4096, 5120, 8192, 11008, 13824, 22016])
def test_chosen_cuts_fit(inputs: int) -> None:
    """Threads load 16 bytes each; chunks of inputs have one scale; memory of a multiprocessor."""
    for bits, outputs, gated in ((4, 4096, False), (8, 100534, False), (4, 11008, True)):
        words = inputs * bits // 32
        tile = choose_words_tile(outputs, words, gated=gated)
        assert tile.words == tile.warps * 32 * 4
        assert tile.words * -(-words // tile.words) <= max(128, 1.18 * words + 128)
        for group in (0, 32, 64, 128, 256):
            for tokens in (2, 33, 64):
                cut = choose_few_bits_rows_tile(tokens, outputs, inputs, group, gated=gated)
                assert group % cut.inputs == 0
                weights = cut.outputs * (2 if gated else 1) * bits // 8
                assert cut.stages * cut.inputs * (weights + 2 * 64) <= 227 * 1024
