"""Workloads, times, counts, agreement with the plain decoder, bytes: what benchmarks rest on."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.engine.tiny import CONFIG, VOCAB, greedy, plain_answer, tiny_decoder
from xverse.engine.agree import compare, judge
from xverse.engine.engine import Engine, Output
from xverse.engine.footprint import bytes_per_token, copy_bandwidth, footprint, weight_bytes
from xverse.engine.measure import (
    Timed,
    measure_latency,
    measure_throughput,
    percentile,
    warm,
)
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request, Token
from xverse.engine.workload import LARGEST_ID, apart, make_requests
from xverse.errors import XverseError
from xverse.model import fresh
from xverse.model.decoder import Decoder
from xverse.model.feedforward import MixtureOfExperts
from xverse.model.fresh import random_decoder
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape

CPU = torch.device("cpu")
MOE = CONFIG | {
    "model_type": "xverse",
    "num_experts": 8,
    "moe_top_k": 2,
    "num_shared_experts": 1,
    "num_key_value_heads": 4,
}


def engine(**options: int | bool) -> Engine:
    return Engine(tiny_decoder(), options=EngineOptions(**({"kv_tokens": 2048} | options)))  # type: ignore[arg-type]


class Watched:
    """An engine, and how many requests it had at once at most."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.open, self.most = engine, set[int](), 0

    def add(self, request: Request) -> int:
        number = self.engine.add(request)
        self.open.add(number)
        self.most = max(self.most, len(self.open))
        return number

    def step(self) -> Sequence[Output]:
        outputs = self.engine.step()
        self.open -= {out.request for out in outputs if isinstance(out, Token) and out.finish}
        return outputs


def test_the_uniform_workload_is_the_well_known_one() -> None:
    requests = make_requests(256, (100, 1024), (100, 1024), vocabulary=100_534)
    assert sum(len(request.ids) for request in requests) == 142_827
    assert sum(request.sampling.max_tokens or 0 for request in requests if request.sampling) == (
        133_966
    )
    assert {len(request.ids) for request in requests} <= set(range(100, 1025))
    assert max(id for request in requests for id in request.ids) == LARGEST_ID
    assert len({request.ids for request in requests}) == 256


def test_ids_are_of_the_vocabulary_and_sampling_has_seeds() -> None:
    requests = make_requests(20, (3, 9), (2, 2), vocabulary=10, temperature=0.7)
    assert {id for request in requests for id in request.ids} == set(range(10))
    assert all(request.sampling and request.sampling.ignore_eos for request in requests)
    assert [r.sampling.seed for r in requests if r.sampling] == list(range(20))


def test_answers_are_the_engine_s_own_and_all_is_counted() -> None:
    requests = make_requests(7, (3, 20), (1, 9), vocabulary=VOCAB)
    run = measure_throughput(engine(), requests)
    for request, answer in zip(requests, run.answers, strict=True):
        assert request.sampling is not None
        assert request.sampling.max_tokens is not None
        assert answer.ids == tuple(plain_answer(request.ids, request.sampling.max_tokens))
        assert answer.prompt_tokens == len(request.ids)
        assert list(answer.token_s) == sorted(answer.token_s)
        assert 0 <= answer.asked_s < answer.token_s[0] <= answer.token_s[-1] <= run.seconds
    assert run.prompt_tokens == sum(len(request.ids) for request in requests)
    assert run.output_tokens == sum(len(answer.ids) for answer in run.answers)
    assert run.output_tokens_per_s == pytest.approx(run.output_tokens / run.seconds)
    assert run.total_tokens_per_s > run.output_tokens_per_s
    assert len(run.ttfts_s) == 7
    assert len(run.tpots_s) == sum(len(answer.ids) > 1 for answer in run.answers)
    assert len(run.gaps_s) == run.output_tokens - 7
    assert (run.preempted, run.reused_tokens) == (0, 0)


