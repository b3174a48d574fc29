"""Products of many rows with quantized weights against their plain twins, in the interpreter."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from xverse.kernels import dispatch_quantized, multiply_rounded, reference_steps
from xverse.kernels.reference import Norm
from xverse.kernels.reference_few_bits import FewBits, Form, dequantize, pack_nibbles
from xverse.kernels.reference_steps import RoundedRows

CUDA = torch.device("cuda")
FORMS = [
    ("int4", None, False),
    ("int4", None, True),
    ("int4", 32, False),
    ("int4", 64, True),
    ("int8", None, False),
    ("int8", 32, True),
    ("int8", 64, False),
    ("fp8", None, False),
]

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a check by Triton's interpreter"
)


def seeded(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + seed))


def weight_of(
    kind: str, group: int | None, outputs: int, inputs: int, *, zero: bool, dtype: torch.dtype
) -> FewBits:
    numbers = torch.Generator().manual_seed(outputs + inputs)
    largest = 8 if kind == "int4" else 128
    size = (outputs,) if group is None else (outputs, inputs // group)
    scale = (seeded(*size).abs() / largest / 8 + 0.001).to(dtype)
    if kind == "fp8":
        return FewBits((100 * seeded(outputs, inputs)).to(torch.float8_e4m3fn), scale)
    drawn = torch.randint(-largest, largest, (outputs, inputs), generator=numbers).to(torch.int8)
    shift = torch.randint(-largest, largest, size, generator=numbers).to(torch.int8)
    steps = pack_nibbles(drawn) if kind == "int4" else drawn
    return FewBits(steps, scale, shift if zero else None)


def close(fast: Tensor, twin: Tensor) -> bool:
    """To within a few roundings of the twin's dtype, of the largest."""
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[twin.dtype]
    return bool((fast.float() - twin.float()).abs().max() <= tolerance * twin.float().abs().max())


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("kind", "group", "zero"), FORMS)
def test_widened_weights_are_the_twins(
    kind: str, group: int | None, zero: bool, dtype: torch.dtype
) -> None:
    from xverse.kernels import dequantize_triton

    steps = weight_of(kind, group, 37, 192, zero=zero, dtype=dtype)
    assert torch.equal(dequantize_triton.dequantize(steps), dequantize(steps).to(steps.scale.dtype))


@interpreted
def test_odd_groups_and_rows_are_widened_too() -> None:
    from xverse.kernels import dequantize_triton

    for group, inputs in ((24, 120), (8, 40), (None, 1030)):
        steps = weight_of("int4", group, 9, inputs, zero=True, dtype=torch.float32)
        assert torch.equal(
            dequantize_triton.dequantize(steps), dequantize(steps).to(steps.scale.dtype)
        )


@interpreted
@pytest.mark.parametrize(("kind", "group", "zero"), FORMS)
@pytest.mark.parametrize(("tokens", "dtype"), [(70, torch.float32), (19, torch.float16)])
def test_products_widened_in_registers(
    kind: str, group: int | None, zero: bool, tokens: int, dtype: torch.dtype
) -> None:
    from xverse.kernels import multiply_steps_triton

    steps = weight_of(kind, group, 75, 192, zero=zero, dtype=dtype)
    x = seeded(tokens, 192).to(dtype)
    fast = multiply_steps_triton.multiply_steps(x, steps)
    assert close(fast, reference_steps.multiply_steps(x, steps))


@interpreted
def test_rows_that_end_in_the_middle_of_a_tile() -> None:
    from xverse.kernels import multiply_steps_triton

    steps = weight_of("int4", None, 130, 104, zero=False, dtype=torch.float32)
    x = seeded(33, 104)
    fast = multiply_steps_triton.multiply_steps(x, steps)
    assert close(fast, reference_steps.multiply_steps(x, steps))


