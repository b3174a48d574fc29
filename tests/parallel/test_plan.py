"""The plan: who keeps what, and what does not divide."""

from dataclasses import replace

import pytest

from xverse.errors import XverseError
from xverse.model.catalog import CATALOG
from xverse.parallel.plan import Part, check, local_shape, part_of

SHAPE = CATALOG["xverse-13b-2"]
FEW = replace(SHAPE, num_key_value_heads=2)


def test_what_each_rank_keeps() -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        assert part_of(f"model.layers.3.self_attn.{name}", SHAPE, 1, 4) == Part("outputs", 1, 2, 4)
    assert part_of("model.layers.0.self_attn.o_proj", SHAPE, 0, 2) == Part("inputs", 0, 1, 2)
    assert part_of("model.layers.0.mlp.down_proj", SHAPE, 1, 2) == Part("inputs", 1, 2, 2)
    assert part_of("model.layers.0.mlp.experts.up_proj", SHAPE, 1, 2) == Part("outputs", 1, 2, 2)
    for whole in ("model.embed_tokens", "model.norm", "model.layers.0.mlp.router"):
        assert part_of(whole, SHAPE, 1, 2) is None


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_every_row_of_the_vocabulary_is_kept_once(size: int) -> None:
    parts = [part_of("lm_head", SHAPE, rank, size) for rank in range(size)]
    rows = [row for part in parts if part for row in range(part.first, part.last)]
    assert rows == list(range(SHAPE.vocab_size))


def test_fewer_key_heads_than_ranks_are_repeated() -> None:
    keys = [part_of("self_attn.k_proj", FEW, rank, 4) for rank in range(4)]
    assert [part.first for part in keys if part] == [0, 0, 1, 1]
    assert {part.units for part in keys if part} == {2}
    assert local_shape(FEW, 4).num_key_value_heads == 1


def test_the_shape_of_a_part() -> None:
    part = local_shape(SHAPE, 4)
    assert (part.num_attention_heads, part.num_key_value_heads) == (10, 10)
    assert (part.intermediate_size, part.head_dim) == (13824 // 4, 128)
    assert (part.hidden_size, part.vocab_size) == (SHAPE.hidden_size, SHAPE.vocab_size)


@pytest.mark.parametrize(
    ("shape", "size", "why"),
    [
        (SHAPE, 3, "1, 2, 4, 8"),
        (replace(SHAPE, num_key_value_heads=8), 5, "1, 2, 4, 8"),
        (replace(SHAPE, intermediate_size=13823), 2, "as tensor_parallel: 1"),
        (SHAPE, 0, "from 1 to 8"),
        (SHAPE, 9, "from 1 to 8"),
        (SHAPE, True, "from 1 to 8"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(shape, size: int, why: str) -> None:
    with pytest.raises(XverseError, match=why):
        check(shape, size)
