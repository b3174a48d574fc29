"""compressed-tensors: the layout and the config as the package itself writes and reads them."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from xverse.errors import XverseError
from xverse.model.decoder import Decoder
from xverse.model.linear import Linear
from xverse.model.shape import ModelShape
from xverse.quant.linear import QuantizedLinear
from xverse.quant.recipe import NAMED, Recipe
from xverse.quant.scheme import Scheme
from xverse.quant.stored import layout_of
from xverse.quant.stored_compressed import Compressed, to_config, to_disk

ROWS, COLUMNS = 12, 96  # rows that are no whole words, a number of columns with groups of 32
SCHEMES = [
    *(Scheme(b, g, s) for b, g, s in itertools.product((8, 4), (None, 32), (True, False))),
    Scheme(8, kind="float"),
]


class Memory:
    """Stored tensors of one layer, as `LayerTensors`."""

    dtype = torch.float32

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].shape) if name in self.tensors else None

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert tuple(self.tensors[name].shape) == shape
        return self.tensors[name].to(dtype)


def layer_of(scheme: Scheme, rows: int = ROWS, columns: int = COLUMNS) -> QuantizedLinear:
    layer = Linear(columns, rows)
    with torch.no_grad():
        layer.weight.normal_(0.1, generator=torch.Generator().manual_seed(1))
    return QuantizedLinear.of(layer, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_layer_comes_back_bit_for_bit(scheme: Scheme) -> None:
    layer = layer_of(scheme)
    layout = layout_of(to_config(Recipe(scheme)))
    parts = layout.read(scheme, ROWS, COLUMNS, Memory(to_disk(layer)))
    assert parts.weight.dtype == layer.weight.dtype
    for name in ("weight", "scale", "zero"):
        mine, theirs = getattr(layer, name), getattr(parts, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or mine.dtype == theirs.dtype
        assert mine is None or torch.equal(mine.float(), theirs.float())
    assert parts.order is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_package_reads_what_we_write(scheme: Scheme) -> None:
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    layer, config = layer_of(scheme), to_config(Recipe(scheme))
    theirs = QuantizationConfig.model_validate(config)
    group: Any = theirs.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    read = compressor.decompress(to_disk(layer), group)["weight"]
    assert torch.equal(read, layer.dequantized())


def test_words_hold_the_first_column_lowest() -> None:
    layer = layer_of(Scheme(4))
    stored = to_disk(layer)
    assert stored["weight_packed"].dtype == torch.int32
    assert stored["weight_packed"].shape == (ROWS, COLUMNS // 8)
    assert stored["weight_shape"].tolist() == [ROWS, COLUMNS]
    word = int(stored["weight_packed"][2, 1]) & 0xFFFFFFFF
    for place in range(8):
        assert (word >> place * 4 & 15) - 8 == int(layer.integers()[2, 8 + place])


def test_rows_that_are_no_whole_words_are_filled_up() -> None:
    layer = layer_of(Scheme(4), columns=20)
    stored = to_disk(layer)
    assert stored["weight_packed"].shape == (ROWS, 3)
    parts = layout_of(to_config(Recipe(Scheme(4)))).read(Scheme(4), ROWS, 20, Memory(stored))
    assert torch.equal(parts.weight, layer.weight)


def decoder_of(**changes: object) -> Decoder:
    config: dict[str, object] = {
        "model_type": "xverse", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip
    with torch.device("meta"):
        return Decoder(ModelShape.from_config(config | changes))


@pytest.mark.parametrize("name", NAMED)
def test_the_config_says_which_layer_has_which_scheme(name: str) -> None:
    recipes = [NAMED[name], Recipe(NAMED[name].scheme, Scheme(8), Scheme(8, 32))]
    for recipe in recipes:
        layout = layout_of(to_config(recipe))
        for where, module in decoder_of().named_modules():
            wanted = recipe.scheme_of(where, module)
            if where == "lm_head" and wanted is None:
                continue  # the class would be meant, and the files hold it unquantized
            assert layout.scheme_of(where, module) == wanted, where


def config_of(**weights: object) -> dict[str, Any]:
    config: dict[str, Any] = to_config(Recipe(Scheme(4, 32)))
    config["config_groups"]["group_0"]["weights"] |= weights
    return config


REFUSED = {
    "2 bits": config_of(num_bits=2),
    "bits as text": config_of(num_bits="4"),
    "true bits": config_of(num_bits=True),
    "blocks": config_of(strategy="block"),
    "tensor groups": config_of(strategy="tensor_group"),
    "group without a size": config_of(group_size=None),
    "group of 12": config_of(group_size=12),
    "dynamic": config_of(dynamic=True),
    "column order": config_of(actorder="group"),
    "fp8 in groups": config_of(num_bits=8, type="float"),
    "fp4": config_of(type="float"),
    "no groups": {**config_of(), "config_groups": {}},
    "groups of numbers": {**config_of(), "config_groups": {"group_0": 3}},
    "sparse": {**config_of(), "format": "marlin-24"},
    "sparsity": {**config_of(), "sparsity_config": {"format": "sparse-bitmask"}},
    "keys and values": {**config_of(), "kv_cache_scheme": {"num_bits": 8}},
    "of nobody": {"quant_method": "quip"},
    "nothing": {},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_variants_are_refused_by_name(case: str) -> None:
    with pytest.raises(XverseError, match=r"does not read|no such floating"):
        layout_of(REFUSED[case])


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "a" * 201, ".*.*.*.*x", "[", r"(.)\1", "(a*){9}"]
)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    config = config_of()
    config["config_groups"]["group_0"]["targets"] = [f"re:{pattern}"]
    with pytest.raises(XverseError, match="pattern"):
        layout_of(config)


def test_targets_are_names_before_patterns_before_classes() -> None:
    config = config_of()
    groups = config["config_groups"]
    for key, target, bits in (("a", "re:.*[qk]_proj$", 8), ("b", "model.layers.0.mlp.up_proj", 8)):
        weights = groups["group_0"]["weights"] | {"num_bits": bits}
        groups[key] = {"targets": [target], "weights": weights}
    layout = Compressed(config)
    bits = {
        name.rpartition(".")[2]: scheme.bits
        for name, module in decoder_of().named_modules()
        if (scheme := layout.scheme_of(name, module)) is not None and name != "lm_head"
    }
    assert bits == {
        "q_proj": 8, "k_proj": 8, "v_proj": 4, "o_proj": 4,
        "gate_proj": 4, "up_proj": 8, "down_proj": 4,
    }  # fmt: skip


def test_activations_rounded_as_they_come_stay_as_they_are() -> None:
    config = config_of()
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    assert layout_of(config).scheme_of("q", Linear(32, 4)) == Scheme(4, 32)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": False}
    with pytest.raises(XverseError, match="input_activations"):
        layout_of(config)


def test_one_scale_for_a_matrix_and_unpacked_integers_are_read() -> None:
    scheme = Scheme(8)
    config = config_of(num_bits=8, strategy="tensor", group_size=None) | {"format": "int-quantized"}
    weight = torch.arange(-16, 16, dtype=torch.int8).view(4, 8)
    stored = Memory({"weight": weight, "weight_scale": torch.tensor([0.5])})
    parts = layout_of(config).read(scheme, 4, 8, stored)
    assert torch.equal(parts.weight, weight)
    assert parts.scale.tolist() == [0.5] * 4


def test_a_shape_that_is_not_the_models_is_refused() -> None:
    stored = to_disk(layer_of(Scheme(4, 32)))
    stored["weight_shape"] = torch.tensor([ROWS, COLUMNS - 1])
    with pytest.raises(XverseError, match="weight_shape"):
        layout_of(config_of()).read(Scheme(4, 32), ROWS, COLUMNS, Memory(stored))
