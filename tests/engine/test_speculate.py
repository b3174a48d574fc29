"""Guessed tokens make answers come sooner and change none: ids, bits, finish, memory."""

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.test_engine import prompts
from tests.engine.tiny import VOCAB, greedy, repeating_decoder
from tests.tiny_model import write_published_folder
from xverse import LLM, Sampling, XverseError
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.engine import Engine
from xverse.engine.options import EngineOptions
from xverse.engine.request import Failed, Request, Scores, Token
from xverse.engine.runner import Flight, PlainRunner
from xverse.engine.scheduler import Chunk
from xverse.engine.simple import decode
from xverse.engine.speculate import FORGIVEN, LONGEST, RESTS, SEQUENCES, SHORTEST, Lookup
from xverse.kernels.multiply import ROWS
from xverse.model.decoder import Decoder
from xverse.model.fuse import fuse

Found = dict[int, list[Token | Scores]]


def engine(decoder: Decoder | None = None, **options: int) -> Engine:
    chosen = {"kv_tokens": 2000, "page_size": 4, "speculate": 8, **options}
    return Engine(decoder or repeating_decoder(), options=EngineOptions(**chosen))


def plain_ids(request: Request, decoder: Decoder | None = None) -> list[int]:
    """What the plain decoder chooses."""
    assert request.sampling is not None
    found = decode(decoder or repeating_decoder(), [request.ids], [request.sampling])
    return [token.id for token in found]


def run(it: Engine, asked: Sequence[Request]) -> Found:
    """All outputs of each request; and after each step nothing of a wrong guess is left."""
    numbers = [it.add(request) for request in asked]
    found: Found = {number: [] for number in numbers}
    while it.busy:
        for output in it.step():
            assert isinstance(output, Token | Scores)
            found[output.request].append(output)
        it.scheduler.check()
        # A GPU's kernels look at no place past the last token, and pages are not zeroed for them.
        for generation in it.scheduler.running * isinstance(it.runner, PlainRunner):
            assert generation.table is not None
            pages = it.kv.keys[:, generation.table.pages].transpose(1, 2).flatten(2, 3)
            begun = it.pages.needed(generation.held) * it.pages.size
            assert not pages[:, :, generation.held : begun].any()
    assert it.pages.available == it.pages.count
    return found


def ids_of(outputs: Sequence[Token | Scores]) -> list[int]:
    return [output.id for output in outputs if isinstance(output, Token)]


def specified(ids: Sequence[int], most: int) -> tuple[int, ...]:
    """The latest place before the end where the longest of the last 4, 3 or 2 tokens stood."""
    for size in range(LONGEST, SHORTEST - 1, -1):
        tail = ids[-size:]
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == tail:
                period = ids[end:]
                return tuple(period[i % len(period)] for i in range(most))
    return ()


def test_a_draft_is_what_followed_the_longest_latest_match() -> None:
    chance = random.Random(0)
    drafted = 0
    for _ in range(60):
        ids: list[int] = [chance.randrange(4) for _ in range(chance.randint(1, 12))]
        lookup = Lookup(ids)
        for _ in range(40):
            most = chance.randint(1, 9)
            if chance.random() < 0.7:  # not asked at every token
                draft = lookup.draft(most)
                assert draft == specified(ids, most)
                drafted += bool(draft)
            ids.append(chance.randrange(4))
        assert lookup.draft(0) == ()
    assert drafted > 500


def test_a_long_past_is_read_once() -> None:
    class Counted(list[int]):
        read = 0

        def __getitem__(self, place: object) -> object:  # type: ignore[override]
            found = super().__getitem__(place)  # type: ignore[index]
            Counted.read += len(found) if isinstance(found, list) else 1
            return found

    ids = Counted(i * i % 9973 for i in range(5000))
    lookup = Lookup(ids)
    lookup.draft(8)
    Counted.read = 0
    for number in range(100):
        ids.append(number)
        lookup.draft(8)
    assert Counted.read < 100 * 40


def test_whoever_is_wrong_rests_longer_each_time() -> None:
    ids = [1, 2, 3] * 4
    lookup = Lookup(ids)
    pauses = []
    for _ in range(6):
        for _ in range(FORGIVEN - 1 if not pauses else 0):
            lookup.learn(8, 1)
            assert lookup.draft(3)
        lookup.learn(8, 0)
        start = len(ids)
        while not lookup.draft(3):
            ids.append(ids[-3])
        pauses.append(len(ids) - start)
    assert pauses == [8, 16, 32, 64, 64, 64]
    assert pauses[0] == RESTS[0]
    assert max(pauses) == RESTS[1]
    lookup.learn(8, 2)  # a quarter was right: that pays
    for _ in range(FORGIVEN - 1):
        lookup.learn(8, 0)
        assert lookup.draft(3)
    lookup.learn(8, 0)
    assert not lookup.draft(3)


