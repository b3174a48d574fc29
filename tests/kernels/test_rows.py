"""The kernels of steps of 2 and more tokens against their plain twins, in Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

from xverse.kernels import reference
from xverse.kernels.reference import Norm
from xverse.kernels.tiles import MOST_ROWS, RowsTile, choose_rows_tile

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are checks by Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed, and its interpreter is the test")

from xverse.kernels import between_triton, multiply_rows_triton
from xverse.kernels.multiply_rows_triton import Scratch, some_rows

DTYPES = [torch.float32, torch.float16]
TILES = [
    RowsTile(16, 32, stages=2),  # 72 inputs and 26 outputs end in the middle of a tile
    RowsTile(16, 32, stages=3, splits=2),
    RowsTile(32, 16, stages=2, splits=4),  # 5 chunks: the last of 3 splits that are left is short
    RowsTile(32, 32, stages=2, splits=2),
]


def seeded(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + seed)).to(dtype)


def close(fast: Tensor, twin: Tensor) -> bool:
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[twin.dtype]
    return torch.allclose(fast, twin, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    ("tokens", "tile", "gated"),
    [
        (2, 0, True),
        (7, 1, False),
        (7, 3, True),
        (16, 2, True),
        (17, 3, True),
        (29, 0, False),
        (31, 1, True),
        (32, 2, False),
    ],
)
def test_products_with_all_that_surrounds_them(tokens: int, tile: int, gated: bool) -> None:
    dtype = DTYPES[tile % 2]
    x, weight = seeded(tokens, 72, dtype=dtype), seeded(26, 72, dtype=dtype) / 8
    args = {
        "norm": Norm(1 + seeded(72, dtype=dtype) / 4, 1e-5, weight_in_fp32=tokens % 2 == 0),
        "bias_N": seeded(26, dtype=dtype),
        "residual_TN": seeded(tokens, 13 if gated else 26, dtype=dtype),
        "gated": gated,
    }
    fast = some_rows(x, weight, **args, tile=TILES[tile])
    assert close(fast, reference.multiply_rows(x, weight, **args))


def test_splits_give_equal_bits_again_and_leave_no_trace() -> None:
    x, weight, scratch = seeded(5, 96), seeded(40, 96), Scratch()
    tile = RowsTile(32, 32, stages=2, splits=3)
    first = some_rows(x, weight, scratch=scratch, tile=tile)
    wider = some_rows(x, seeded(70, 96), scratch=scratch, tile=tile)  # memory grows
    again = some_rows(x, weight, scratch=scratch, tile=tile)
    assert torch.equal(first, again)
    assert close(wider, x @ seeded(70, 96).T)
    assert not scratch.arrived.any()


def test_one_token_takes_its_own_kernel() -> None:
    x, weight, residual = seeded(1, 72), seeded(26, 72), seeded(1, 26)
    norm = Norm(1 + seeded(72) / 4, 1e-5, weight_in_fp32=True)
    assert close(
        multiply_rows_triton.multiply_rows(x, weight, norm=norm),
        reference.multiply_rows(x, weight, norm=norm),
    )
    assert close(
        multiply_rows_triton.multiply_rows(x, weight, residual_TN=residual),
        reference.multiply_rows(x, weight, residual_TN=residual),
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("weight_in_fp32", [True, False])
def test_sum_and_norm(dtype: torch.dtype, weight_in_fp32: bool) -> None:
    x, residual = seeded(5, 72, dtype=dtype), seeded(5, 72, dtype=dtype, seed=1)
    norm = Norm(1 + seeded(72, dtype=dtype) / 4, 1e-5, weight_in_fp32)
    for added in (None, residual):
        before = x.clone()
        total, normed = between_triton.add_norm(x, added, norm)
        twin_total, twin_normed = reference.add_norm(x, added, norm)
        assert close(total, twin_total)  # in bf16 the interpreter cuts off what torch rounds
        assert close(normed, twin_normed)
        assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 1100])
def test_swiglu_of_joined_projections(dtype: torch.dtype, width: int) -> None:
    joined = seeded(3, 2 * width, dtype=dtype)
    assert close(between_triton.swiglu_joined(joined), reference.swiglu_joined(joined))


def test_embedding() -> None:
    table = seeded(11, 72, dtype=torch.float16)
    ids = torch.tensor([3, 10, 0, 3])
    assert torch.equal(between_triton.embed_rows(ids, table), reference.embed_rows(ids, table))


@pytest.mark.parametrize("tokens", [2, 16, 17, 32, 33, MOST_ROWS])
def test_chosen_tiles_fit_the_chip(tokens: int) -> None:
    """Two matrices of bf16 in flight within the 227 KiB of a Hopper's multiprocessor."""
    for outputs, inputs in [(64, 64), (12288, 4096), (4096, 11008), (100534, 4096), (22016, 8192)]:
        for gated in (False, True):
            tile = choose_rows_tile(tokens, outputs, inputs, gated=gated)
            weights = tile.stages * tile.outputs * tile.inputs * 2 * (1 + gated)
            assert weights + 2 * MOST_ROWS * tile.inputs <= 227 * 1024
            assert 1 <= tile.splits <= -(-inputs // tile.inputs)
