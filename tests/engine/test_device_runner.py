"""Steps that are read one step late, here by the plain references on the CPU.

Whatever a GPU would do in between, the ids are those of the plain decoder alone.
"""

import random
from copy import deepcopy

import pytest
import torch

from tests.engine.tiny import VOCAB, greedy, plain_answer, tiny_decoder
from xverse.engine.captured import padded
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.engine import Engine
from xverse.engine.options import EngineOptions
from xverse.engine.request import Failed, Request, Sampling, Scores, Token
from xverse.engine.runner import PlainRunner
from xverse.engine.simple import decode
from xverse.errors import XverseError
from xverse.model.cache import Packed
from xverse.model.fuse import fuse


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DeviceRunner.why_not(tiny_decoder(), None)  # type: ignore[arg-type]  # never by itself
    monkeypatch.setattr(DeviceRunner, "why_not", lambda decoder, kv: "")


def engine(kv_tokens: int = 2000, page_size: int = 4, **options: int) -> Engine:
    decoder = fuse(deepcopy(tiny_decoder()))
    it = Engine(decoder, options=EngineOptions(kv_tokens=kv_tokens, page_size=page_size, **options))
    assert isinstance(it.runner, DeviceRunner)
    assert it.overlap
    return it


@pytest.mark.parametrize("kv_tokens", [2000, 300], ids=["roomy", "preempting"])
def test_ids_are_those_of_the_plain_decoder(kv_tokens: int) -> None:
    """Many sequences, arriving in waves, in pages that others used; some are aborted."""
    dice = random.Random(3)
    it = engine(kv_tokens)
    prompts: dict[int, tuple[int, ...]] = {}
    found: dict[int, list[int]] = {}
    stem = tuple(dice.randrange(VOCAB) for _ in range(14))

    def take() -> None:
        for output in it.step():
            assert isinstance(output, Token)
            found[output.request].append(output.id)
        it.scheduler.check()

    aborted = set()
    for _ in range(6):
        for _ in range(dice.randint(1, 12)):
            ids = tuple(dice.randrange(VOCAB) for _ in range(dice.randint(1, 16)))
            ids = stem[: dice.choice([0, 6, 14])] + ids
            number = it.add(Request(ids, greedy(20)))
            prompts[number], found[number] = ids, []
        for _ in range(dice.randint(1, 9)):
            take()
        gone = dice.choice(list(prompts))
        if len(found[gone]) < 20:
            it.abort(gone)
            aborted.add(gone)
    while it.busy:
        take()
    assert len(prompts) > 16
    for number, ids in prompts.items():
        expected = plain_answer(ids, 20)
        assert found[number] == expected[: len(found[number])], number
        assert number in aborted or len(found[number]) == 20
    assert it.pages.available == it.pages.count


def test_an_end_that_is_read_late_is_still_the_end() -> None:
    """The step after it is under way by then; nothing of it comes out, and its pages come back."""
    ids = (1, 2, 3, 4, 5)
    free = plain_answer(ids, 20)
    it = Engine(
        fuse(deepcopy(tiny_decoder())),
        end_ids={free[7]},
        options=EngineOptions(kv_tokens=64, page_size=4),
    )
    it.add(Request(ids, greedy(20)))
    found = []
    while it.busy:
        found += it.step()
    assert [t.id for t in found if isinstance(t, Token)] == free[: free.index(free[7]) + 1]
    assert found[-1].finish == "stop"  # type: ignore[union-attr]
    assert it.step() == []
    assert it.pages.available == it.pages.count


def test_sampled_answers_are_those_of_the_simple_path() -> None:
    it = engine(600)
    dice = random.Random(5)
    asked = {}
    for seed in range(24):
        sampling = Sampling(
            max_tokens=12,
            temperature=dice.choice([0.0, 0.7, 1.5]),
            top_k=dice.choice([0, 5, 30]),
            top_p=dice.choice([1.0, 0.8]),
            min_p=dice.choice([0.0, 0.05]),
            repetition_penalty=dice.choice([1.0, 1.3]),
            presence_penalty=dice.choice([0.0, 0.6]),
            frequency_penalty=dice.choice([0.0, 0.4]),
            logit_bias=dice.choice([None, {3: 5.0, 7: -100.0}]),
            min_tokens=dice.choice([0, 4]),
            stop_ids=dice.choice([(), (9, 11)]),
            seed=seed,
        ).over({})
        ids = tuple(dice.randrange(VOCAB) for _ in range(dice.randint(1, 20)))
        asked[it.add(Request(ids, sampling))] = ids, sampling
    found: dict[int, list[int]] = {number: [] for number in asked}
    while it.busy:
        for output in it.step():
            assert isinstance(output, Token)
            found[output.request].append(output.id)
    for number, (ids, sampling) in asked.items():
        assert found[number] == [t.id for t in decode(tiny_decoder(), [ids], [sampling])], sampling


def test_log_probabilities_come_with_their_tokens() -> None:
    it = engine()
    sampling = Sampling(max_tokens=6, temperature=0.0, logprobs=3).over({})
    it.add(Request((1, 2, 3), sampling))
    it.add(Request((9, 8), greedy(6)))
    it.add(Request((4, 5, 6, 7), None, score_from=1))
    tokens, scores = [], []
    while it.busy:
        for output in it.step():
            (scores if isinstance(output, Scores) else tokens).append(output)
    with_logprobs = [t for t in tokens if t.request == 0]
    assert len(with_logprobs) == 6
    for token in with_logprobs:
        assert token.id == token.top[0][0]
        assert token.logprob == token.top[0][1] < 0
        assert len(token.top) == 3
    assert all(t.logprob is None for t in tokens if t.request == 1)
    plain = Engine(tiny_decoder(), options=EngineOptions(kv_tokens=100))
    plain.runner, plain.overlap = PlainRunner(tiny_decoder(), plain.kv), False
    plain.add(Request((4, 5, 6, 7), None, score_from=1))
    (expected,) = plain.step()
    assert isinstance(expected, Scores)
    assert scores[0].logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.parametrize("overlap", [True, False])
