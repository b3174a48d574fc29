"""The fused decode step against the plain decoder."""

import dataclasses
import os

import pytest
import torch

from tests.tiny_model import published_config, random_decoder
from xverse.engine.step import DecodeStep, unfit
from xverse.errors import XverseError
from xverse.kernels import choice, dispatch, reference
from xverse.model.cache import Growing
from xverse.model.decoder import Decoder, initialize
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape
from xverse.quant.linear import QuantizedLinear
from xverse.quant.quantize import quantize
from xverse.quant.recipe import NAMED, Recipe
from xverse.quant.scheme import Scheme

LLAMA = {"model_type": "llama", "num_key_value_heads": 2, "attention_bias": True}


@pytest.mark.parametrize("changes", [{}, LLAMA, {"tie_word_embeddings": True}])
@torch.inference_mode()
def test_a_step_gives_the_decoders_logits_and_keeps_its_keys(changes: dict[str, object]) -> None:
    config = published_config() | changes
    decoder = fuse(random_decoder(config, dtype=torch.float32))
    shape, page_size = decoder.shape, 16
    pool = (6, shape.num_key_value_heads, page_size, shape.head_dim)
    keys, values = ([torch.zeros(pool) for _ in decoder.model.layers] for _ in range(2))
    step = DecodeStep(
        decoder, keys, values, torch.tensor([[4, 0, 5], [1, 3, 2]], dtype=torch.int32)
    )
    plain = Growing(shape, 2, dtype=torch.float32)
    ids = torch.arange(2 * 40).view(40, 2) * 7 % shape.vocab_size
    for place, pair in enumerate(ids):
        expected = decoder(pair, plain.extend([1, 1]), plain)
        step.ids.copy_(pair)
        step.positions.fill_(place)
        assert torch.allclose(step(), expected, atol=1e-3), place
    with pytest.raises(XverseError, match="cannot be captured"):
        step.capture()


def largest_difference(
    decoder: Decoder, rows: int, steps: int, other: Decoder | None = None
) -> float:
    """Between the logits of the step and those of the decoder itself, or of another, over the first
    `steps` places."""
    shape, page_size = decoder.shape, 16
    pool = (rows, shape.num_key_value_heads, page_size, shape.head_dim)
    keys, values = ([torch.zeros(pool) for _ in decoder.model.layers] for _ in range(2))
    pages = torch.randperm(rows, generator=torch.Generator().manual_seed(rows)).int()[:, None]
    step = DecodeStep(decoder, keys, values, pages)
    plain = Growing(shape, rows, dtype=torch.float32)
    apart = 0.0
    for place in range(steps):
        ids = (torch.arange(rows) * 13 + place * 5) % shape.vocab_size
        expected = (other or decoder)(ids, plain.extend([1] * rows), plain)
        step.ids.copy_(ids)
        step.positions.fill_(place)
        apart = max(apart, float((step() - expected).abs().max()))
    return apart


@pytest.mark.parametrize("rows", [1, 5, 20, 40, 70])
@torch.inference_mode()
def test_any_number_of_rows_gives_the_decoders_logits(rows: int) -> None:
    decoder = fuse(random_decoder(published_config() | LLAMA, dtype=torch.float32))
    assert largest_difference(decoder, rows, 3) < 1e-3


def by_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    plain = choice.Choice("attention", "plain", "", reference.rotate_store_attend)
    monkeypatch.setattr(dispatch, "rotate_store_attend", lambda *_, **__: plain)
    monkeypatch.setattr(dispatch, "why_no_triton", lambda *_, **__: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, **__: (8, 0))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter")
