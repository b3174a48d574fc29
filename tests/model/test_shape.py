"""Shapes: what a config.json may say, and that the published models count to the parameter."""

import dataclasses

import pytest

from xverse.errors import XverseError
from xverse.model.catalog import CATALOG
from xverse.model.shape import ModelShape

SMALL: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


# Totals and active counts as printed by the published tools (specification, section 1.2).
@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("xverse-7b", 7_299_846_144, 7_299_846_144),
        ("xverse-13b", 13_715_031_040, 13_715_031_040),
        ("xverse-13b-2", 13_717_652_480, 13_717_652_480),
        ("xverse-65b", 66_408_521_728, 66_408_521_728),
        ("xverse-moe-a4.2b", 25_778_352_640, 4_226_000_000),
    ],
)
def test_published_shapes_count_to_the_parameter(name: str, total: int, active: int) -> None:
    shape = CATALOG[name]
    assert shape.num_parameters == total
    assert shape.num_active_parameters == pytest.approx(active, rel=0.001)
    assert ModelShape.from_config(shape.to_config()) == shape


def test_parameter_count_is_that_of_the_decoder() -> None:
    import torch

    from xverse.model.decoder import Decoder

    variants = [
        SMALL,
        SMALL | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        SMALL | {"model_type": "xverse", "num_experts": 4, "moe_top_k": 2},
        SMALL | {"model_type": "xverse", "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 3},
    ]
    for config in variants:
        shape = ModelShape.from_config(config)
        with torch.device("meta"):
            decoder = Decoder(shape)
        assert sum(p.numel() for p in decoder.parameters()) == shape.num_parameters


def test_memory_of_the_published_models() -> None:
    assert CATALOG["xverse-7b"].kv_bytes_per_token() == 512 * 1024
    assert CATALOG["xverse-13b-2"].kv_bytes_per_token() == 800 * 1024
    assert CATALOG["xverse-moe-a4.2b"].kv_bytes_per_token() == 280 * 1024


def test_newer_and_older_rope_keys_say_the_same() -> None:
    older = SMALL | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}
    newer = SMALL | {
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
    }
    assert ModelShape.from_config(older) == ModelShape.from_config(newer)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gpt2"},
        {"model_type": None},
        {"hidden_size": 0},
        {"hidden_size": -1},
        {"hidden_size": "32"},
        {"hidden_size": True},
        {"hidden_size": 1e400},
        {"vocab_size": None},
        {"vocab_size": 2**70},
        {"num_key_value_heads": 3},
        {"head_dim": 7},
        {"hidden_act": "gelu"},
        {"sliding_window": 128},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": -5.0},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": "4"}},
        {"tie_word_embeddings": "yes"},
        {"num_experts": 4, "moe_top_k": 5},
    ],
)
def test_impossible_configs_are_refused_in_words(change: dict[str, object]) -> None:
    with pytest.raises(XverseError):
        ModelShape.from_config(SMALL | change)


def test_every_field_survives_the_folder() -> None:
    shape = ModelShape.from_config(SMALL | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    changed = dataclasses.replace(shape, attention_bias=True, rms_norm_eps=1e-5, rope_theta=7.0)
    assert ModelShape.from_config(changed.to_config()) == changed
