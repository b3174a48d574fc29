"""The published per-row scheme: what it rounds to, where it applies, and its packing on disk."""

import pytest
import torch

from xverse.errors import XverseError
from xverse.kernels.reference_steps import pack_nibbles, unpack_nibbles
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder, initialize
from xverse.model.fuse import fuse
from xverse.model.linear import Linear
from xverse.model.shape import ModelShape
from xverse.quant.linear import QuantizedLinear
from xverse.quant.quantize import quantize
from xverse.quant.scheme import Scheme

CONFIG: dict[str, object] = {
    "model_type": "xverse",
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MOE = CONFIG | {"num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1}


def decoder_of(config: dict[str, object]) -> Decoder:
    return initialize(Decoder(ModelShape.from_config(config)), std=0.2).requires_grad_(False)


def logits(decoder: Decoder) -> torch.Tensor:
    kv = Packed([12])
    return decoder(torch.arange(12) * 7 % 120, kv.positions(), kv)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_that_of_the_formula(bits: int) -> None:
    layer = Linear(32, 5)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(0))
        layer.weight[3] = 0
    quantized = QuantizedLinear.of(layer, Scheme(bits))
    largest = {8: 127, 4: 7}[bits]
    for row, scale, integers in zip(
        layer.weight.tolist(), quantized.scale.tolist(), quantized.integers().tolist(), strict=True
    ):
        assert scale == pytest.approx(max(map(abs, row)) / largest)
        for value, integer in zip(row, integers, strict=True):
            assert abs(integer) <= largest
            assert abs(value - integer * scale) <= scale / 2 * 1.0001


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_logits_are_those_of_the_rounded_weights(bits: int, config: dict[str, object]) -> None:
    small, rounded = quantize(decoder_of(config), bits), decoder_of(config)
    modules = dict(rounded.named_modules())
    replaced = [(n, m) for n, m in small.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(replaced) == 2 * (7 if config is CONFIG else 10)
    for name, module in replaced:
        weight = module.integers().float() * module.scale[..., None]
        modules[name].weight.data.copy_(weight)
    assert torch.allclose(logits(small), logits(rounded), atol=1e-4)
    assert torch.allclose(logits(fuse(small)), logits(rounded), atol=1e-4)


def test_fewer_bits_lose_more() -> None:
    exact = logits(decoder_of(CONFIG))
    losses = [(logits(quantize(decoder_of(CONFIG), b)) - exact).abs().mean() for b in (8, 4)]
    assert 0 < losses[0] < losses[1] / 5


def test_other_widths_and_second_helpings_are_refused() -> None:
    for bits in (2, 16, 0, -8, True):
        with pytest.raises(XverseError, match=r"quantize\(8\) or quantize\(4\)"):
            quantize(decoder_of(CONFIG), bits)
    with pytest.raises(XverseError, match="already"):
        quantize(quantize(decoder_of(CONFIG), 8), 4)


def test_nibbles_come_back() -> None:
    integers = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2)
    assert torch.equal(unpack_nibbles(pack_nibbles(integers)), integers)
