"""Deterministic mode: equal to the last bit, whatever runs beside a request and before it."""

import random

import pytest
import torch

from tests.engine.tiny import CONFIG, VOCAB
from xverse.engine.engine import Engine, EngineOptions
from xverse.engine.request import Request, Sampling, Scores, Token
from xverse.errors import XverseError
from xverse.model.decoder import Decoder, initialize
from xverse.model.shape import ModelShape

Found = list[tuple[object, ...]]


def asked(count: int) -> list[tuple[int, ...]]:
    """Prompts, many of which begin alike."""
    chance = random.Random(7)
    stem = [chance.randrange(VOCAB) for _ in range(40)]
    return [
        (*stem[: chance.randint(0, 40)], *(chance.randrange(VOCAB) for _ in range(9)))
        for _ in range(count)
    ]


def run(it: Engine, prompts: list[tuple[int, ...]]) -> list[Found]:
    """Ids and all log-probabilities of each request, exactly."""
    sampling = Sampling(max_tokens=6, temperature=1.0, seed=3, logprobs=4).over({})
    numbers = [it.add(Request(ids, sampling, score_from=len(ids) - 3)) for ids in prompts]
    found: dict[int, Found] = {number: [] for number in numbers}
    while it.busy:
        for output in it.step():
            if isinstance(output, Token):
                found[output.request].append((output.id, output.logprob, output.top))
            else:
                assert isinstance(output, Scores)
                found[output.request].append(output.logprobs)
    return [found[number] for number in numbers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    """Alone without anything kept; then in crowds of 1 to 64, with shared pages and preemption."""
    shape = ModelShape.from_config(CONFIG)
    decoder = initialize(Decoder(shape), std=0.3).to(dtype).requires_grad_(False)
    prompts = asked(64)

    def engine(kv_tokens: int, **options: int) -> Engine:
        return Engine(
            decoder, options=EngineOptions(kv_tokens=kv_tokens, deterministic=True, **options)
        )

    alone = [run(engine(256), [ids])[0] for ids in prompts]
    assert run(engine(4096), prompts) == alone
    tight = engine(200, page_size=4, step_tokens=23, max_running=9)
    start = 0
    for crowd in (1, 2, 5, 17, 39):
        assert run(tight, prompts[start : start + crowd]) == alone[start : start + crowd]
        start += crowd


def test_experts_are_refused() -> None:
    config = {"model_type": "xverse", "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1}
    decoder = initialize(Decoder(ModelShape.from_config(CONFIG | config)))
    with pytest.raises(XverseError, match="deterministic"):
        Engine(decoder, options=EngineOptions(deterministic=True))
