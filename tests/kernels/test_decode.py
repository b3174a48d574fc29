"""The GPU decode kernels against their plain twins, in Triton's interpreter, on the CPU."""

import os

import pytest
import torch
from torch import Tensor

from xverse.kernels import reference
from xverse.kernels.reference import Norm

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are checks by Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed, and its interpreter is the test")

from xverse.kernels import attend_triton, multiply_triton
from xverse.kernels.tiles import Tile

DTYPES = [torch.float32, torch.float16]


def seeded(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + seed)).to(dtype)


def close(fast: Tensor, twin: Tensor) -> bool:
    tolerance = (
        1e-5 if twin.dtype == torch.float32 else 2**-9 if twin.dtype == torch.float16 else 2**-6
    )
    return torch.allclose(fast, twin, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("weight_in_fp32", [True, False, None])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "tile", [Tile(4, 128), Tile(2, 128, tiles=3), Tile(8, 32), Tile(4, 32, tiles=2)]
)
def test_one_row(dtype: torch.dtype, weight_in_fp32: bool | None, gated: bool, tile: Tile) -> None:
    x, weight = seeded(1, 72, dtype=dtype), seeded(26, 72, dtype=dtype) / 8
    outputs = 13 if gated else 26
    norm_D = 1 + seeded(72, dtype=dtype) / 4
    norm = None if weight_in_fp32 is None else Norm(norm_D, 1e-5, weight_in_fp32)
    for bias in (None, seeded(26, dtype=dtype)):
        for residual in (None, seeded(1, outputs, dtype=dtype)):
            args = {"norm": norm, "bias_N": bias, "residual_TN": residual, "gated": gated}
            fast = multiply_triton.one_row(x, weight, **args, tile=tile)
            assert close(fast, reference.multiply_rows(x, weight, **args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("parts", [1, 4])
def test_attention_over_pages(
    dtype: torch.dtype, heads: int, kv_heads: int, size: int, parts: int
) -> None:
    page_size, positions = 16, torch.tensor([0, 5, 16, 70], dtype=torch.int32)
    tokens, pages = len(positions), 5
    order = torch.randperm(tokens * pages, generator=torch.Generator().manual_seed(1))
    table = order.view(tokens, pages).int()
    pool = (tokens * pages, kv_heads, page_size, size)
    caches = [seeded(*pool, dtype=dtype, seed=i) for i in range(2)]
    twins = [cache.clone() for cache in caches]
    angles = seeded(80, size)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv = seeded(tokens, (heads + 2 * kv_heads) * size, dtype=dtype)
    scratch = attend_triton.Scratch.reserve(tokens, heads, kv_heads, size, "cpu", parts=parts)
    fast = attend_triton.rotate_store_attend(
        qkv, cos, sin, positions, table, *caches, scratch=scratch, block=16
    )
    twin = reference.rotate_store_attend(qkv, cos, sin, positions, table, *twins)
    assert close(fast, twin)
    assert all(torch.equal(cache, other) for cache, other in zip(caches, twins, strict=True))
    assert not scratch.arrived.any()
