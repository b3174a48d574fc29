"""Recipes and schemes: what they are called, what fits which model, what is refused."""

from dataclasses import replace

import pytest
import torch

from tests.quant.test_quantize import CONFIG, MOE, decoder_of, logits
from xverse.errors import XverseError
from xverse.model.fuse import fuse
from xverse.model.linear import Linear, SideBySide, join
from xverse.model.shape import ModelShape
from xverse.quant.embedding import QuantizedEmbedding
from xverse.quant.linear import QuantizedLinear
from xverse.quant.quantize import quantize
from xverse.quant.recipe import NAMED, Recipe
from xverse.quant.scheme import Scheme

SHAPE = ModelShape.from_config(CONFIG)


def layer(seed: int = 0, *, outputs: int = 12, inputs: int = 128, bias: bool = False) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(outputs, generator=generator) if bias else None
    return Linear.of(torch.randn(outputs, inputs, generator=generator), given)


def test_names_mean_what_they_say() -> None:
    assert Recipe.of(8).scheme == Recipe.of("int8-row").scheme == Scheme(8)
    assert NAMED["int4"] == Recipe(Scheme(4, 128), head=Scheme(8))
    assert str(NAMED["int4"]) == "int4 in groups of 128; head int8 per row"
    with pytest.raises(XverseError, match="Did you mean 'int4-row'"):
        Recipe.of("int4-rows")


def test_groups_are_halved_until_they_fit_every_layer() -> None:
    assert Recipe.of("int4").fitting(SHAPE).scheme == Scheme(4, 32)  # 64 and 96 inputs
    assert Recipe.of("int4").fitting(replace(SHAPE, intermediate_size=128)).scheme.group_size == 64
    with pytest.raises(XverseError, match="int4-row"):
        Recipe.of("int4").fitting(replace(SHAPE, intermediate_size=100))
    assert Recipe.of("int4").fitting(replace(SHAPE, tie_word_embeddings=True)).head is None


BAD: list[dict[str, object]] = [{"bits": 4, "group_size": 7}, {"bits": 4, "kind": "float"}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_impossible_schemes_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(XverseError):
        Scheme(**bad)  # type: ignore[arg-type]


GROUPED = [Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(8, 64), Scheme(8, kind="float")]


@pytest.mark.parametrize("scheme", GROUPED, ids=str)
def test_parts_add_up_to_the_layer(scheme: Scheme) -> None:
    whole = QuantizedLinear.of(layer(bias=True), scheme)
    x_TD = torch.randn(3, 128, generator=torch.Generator().manual_seed(9))
    y_TN = whole(x_TD)
    rows = [whole.keep_outputs(part, part + 1, 3)(x_TD) for part in range(3)]
    assert torch.allclose(torch.cat(rows, dim=-1), y_TN, atol=1e-5)
    # Eight parts of 16 columns go through the groups.
    columns = [
        whole.keep_inputs(part, part + 1, 8)(x_TD[:, 16 * part : 16 * part + 16])
        for part in range(8)
    ]
    assert torch.allclose(torch.stack(columns).sum(0), y_TN, atol=1e-4)


@pytest.mark.parametrize("scheme", GROUPED, ids=str)
def test_joined_layers_give_what_they_gave(scheme: Scheme) -> None:
    parts = [QuantizedLinear.of(layer(seed), scheme) for seed in range(3)]
    x_TD = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    joined = join(*parts)  # type: ignore[arg-type]
    assert isinstance(joined, QuantizedLinear)
    assert torch.allclose(joined(x_TD), torch.cat([part(x_TD) for part in parts], -1), atol=1e-5)


def test_layers_of_different_kinds_stand_side_by_side() -> None:
    ordered = QuantizedLinear.of(layer(1), Scheme(4, 32))
    ordered.order = torch.arange(127, -1, -1)
    parts = [layer(0), ordered, QuantizedLinear.of(layer(2), Scheme(8))]
    x_TD = torch.randn(2, 128, generator=torch.Generator().manual_seed(1))
    for one in (parts, [ordered, QuantizedLinear.of(layer(1), Scheme(4, 32))]):
        joined = join(*one)  # type: ignore[arg-type]
        assert isinstance(joined, SideBySide)
        assert torch.equal(joined(x_TD), torch.cat([part(x_TD) for part in one], -1))
    with pytest.raises(XverseError, match="desc_act"):
        ordered.keep_inputs(0, 1, 2)


@pytest.mark.parametrize("config", [CONFIG, MOE, CONFIG | {"tie_word_embeddings": True}])
def test_head_and_embedding_are_quantized_as_the_recipe_says(config: dict[str, object]) -> None:
    recipe = Recipe(Scheme(8, 32), head=Scheme(8), embedding=Scheme(8))
    source, small = logits(decoder_of(config)), quantize(decoder_of(config), recipe)
    assert isinstance(small.model.embed_tokens, QuantizedEmbedding)
    assert small.dtype == torch.float32
    error = (logits(small) - source).norm() / source.norm()
    assert 0 < float(error) < 0.3  # a router may choose another expert
    assert torch.allclose(logits(fuse(small)), logits(small), atol=1e-4)
