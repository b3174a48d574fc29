"""Log-probabilities, of answers and of given texts; several answers; options inside a batch."""

import random
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from tests.engine.test_engine import engine, finish, prompts
from tests.engine.tiny import VOCAB, greedy, tiny_decoder
from tests.model.test_decoder import FAMILIES, pair
from tests.tiny_model import write_published_folder
from xverse import LLM, Sampling, XverseError
from xverse.engine.engine import Engine
from xverse.engine.options import EngineOptions
from xverse.engine.request import Request, Scores, Token
from xverse.engine.simple import decode
from xverse.model.cache import Packed


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(folder)
    return LLM(folder, dtype="float32")


def exact(ids: tuple[int, ...]) -> torch.Tensor:
    kv = Packed([len(ids)])
    return tiny_decoder()(torch.tensor(ids), kv.positions(), kv).log_softmax(-1)


def test_logprobs_equal_transformers() -> None:
    ours, theirs = pair(FAMILIES["gqa"], torch.float32)
    it = Engine(ours, options=EngineOptions(kv_tokens=512, page_size=4))
    prompt = (5, 9, 100, 7, 8)
    it.add(Request(prompt, Sampling(max_tokens=8, logprobs=5, temperature=0.0).over({})))
    tokens: list[Token] = []
    while it.busy:
        tokens += [output for output in it.step() if isinstance(output, Token)]
    ids = [*prompt, *(token.id for token in tokens)]
    expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, token in enumerate(tokens, len(prompt)):
        best = expected[place - 1].topk(5)
        assert token.logprob == pytest.approx(float(expected[place - 1, token.id]), abs=1e-4)
        assert [id for id, _ in token.top] == best.indices.tolist()
        values = [value for _, value in token.top]
        assert values == pytest.approx(best.values.tolist(), abs=1e-4)


BEST = Sampling(max_tokens=9, temperature=0.0, prompt_logprobs=3).over({})


@pytest.mark.parametrize("seed", range(8))
def test_scores_of_prompts_however_they_are_cut(seed: int) -> None:
    """Chunks, shared beginnings, preemption and decoding neighbours leave every score exact."""
    chance = random.Random(seed)
    rows = chance.randint(1, 6)
    it = engine(
        kv_tokens=120,
        page_size=chance.randint(1, 6),
        max_running=rows,
        step_tokens=rows + chance.randint(0, 20),
    )
    stem = tuple(chance.randrange(VOCAB) for _ in range(20))
    asked: dict[int, Request] = {}
    for _ in range(20):
        ids = stem[: chance.randint(2, 20)] + prompts(1, seed=chance.randrange(99))[0]
        sampling = chance.choice([None, greedy(1), greedy(20), BEST, replace(BEST, max_tokens=0)])
        scored = sampling is not None and sampling.prompt_logprobs is not None
        start = None if scored else chance.randint(1, len(ids))
        request = Request(ids, sampling, score_from=start)
        asked[it.add(request)] = request
    found: dict[int, Scores] = {}
    while it.busy:
        for output in it.step():
            if isinstance(output, Scores):
                assert output.request not in found
                found[output.request] = output
        it.scheduler.check()
    assert found.keys() == asked.keys()
    for number, request in asked.items():
        start, ids = request.score_from, request.ids
        assert start is not None
        table = exact(ids)
        expected = [float(table[i - 1, ids[i]]) for i in range(start, len(ids))]
        assert list(found[number].logprobs) == pytest.approx(expected, abs=1e-3)
        assert found[number].last == (not request.answers)
        tops = found[number].tops
        assert len(tops) == (len(expected) if request.best_scored else 0)
        for place, top in enumerate(tops, start):
            best = table[place - 1].topk(3)
            assert [id for id, _ in top] == best.indices.tolist()
            assert [value for _, value in top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_options_hold_inside_a_mixed_batch() -> None:
    """Each request has its own options; all together equal the plain decoder one by one."""
    kinds = [
        Sampling(temperature=0.0),
        Sampling(temperature=0.8, seed=1, top_k=20),
        Sampling(presence_penalty=1.5, frequency_penalty=0.7),
        Sampling(logit_bias={3: 5.0, 4: -100.0}, repetition_penalty=1.2),
        Sampling(stop_ids=tuple(range(10)), min_tokens=5),
        Sampling(stop_ids=tuple(range(10)), temperature=1.0, seed=2),
    ]
    asked = [
        (ids, kinds[i % len(kinds)].over({"max_new_tokens": 15}))
        for i, ids in enumerate(prompts(24, seed=30))
    ]
    it = engine(kv_tokens=600, page_size=4)
    numbers = [it.add(Request(ids, sampling)) for ids, sampling in asked]
    found = finish(it)
    for number, (ids, sampling) in zip(numbers, asked, strict=True):
        assert found[number] == [t.id for t in decode(tiny_decoder(), [ids], [sampling])]
    assert any(len(found[n]) < 15 for n in numbers[5::6])
    assert all(len(found[n]) > 5 for n in numbers[4::6])


def test_llm_gives_logprobs_with_bytes(llm: LLM) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=6, logprobs=3, ignore_eos=True)
    answer = llm.generate("Hello", sampling)
    assert [token.id for token in answer.logprobs] == list(answer.tokens)
    for token in answer.logprobs:
        assert token.bytes == llm.tokenizer.token_bytes(token.id)
        assert len(token.top) == 3
        assert token.logprob == token.top[0].logprob >= token.top[1].logprob
    assert llm.generate("Hello", Sampling(temperature=0.0, max_tokens=2)).logprobs == ()


