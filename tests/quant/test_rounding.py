"""Rounding: no weight is off by more than half a step, and searching never makes it worse."""

import pytest
import torch

from xverse.quant.rounding import nearest, searched, worth
from xverse.quant.scheme import Scheme

SCHEMES = [
    Scheme(8),
    Scheme(4),
    Scheme(8, 32),
    Scheme(4, 32),
    Scheme(4, 32, symmetric=False),
    Scheme(8, 32, symmetric=False),
    Scheme(4, symmetric=False),
]


def weights(*size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    heavy = torch.randn(size, generator=generator) ** 3  # long tails, as weights have
    return heavy + 0.2


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_weight_is_off_by_more_than_half_a_step(scheme: Scheme) -> None:
    weight = weights(6, 64)
    rounded = nearest(weight, scheme)
    scale = rounded.scale if rounded.scale.dim() == 2 else rounded.scale[:, None]
    step = scale.repeat_interleave(64 // scale.shape[-1], dim=-1)
    # A zero between two steps costs asymmetric ends up to half a step more.
    allowed = 0.5 if scheme.symmetric else 1.0
    assert bool(((worth(rounded, scheme) - weight).abs() <= allowed * 1.001 * step).all())
    assert int(rounded.steps.min()) >= scheme.smallest
    assert int(rounded.steps.max()) <= scheme.largest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_search_is_never_worse_and_heeds_importance(scheme: Scheme) -> None:
    weight = weights(3, 40, 64)  # a stack
    importance = weights(64, seed=1).abs()

    def loss(by: torch.Tensor | float, *, importance_D: torch.Tensor | None) -> torch.Tensor:
        found = worth(searched(weight, scheme, importance_D), scheme)
        return ((found - weight).square() * by).sum()

    plain = (worth(nearest(weight, scheme), scheme) - weight).square().sum()
    assert float(loss(1.0, importance_D=None)) <= float(plain)
    weighed = loss(importance, importance_D=importance)
    assert float(weighed) <= float(loss(importance, importance_D=None))


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(8, kind="float")], ids=str)
def test_zeros_stay_zeros(scheme: Scheme) -> None:
    for way in (nearest, searched):
        assert not worth(way(torch.zeros(3, 64), scheme), scheme).any()


def test_fp8_keeps_three_bits_of_every_number() -> None:
    scheme, weight = Scheme(8, kind="float"), weights(5, 64)
    rounded = nearest(weight, scheme)
    assert rounded.steps.dtype == torch.float8_e4m3fn
    error = (worth(rounded, scheme) - weight).abs()
    smallest = 2**-9 * rounded.scale[:, None]  # below 2^-6 its steps are even
    assert bool((error <= (weight.abs() / 16 + smallest) * 1.001).all())


def test_a_search_in_pieces_is_the_search_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = weights(2, 30, 64), Scheme(4, 32, symmetric=False)
    whole = searched(weight, scheme)
    monkeypatch.setattr("xverse.quant.rounding.CHUNK", 7 * 64)
    for one, other in zip(whole, searched(weight, scheme), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_scales_come_in_the_dtype_that_is_asked_for() -> None:
    weight = weights(4, 64)
    assert searched(weight, Scheme(4, 32), dtype=torch.bfloat16).scale.dtype == torch.bfloat16
    assert nearest(weight.bfloat16(), Scheme(4, 32)).scale.dtype == torch.bfloat16
