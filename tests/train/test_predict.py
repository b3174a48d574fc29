"""Predictions: by the formulas, against what is counted."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.train.tiny import options
from xverse.model.catalog import CATALOG, from_depth
from xverse.train import flops, predict
from xverse.train.options import Computing, Updating


def test_operations_of_a_token_are_the_specifications() -> None:
    """spec: 7B at 4,096: 44.55 G strict, 47.77 G by PaLM's formula without the embedding."""
    shape = CATALOG["xverse-7b"]
    assert flops.strict(shape, 4096) == pytest.approx(44.55e9, rel=1e-3)
    embedding = 6 * shape.vocab_size * shape.hidden_size
    assert flops.palm(shape, 4096) - embedding == pytest.approx(47.77e9, rel=1e-3)


def test_states_of_a_7b_are_the_known_ones() -> None:
    shape = CATALOG["xverse-7b"]
    training = options(rows_per_pass=1, rows_per_step=8)
    rich = predict.memory(shape, training, dtype="bfloat16", ranks=1)
    states = rich.weights + rich.masters + rich.moments + rich.gradients
    assert states == 16 * shape.num_parameters
    lean = dataclasses.replace(training, update=Updating(master="none", moments="bfloat16"))
    told = predict.memory(shape, lean, dtype="bfloat16", ranks=1)
    assert told.weights + told.masters + told.moments + told.gradients == pytest.approx(
        58e9, rel=0.01
    )
    parts = dataclasses.asdict(told)
    assert parts.pop("host") == told.weights + told.moments  # what a save is copied to
    assert told.total == sum(parts.values())
    spread = predict.memory(shape, training, dtype="bfloat16", ranks=4)
    assert spread.moments == pytest.approx(rich.moments / 4, rel=1e-6)
    assert spread.gathered > 0


def test_gradients_of_one_pass_come_as_activations_go() -> None:
    shape = CATALOG["xverse-7b"]
    lean = Updating(master="none", moments="bfloat16")
    told = [
        predict.memory(
            shape,
            options(row_tokens=4096, rows_per_pass=4, rows_per_step=rows, update=lean),
            dtype="bfloat16",
            ranks=1,
        )
        for rows in (4, 8)
    ]
    assert [one.gradients for one in told] == [0, 2 * shape.num_parameters]
    assert told[0].activations == pytest.approx(69e9, rel=0.01)  # 8 x 4096 + 3 x 11008 a token
    short = options(row_tokens=64, rows_per_pass=1, rows_per_step=1, update=lean)
    alone = predict.memory(shape, short, dtype="bfloat16", ranks=1)
    least = 6 * shape.num_parameters + alone.activations + alone.working
    assert alone.total == max(8 * shape.num_parameters, least)


def test_the_peak_is_the_one_that_an_h200_had() -> None:
    """7B, 4 rows of 4,096, all states in bf16: within 5 %, as the house has promised."""
    results = Path(__file__).parents[2] / "bench" / "results" / "train_h200_mfu4096.json"
    measured = json.loads(results.read_text("utf-8"))["figures"]["peak_GB"] * 1e9
    training = options(
        row_tokens=4096,
        rows_per_step=4,
        rows_per_pass=4,
        update=Updating(master="none", moments="bfloat16"),
        compute=Computing(dtype="bfloat16"),
    )
    told = predict.memory(CATALOG["xverse-7b"], training, dtype="bfloat16", ranks=1)
    assert told.total == pytest.approx(measured, rel=0.05)


def test_recompute_is_reckoned_with() -> None:
    shape = CATALOG["xverse-7b"]
    none, selective, full = (
        predict.memory(
            shape, options(compute=Computing(recompute=how)), dtype="bfloat16", ranks=1
        ).activations
        for how in ("none", "selective", "full")
    )
    assert none > selective > full


def test_depth_is_one_dial() -> None:
    shape = from_depth(12, 32_000, 2048)
    assert (shape.hidden_size, shape.num_attention_heads, shape.intermediate_size) == (
        768,
        12,
        2048,
    )
    assert shape.num_parameters == pytest.approx(134e6, rel=0.01)
    assert from_depth(32, 100, 64).head_dim == 128
