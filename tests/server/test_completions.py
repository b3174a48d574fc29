"""Completions through the openai package: texts, ids, echo, log-probabilities, streams."""

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.server.inside import Inside
from xverse import LLM, Sampling

PLAIN = {"temperature": 0, "extra_body": {"repetition_penalty": 1.0, "ignore_eos": True}}


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="float32")


def test_texts_and_ids_are_continued_as_in_process(client: OpenAI, llm: LLM) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=8, repetition_penalty=1.0, ignore_eos=True)
    prompts = ["Hello", "北京的"]
    expected = [answer.text for answer in llm.generate(prompts, sampling)]
    ids = [llm.tokenizer.encode(text) for text in prompts]
    for prompt in (prompts, ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, **PLAIN)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 16
        assert answer.usage.prompt_tokens == len(ids[0]) + len(ids[1])
    for one in (prompts[0], ids[0]):
        answer = client.completions.create(model="tiny", prompt=one, max_tokens=8, **PLAIN)
        assert answer.choices[0].text == expected[0]


def test_sixteen_tokens_where_nothing_is_said(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello", **PLAIN)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_echo_gives_the_prompt_and_its_log_probabilities(client: OpenAI, llm: LLM) -> None:
    answer = client.completions.create(
        model="tiny", prompt="Hello The", max_tokens=0, echo=True, logprobs=2, **PLAIN
    )
    choice = answer.choices[0]
    assert choice.text == "Hello The"
    found = choice.logprobs
    assert found is not None
    expected = llm.logprobs("Hello The")
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:] == pytest.approx([each.logprob for each in expected])
    assert "".join(found.tokens) == "Hello The"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    offsets = found.text_offset or []
    assert [
        choice.text[at:].startswith(token) for at, token in zip(offsets, found.tokens, strict=True)
    ]


def test_streams_join_and_logprobs_too(client: OpenAI) -> None:
    asked = {
        "model": "tiny",
        "prompt": "Hello",
        "max_tokens": 8,
        "echo": True,
        "logprobs": 1,
        **PLAIN,
    }
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    numbers = [n for c in chunks for n in (c.choices[0].logprobs.token_logprobs or [])]
    assert whole.choices[0].logprobs is not None
    assert numbers == pytest.approx(whole.choices[0].logprobs.token_logprobs)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_every_streamed_choice_has_the_prompt_s_log_probabilities(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["Hello The", "One two three"],
        "n": 5,
        "max_tokens": 4,
        "echo": True,
        "logprobs": 1,
        "seed": 7,
        "temperature": 1.2,
        "extra_body": {"ignore_eos": True},
    }
    whole = {choice.index: choice for choice in client.completions.create(**asked).choices}
    texts: dict[int, str] = {}
    tokens: dict[int, list[str]] = {}
    for chunk in client.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            assert choice.logprobs is not None
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            tokens.setdefault(choice.index, []).extend(choice.logprobs.tokens or [])
    assert texts == {index: choice.text for index, choice in whole.items()}
    for index, choice in whole.items():
        assert choice.logprobs is not None
        assert tokens[index] == choice.logprobs.tokens


def test_choices_are_numbered_through(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["a", "b"], n=2, seed=1, max_tokens=6, temperature=1.5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 4


def test_stop_strings_end_before_them(client: OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt="Hello", **PLAIN).choices[0].text
    stop = whole[5:7]
    answer = client.completions.create(model="tiny", prompt="Hello", stop=stop, **PLAIN)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"suffix": "a"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 300}, "max_tokens"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 2}, "n"),
        ({"prompt": [[1, 2], "a"]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_done_is_refused_by_name(
    http: httpx.Client, more: dict[str, object], param: str
) -> None:
    answer = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **more})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_openai_says_which_error_it_is(client: OpenAI, server: Inside) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=256)
    assert caught.value.code == "context_length_exceeded"
    name = caught.value.request_id
    assert name
    assert server.logged(name)["error"] == "context_length_exceeded"