@pytest.mark.parametrize("concurrency", [1, 3, 8, None])
def test_never_more_at_once_than_asked(concurrency: int | None) -> None:
    watched = Watched(engine())
    run = measure_throughput(
        watched, make_requests(8, (2, 6), (2, 5), vocabulary=VOCAB), concurrency=concurrency
    )
    assert watched.most == (concurrency or 8)
    assert run.preempted is None, "only our own engine tells"


def test_latency_is_one_after_another() -> None:
    watched = Watched(engine())
    run = measure_latency(watched, make_requests(3, (4, 4), (3, 3), vocabulary=VOCAB))
    assert watched.most == 1
    ends = [answer.token_s[-1] for answer in run.answers]
    assert all(end <= answer.asked_s for end, answer in zip(ends, run.answers[1:], strict=False))


def test_rounds_apart_share_no_pages_and_others_do() -> None:
    sharing = engine(share_prefixes=True)
    requests = make_requests(2, (40, 40), (2, 2), vocabulary=VOCAB)
    assert measure_throughput(sharing, apart(requests, "one")).reused_tokens == 0
    assert measure_throughput(sharing, apart(requests, "two")).reused_tokens == 0
    assert measure_throughput(sharing, apart(requests, "two")).reused_tokens == 2 * 32


def test_preemptions_are_counted() -> None:
    small = engine(kv_tokens=64)
    run = measure_throughput(small, make_requests(4, (10, 10), (30, 30), vocabulary=VOCAB))
    assert run.preempted
    assert run.output_tokens == 120


def test_what_fails_is_raised() -> None:
    (request,) = make_requests(1, (5, 5), (400, 400), vocabulary=VOCAB)
    with pytest.raises(XverseError, match="does not fit"):
        measure_throughput(engine(kv_tokens=64), [request])


def test_times_of_an_answer() -> None:
    answer = Timed(5, (1, 2, 3), asked_s=1.0, token_s=(1.5, 1.6, 2.0))
    assert answer.ttft_s == 0.5
    assert answer.tpot_s == pytest.approx(0.25)
    assert answer.gaps_s == pytest.approx([0.1, 0.4])
    assert Timed(5, (1,), asked_s=0.0, token_s=(1.0,)).tpot_s is None


def test_percentiles_lie_on_a_line() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.95) == 9.5
    assert percentile([4.0], 0.95) == 4.0
    assert percentile(range(101), 1) == 100


def test_warming_up_meets_the_largest_step_and_long_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warmed = engine(max_running=11)
    seen: set[int] = set()
    tokens: set[int] = set()
    step, prepared = warmed.step, []

    def watched() -> Sequence[Output]:
        seen.add(len(warmed.scheduler.running))
        tokens.update(len(g.request.ids) for g in warmed.scheduler.running)
        return step()

    monkeypatch.setattr(warmed, "step", watched)
    monkeypatch.setattr(warmed, "prepare", lambda: prepared.append(True))
    warm(warmed)
    assert prepared
    assert seen >= {1, 2, 4, 8, 11}
    assert max(tokens) > 200


def test_the_engine_agrees_with_the_plain_decoder() -> None:
    (request,) = make_requests(1, (9, 9), (12, 12), vocabulary=VOCAB)
    agreement = compare(engine(), request)
    assert agreement.ids == agreement.plain_ids
    assert agreement.sound
    assert str(agreement) == "all 12 greedy ids equal those of the plain decoder"


def test_wrong_ids_are_wrong_and_near_ties_are_not() -> None:
    (request,) = make_requests(1, (9, 9), (6, 6), vocabulary=VOCAB)
    right = plain_answer(request.ids, 6)
    liar = (*right[:5], (right[5] + 1) % VOCAB)
    agreement = judge(tiny_decoder(), request, liar)
    assert (agreement.ties, agreement.wrong) == (0, 1)
    assert not agreement.sound
    assert "WRONG ANSWERS: 1 of 6" in str(agreement)
    forgiven = judge(tiny_decoder(), request, liar, rounding_steps=2**40)
    assert (forgiven.ties, forgiven.wrong) == (1, 0)
    assert "1 of 6 tokens were near ties" in str(forgiven)


