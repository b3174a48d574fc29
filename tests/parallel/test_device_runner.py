"""Steps that overlap, on ranks that each compute a part: all say what the whole decoder says."""

import copy
from collections.abc import Callable

import pytest
import torch

from tests.engine.tiny import greedy
from tests.parallel.ranks import ThreadMesh, on_ranks
from tests.parallel.test_tensor import BIASED, decoder_of
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.engine import Engine, Output
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request, Sampling, Scores, Token
from xverse.engine.simple import decode
from xverse.engine.step import unfit
from xverse.kernels.tiles import MOST_ROWS
from xverse.model.decoder import Decoder
from xverse.model.fuse import _widen, fuse
from xverse.model.linear import Linear
from xverse.parallel.tensor import Gathered, connect, keep_part, shard

RANDOM = Sampling(temperature=1.0, top_p=0.9, seed=3, max_tokens=4).over({})


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceRunner, "why_not", lambda decoder, kv: "")


def run(whole: Decoder, use: Callable[[Engine], list[Output]]) -> list[Output]:
    """What both of two ranks say, which must be the same."""
    copies = [copy.deepcopy(whole) for _ in range(2)]

    def work(mesh: ThreadMesh) -> list[Output]:
        decoder = fuse(shard(copies[mesh.rank], mesh))
        options = EngineOptions(kv_tokens=2000, page_size=4, max_running=80)
        it = Engine(decoder, options=options, least=lambda number: number)
        assert it.overlap
        return use(it)

    first, second = on_ranks(2, work)
    assert first == second
    return first


@pytest.mark.parametrize("changes", [{}, BIASED, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("sequences", [3, MOST_ROWS + 2])
def test_tokens_are_those_of_the_whole_decoder(changes: dict[str, object], sequences: int) -> None:
    """Few rows have their sums in one kernel with the stream; many have them apart from it."""
    whole = decoder_of(changes)
    prompts = [tuple((7 * i + j) % 60 for j in range(1 + i % 5)) for i in range(sequences)]
    samplings = [RANDOM if i % 4 == 1 else greedy(4) for i in range(sequences)]

    def use(it: Engine) -> list[Output]:
        for ids, sampling in zip(prompts, samplings, strict=True):
            it.add(Request(ids, sampling))
        found: list[Output] = [*it.step(), *it.step()]
        it.abort(2)
        while it.busy:
            found += it.step()
        return found

    found = run(whole, use)
    for number in (0, 1, sequences - 1):
        ids = [t.id for t in found if isinstance(t, Token) and t.request == number]
        plain = decode(whole, [prompts[number]], [samplings[number]])
        assert number == 2 or ids == [t.id for t in plain]


def test_scores_are_those_of_the_whole_decoder() -> None:
    whole = decoder_of(BIASED)

    def use(it: Engine) -> list[Output]:
        it.add(Request((4, 5, 6, 7), None, score_from=1))
        return [*it.step(), *it.step()]

    (found,) = run(whole, use)
    it = Engine(fuse(copy.deepcopy(whole)), options=EngineOptions(kv_tokens=100))
    it.add(Request((4, 5, 6, 7), None, score_from=1))
    (expected,) = [*it.step(), *it.step()]
    assert isinstance(found, Scores)
    assert isinstance(expected, Scores)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_a_wide_head_is_wide_on_every_rank() -> None:
    """As a GPU has it: rows of zeros below each rank's part, of which no logit is seen."""
    whole = decoder_of({"vocab_size": 61})
    x_TD = torch.randn(3, whole.shape.hidden_size)

    def work(mesh: ThreadMesh) -> torch.Tensor:
        decoder = copy.deepcopy(whole)
        assert isinstance(decoder.lm_head, Linear)
        head = keep_part("lm_head", decoder.lm_head, whole.shape, mesh.rank, 2)
        assert isinstance(head, Linear)
        decoder.lm_head = head
        _widen(decoder, head)
        connect(decoder, mesh)
        assert isinstance(decoder.lm_head, Gathered)
        assert decoder.lm_head.wide_ND is not None
        assert len(decoder.lm_head.wide_ND) == 128
        assert decoder.wide_head_VD is None
        return decoder.logits(x_TD)

    for found in on_ranks(2, work):
        assert torch.allclose(found, whole.logits(x_TD), atol=1e-5)


def test_who_runs_out_of_memory_among_several_does_not_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone it would give up a request, of which the others know nothing."""

    def full(self: DeviceRunner, chunks: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(DeviceRunner, "launch", full)
    decoder = fuse(decoder_of({}))
    it = Engine(decoder, options=EngineOptions(kv_tokens=100), least=lambda number: number)
    it.add(Request((1, 2), greedy(2)))
    with pytest.raises(torch.OutOfMemoryError):
        it.step()


def test_experts_that_are_spread_go_the_plain_way() -> None:
    def work(mesh: ThreadMesh) -> str:
        return unfit(fuse(shard(decoder_of({}, moe=True), mesh)))

    assert all("spread" in why for why in on_ranks(2, work))


def test_the_least_room_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_room", lambda self: 1000)
    asked: list[int] = []

    def least(number: int) -> int:
        asked.append(number)
        return 96

    it = Engine(fuse(decoder_of({})), options=EngineOptions(page_size=16), least=least)
    assert (asked, it.capacity) == ([1000], 96)
