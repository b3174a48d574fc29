"""The compiled products and attention of a CPU against their plain twins, by every variant."""

import pytest
import torch
from torch.nn import functional

from xverse.kernels import multiply, native, reference
from xverse.kernels.attend_cpu import rotate_heads, store_attend
from xverse.kernels.packed import PackedWeights, group_of
from xverse.kernels.reference import Norm
from xverse.kernels.reference_packed import multiply_packed, round_rows

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())
Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@pytest.fixture(params=["avx512", "avx2"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The library of each variant that this CPU can run."""
    if request.param == "avx512" and native.variant() != "avx512":
        pytest.skip("this CPU has no AVX-512 VNNI")
    library = native.load(request.param)
    monkeypatch.setattr(native, "loaded", lambda: library)
    return request.param


def seeded(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def weights(outputs: int, inputs: int, group: int, bits: int, *, asymmetric: bool) -> Weights:
    generator = torch.Generator().manual_seed(outputs + inputs)
    half = 2 ** (bits - 1)
    steps = torch.randint(-half, half, (outputs, inputs), generator=generator, dtype=torch.int8)
    size = (outputs, inputs // group)
    zero = torch.randint(-half, half, size, generator=generator, dtype=torch.int8)
    scale = torch.rand(size, generator=generator) * 0.02
    return steps, scale, zero if asymmetric else None


def close(fast: torch.Tensor, twin: torch.Tensor) -> bool:
    """Within one step of the dtype; sums are exact but for the order of groups."""
    assert fast.dtype == twin.dtype
    assert fast.shape == twin.shape
    step = 2**-7 if fast.dtype == torch.bfloat16 else 1e-5
    room = step * twin.float().abs().clamp_min(0.1 * float(twin.float().abs().max()))
    return bool(((fast.float() - twin.float()).abs() <= room).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(96, 256, 128), (70, 576, 64), (33, 48, 8), (5, 80, 80)]
)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_products(
    variant: str, bits: int, outputs: int, inputs: int, group: int, asymmetric: bool
) -> None:
    steps, scale, zero = weights(outputs, inputs, group, bits, asymmetric=asymmetric)
    bias = seeded(outputs)
    packed = PackedWeights(steps, scale, zero, bias, bits=bits)
    for rows in (1, 2, 3, 7, 8, 13):
        x = seeded(rows, inputs)
        twin = multiply_packed(
            x, steps, scale, zero, bias, group=group_of(inputs, group), terms=bits // 4
        )
        assert close(packed.multiply(x), twin), rows


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (35, 100), (7, 31), (1, 1), (200, 513)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_of_bf16_without_its_arithmetic(
    variant: str, outputs: int, inputs: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "bf16_in_hardware", lambda: False)
    monkeypatch.setattr(multiply, "WIDENED", 1024)
    weight = seeded(outputs, inputs, dtype=torch.bfloat16)
    bias = seeded(outputs, dtype=torch.bfloat16) if biased else None
    x = seeded(multiply.COMPILED_ROWS + 1, inputs, dtype=torch.bfloat16)
    twin = functional.linear(x.float(), weight.float()).bfloat16()
    twin = twin if bias is None else twin + bias
    with torch.no_grad():
        alone = [multiply.linear(row[None], weight, bias) for row in x]
        for rows in (2, 3, 7, 66, 128):
            assert torch.equal(multiply.linear(x[:rows], weight, bias), torch.cat(alone[:rows]))
        assert close(torch.cat(alone), twin)
        assert close(multiply.linear(x, weight, bias), twin)
        turned = weight.T.contiguous().T  # as views of split layers come
        assert torch.equal(multiply.linear(x[:5], turned, bias), torch.cat(alone[:5]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(
    variant: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "bf16_in_hardware", lambda: False)
    weight, x = torch.eye(40, dtype=torch.bfloat16), seeded(3, 40, dtype=torch.bfloat16)
    x[1, 7] = value
    with torch.no_grad():
        y = multiply.linear(x, weight)
    assert torch.equal(y.isfinite().all(dim=1), torch.tensor([True, False, True]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_fp32", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_what_stands_around_a_product(
    variant: str, dtype: torch.dtype, in_fp32: bool, gated: bool
) -> None:
    steps, scale, zero = weights(76, 64, 32, 4, asymmetric=False)
    norm = Norm(seeded(64) + 1, 1e-5, in_fp32)
    held = Norm(norm.weight_D.to(dtype), *norm[1:])
    packed = PackedWeights(steps, scale, zero, None, bits=4, norm=held, gated=gated)
    x, residual = seeded(5, 64, dtype=dtype), seeded(5, 38 if gated else 76, dtype=dtype)
    fast = packed.multiply(x, residual)
    twin = multiply_packed(
        x, steps, scale, zero, group=32, terms=1, norm=held, residual_TN=residual, gated=gated
    )
    assert fast.dtype == dtype
    # A norm that rounds otherwise may move an input by one of its 127 steps.
    assert torch.allclose(fast.float(), twin.float(), atol=0.03 * float(twin.abs().max()))
    assert not torch.allclose(fast, packed.multiply(x), atol=0.1)


def test_groups_that_are_not_finite_give_no_numbers(variant: str) -> None:
    steps, scale, zero = weights(40, 64, 32, 8, asymmetric=False)
    packed = PackedWeights(steps, scale, zero, None, bits=8)
    for broken in (torch.nan, torch.inf, -torch.inf):
        x = seeded(3, 64)
        x[1, 40] = broken
        y = packed.multiply(x)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
    assert (packed.multiply(torch.zeros(2, 64)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_in_any_company_and_on_any_threads(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, scale, zero = weights(96, 128, 64, 4, asymmetric=True)
    packed = PackedWeights(steps, scale, zero, None, bits=4)
    x = seeded(15, 128, dtype=dtype)
    together = packed.multiply(x)
    assert all(torch.equal(packed.multiply(x[i : i + 1])[0], together[i]) for i in range(15))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(packed.multiply(x), together)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_embedding_finds_its_rows(bits: int) -> None:
    steps, scale, zero = weights(70, 64, 16, bits, asymmetric=True)
    assert zero is not None
    packed = PackedWeights(steps, scale, zero, None, bits=bits)
    whole = (steps.float().view(70, 4, 16) - zero[..., None]) * scale[..., None]
    ids = torch.tensor([0, 69, 31, 32, 31])
    assert torch.equal(packed.rows_of(ids), whole.flatten(1)[ids])


@pytest.mark.parametrize(("terms", "step"), [(1, 1.0), (2, 1 / 254)])
def test_rounding_of_rows_loses_half_a_step_at_most(terms: int, step: float) -> None:
    x = seeded(4, 256)
    steps, scale = round_rows(x, 64, terms)
    assert steps.abs().amax() == 127
    back = (steps * scale[..., None]).flatten(-2)
    assert ((back - x).abs() <= scale.repeat_interleave(64, -1) * step * 0.502).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_the_reference(variant: str, dtype: torch.dtype) -> None:
    qkv, angles = seeded(9, 8, 20, dtype=dtype), seeded(9, 20)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    twin = reference.rotate(qkv[:, :6], cos, sin)
    rest = qkv[:, 6:].clone()
    turned = rotate_heads(qkv, cos, sin, 6)
    assert torch.allclose(turned[:, :6], twin, atol=1e-6)
    assert torch.equal(turned[:, 6:], rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 32), (6, 2, 24)])
def test_attention_over_pages(
    variant: str, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> None:
    tables = torch.tensor([[5, 1, 0], [2, 3, 4], [2, 3, 4], [6, 0, 0]])
    lengths = torch.tensor([7, 11, 12, 1])  # the two in the middle are neighbours of one sequence
    keys, values = (seeded(7, kv_heads, 4, size + i, dtype=dtype)[..., :size] for i in (0, 1))
    keys, values = keys.contiguous(), values.contiguous()
    qkv = seeded(4, heads + 2 * kv_heads, size, dtype=dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    before = keys.clone()
    mixed = store_attend(q, k, v, keys, values, tables, lengths)
    for row in range(4):
        last = int(lengths[row]) - 1
        page = int(tables[row, last // 4])
        assert torch.equal(keys[page, :, last % 4], k[row])
        assert torch.equal(values[page, :, last % 4], v[row])
        before[page, :, last % 4] = k[row]
    assert torch.equal(keys, before), "nothing else was written"
    twin = reference.attend_pages(q, keys, values, tables, lengths)
    assert torch.allclose(mixed.float(), twin.float(), atol=1e-5 if dtype.itemsize == 4 else 2e-2)
    alone = store_attend(q[1:2], k[1:2], v[1:2], keys, values, tables[1:2], lengths[1:2])
    assert torch.equal(alone[0], mixed[1])
    q[0, 0, 0] = torch.nan
    assert store_attend(q, k, v, keys, values, tables, lengths)[0, 0].isnan().all()