@interpreted
@pytest.mark.parametrize(("kind", "group", "zero"), FORMS)
def test_products_widened_part_by_part(
    kind: str, group: int | None, zero: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xverse.kernels import dequantize_triton

    monkeypatch.setattr(dequantize_triton, "AT_ONCE", 16)
    steps = weight_of(kind, group, 300, 192, zero=zero, dtype=torch.float32)
    x = seeded(41, 192)
    for numbers in (128 * 192, dequantize_triton.MOST_NUMBERS):
        fast = dequantize_triton.multiply_widened(x, steps, numbers)
        assert fast.shape == (41, 300)
        assert close(fast, reference_steps.multiply_steps(x, steps))


@interpreted
def test_parts_of_a_weight_fit_in_the_cache() -> None:
    from xverse.kernels import dequantize_triton

    numbers = dequantize_triton.NUMBERS
    for outputs, inputs in ((22016, 4096), (12288, 4096), (4096, 11008), (100534, 4096), (5, 8)):
        assert dequantize_triton.rows_at_once(outputs, inputs, 2**40) >= outputs
        at_once = dequantize_triton.rows_at_once(outputs, inputs, numbers)
        assert at_once * inputs <= numbers + 128 * inputs
        assert at_once == outputs or at_once % 128 == 0
        parts = -(-outputs // at_once)
        assert outputs - (parts - 1) * at_once >= at_once - 128 * parts  # about one size


@interpreted
@pytest.mark.parametrize("width", [40, 192])
def test_rows_in_8_bits_are_the_twins(width: int) -> None:
    from xverse.kernels import round_triton

    x = seeded(7, width).half()
    x[3] = 0
    norm = Norm(1 + seeded(width).half() / 4, 1e-5, weight_in_fp32=False)
    same(round_triton.round_rows(x), reference_steps.round_rows(x))
    for residual in (None, seeded(7, width, seed=1).half()):
        sums, rounded = round_triton.add_norm_rounded(x, residual, norm)
        twin_sums, twin = reference_steps.add_norm_rounded(x, residual, norm)
        assert torch.equal(sums, twin_sums)
        same(rounded, twin)
    joined = seeded(7, 2 * width).half()
    same(round_triton.swiglu_rounded(joined), reference_steps.swiglu_rounded(joined))


def same(fast: RoundedRows, twin: RoundedRows) -> None:
    assert torch.allclose(fast.scale, twin.scale, rtol=1e-3)
    values, wanted = (r.values.float() * r.scale[:, None] for r in (fast, twin))
    assert (values - wanted).norm() <= 0.02 * wanted.norm()  # a step here and there


def test_rows_in_8_bits_keep_what_8_bits_can() -> None:
    x = seeded(5, 64) * torch.tensor([1e-6, 1.0, 1e4, 0.0, 3.0])[:, None]
    rounded = reference_steps.round_rows(x)
    assert rounded.values.float().isfinite().all()
    assert (rounded.values.float().abs().amax(1)[[0, 1, 2, 4]] == 448).all()
    assert not rounded.values[3].float().any()
    back = rounded.values.float() * rounded.scale[:, None]
    error = (back - x).abs() / x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert error.max() < 2**-4


def test_products_in_8_bits_are_those_of_the_rounded_numbers() -> None:
    steps = weight_of("fp8", None, 32, 48, zero=False, dtype=torch.float32)
    x = seeded(6, 48)
    rounded = reference_steps.round_rows(x)
    y = reference_steps.multiply_rounded(rounded, steps)
    exact = (rounded.values.double() * rounded.scale.double()[:, None]) @ dequantize(
        steps
    ).double().T
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-5)
    assert (y - x @ dequantize(steps).T).norm() < 0.05 * y.norm()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As if there were an H200; what is chosen for it is not called."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("xverse.kernels.choice.triton_is_here", lambda: True)
    dispatch_quantized.multiply_steps.cache_clear()
    yield monkeypatch
    dispatch_quantized.multiply_steps.cache_clear()


def chosen(rows: int, form: Form, dtype: torch.dtype = torch.bfloat16) -> str:
    return str(dispatch_quantized.multiply_steps(CUDA, dtype, rows, form))


def test_the_number_of_rows_chooses(gpu: pytest.MonkeyPatch) -> None:
    int4, fp8 = Form("int4", 128, 4096, 4096), Form("fp8", 0, 4096, 4096)
    few, many = dispatch_quantized.TILE_ROWS, dispatch_quantized.ROWS_APART
    assert "widened in registers" in chosen(few, int4)
    assert "widened whole, then cuBLAS" in chosen(few + 1, int4)
    assert "part by part, then cuBLAS" in chosen(many, int4)
    assert "widened in registers" in chosen(multiply_rounded.LEAST_ROWS - 1, fp8)
    assert "in 8 bits" in chosen(many, fp8)


def test_what_a_kernel_cannot_do_goes_another_way_and_says_why(gpu: pytest.MonkeyPatch) -> None:
    assert "groups of 24" in chosen(8, Form("int4", 24, 4096, 96))
    assert "then cuBLAS" in chosen(8, Form("int4", 24, 4096, 96))
    odd = Form("fp8", 0, 4097, 4096)
    assert "then cuBLAS" in chosen(dispatch_quantized.ROWS_APART, odd)
    assert "4097" in dispatch_quantized.why_not_rounded(CUDA, torch.bfloat16, odd)
    gpu.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "first with FP8" in dispatch_quantized.why_not_rounded(
        CUDA, torch.bfloat16, Form("fp8", 0, 64, 64)
    )
    assert "the reference" in chosen(8, Form("int8", 128, 64, 128), torch.float32)