def test_out_of_memory_sheds_who_came_last(monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    it = engine()
    it.overlap = overlap
    first = it.add(Request((1, 2, 3), greedy(8)))
    second = it.add(Request((4, 5), greedy(8)))
    found: dict[int, list[object]] = {first: [], second: []}
    launch = it.runner.launch

    def full(chunks: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    for step in range(30):
        monkeypatch.setattr(it.runner, "launch", full if step == 3 else launch)
        for output in it.step():
            found[output.request].append(output)
    assert isinstance(found[second][-1], Failed)
    assert "memory" in str(found[second][-1].error)
    assert [o.id for o in found[first]] == plain_answer((1, 2, 3), 8)  # type: ignore[attr-defined]
    assert not it.busy
    assert it.pages.available == it.pages.count


def test_an_unknown_id_in_logit_bias_is_refused_at_once() -> None:
    it = engine()
    with pytest.raises(XverseError, match=f"no token {VOCAB}"):
        it.add(Request((1, 2), Sampling(logit_bias={VOCAB: 1.0}).over({"max_new_tokens": 3})))
    assert not it.busy


def test_one_row_that_is_no_number_fails_alone() -> None:
    it = engine()
    weight = it.decoder.model.embed_tokens.weight
    weight[50] = float("nan")
    bad = it.add(Request((50, 2), greedy(5)))
    good = it.add(Request((1, 2, 3), greedy(5)))
    found: dict[int, list[object]] = {bad: [], good: []}
    while it.busy:
        for output in it.step():
            found[output.request].append(output)
    assert [type(o) for o in found[bad]] == [Failed]
    assert [o.id for o in found[good]] == plain_answer((1, 2, 3), 5)  # type: ignore[attr-defined]


def test_rows_that_nobody_fills_write_to_the_spare_page_alone() -> None:
    it = engine(400)
    used = it.kv.keys.clone()
    for start in range(3):  # a step of four rows, one of them empty
        it.add(Request((start, 5, 9), greedy(4)))
    pages: set[int] = set()
    for _ in range(3):
        it.step()
        running = [g.table for g in it.scheduler.running if g.table is not None]
        pages |= {page for table in running for page in table.pages}
    spare = it.pages.count
    changed = (it.kv.keys != used).any(dim=4).any(dim=3).any(dim=2).any(dim=0).nonzero()[:, 0]
    assert set(changed.tolist()) <= pages | {spare}
    assert torch.equal(it.kv.keys[:, spare, :, 1:], used[:, spare, :, 1:])


def test_captured_sizes_waste_little() -> None:
    sizes = sorted({padded(rows) for rows in range(1, 1025)})
    assert sizes[:5] == [1, 2, 4, 8, 16]
    assert len(sizes) < 60
    for rows in range(1, 1025):
        assert rows <= padded(rows)
        assert rows <= 16 or padded(rows) <= rows * 1.5


def test_a_long_prompt_is_attended_to_as_a_whole() -> None:
    """The way of cuDNN on a GPU, with rows filled up; then it decodes over its pages."""
    it = engine()
    assert isinstance(it.runner, DeviceRunner)
    it.runner.prompts.whole_from = 20
    ids = tuple(number * 7 % VOCAB for number in range(33))
    numbers = [it.add(Request(ids, greedy(10)))]
    numbers.append(it.add(Request(ids[:24], None, score_from=1)))
    found: dict[int, list[int]] = {}
    while it.busy:
        for output in it.step():
            if isinstance(output, Token):
                found.setdefault(output.request, []).append(output.id)
    assert found == {numbers[0]: plain_answer(ids, 10)}


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_read_a_step_late_however_prompts_are_cut(seed: int) -> None:
    """A prompt's last chunk may be under way when the one before it lands: it has not ended then.
    Pages are few, so that some are taken back meanwhile."""
    chance = random.Random(seed)
    it = engine(kv_tokens=100, max_running=5, step_tokens=5 + chance.randint(0, 9))
    stem = tuple(chance.randrange(VOCAB) for _ in range(17))
    asked: dict[int, Request] = {}
    for _ in range(40):
        rest = tuple(chance.randrange(VOCAB) for _ in range(chance.randint(1, 12)))
        ids, labels = stem[: chance.randint(0, 17)] + rest, (chance.randrange(VOCAB), 3, 5)
        request = Request(ids, None if chance.random() < 0.8 else greedy(9), labels=labels)
        if request.sampling is not None:
            request = Request(ids, request.sampling)
        asked[it.add(request)] = request
    found: dict[int, Scores] = {}
    while it.busy:
        for output in it.step():
            if isinstance(output, Scores):
                assert output.request not in found
                found[output.request] = output
        it.scheduler.check()
    wanted = {number: request for number, request in asked.items() if request.labels}
    assert it.scheduler.preempted or it.scheduler.reused_tokens
    assert found.keys() == wanted.keys()
    for number, request in wanted.items():
        kv = Packed([len(request.ids)])
        logits_TV = tiny_decoder()(torch.tensor(request.ids), kv.positions(), kv)
        expected = logits_TV[-1].log_softmax(-1)[list(request.labels)].tolist()
        assert list(found[number].labels) == pytest.approx(expected, abs=1e-3)
