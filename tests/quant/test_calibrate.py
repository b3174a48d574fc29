"""Calibration: GPTQ and AWQ lose less than rounding on the inputs they saw, dense and experts."""

import logging

import pytest
import torch

from tests.quant.test_quantize import CONFIG, MOE, decoder_of
from xverse.errors import XverseError
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.quant.awq import scale_inputs
from xverse.quant.calibrate import Method, choose_method
from xverse.quant.compare import compare
from xverse.quant.gptq import importance, solve
from xverse.quant.observe import linears, observed
from xverse.quant.passage import Passage
from xverse.quant.quantize import quantize
from xverse.quant.rounding import Rounded, nearest, searched, worth
from xverse.quant.scheme import Scheme

SCHEME = Scheme(4, 16)


def inputs(tokens: int, columns: int) -> torch.Tensor:
    """Correlated, of very unequal sizes, as activations are."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mix * torch.logspace(-1, 1, columns)


def samples(rows: int, length: int = 48) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(120, (rows, length), generator=generator).tolist()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_gptq_loses_less_than_the_best_scales_alone(group: int | None, symmetric: bool) -> None:
    scheme = Scheme(4, group, symmetric=symmetric)
    x_TD = inputs(400, 160)
    hessian_XDD = torch.stack([x_TD.T @ x_TD, (x_TD[:200].T @ x_TD[:200])]) / 400
    weight_XND = torch.randn(2, 24, 160, generator=torch.Generator().manual_seed(0))

    def loss(rounded: Rounded) -> list[float]:
        error = worth(rounded, scheme) - weight_XND
        return ((error @ hessian_XDD) * error).sum((1, 2)).tolist()

    best = searched(weight_XND, scheme, hessian_XDD.diagonal(dim1=1, dim2=2))
    for calibrated, plain in zip(
        loss(solve(weight_XND, hessian_XDD, scheme)), loss(best), strict=True
    ):
        assert calibrated < 0.6 * plain


def test_gptq_of_uncorrelated_inputs_is_plain_rounding() -> None:
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    alone = torch.diag(torch.arange(1.0, 65.0))
    expected = searched(weight, SCHEME, importance(alone[None]))
    assert torch.equal(solve(weight, alone[None], SCHEME).steps, expected.steps)


def test_gptq_bears_inputs_that_are_always_zero_or_always_alike() -> None:
    x_TD = inputs(100, 64)
    x_TD[:, 5] = 0
    x_TD[:, 6] = x_TD[:, 7]
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    found = worth(solve(weight, (x_TD.T @ x_TD)[None], SCHEME), SCHEME)
    plain = worth(nearest(weight, SCHEME), SCHEME)
    losses = [float(((x - weight) @ x_TD.T).norm()) for x in (found, plain)]
    assert losses[0] < 0.8 * losses[1]


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_scaled_inputs_change_nothing_but_the_rounding(config: dict[str, object]) -> None:
    decoder = decoder_of(config)
    block = decoder.model.layers[0]
    block.input_layernorm.weight.data.mul_(torch.logspace(-1, 1, 64))
    passage = Passage(decoder, samples(4))
    kv = Packed([48])
    angles = decoder.rope.tables(kv.positions(), None, torch.float32)
    before = block(passage.hidden[0], *angles, kv)
    with observed(block) as moments:
        passage.pass_by(block)
    weight = block.self_attn.q_proj.weight.clone()
    scale_inputs(block, moments, SCHEME)
    assert not torch.allclose(weight, block.self_attn.q_proj.weight)
    assert torch.allclose(block(passage.hidden[0], *angles, kv), before, atol=2e-4)
    with observed(block) as again:
        passage.pass_by(block)
    for name, seen in moments.items():
        assert torch.allclose(seen.mean(), again[name].mean(), rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_every_layer_is_shown_what_it_is_fed(config: dict[str, object]) -> None:
    decoder = decoder_of(config)
    block = decoder.model.layers[0]
    passage = Passage(decoder, samples(2))
    with observed(block) as moments:
        passage.pass_by(block)
    assert set(moments) == set(linears(block)) == set(linears(decoder.model.layers[1]))
    experts = [seen for name, seen in moments.items() if ".experts." in name]
    for seen in experts:
        assert int(seen.tokens_X.sum()) == 2 * 48 * 2  # each token has two of them
    assert all(int(moments[name].tokens_X) == 96 for name in moments if ".experts." not in name)


def divergence(decoder: Decoder, source: Decoder) -> float:
    held_out = samples(5)
    passages = [Passage(one, held_out) for one in (source, decoder)]
    for passage in passages:
        for block in passage.decoder.model.layers:
            passage.advance(block)
    return compare(*passages).kl_divergence


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_calibrated_models_are_nearer_to_their_source(config: dict[str, object]) -> None:
    def loss(method: Method) -> float:
        shown = samples(24) if method in ("gptq", "awq") else None
        return divergence(quantize(decoder_of(config), SCHEME, shown, method=method), source)

    source = decoder_of(config)
    losses = {method: loss(method) for method in ("rtn", "search", "gptq", "awq")}
    assert losses["search"] < losses["rtn"]
    assert losses["gptq"] < 0.8 * losses["rtn"]
    assert losses["awq"] < losses["rtn"]
    assert losses["gptq"] > 0


def test_experts_that_saw_little_are_named(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("xverse")
    logger.propagate, was = True, logger.propagate
    try:
        quantize(decoder_of(MOE), SCHEME, samples(1, 20), method="gptq")
    finally:
        logger.propagate = was
    assert any("fewer samples than they have inputs (64)" in text for text in caplog.messages)


def test_a_second_run_gives_the_same_model() -> None:
    first, second = (quantize(decoder_of(CONFIG), SCHEME, samples(4)) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_auto_takes_what_suits_and_the_rest_is_refused() -> None:
    assert choose_method("auto", SCHEME, samples=True) == "gptq"
    assert choose_method("auto", SCHEME, samples=False) == "search"
    assert choose_method("auto", Scheme(4), samples=False) == "rtn"
    assert choose_method("auto", Scheme(8, kind="float"), samples=True) == "rtn"
    with pytest.raises(XverseError, match="samples"):
        choose_method("awq", SCHEME, samples=False)
    with pytest.raises(XverseError, match="fp8"):
        choose_method("gptq", Scheme(8, kind="float"), samples=True)


def test_published_schemes_are_rounded_as_ever() -> None:
    source, small = decoder_of(CONFIG), quantize(decoder_of(CONFIG), 4)
    layer = small.model.layers[1].mlp.up_proj
    expected = nearest(source.model.layers[1].mlp.up_proj.weight, Scheme(4))
    assert torch.equal(layer.integers(), expected.steps)
    assert torch.equal(layer.scale, expected.scale)
