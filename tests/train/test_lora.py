"""Adapters: they begin as nothing, learn alone, are merged, and stand on quantized layers too."""

from typing import Any

import pytest
import torch

from tests.train.tiny import tiny_decoder
from xverse.errors import XverseError
from xverse.kernels import dispatch_quantized
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.quant.linear import QuantizedLinear
from xverse.quant.quantize import quantize
from xverse.train import lora
from xverse.train.build import compiled
from xverse.train.tuning import Lora

MIXTURE = {"num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1}
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}


def logits(decoder: Decoder) -> torch.Tensor:
    ids = torch.arange(24) * 7 % 64
    kv = Packed((10, 14))
    return decoder(ids, kv.positions(), kv)


def shaken(decoder: Decoder, seed: int = 1) -> Decoder:
    """The decoder, its adapters no longer nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.adapters(decoder).values():
        parts = [layer.a, layer.b, *([] if layer.magnitude is None else [layer.magnitude])]
        for part in parts:
            noise = torch.empty(part.shape).normal_(0, 0.05, generator=generator)
            part.data += noise.to(part.dtype)
    return decoder


@pytest.mark.parametrize("changes", [{}, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_begins_as_nothing_and_is_merged(changes: Any, kind: str) -> None:
    decoder = tiny_decoder(**changes)
    plain = logits(decoder).detach()
    lora.add_lora(decoder, Lora(rank=4, **KINDS[kind]))  # type: ignore[arg-type]
    assert torch.allclose(logits(decoder), plain, atol=1e-6)
    learned = logits(shaken(decoder)).detach()
    assert not torch.allclose(learned, plain, atol=1e-3)
    with lora.switched_off(decoder):
        assert torch.equal(logits(decoder), plain)
    assert torch.equal(logits(decoder), learned)
    assert not lora.adapters(lora.merge_adapters(decoder))
    assert torch.allclose(logits(decoder), learned, atol=1e-5)


def test_merged_is_base_and_adapter_within_bf16() -> None:
    decoder = shaken(lora.add_lora(tiny_decoder(torch.bfloat16), Lora()))
    learned = logits(decoder).float()
    merged = logits(lora.merge_adapters(decoder)).float()
    assert (merged - learned).norm() < 0.02 * learned.norm()  # 8 bits of mantissa, 2 layers


def test_only_adapters_learn() -> None:
    decoder = lora.add_lora(tiny_decoder(), Lora(targets=("q_proj", "v_proj"), dora=True))
    learning = {name for name, p in decoder.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 2 * 3
    assert all(name.endswith((".a", ".b", ".magnitude")) for name in learning)
    shaken(decoder)
    logits(decoder).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert (parameter.grad is not None) == (name in learning)
        assert parameter.grad is None or parameter.grad.norm() > 0


@pytest.mark.parametrize("name", ["int4", "int8", "int8-row", "fp8"])
def test_gradients_pass_through_integers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As through a plain layer of the dequantized weights, some rows of them at a time."""
    monkeypatch.setattr("xverse.quant.gradient.NUMBERS", 32 * 10)
    decoder = tiny_decoder(**MIXTURE).requires_grad_(False)
    quantize(decoder, name, method="rtn")
    for layer in (
        decoder.model.layers[0].self_attn.q_proj,
        decoder.model.layers[0].mlp.experts.up_proj,
    ):
        assert isinstance(layer, QuantizedLinear)
        expert = 2 if layer.weight.dim() == 3 else None
        x_TD = torch.randn(5, 32, requires_grad=True)
        y_TN = layer(x_TD, expert)
        plain_ND = layer.dequantized(expert)
        assert torch.allclose(y_TN, x_TD @ plain_ND.T, atol=1e-5)
        upstream = torch.randn_like(y_TN)
        y_TN.backward(upstream)
        assert x_TD.grad is not None
        assert torch.allclose(x_TD.grad, upstream @ plain_ND, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_nothing_dequantized_is_kept_for_the_backward_pass(dora: bool) -> None:
    decoder = quantize(tiny_decoder().requires_grad_(False), "int4-row")
    lora.add_lora(decoder, Lora(rank=2, dora=dora))
    weights = {32 * 32 * 4, 32 * 48 * 4}  # bytes of a whole one in fp32
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kv = Packed((5,))
        hidden = decoder.hidden(torch.arange(5), kv.positions(), kv)
    hidden.sum().backward()
    assert kept
    assert not weights & set(kept)


def test_dropout_is_for_training_alone() -> None:
    decoder = shaken(lora.add_lora(tiny_decoder(), Lora(dropout=0.5))).train()
    assert not torch.equal(logits(decoder), logits(decoder))
    decoder.eval()
    assert torch.equal(logits(decoder), logits(decoder))


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(XverseError, match=r"linear layer 'q_prj'\. Did you mean 'q_proj'"):
        lora.add_lora(tiny_decoder(), Lora(targets=("q_prj",)))
    for wrong in ({"rank": 0}, {"dropout": 1.0}, {"alpha": 0}, {"targets": ()}):
        with pytest.raises(XverseError, match="cannot be"):
            Lora(**wrong)  # type: ignore[arg-type]
    quantized = quantize(tiny_decoder().requires_grad_(False), "int8")
    with pytest.raises(XverseError, match="quantized"):
        lora.merge_adapters(lora.add_lora(quantized, Lora()))


def test_compiled_blocks_choose_no_kernels_of_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block's input has no gradient, and an evaluation's has none at all."""

    def chosen(*_: object) -> None:
        raise AssertionError("a kernel without a gradient was chosen in compiled code")

    torch._dynamo.reset()
    decoder = lora.add_lora(quantize(tiny_decoder(), "int4"), Lora())
    wanted = logits(decoder).detach()
    compiled(decoder, backend="eager")
    monkeypatch.setattr(dispatch_quantized, "multiply_steps", chosen)
    ids, kv = torch.arange(24) * 7 % 64, Packed((10, 14))
    found = decoder.hidden(ids, kv.positions(), kv)
    found.sum().backward()
    with torch.no_grad():
        again = decoder.hidden(ids, kv.positions(), kv)
    monkeypatch.undo()
    torch.testing.assert_close(decoder.logits(found.detach()), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, found.detach(), atol=1e-5, rtol=1e-5)
