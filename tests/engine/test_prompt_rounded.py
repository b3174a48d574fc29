"""Prompts of fp8 models: rows in 8 bits on their way between norms, SwiGLU and products."""

from copy import deepcopy

import pytest
import torch

from tests.engine.tiny import tiny_decoder
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.paged import Paged
from xverse.kernels import dispatch_quantized, reference_steps
from xverse.kernels.multiply_rounded import LEAST_ROWS
from xverse.kernels.reference_few_bits import FewBits
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.model.fuse import fuse
from xverse.quant import linear
from xverse.quant.quantize import quantize
from xverse.quant.scheme import Scheme

PAGE = 16


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return fuse(quantize(deepcopy(tiny_decoder()), Scheme(8, kind="float")))


def hidden(decoder: Decoder, rows: int) -> torch.Tensor:
    pages = -(-rows // PAGE) + 1
    kv = Paged(decoder.shape, pages, PAGE, dtype=decoder.dtype)
    runner = DeviceRunner(decoder, kv, slots=1, spare=pages - 1)
    runner.tables_SP[0, : pages - 1] = torch.arange(pages - 1, dtype=torch.int32)
    with torch.inference_mode():
        return runner.prompts(runner._prompt_rows([(0, 0, rows)]), decoder)[:rows]


def plain(decoder: Decoder, rows: int) -> torch.Tensor:
    kv = Packed([rows])
    with torch.inference_mode():
        return decoder.hidden(torch.zeros(rows, dtype=torch.int64), kv.positions(), kv)


@pytest.fixture
def in_8_bits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on a GPU, by the twins; the numbers of rows of products that were made so."""
    made: list[int] = []

    def multiply(x: reference_steps.RoundedRows, steps: FewBits) -> torch.Tensor:
        made.append(len(x.values))
        return reference_steps.multiply_rounded(x, steps)

    monkeypatch.setattr(dispatch_quantized, "why_not_rounded", lambda *_: "")
    monkeypatch.setattr(linear, "multiply_rounded", multiply)
    return made


def test_many_rows_are_rounded_before_every_product(decoder: Decoder, in_8_bits: list[int]) -> None:
    rows = LEAST_ROWS
    found, exact = hidden(decoder, rows), plain(decoder, rows)
    # The output projection rounds by itself, when it is called.
    assert in_8_bits == [rows] * (3 * decoder.shape.num_hidden_layers)
    error = (found - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.1


def test_few_rows_stay_as_they_are(decoder: Decoder, in_8_bits: list[int]) -> None:
    found, exact = hidden(decoder, LEAST_ROWS - 1), plain(decoder, LEAST_ROWS - 1)
    assert in_8_bits == []
    assert torch.allclose(found, exact, rtol=1e-4, atol=1e-4)
