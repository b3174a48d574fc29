"""FP8 keys and values: what is lost, and what must not be."""

import torch

from tests.kernels.paged_case import Pool, close, seeded
from xverse.kernels import reference


def test_fp8_keeps_four_bits_and_cuts_nothing_off() -> None:
    magnitudes = torch.tensor([1e-20, 1e-4, 1.0, 448.0, 3e4])[:, None, None]
    x = seeded(5, 3, 64) * magnitudes
    fp8, scale = reference.quantize_kv(x)
    back = reference.dequantize_kv(fp8, scale, torch.float32)
    largest = x.abs().amax(-1, keepdim=True)
    assert ((back - x).abs() <= torch.maximum(x.abs() / 15.9, largest / 2**17)).all()
    assert scale.dtype == torch.bfloat16
    assert (largest[..., 0] <= scale.float() * 448 * (1 + 1e-6)).all(), "rounded up"
    assert (scale.float() * 448 < largest[..., 0] * (1 + 2**-6)).all(), "and not by more"


def test_a_row_of_zeros_stays_one() -> None:
    fp8, scale = reference.quantize_kv(torch.zeros(2, 3, 16))
    assert not reference.dequantize_kv(fp8, scale, torch.bfloat16).any()
    assert (scale > 0).all()


def test_one_bad_number_spoils_its_own_row_only() -> None:
    x = seeded(2, 2, 16)
    x[0, 1, 3] = torch.inf
    back = reference.dequantize_kv(*reference.quantize_kv(x), torch.float32)
    assert not back[0, 1].isfinite().all()
    assert back[0, 0].isfinite().all()
    assert back[1].isfinite().all()


def test_attention_over_fp8_is_that_over_what_it_stands_for() -> None:
    pool = Pool.of([20, 3], 2, 16, torch.float32, fp8=True)
    assert pool.scales is not None
    keys, values = (
        reference.dequantize_kv(pages, scales, torch.float32)
        for pages, scales in zip((pool.keys, pool.values), pool.scales, strict=True)
    )
    q, lengths = seeded(2, 4, 16), torch.tensor([20, 3])
    fp8 = reference.attend_pages(q, pool.keys, pool.values, pool.tables, lengths, pool.scales)
    assert close(fp8, reference.attend_pages(q, keys, values, pool.tables, lengths))
