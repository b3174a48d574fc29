"""A decoder repacked for a CPU gives what the quantized one gives, and serves."""

from dataclasses import replace

import pytest
import torch

from tests.quant.test_quantize import CONFIG, MOE, decoder_of
from xverse.engine.engine import Engine
from xverse.engine.options import EngineOptions
from xverse.engine.packed_step import PackedStep
from xverse.engine.request import Request, Sampling, Token
from xverse.engine.runner import PlainRunner
from xverse.engine.simple import decode
from xverse.kernels import native
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.model.fuse import fuse
from xverse.quant.linear import QuantizedLinear
from xverse.quant.prepare import PackedBlock, PackedEmbedding, PackedLinear, prepare, why_not
from xverse.quant.quantize import quantize
from xverse.quant.recipe import Recipe
from xverse.quant.scheme import Scheme

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())
GREEDY = Sampling(temperature=0.0, max_tokens=9, ignore_eos=True).over({})
PROMPTS = [[5, 9, 30, 2], [7], [100, 3, 3, 8, 1, 60, 61, 62, 63, 64], [11, 12]]
RECIPES = {
    "int4": Recipe(Scheme(4, 32), head=Scheme(8), embedding=Scheme(8, 32)),
    "int8": Recipe(Scheme(8, 16, symmetric=False)),
    "int4-row": Recipe(Scheme(4), embedding=Scheme(8)),
}


def logits(decoder: Decoder) -> torch.Tensor:
    ids = torch.tensor([3, 50, 7, 119, 3, 64])
    kv = Packed([4, 2])
    with torch.inference_mode():
        return decoder(ids, kv.positions(), kv)


def prepared(recipe: str, config: dict[str, object] = CONFIG) -> Decoder:
    return prepare(fuse(quantize(decoder_of(config), RECIPES[recipe])))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_rounding_of_activations_is_new(recipe: str, tied: bool) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    exact = logits(quantize(decoder_of(config), RECIPES[recipe]))
    decoder = prepared(recipe, config)
    assert all(isinstance(block, PackedBlock) for block in decoder.model.layers)
    assert not any(isinstance(m, QuantizedLinear) for m in decoder.modules())
    fast = logits(decoder)
    assert 0 < (fast - exact).abs().mean() < 0.02 * exact.std()


def test_what_is_repacked_is_no_part_of_the_state() -> None:
    names = prepared("int4").state_dict()
    assert names, "norms are"
    assert not [name for name in names if "packed" in name]


def test_experts_stay_and_the_rest_of_a_mixture_is_repacked() -> None:
    exact = logits(quantize(decoder_of(MOE), RECIPES["int8"]))
    decoder = prepared("int8", MOE)
    kinds = {type(m) for m in decoder.modules()}
    assert {QuantizedLinear, PackedLinear} <= kinds
    assert PackedBlock not in kinds
    assert (logits(decoder) - exact).abs().mean() < 0.02 * exact.std()
    stacks = [m for m in decoder.modules() if isinstance(m, QuantizedLinear)]
    assert {why_not(stack) for stack in stacks} == {"it is a stack of experts"}


def test_reasons_to_stay() -> None:
    fp8 = quantize(decoder_of(CONFIG), "fp8")
    found = {why_not(m) for m in fp8.modules() if isinstance(m, QuantizedLinear)}
    assert found == {"its weights are fp8"}
    before = logits(fp8)
    assert torch.allclose(logits(prepare(fuse(fp8))), before, atol=1e-5)
    assert why_not(torch.nn.Linear(8, 8)) == "its weights are not quantized"


def test_an_embedding_is_one_memory() -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    plain = quantize(decoder_of(config), RECIPES["int4"]).model.embed_tokens
    ids = torch.tensor([0, 119, 7])
    packed = prepared("int4", config).model.embed_tokens
    assert isinstance(packed, PackedEmbedding)
    assert torch.equal(packed(ids), plain(ids))


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_of_many_are_those_of_one(recipe: str) -> None:
    """In the engine, mixed with prompts, with guesses or without; and by the plain decoder."""
    decoder = prepared(recipe)
    alone = [[t.id for t in decode(decoder, [ids], [GREEDY])] for ids in PROMPTS]
    for speculate in (0, 3):
        options = EngineOptions(
            kv_tokens=256, page_size=4, share_prefixes=False, speculate=speculate
        )
        engine = Engine(decoder, options=options)
        assert isinstance(engine.runner, PlainRunner)
        assert isinstance(engine.runner.step, PackedStep)
        numbers = [engine.add(Request(tuple(ids), GREEDY)) for ids in PROMPTS]
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        while engine.busy:
            for output in engine.step():
                assert isinstance(output, Token)
                answers[output.request].append(output.id)
        assert list(answers.values()) == alone


def test_a_deterministic_engine_fills_its_rows() -> None:
    decoder = prepared("int4")
    options = EngineOptions(kv_tokens=256, page_size=4)
    engine = Engine(decoder, options=replace(options, deterministic=True))
    assert isinstance(engine.runner, PlainRunner)
    assert engine.runner.step is None
    engine.add(Request((5, 9, 30), GREEDY))
    tokens = [output for _ in range(40) if engine.busy for output in engine.step()]
    assert len(tokens) == GREEDY.max_tokens