def test_an_answer_from_nan_is_wrong() -> None:
    (request,) = make_requests(1, (4, 4), (3, 3), vocabulary=VOCAB)
    right = tuple(plain_answer(request.ids, 3))
    broken = random_decoder(ModelShape.from_config(CONFIG), dtype=torch.float32, device=CPU)
    broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(XverseError):
        judge(broken, request, right)  # the plain decoder itself says so


def test_only_greedy_requests_are_compared() -> None:
    (request,) = make_requests(1, (4, 4), (3, 3), vocabulary=VOCAB, temperature=1.0)
    with pytest.raises(AssertionError, match="greedy"):
        compare(engine(), request)
    assert request.sampling is not None
    compare(engine(), replace(request, sampling=greedy(3)))


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_dense_model(tied: bool) -> None:
    shape = ModelShape.from_config(CONFIG | {"tie_word_embeddings": tied})
    decoder = fuse(random_decoder(shape, dtype=torch.bfloat16, device=CPU))
    assert weight_bytes(decoder) == 2 * shape.num_parameters
    embedding = 0 if tied else 2 * shape.vocab_size * shape.hidden_size
    assert bytes_per_token(decoder) == 2 * shape.num_parameters - embedding


def test_bytes_of_a_mixture_count_the_chosen_experts() -> None:
    shape = ModelShape.from_config(MOE)
    decoder = fuse(random_decoder(shape, dtype=torch.bfloat16, device=CPU))
    routers = shape.num_hidden_layers * shape.num_experts * shape.hidden_size
    assert weight_bytes(decoder) == 2 * shape.num_parameters + 2 * routers
    embedding = 2 * shape.vocab_size * shape.hidden_size
    active = 2 * shape.num_active_parameters + 2 * routers - embedding
    assert bytes_per_token(decoder) == active


def test_footprint_of_an_engine() -> None:
    found = footprint(engine(kv_tokens=160, page_size=16))
    shape = tiny_decoder().shape
    assert found.kv_tokens == 160
    assert found.kv_bytes == (160 + 16) * shape.kv_bytes_per_token(4), "and the spare page"
    assert found.weights_bytes == 4 * shape.num_parameters
    assert found.peak_bytes > found.weights_bytes


def test_memory_copies_at_some_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xverse.engine.footprint.free_memory", lambda device: 2**24)
    assert copy_bandwidth(CPU) > 1e6


def test_random_weights_are_ready_to_run() -> None:
    decoder: Decoder = random_decoder(
        ModelShape.from_config(MOE), dtype=torch.bfloat16, device=CPU, std=0.1
    )
    block = decoder.model.layers[0]
    assert isinstance(block.mlp, MixtureOfExperts)
    assert block.mlp.router.weight.dtype == torch.float32
    assert decoder.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert block.mlp.experts.up_proj.weight.float().std() == pytest.approx(0.1, rel=0.1)
    other = random_decoder(ModelShape.from_config(MOE), dtype=torch.bfloat16, device=CPU, std=0.1)
    assert torch.equal(decoder.model.embed_tokens.weight, other.model.embed_tokens.weight)
    run = measure_throughput(
        Engine(fuse(decoder), options=EngineOptions(kv_tokens=256)),
        make_requests(2, (5, 5), (4, 4), vocabulary=VOCAB),
    )
    assert run.output_tokens == 8


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ModelShape.from_config(CONFIG)
    monkeypatch.setattr(fresh, "free_memory", lambda device: 4 * shape.num_parameters)
    with pytest.raises(XverseError, match="do not fit on cpu"):
        random_decoder(shape, dtype=torch.float32, device=CPU)
    random_decoder(shape, dtype=torch.bfloat16, device=CPU)
