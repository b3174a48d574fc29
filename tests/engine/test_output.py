"""Echoed prompts and their log-probabilities, in answers and in streams."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_model import write_published_folder
from xverse import LLM, Sampling, XverseError
from xverse.engine.request import Answer

GREEDY = Sampling(temperature=0.0, repetition_penalty=1.0, max_tokens=8, ignore_eos=True)
PROMPT = "Tell me (now): 北京"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder: Path = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(folder)
    return LLM(folder, dtype="float32")


def test_echo_puts_the_prompt_before_the_answer(llm: LLM) -> None:
    plain = llm.generate(PROMPT, GREEDY)
    echoed = llm.generate(PROMPT, replace(GREEDY, echo=True))
    ids = llm.tokenizer.encode(PROMPT)
    assert echoed.text == PROMPT + plain.text
    assert echoed.tokens == (*ids, *plain.tokens)
    assert echoed.prompt_tokens == plain.prompt_tokens == len(ids)
    assert echoed.prompt_logprobs == ()
    alone = llm.generate([PROMPT, "a"], replace(GREEDY, echo=True, max_tokens=0))
    assert [answer.text for answer in alone] == [PROMPT, "a"]
    assert alone[0] == Answer(PROMPT, tuple(ids), "length", len(ids))


def test_a_stop_string_in_the_prompt_ends_nothing(llm: LLM) -> None:
    plain = llm.generate(PROMPT, GREEDY)
    stop = (PROMPT[3:6], PROMPT[-1] + plain.text[0])
    assert llm.generate(PROMPT, replace(GREEDY, echo=True, stop=stop)).finish == "length"
    inside = plain.text[2:5]
    stopped = llm.generate(PROMPT, replace(GREEDY, echo=True, stop=inside))
    assert stopped.text == PROMPT + plain.text[: plain.text.index(inside)]
    assert stopped.finish == "stop"


def test_prompt_logprobs_with_their_bytes(llm: LLM) -> None:
    """The same with an answer, without, echoed, and as `logprobs` gives them."""
    expected = llm.logprobs(PROMPT)
    ids = llm.tokenizer.encode(PROMPT)
    plain = llm.generate(PROMPT, GREEDY)
    for echo in (False, True):
        for most in (0, 8):
            asked = replace(GREEDY, prompt_logprobs=3, echo=echo, max_tokens=most)
            answer = llm.generate(PROMPT, asked)
            assert answer.tokens == (tuple(ids) if echo else ()) + plain.tokens[:most]
            assert [replace(each, top=()) for each in answer.prompt_logprobs] == expected
            for each in answer.prompt_logprobs:
                assert len(each.top) == 3
                assert each.bytes == llm.tokenizer.token_bytes(each.id)
                values = [best.logprob for best in each.top]
                assert values == sorted(values, reverse=True)
                assert (each.logprob in values) == (each.id in {best.id for best in each.top})
    none_best = llm.generate(PROMPT, replace(GREEDY, prompt_logprobs=0)).prompt_logprobs
    assert list(none_best) == expected
    single = llm.choices(ids[:1], 1, replace(GREEDY, prompt_logprobs=2))[0]
    assert (len(single.tokens), single.prompt_logprobs) == (8, ())


@pytest.mark.parametrize("most", [0, 8])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("scored", [None, 2])
def test_streams_join_to_the_answer(llm: LLM, most: int, echo: bool, scored: int | None) -> None:
    if not most and not echo and scored is None:
        pytest.skip("that asks for nothing")
    asked = replace(GREEDY, max_tokens=most, echo=echo, prompt_logprobs=scored, logprobs=2)
    whole = llm.generate(PROMPT, asked)
    pieces = list(llm.stream(PROMPT, asked))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert sum((piece.tokens for piece in pieces), ()) == whole.tokens
    assert sum((piece.logprobs for piece in pieces), ()) == whole.logprobs
    assert len(whole.logprobs) == most
    assert pieces[0].prompt_logprobs == whole.prompt_logprobs
    assert not any(piece.prompt_logprobs for piece in pieces[1:])
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_every_choice_has_the_scores_of_the_one_prompt(llm: LLM) -> None:
    asked = Sampling(
        temperature=1.0, seed=4, max_tokens=6, ignore_eos=True, prompt_logprobs=1, echo=True
    )
    answers = llm.choices(PROMPT, 3, asked)
    assert len({answer.tokens for answer in answers}) == 3
    for place, answer in enumerate(answers):
        assert answer == llm.generate(PROMPT, replace(asked, seed=4 + place))
    scores = llm.choices(PROMPT, 2, replace(asked, max_tokens=0))
    assert [answer.prompt_logprobs for answer in scores] == [answers[0].prompt_logprobs] * 2


def test_a_prompt_that_fills_the_context_can_be_scored(llm: LLM) -> None:
    text = "a" * llm.context
    assert len(llm.tokenizer.encode(text)) == llm.context
    asked = Sampling(max_tokens=0, prompt_logprobs=0)
    assert len(llm.generate(text, asked).prompt_logprobs) == llm.context - 1
    with pytest.raises(XverseError, match="context holds"):
        llm.generate(text + "a", asked)


def test_what_cannot_be_asked_is_refused(llm: LLM) -> None:
    with pytest.raises(XverseError, match="max_tokens 0"):
        Sampling(max_tokens=0)
    for bad in (-1, 101, 1.5, True):
        with pytest.raises(XverseError, match="prompt_logprobs"):
            Sampling(prompt_logprobs=bad)  # type: ignore[arg-type]
    messages = [{"role": "user", "content": "Hello"}]
    echo = replace(GREEDY, echo=True)
    for ask in (llm.chat, lambda *given: list(llm.chat_stream(*given))):
        with pytest.raises(XverseError, match="echoed"):
            ask(messages, echo)
    assert llm.chat(messages, replace(GREEDY, prompt_logprobs=1)).prompt_logprobs