KINDS = [
    Sampling(temperature=0.0),
    Sampling(temperature=0.3, seed=1),
    Sampling(temperature=0.0, presence_penalty=0.3, repetition_penalty=1.05),
    Sampling(temperature=0.5, seed=2, top_k=5, min_tokens=9, stop_ids=tuple(range(0, VOCAB, 3))),
    Sampling(temperature=0.2, seed=3, top_p=0.9, logit_bias={3: 4.0}, frequency_penalty=0.1),
]


def test_every_kind_of_choice_is_the_plain_decoders() -> None:
    """Repetitive prompts, a crowd that comes and goes around the eight who may guess."""
    chance = random.Random(5)
    asked = []
    for number in range(24):
        ids = prompts(1, seed=number, most=9)[0] * chance.randint(1, 5)
        limit = {"max_new_tokens": chance.choice([1, 2, 30, 60])}
        asked.append(Request(ids, KINDS[number % len(KINDS)].over(limit)))
    expected = [plain_ids(request) for request in asked]
    for rows, kv_tokens in ((1, 400), (5, 300), (12, 1000)):
        it = engine(kv_tokens=kv_tokens, max_running=rows, step_tokens=rows + 13)
        found = run(it, asked)
        for number, request in enumerate(asked):
            assert request.sampling is not None
            assert ids_of(found[number]) == expected[number], number
            ends = [output.finish for output in found[number] if isinstance(output, Token)]
            full = len(ends) == request.sampling.max_tokens
            assert ends[:-1] == [None] * (len(ends) - 1)
            assert ends[-1] == "stop" or full
        assert it.speculation.accepted > 20


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_bits_with_guesses_and_without(dtype: torch.dtype, deterministic: bool) -> None:
    """In bf16 on a CPU, and in deterministic mode: each log-probability, alone and among others.

    In fp32 a CPU's products sum in another order where they have more rows: there it is the ids.
    Pages have 16 tokens, as `LLM`'s do: of other lengths PyTorch sums a tail in another order.
    """
    decoder = repeating_decoder(dtype)
    best = {"logprobs": 3, "prompt_logprobs": 2}
    asked = [
        Request(ids * 3, Sampling(temperature=heat, seed=1, **best).over({"max_new_tokens": 30}))
        for ids in prompts(3, seed=40, most=12)
        for heat in (0.0, 0.4)
    ]
    options = {"deterministic": deterministic, "share_prefixes": False, "page_size": 16}
    plain = run(engine(decoder, speculate=0, **options), asked)
    for guesses in (3, 15):
        it = engine(decoder, speculate=guesses, **options)
        found = run(it, asked)
        assert it.speculation.accepted > 20
        for number, request in enumerate(asked):
            (alone,) = run(engine(decoder, **options), [request]).values()
            assert ids_of(found[number]) == ids_of(alone) == ids_of(plain[number])
            if deterministic or dtype == torch.bfloat16:
                assert found[number] == plain[number]
                assert [replace(each, request=number) for each in alone] == plain[number]


def test_end_ids_inside_a_guess_end_the_answer() -> None:
    """Whatever token is the end: nothing comes after it, and its pages go back."""
    prompt = prompts(1, seed=3)[0]
    free = plain_ids(Request(prompt, greedy(40)))
    for end in set(free):
        it = Engine(
            repeating_decoder(),
            end_ids={end},
            options=EngineOptions(kv_tokens=200, page_size=4, speculate=8),
        )
        (found,) = run(it, [Request(prompt, greedy(40))]).values()
        assert ids_of(found) == free[: free.index(end) + 1]
        last = found[-1]
        assert isinstance(last, Token)
        assert last.finish == "stop"


def test_rope_that_follows_the_length_follows_guesses() -> None:
    stem = prompts(1, seed=20)[0][:5] * 8
    asked = [Request(stem[:length], greedy(20)) for length in (5, 10, 15, 17, 30)]
    decoder = repeating_decoder(dynamic=True)
    it = engine(decoder)
    found = run(it, asked)
    assert it.speculation.accepted > 20
    for number, request in enumerate(asked):
        assert ids_of(found[number]) == plain_ids(request, decoder)


