"""The engine's decoding rows through the fused step, here by its plain references on the CPU."""

import random
from copy import deepcopy

import pytest
import torch

from tests.engine.tiny import VOCAB, greedy, plain_answer, tiny_decoder
from xverse.engine.engine import Engine, EngineOptions
from xverse.engine.fused import FusedDecode
from xverse.engine.request import Request, Token
from xverse.model.fuse import fuse


def fused_engine(kv_tokens: int) -> Engine:
    decoder = fuse(deepcopy(tiny_decoder()))
    engine = Engine(decoder, options=EngineOptions(kv_tokens=kv_tokens, page_size=4))
    assert FusedDecode.of(decoder, engine.kv, engine.pages.count) is None  # not on a CPU by itself
    engine._fused = FusedDecode(decoder, engine.kv, spare=engine.pages.count)
    return engine


@pytest.mark.parametrize("kv_tokens", [2000, 300], ids=["roomy", "preempting"])
def test_ids_are_those_of_the_plain_decoder(kv_tokens: int) -> None:
    """More sequences than one step has rows, arriving in waves, in pages that others used."""
    dice = random.Random(3)
    engine = fused_engine(kv_tokens)
    prompts: dict[int, tuple[int, ...]] = {}
    found: dict[int, list[int]] = {}

    def take() -> None:
        for output in engine.step():
            assert isinstance(output, Token)
            found[output.request].append(output.id)

    for _ in range(4):
        for _ in range(dice.randint(1, 12)):
            ids = tuple(dice.randrange(VOCAB) for _ in range(dice.randint(1, 30)))
            number = engine.add(Request(ids, greedy(20)))
            prompts[number], found[number] = ids, []
        for _ in range(dice.randint(1, 9)):
            take()
    while engine.busy:
        take()
    assert len(prompts) > 16
    for number, ids in prompts.items():
        assert found[number] == plain_answer(ids, 20), number
    engine.scheduler.check()


def test_rows_that_nobody_fills_write_to_the_spare_page_alone() -> None:
    engine = fused_engine(400)
    used = engine.kv.keys.clone()
    for start in range(3):  # a step of four rows, one of them empty
        engine.add(Request((start, 5, 9), greedy(4)))
    pages: set[int] = set()
    for _ in range(3):
        engine.step()
        running = [g.table for g in engine.scheduler.running if g.table is not None]
        pages |= {page for table in running for page in table.pages}
    spare = engine.pages.count
    changed = (engine.kv.keys != used).any(dim=4).any(dim=3).any(dim=2).any(dim=0).nonzero()[:, 0]
    assert set(changed.tolist()) <= pages | {spare}
    assert torch.equal(engine.kv.keys[:, spare, :, 1:], used[:, spare, :, 1:])
