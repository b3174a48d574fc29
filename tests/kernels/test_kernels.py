"""Every fast operation against its plain twin in `reference`."""

import pytest
import torch
from torch.nn import functional

from xverse.kernels import attend, multiply, normalize, reference


def seeded(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_in_fp32", [False, True])
def test_rms_norm_rounds_exactly_as_specified(dtype: torch.dtype, weight_in_fp32: bool) -> None:
    x, weight = seeded(50, 96, dtype=dtype) * 3, seeded(96, dtype=dtype)
    fast = normalize.rms_norm(x, weight, 1e-6, weight_in_fp32=weight_in_fp32)
    twin = reference.rms_norm(x, weight, 1e-6, weight_in_fp32=weight_in_fp32)
    if dtype == torch.bfloat16:
        assert torch.equal(fast, twin)
    assert torch.allclose(fast, twin, atol=1e-6)


def test_the_two_roundings_of_rms_norm_differ_in_bf16() -> None:
    x, weight = seeded(50, 96, dtype=torch.bfloat16), seeded(96, dtype=torch.bfloat16)
    old = reference.rms_norm(x, weight, 1e-6, weight_in_fp32=True)
    new = reference.rms_norm(x, weight, 1e-6, weight_in_fp32=False)
    assert not torch.equal(old, new)


@pytest.mark.parametrize(("tokens", "seen"), [(1, 1), (1, 9), (6, 6), (5, 12)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_attention_of_one_sequence(tokens: int, seen: int, heads: int, kv_heads: int) -> None:
    q, k, v = seeded(tokens, heads, 16), seeded(seen, kv_heads, 16), seeded(seen, kv_heads, 16) + 1
    fast = attend.attend_sequence(q, k.transpose(0, 1), v.transpose(0, 1))
    assert torch.allclose(fast, reference.attend(q, k, v), atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_attention_of_a_batch(heads: int, kv_heads: int) -> None:
    lengths = [3, 8, 1]
    q, k, v = (seeded(3, n, 16) for n in (heads, kv_heads * 8, kv_heads * 8 + 1))
    k, v = k.view(3, kv_heads, 8, 16), v[:, 1:].reshape(3, kv_heads, 8, 16)
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    fast = attend.attend_batch(q, k, v, mask)
    for row, length in enumerate(lengths):
        past = k[row, :, :length].transpose(0, 1), v[row, :, :length].transpose(0, 1)
        assert torch.allclose(fast[row], reference.attend(q[row][None], *past)[0], atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("size", [1, 4])
def test_attention_over_pages(heads: int, kv_heads: int, size: int) -> None:
    tables, lengths = torch.randperm(24 // size).view(3, -1), torch.tensor([3, 8, 1])
    q = seeded(3, heads, 16)
    keys, values = (seeded(24 // size, kv_heads, size, 16) + extra for extra in (0, 1))
    gathered = (attend.gather_pages(pages, tables) for pages in (keys, values))
    seen = torch.arange(8) < lengths[:, None]
    fast = attend.attend_batch(q, *gathered, seen)
    twin = reference.attend_pages(q, keys, values, tables, lengths)
    assert torch.allclose(fast, twin, atol=1e-5)
    order = torch.cat([keys[page].transpose(0, 1) for page in tables[1]])
    shown = attend.gather_pages(keys, tables)[1].transpose(0, 1)
    assert torch.equal(shown, order)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_linear_in_bf16_sums_in_fp32(tokens: int, bias: bool) -> None:
    x, weight = seeded(tokens, 512, dtype=torch.bfloat16), seeded(64, 512, dtype=torch.bfloat16)
    bias_N = seeded(64, dtype=torch.bfloat16) if bias else None
    with torch.inference_mode():
        fast = multiply.linear(x, weight, bias_N)
    exact = functional.linear(
        x.double(), weight.double(), None if bias_N is None else bias_N.double()
    )
    # Two roundings to bf16, each at most 2^-9 of the value.
    assert torch.allclose(fast.double(), exact, rtol=2**-7, atol=0.05)
    assert fast.shape == (tokens, 64)


def test_company_changes_no_bit_of_a_row() -> None:
    x, weight = seeded(16, 512, dtype=torch.bfloat16), seeded(200, 512, dtype=torch.bfloat16)
    with torch.inference_mode():
        together = multiply.linear(x, weight)
        for rows in (1, 2, 5, 15):
            for start in range(0, 16 - rows, 3):
                alone = multiply.linear(x[start : start + rows], weight)
                assert torch.equal(alone, together[start : start + rows])


def test_router_weights_sum_to_one_and_are_the_largest() -> None:
    x, router = seeded(20, 32), seeded(8, 32)
    weights, experts = reference.route(x, router, 3)
    scores = (x @ router.T).softmax(-1)
    assert torch.allclose(weights.sum(-1), torch.ones(20), atol=1e-4)
    assert torch.equal(experts, scores.argsort(-1, descending=True)[:, :3])
