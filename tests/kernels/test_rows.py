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
    RowsTile(16, 32, stages=2, splits=3, tma=True),
    RowsTile(32, 32, stages=2, splits=2, early=False),
]


def seeded(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + seed)).to(dtype)


def close(fast: Tensor, twin: Tensor) -> bool:
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[twin.dtype]
    return torch.allclose(fast, twin, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    ("tokens", "tile", "gated", "ready"),
    [
        (2, 0, True, True),
        (7, 1, False, True),
        (7, 3, True, False),
        (16, 2, True, True),
        (17, 3, True, True),
        (29, 0, False, False),
        (31, 1, True, True),
        (32, 2, False, True),
        (5, 4, True, True),
    ],
)
def test_products_with_all_that_surrounds_them(
    tokens: int, tile: int, gated: bool, ready: bool
) -> None:
    """Normalized on the way where squares are `ready`, by a kernel ahead elsewhere."""
    dtype = DTYPES[tile % 2]
    x, weight = seeded(tokens, 72, dtype=dtype), seeded(26, 72, dtype=dtype) / 8
    args = {
        "norm": Norm(1 + seeded(72, dtype=dtype) / 4, 1e-5, weight_in_fp32=tokens % 2 == 0),
        "squares_TP": x.float().square().unflatten(1, (3, 24)).sum(-1) if ready else None,
        "bias_N": seeded(26, dtype=dtype),
        "residual_TN": seeded(tokens, 13 if gated else 26, dtype=dtype),
        "gated": gated,
    }
    fast, none = some_rows(x, weight, **args, tile=TILES[tile])
    assert none is None
    assert close(fast, reference.multiply_rows(x, weight, **args))


def test_the_squares_given_are_those_that_normalize() -> None:
    x, weight = seeded(3, 64), seeded(20, 64)
    norm = Norm(torch.ones(64), 1e-9, weight_in_fp32=True)
    args = {"norm": norm, "squares_TP": torch.full((3, 2), 64 * 2.0)}  # a mean of 4
    for multiply in (multiply_rows_triton.multiply_rows, reference.multiply_rows):
        assert torch.allclose(multiply(x, weight, **args), x @ weight.T / 2, atol=1e-4)


@pytest.mark.parametrize(("tokens", "tile"), [(2, TILES[1]), (24, TILES[0]), (3, TILES[3])])
def test_who_adds_to_the_stream_leaves_its_squares(tokens: int, tile: RowsTile) -> None:
    dtype = torch.float16
    x, weight = seeded(tokens, 72, dtype=dtype), seeded(26, 72, dtype=dtype) / 8
    residual = seeded(tokens, 26, dtype=dtype)
    fast, squares = some_rows(x, weight, residual_TN=residual, sum_squares=True, tile=tile)
    twin, twin_squares = reference.add_rows(x, weight, residual)
    assert close(fast, twin)
    assert squares is not None
    assert squares.shape == (tokens, -(-26 // tile.outputs))
    exact = fast.float().square().sum(-1, keepdim=True)  # of what is stored, rounded as it is
    assert torch.allclose(squares.sum(-1, keepdim=True), exact, rtol=1e-5)
    assert torch.allclose(exact, twin_squares, rtol=1e-2)


def test_splits_give_equal_bits_again_and_leave_no_trace() -> None:
    x, weight, scratch = seeded(5, 96), seeded(40, 96), Scratch()
    tile = RowsTile(32, 32, stages=2, splits=3)
    first, _ = some_rows(x, weight, scratch=scratch, tile=tile)
    wider, _ = some_rows(x, seeded(70, 96), scratch=scratch, tile=tile)  # memory grows
    again, _ = some_rows(x, weight, scratch=scratch, tile=tile)
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
    y, squares = multiply_rows_triton.add_rows(x, weight, residual)
    assert close(y, reference.add_rows(x, weight, residual)[0])
    assert squares is None


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


def test_embedding_and_its_squares() -> None:
    table = seeded(11, 72, dtype=torch.float16)
    ids = torch.tensor([3, 10, 0, 3])
    x, squares = between_triton.embed_rows(ids, table)
    twin, twin_squares = reference.embed_rows(ids, table)
    assert torch.equal(x, twin)
    assert torch.allclose(squares, twin_squares, rtol=1e-5)


@pytest.mark.parametrize("tokens", [2, 16, 17, 32, 33, MOST_ROWS])
def test_chosen_tiles_fit_the_chip(tokens: int) -> None:
    """Two matrices of bf16 in flight within the 227 KiB of a Hopper's multiprocessor."""
    for outputs, inputs in [(64, 64), (12288, 4096), (4096, 11008), (100534, 4096), (22016, 8192)]:
        for gated in (False, True):
            tile = choose_rows_tile(tokens, outputs, inputs, gated=gated)
            weights = tile.stages * tile.outputs * tile.inputs * 2 * (1 + gated)
            assert weights + 2 * MOST_ROWS * tile.inputs <= 227 * 1024
            assert 1 <= tile.splits <= -(-inputs // tile.inputs)