def test_llm_scores_continuations(llm: LLM) -> None:
    prompt, labels = "Tell me (now), please:", [" yes", " no", "北京", ""]
    scores = llm.score(prompt, labels)
    assert scores[3] == 0.0
    assert max(scores[:3]) < 0.0
    whole = llm.logprobs(prompt + labels[0])
    assert len(whole) == len(llm.tokenizer.encode(prompt + labels[0])) - 1
    extra = len(whole) + 1 - len(llm.tokenizer.encode(prompt))
    assert scores[0] == pytest.approx(sum(t.logprob for t in whole[-extra:]), abs=1e-3)
    for bad in (("", ["a"]), ("a" * 300, ["b"])):
        with pytest.raises(XverseError, match="cannot be scored"):
            llm.score(*bad)
    with pytest.raises(XverseError, match="cannot be scored"):
        llm.logprobs("")


def test_n_answers_share_a_prompt_and_differ(llm: LLM) -> None:
    sampling = Sampling(temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)
    answers = llm.choices("Hello", 4, sampling)
    assert len({answer.tokens for answer in answers}) == 4
    assert answers[2] == llm.generate(
        "Hello", Sampling(temperature=1.0, seed=7, max_tokens=8, ignore_eos=True)
    )
    assert llm.choices(llm.tokenizer.encode("Hello"), 4, sampling) == answers
    for bad in (0, 1.5, 10**6):
        with pytest.raises(XverseError, match="answers"):
            llm.choices("Hello", bad)  # type: ignore[arg-type]


def test_unknown_ids_are_refused(llm: LLM) -> None:
    with pytest.raises(XverseError, match="does not know"):
        llm.choices([10**6], 1, Sampling(max_tokens=2))


def test_an_abandoned_stream_gives_its_pages_back(llm: LLM) -> None:
    stream = llm.stream("Hello", Sampling(temperature=0.0, max_tokens=200, ignore_eos=True))
    next(stream)
    assert llm.engine.busy
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.busy
    assert llm.engine.pages.available == llm.engine.pages.count


@pytest.mark.parametrize("seed", range(4))
def test_labels_are_read_from_one_pass_however_prompts_are_cut(seed: int) -> None:
    chance = random.Random(seed)
    it = engine(kv_tokens=120, page_size=4, max_running=3, step_tokens=3 + chance.randint(0, 20))
    stem = tuple(chance.randrange(VOCAB) for _ in range(17))
    asked: dict[int, Request] = {}
    for _ in range(70):
        ids = stem[: chance.randint(2, 17)] + prompts(1, seed=chance.randrange(99))[0]
        labels = tuple(chance.randrange(VOCAB) for _ in range(chance.randint(1, 5)))
        request = Request(ids, None, labels=labels)
        asked[it.add(request)] = request
    found: dict[int, Scores] = {}
    while it.busy:
        for output in it.step():
            assert isinstance(output, Scores)
            found[output.request] = output
        it.scheduler.check()
    for number, request in asked.items():
        expected = [float(exact(request.ids)[-1, label]) for label in request.labels]
        assert list(found[number].labels) == pytest.approx(expected, abs=1e-3)
        assert found[number].last
        assert found[number].logprobs == ()


def test_best_ids_beside_scores_tell_what_is_greedy() -> None:
    it = engine(page_size=4)
    ids = prompts(1, seed=3, most=9)[0] + (5, 9, 7)
    number = it.add(Request(ids, None, score_from=len(ids) - 2, score_best=1))
    (scores,) = (output for _ in range(9) for output in it.step())
    assert isinstance(scores, Scores)
    assert scores.request == number
    best = exact(ids)[-3:-1].argmax(-1).tolist()
    assert [top[0][0] for top in scores.tops] == best


def test_labels_that_are_no_ids_are_refused() -> None:
    with pytest.raises(XverseError, match="does not know"):
        engine().add(Request((1, 2), None, labels=(VOCAB,)))


def test_only_what_is_read_goes_through_the_last_layer() -> None:
    """Rows of the last feed-forward: a prompt's last one, all that are scored, or from a label."""
    decoder = deepcopy(tiny_decoder())
    options = EngineOptions(kv_tokens=200, page_size=4, step_tokens=16, share_prefixes=False)
    it = Engine(decoder, options=options)
    seen: list[int] = []
    last = decoder.model.layers[-1].mlp
    assert isinstance(last, torch.nn.Module)
    last.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    prompt = tuple(range(5, 35))
    scored = Sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0).over({})
    for request, rows in (
        (Request(prompt, greedy(3)), [0, 1, 1, 1]),
        (Request(prompt, None, labels=(7, 8)), [0, 1]),
        (Request(prompt, None, score_from=20), [0, 11]),
        (Request(prompt, scored, score_from=1), [16, 14]),
    ):
        seen.clear()
        it.add(request)
        while it.busy:
            it.step()
        assert seen == rows