@pytest.mark.parametrize("rows", [1, 5, 40, 70])
@torch.inference_mode()
def test_the_kernels_of_a_gpu_give_the_decoders_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Products by Triton in its interpreter, handed on from one to the next as on a GPU."""
    by_interpreter(monkeypatch)
    decoder = random_decoder(published_config() | {"num_hidden_layers": 2}, dtype=torch.float32)
    assert largest_difference(fuse(decoder), rows, 1) < 1e-3


RECIPES = {
    "int4": NAMED["int4"],
    "int8, all": Recipe(Scheme(8, 32, symmetric=False), head=Scheme(8), embedding=Scheme(4, 32)),
    "fp8": NAMED["fp8"],
}


def quantized_model(name: str, **changes: object) -> tuple[Decoder, Decoder]:
    """A fused decoder in few bits, and one of the same weights that are not."""
    config = published_config() | {"num_hidden_layers": 2} | changes
    decoder = fuse(quantize(random_decoder(config, dtype=torch.float32), RECIPES[name]))
    plain = fuse(random_decoder(config, dtype=torch.float32))
    for path, module in decoder.named_modules():
        if isinstance(module, QuantizedLinear):
            weight = plain.get_submodule(path).weight
            assert isinstance(weight, torch.Tensor)
            weight.copy_(module.dequantized())
    return decoder, plain


@pytest.mark.parametrize("rows", [1, 5, 40, 70])
@pytest.mark.parametrize("name", RECIPES)
@torch.inference_mode()
def test_quantized_weights_are_those_of_the_decoder(name: str, rows: int) -> None:
    decoder, plain = quantized_model(name)
    assert not unfit(decoder)
    assert largest_difference(decoder, rows, 2, plain) < 1e-3


@torch.inference_mode()
def test_a_tied_head_of_few_bits() -> None:
    decoder, plain = quantized_model("int8, all", tie_word_embeddings=True)
    for rows in (1, 70):
        assert largest_difference(decoder, rows, 1, plain) < 1e-3


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter")
@pytest.mark.parametrize(("name", "rows"), [("int4", 5), ("int8, all", 40), ("fp8", 5)])
@torch.inference_mode()
def test_the_kernels_of_a_gpu_read_quantized_weights(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    by_interpreter(monkeypatch)
    decoder, plain = quantized_model(name)
    assert largest_difference(decoder, rows, 1, plain) < 1e-3


def test_what_the_step_does_not_read_is_said() -> None:
    decoder = quantize(random_decoder(published_config()), "int4")
    first = decoder.model.layers[0].self_attn.o_proj
    first.order = torch.arange(first.inputs)
    assert "sorted" in unfit(fuse(decoder))
    odd = quantize(random_decoder(published_config()), Scheme(4, 16))
    assert "groups of 16" in unfit(fuse(odd))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "length"),
        ({}, "apart"),
    ],
)
def test_a_model_without_a_fused_step_is_told_why(changes: dict[str, object], why: str) -> None:
    decoder = random_decoder(published_config() | changes)
    assert why in unfit(decoder)
    with pytest.raises(XverseError, match="no fused decode step"):
        DecodeStep(decoder, [], [], torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("shared", [0, 2])
@torch.inference_mode()
def test_a_step_of_experts_gives_the_decoders_logits(rows: int, shared: int) -> None:
    shape = dataclasses.replace(
        ModelShape.from_config(published_config(moe=True)), num_shared_experts=shared
    )
    decoder = fuse(initialize(Decoder(shape), std=0.15).requires_grad_(False))
    pool = (rows, shape.num_key_value_heads, 16, shape.head_dim)
    keys, values = ([torch.zeros(pool) for _ in decoder.model.layers] for _ in range(2))
    step = DecodeStep(decoder, keys, values, torch.arange(rows, dtype=torch.int32)[:, None])
    plain = Growing(shape, rows, dtype=torch.float32)
    for place, ids in enumerate(torch.arange(3 * rows).view(3, rows) * 7 % shape.vocab_size):
        expected = decoder(ids, plain.extend([1] * rows), plain)
        step.ids.copy_(ids)
        step.positions.fill_(place)
        assert torch.allclose(step(), expected, atol=1e-3), place


def test_experts_have_a_step_unless_they_are_quantized() -> None:
    assert not unfit(fuse(random_decoder(published_config(moe=True))))
    assert "apart" in unfit(random_decoder(published_config(moe=True)))
    quantized = fuse(quantize(random_decoder(published_config(moe=True)), 8))
    assert "experts are quantized" in unfit(quantized)
