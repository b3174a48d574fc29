"""The products of a decode step on a GPU against their twins, in Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

from xverse.kernels import reference
from xverse.kernels.reference import Norm

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are checks by Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed, and its interpreter is the test")

from xverse.kernels import multiply_triton
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
