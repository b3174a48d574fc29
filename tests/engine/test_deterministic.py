"""Deterministic mode: equal to the last bit, whatever runs beside a request and before it."""

import random
from pathlib import Path

import pytest
import torch

from tests.engine.tiny import CONFIG, VOCAB
from tests.tiny_model import write_published_folder
from xverse import LLM
from xverse.engine.engine import Engine
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request, Sampling, Scores, Token
from xverse.engine.scheduler import Generation, Scheduler
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


CROWDS = (64, 1, 5, 17, 2, 39, 8, 64)  # 200 together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_bits_alone_and_among_others(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 prompts alone; in crowds of 1 to 64 with shared pages and without; and where memory is
    so short that who came last is computed again."""
    shape = ModelShape.from_config(CONFIG)
    decoder = initialize(Decoder(shape), std=0.3).to(dtype).requires_grad_(False)
    prompts = asked(sum(CROWDS))

    def engine(kv_tokens: int, **options: int) -> Engine:
        return Engine(
            decoder, options=EngineOptions(kv_tokens=kv_tokens, deterministic=True, **options)
        )

    solo = engine(256, share_prefixes=False)
    alone = [run(solo, [ids])[0] for ids in prompts]
    assert in_crowds(engine(4096), prompts) == alone
    preempted: list[Generation] = []
    plain = Scheduler._preempt

    def count(it: Scheduler, generation: Generation) -> None:
        preempted.append(generation)
        plain(it, generation)

    monkeypatch.setattr(Scheduler, "_preempt", count)
    for share in (False, True):
        tight = engine(110, page_size=2, step_tokens=23, max_running=9, share_prefixes=share)
        half = prompts[:64] if share else prompts[64:]
        assert in_crowds(tight, half) == (alone[:64] if share else alone[64:])
        assert preempted
        preempted.clear()


def in_crowds(it: Engine, prompts: list[tuple[int, ...]]) -> list[Found]:
    found: list[Found] = []
    for crowd in CROWDS:
        found += run(it, prompts[len(found) : len(found) + crowd])
    return found


def test_text_is_the_same_to_the_byte(tmp_path: Path) -> None:
    """At LLM's own door: whole answers, with their log-probabilities."""
    write_published_folder(tmp_path)
    llm = LLM(tmp_path, deterministic=True)
    options = Sampling(max_tokens=8, temperature=1.0, seed=5, logprobs=2, prompt_logprobs=1)
    prompts = [f"The {number} and then {number * number}, 北京" for number in range(24)]
    together = llm.generate(prompts, options)
    assert together == [llm.generate(prompt, options) for prompt in prompts]
    assert len({answer.text for answer in together}) > 12


def test_experts_are_refused() -> None:
    config = {"model_type": "xverse", "num_experts": 4, "moe_top_k": 2, "num_shared_experts": 1}
    decoder = initialize(Decoder(ModelShape.from_config(CONFIG | config)))
    with pytest.raises(XverseError, match="deterministic"):
        Engine(decoder, options=EngineOptions(deterministic=True))
