"""Which way the experts of a block are computed. What they compute: test_decoder.py."""

import os

import pytest
import torch

from tests.tiny_model import published_config, random_decoder
from xverse.kernels import dispatch
from xverse.kernels.choice import Choice
from xverse.model.feedforward import MixtureOfExperts
from xverse.quant.quantize import quantize


def mixture(*, bits: int | None = None) -> MixtureOfExperts:
    decoder = random_decoder(published_config(moe=True), dtype=torch.float32)
    mlp = (quantize(decoder, bits) if bits else decoder).model.layers[0].mlp
    assert isinstance(mlp, MixtureOfExperts)
    return mlp


def x_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows))


def test_a_block_hands_its_stacks_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a check by Triton's interpreter")
    pytest.importorskip("triton")
    from xverse.kernels import grouped_triton

    mlp, x = mixture(), x_of(6)
    expected = mlp(x)
    asked = []

    def choose(device: torch.device, dtype: torch.dtype, why_not: str) -> Choice:
        asked.append(why_not)
        return Choice("", "", "", grouped_triton.mix_experts)

    monkeypatch.setattr(dispatch, "mix_experts", choose)
    assert torch.allclose(mlp(x), expected, atol=1e-4)
    assert asked == [""]


def test_quantized_experts_and_training_go_one_by_one() -> None:
    mlp, x = mixture(), x_of(2)
    assert mlp.experts.one_by_one(x) == ""
    assert "gradients" in mlp.experts.one_by_one(x.clone().requires_grad_())
    with torch.no_grad():
        assert mlp.experts.one_by_one(x.clone().requires_grad_()) == ""
    mlp.experts.requires_grad_(True)
    assert "gradients" in mlp.experts.one_by_one(x)
    assert "quantized" in mixture(bits=8).experts.one_by_one(x)


def test_gradients_reach_experts_router_and_input() -> None:
    mlp, x = mixture().requires_grad_(True), x_of(5).requires_grad_()
    mlp(x).square().sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mlp.parameters())
