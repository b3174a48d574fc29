"""The mesh and what cannot be spread over it: refused by name, before anything is computed."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.train.tiny import ALONE, options, tiny_shape
from xverse.errors import XverseError
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder
from xverse.model.shape import RopeScaling
from xverse.parallel.axes import ORDER, Axes
from xverse.parallel.context import spread_context
from xverse.parallel.experts import spread_experts
from xverse.parallel.grid import Grid
from xverse.parallel.pipeline import Pipeline, cut_layers, spread_layers
from xverse.parallel.ranks import Ranks
from xverse.parallel.sequence import require_divisible
from xverse.train.passes import passes_of
from xverse.train.predict import memory

MIXTURE = {"num_experts": 4, "moe_top_k": 2}


class QuietGrid(Grid):
    """Of as many ranks as one likes, none of which is there to talk with."""

    def _start(self, names: tuple[str, ...]) -> None:
        pass


def grid(rank: int = 0, **axes: int) -> Grid:
    size = 1
    for number in axes.values():
        size *= number
    size //= axes.get("interleave", 1)
    ranks = SimpleNamespace(rank=rank, size=size, device=ALONE.device, grouped=True)
    return QuietGrid(cast(Ranks, ranks), Axes(**axes))


def test_shard_is_what_the_other_axes_leave() -> None:
    assert Axes().resolve(1) == Axes(shard=1)
    assert Axes().resolve(8).shard == 8
    assert Axes(data=2, tensor=2).resolve(8).shard == 2
    assert Axes(shard=2, expert=2, context=2).resolve(8).readers == 4


@pytest.mark.parametrize(
    ("axes", "why"),
    [
        (Axes(data=3), "8 processes"),
        (Axes(data=2, shard=2), "4 devices"),
        (Axes(tensor=16), "16 devices"),
        (Axes(pipeline=2, tensor=2, shard=4), "pipeline 2 x data 1 x shard 4"),
        (Axes(tensor=0), "0 for 'tensor'"),
        (Axes(shard=-1), "-1 for 'shard'"),
        (Axes(data=True), "True for 'data'"),
        (Axes(context=cast(Any, "2")), "'2' for 'context'"),
        (Axes(interleave=2), "pipeline of one"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(axes: Axes, why: str) -> None:
    with pytest.raises(XverseError, match=why):
        axes.resolve(8)


def test_every_rank_has_its_place_and_neighbours_are_along_tensor() -> None:
    axes = dict.fromkeys(ORDER, 2)
    places = [tuple(grid(rank, **axes).place(name) for name in ORDER) for rank in range(64)]
    assert len(set(places)) == 64
    assert grid(0, **axes).members("tensor") == [0, 1]
    assert grid(63, **axes).members("pipeline") == [31, 63]
    assert grid(5, **axes).place("shard", "context") == 2 * places[5][2] + places[5][4]
    together = grid(5, **axes).members("shard", "expert", "context")
    assert len(together) == 8
    assert together[grid(5, **axes).place("shard", "expert", "context")] == 5
    readers = [grid(rank, **axes).reader for rank in range(64)]
    assert sorted(set(readers)) == list(range(8))


@pytest.mark.parametrize(("stages", "layers"), [(1, 40), (2, 40), (4, 40), (8, 40), (3, 7), (7, 7)])
def test_stages_have_all_layers_in_order_and_the_last_no_more_than_others(
    stages: int, layers: int
) -> None:
    shape = replace(CATALOG["xverse-13b"], num_hidden_layers=layers)
    cuts = cut_layers(shape, stages, 4096)
    assert [layer for cut in cuts for layer in cut] == list(range(layers))
    assert all(len(cut) > 0 for cut in cuts)
    assert len(cuts[-1]) == min(map(len, cuts))


def test_a_head_that_costs_as_much_as_blocks_leaves_its_stage_fewer() -> None:
    wide = replace(CATALOG["xverse-7b"], vocab_size=500_000)
    assert len(cut_layers(wide, 2, 4096)[-1]) <= 12
    with pytest.raises(XverseError, match="40 layers cannot be cut into 41"):
        cut_layers(CATALOG["xverse-13b"], 41, 4096)


def refusals() -> Iterator[tuple[Any, str]]:
    dense, mixture = tiny_shape(), tiny_shape(**MIXTURE)
    for changes, size, why in (
        ({}, 8, "Its heads .4. cannot"),
        ({"num_key_value_heads": 2}, 4, "key/value heads .2."),
        ({"intermediate_size": 50}, 4, "inner width .50."),
        ({"vocab_size": 5}, 4, "vocabulary .5."),
        ({"attention_bias": True}, 2, "biases"),
    ):
        shape = replace(dense, **changes)
        yield lambda shape=shape, size=size: require_divisible(shape, size), why
    yield lambda: spread_experts(Decoder(dense), grid(expert=2)), "It is dense"
    yield lambda: spread_experts(Decoder(mixture), grid(expert=3)), "4 experts cannot"
    yield lambda: spread_context(Decoder(dense), grid(context=2, tensor=4)), "context . tensor = 8"
    stretched = replace(dense, rope_scaling=RopeScaling("dynamic", 2.0))
    yield lambda: spread_context(Decoder(stretched), grid(context=2)), "NTK"
    tied = replace(dense, tie_word_embeddings=True)
    yield lambda: spread_layers(Decoder(tied), grid(pipeline=2), 64), "head is its embedding"
    yield lambda: spread_layers(Decoder(dense), grid(pipeline=3), 64), "2 layers cannot be cut"
    three = {"passes": 5, "tokens": (64, 64)}
    yield lambda: Pipeline((), grid(pipeline=2), cast(Any, None), **three), "multiple of 2 passes"
    odd = options(row_tokens=63, rows_per_pass=1)
    yield lambda: passes_of(Decoder(dense), cast(Any, None), grid(context=2), odd), "multiple of 2"


@pytest.mark.parametrize(("attempt", "why"), list(refusals()))
def test_what_cannot_be_spread_is_refused_by_name(attempt: Any, why: str) -> None:
    with pytest.raises(XverseError, match=why):
        attempt()


def test_memory_is_shared_along_every_axis() -> None:
    shape = CATALOG["xverse-13b"]
    alone = memory(shape, options(), dtype="bfloat16", ranks=1)
    for axis in ("tensor", "pipeline", "context", "shard"):
        part = memory(shape, options(mesh=Axes(**{axis: 2})), dtype="bfloat16", ranks=2)
        assert part.moments == pytest.approx(alone.moments / 2, rel=1e-6)
    spread = memory(shape, options(mesh=Axes(tensor=2)), dtype="bfloat16", ranks=2)
    assert alone.activations / 2 < spread.activations < alone.activations
    assert spread.working < alone.working