@pytest.mark.parametrize("rows", [1, 5, 12])
def test_where_steps_overlap_answers_are_the_plain_decoders(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """As on a GPU: few wait for each other's steps and guess, a crowd overlaps, in turns."""
    monkeypatch.setattr(DeviceRunner, "why_not", lambda decoder, kv: "")
    chance = random.Random(7)
    asked = []
    for number in range(24):
        ids = prompts(1, seed=number, most=9)[0] * chance.randint(1, 5)
        limit = {"max_new_tokens": chance.choice([1, 2, 30, 60])}
        asked.append(Request(ids, KINDS[number % len(KINDS)].over(limit)))
    it = engine(
        fuse(deepcopy(repeating_decoder())),
        kv_tokens={1: 400, 5: 140, 12: 240}[rows],
        max_running=rows,
        step_tokens=rows + 13,
    )
    assert it.overlap
    found = run(it, asked)
    assert it.speculation.accepted > 20
    assert it.scheduler.preempted or rows == 1
    for number, request in enumerate(asked):
        assert ids_of(found[number]) == plain_ids(request), number


def test_where_steps_overlap_ends_scores_and_failures_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompt = prompts(1, seed=3)[0]
    free = plain_ids(Request(prompt, greedy(40)))
    best = Sampling(temperature=0.0, logprobs=2).over({"max_new_tokens": 40})
    (plain,) = run(engine(), [Request(prompt, best)]).values()
    monkeypatch.setattr(DeviceRunner, "why_not", lambda decoder, kv: "")
    decoder = fuse(deepcopy(repeating_decoder()))
    end = free[-1]
    options = EngineOptions(kv_tokens=400, page_size=4, speculate=8)
    it = Engine(decoder, end_ids={end}, options=options)
    (found,) = run(it, [Request(prompt, greedy(40))]).values()
    assert ids_of(found) == free[: free.index(end) + 1]
    (found,) = run(engine(decoder), [Request(prompt, best)]).values()
    for token, expected in zip(found, plain, strict=True):
        assert isinstance(token, Token)
        assert isinstance(expected, Token)
        assert token.id == expected.id
        assert token.logprob == pytest.approx(expected.logprob, abs=1e-5)
        assert [id for id, _ in token.top] == [id for id, _ in expected.top]
    decoder.model.embed_tokens.weight[50] = float("nan")
    it = engine(decoder)
    bad, good = it.add(Request((50, 2) * 4, greedy(9))), it.add(Request(prompt, greedy(30)))
    ends: dict[int, list[object]] = {bad: [], good: []}
    while it.busy:
        for output in it.step():
            ends[output.request].append(output)
    assert [type(output) for output in ends[bad]] == [Failed]
    assert len(ends[good]) == 30


def test_a_step_is_no_larger_than_it_may_be() -> None:
    """Decoding rows and their guesses fill what one product computes; a crowd guesses nothing."""

    class Spy(PlainRunner):
        def launch(self, chunks: Sequence[Chunk]) -> Flight:
            seen.append(chunks)
            return super().launch(chunks)

    for rows in (1, 3, 8, 9):
        seen: list[Sequence[Chunk]] = []
        it = engine(max_running=rows, step_tokens=20)
        it.runner = Spy(it.decoder, it.kv)
        run(it, [Request(ids[:2] * 9, greedy(30)) for ids in prompts(9, seed=7)])
        drafting = [chunks for chunks in seen if any(chunk.draft for chunk in chunks)]
        assert drafting
        for chunks in seen:
            decoding = [chunk for chunk in chunks if chunk.count == 1]
            assert sum(chunk.rows for chunk in decoding) <= ROWS
            guessed = sum(len(chunk.draft) for chunk in chunks)
            assert sum(chunk.count for chunk in chunks if chunk.count > 1) + guessed <= 20
            assert not guessed or len(chunks) <= SEQUENCES
            assert all(len(chunk.draft) <= 8 for chunk in chunks)
        if rows == 1:
            assert any(len(chunks[0].draft) == 8 for chunks in drafting)


def test_fewer_steps_for_text_that_repeats() -> None:
    steps = {}
    for guesses in (0, 8):
        it = engine(speculate=guesses)
        it.add(Request(prompts(1, seed=3)[0], greedy(120)))
        steps[guesses] = 0
        while it.busy:
            it.step()
            steps[guesses] += 1
    assert steps[0] == 120
    assert steps[8] < 80


def test_llm_answers_the_same(tmp_path: Path) -> None:
    """Text, streams, stop strings, choices; in bf16 to the last bit of log-probability."""
    write_published_folder(tmp_path)
    plain, guessing = LLM(tmp_path), LLM(tmp_path, speculate=8)
    free = Sampling(
        temperature=0.0, repetition_penalty=1.0, max_tokens=60, ignore_eos=True, logprobs=1
    )
    texts = ["The 1 and 2 and 1 and 2", "北京的天气"]
    whole = plain.generate(texts, free)
    assert guessing.generate(texts, free) == whole
    assert guessing.engine.speculation.accepted > 0
    for text, answer in zip(texts, whole, strict=True):
        stop = answer.text[20:23]
        ended = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=60, stop=(stop,))
        assert guessing.generate(text, ended) == plain.generate(text, ended)
        assert "".join(p.text for p in guessing.stream(text, free)) == answer.text
    warm = Sampling(temperature=0.6, seed=3, max_tokens=30, ignore_eos=True)
    assert guessing.choices(texts[0], 3, warm) == plain.choices(texts[0], 3, warm)
    assert guessing.engine.pages.available == guessing.engine.pages.count


@pytest.mark.parametrize("bad", [-1, ROWS, True, 1.5])
def test_impossible_lengths_are_refused(bad: int) -> None:
    with pytest.raises(XverseError, match="speculate"):
        EngineOptions(speculate=bad)
