"""Chat completions through the openai package: equal to LLM, streams join, limits are named."""

import shutil
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI

from tests.server.inside import Inside, inside
from xverse import LLM, Sampling
from xverse.checkpoint.load import open_checkpoint
from xverse.server.fingerprint import fingerprint
from xverse.server.messages import Start

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {
    "temperature": 0,
    "max_tokens": 16,
    "extra_body": {"repetition_penalty": 1.0, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="float32")


def test_the_answer_is_that_of_the_model_in_process(client: OpenAI, llm: LLM) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=16, repetition_penalty=1.0, ignore_eos=True)
    expected = llm.chat(HELLO, sampling)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == 16


def test_a_stream_joins_to_the_answer_and_tells_usage_when_asked(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_n_choices_with_a_seed_are_reproducible_and_differ(client: OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model="tiny", messages=HELLO, n=3, seed=2**63 - 2, max_tokens=12, temperature=1.5
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.message.content for choice in answer.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) == 3


def test_logprobs_spell_the_text(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=3, **GREEDY
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    assert 8 < len(content) <= 16  # a special token has no text, and is not told of
    assert all(len(each.top_logprobs) == 3 for each in content)
    assert all(each.top_logprobs[0].logprob >= each.logprob for each in content)
    data = b"".join(bytes(each.bytes or []) for each in content)
    assert data.decode(errors="replace") == choice.message.content


def test_logprobs_end_with_the_text_at_a_stop_string(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    text = whole.choices[0].message.content or ""
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, stop=[text[4:6]], **GREEDY
    )
    choice = answer.choices[0]
    assert choice.message.content == text[: text.index(text[4:6])]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    data = b"".join(bytes(each.bytes or []) for each in choice.logprobs.content or [])
    assert data.decode(errors="replace").startswith(choice.message.content or "")
    assert len(data) <= len((choice.message.content or "").encode()) + 3


def test_logit_bias_and_penalties_reach_the_model(client: OpenAI, server: Inside) -> None:
    ids = server.running.service.tokenizer.encode("k")
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, logit_bias={str(ids[0]): 100}, **GREEDY
    )
    assert answer.choices[0].message.content == "k" * 16
    spread = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        logit_bias={str(ids[0]): 3},
        frequency_penalty=2,
        presence_penalty=2,
        **GREEDY,
    )
    assert (spread.choices[0].message.content or "").count("k") < 8


def test_content_parts_join_and_pictures_are_refused(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    whole = client.chat.completions.create(model="tiny", messages=HELLO, **GREEDY)
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], **GREEDY
    )
    assert answer.choices[0].message.content == whole.choices[0].message.content
    picture = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": picture}]
        )


def test_context_overflow_is_refused_with_counts(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=500)
    assert caught.value.code == "context_length_exceeded"
    assert "23 tokens" in caught.value.message
    assert "256" in caught.value.message
    long = [{"role": "user", "content": "word " * 200}]
    with pytest.raises(openai.BadRequestError, match="256") as caught:
        client.chat.completions.create(model="tiny", messages=long)
    assert caught.value.code == "context_length_exceeded"


def test_another_model_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"store": True}, "store"),
        ({"metadata": {}}, "metadata"),
        ({"service_tier": "auto"}, "service_tier"),
        ({"functions": []}, "functions"),
        ({"temperatur": 1}, "temperatur"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
    ],
)
def test_unknown_fields_are_refused_by_name(
    http: httpx.Client, more: dict[str, object], param: str
) -> None:
    body = {"model": "tiny", "messages": HELLO, **more}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert error["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 2.1},
        {"temperature": "1"},
        {"temperature": 1e-300},
        {"top_p": -0.1},
        {"n": 0},
        {"n": 17},
        {"n": 10**30},
        {"n": True},
        {"seed": 2**63},
        {"stop": ["a"] * 5},
        {"stop": "x" * 257},
        {"stop": ""},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"999999": 1}},
        {"logit_bias": {str(i): 0 for i in range(1025)}},
        {"top_logprobs": 2},
        {"logprobs": True, "top_logprobs": 21},
        {"max_tokens": 0},
        {"max_tokens": 2**31},
        {"max_tokens": 1, "max_completion_tokens": 1},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -2.5},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": [10**6]},
        {"stream_options": {"include_usage": True}},
        {"messages": []},
        {"messages": HELLO * 2049},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "wizard", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}] * 129},
        {"tools": [{"type": "function", "function": {"name": "f"}}] * 2},
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tool_choice": "required"},
        {"model": "m" * 201},
        {"user": "u" * 257},
        {"response_format": {"type": "json_schema"}},
    ],
    ids=lambda more: str(more)[:40],
)
def test_what_is_out_of_bounds_is_refused(http: httpx.Client, more: dict[str, object]) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1, **more}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_usage_tells_what_was_found_in_shared_pages(folder: Path) -> None:
    """A page has 16 tokens; of the prompt the last token is always computed."""
    engine = LLM(folder, dtype="float32", deterministic=True).engine
    with (
        inside(folder, engine) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        chat = {"messages": [{"role": "user", "content": "A" * 40}], "max_tokens": 2}
        first = client.chat.completions.create(model="tiny", **chat)
        again = client.chat.completions.create(model="tiny", n=2, **chat)
        assert first.usage is not None
        full = first.usage.prompt_tokens // 16 * 16
        reusable = (first.usage.prompt_tokens - 1) // 16 * 16
        assert reusable > 0
        assert details(first) == {"cached_tokens": 0, "cache_write_tokens": full}
        both = {"cached_tokens": reusable, "cache_write_tokens": full - reusable}
        assert details(again) == both
        told = {"stream": True, "stream_options": {"include_usage": True}}
        assert details([*client.chat.completions.create(model="tiny", **chat, **told)][-1]) == both
        text = {"prompt": "B" * 40, "max_tokens": 2}
        assert details(client.completions.create(model="tiny", **text))["cached_tokens"] == 0
        two = details(client.completions.create(model="tiny", n=2, **text))
        assert two["cached_tokens"] > 0
        assert details([*client.completions.create(model="tiny", **text, **told)][-1]) == two
        items = {"input": "C" * 40, "max_output_tokens": 2}
        usages = [client.responses.create(model="tiny", **items).usage for _ in range(2)]
        *_, last = client.responses.create(model="tiny", stream=True, **items)
        cached = [
            each.input_tokens_details.cached_tokens for each in (*usages, last.response.usage)
        ]
        assert cached[0] == 0
        assert cached[1] == cached[2] > 0


def details(answer: object) -> dict[str, int]:
    return answer.usage.prompt_tokens_details.model_dump(exclude_none=True)  # type: ignore[attr-defined]


def test_the_fingerprint_names_what_answers(client: OpenAI, server: Inside) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
    name = answer.system_fingerprint
    assert name is not None
    assert name.startswith("fp_")
    chunks = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, stream=True)
    assert {chunk.system_fingerprint for chunk in chunks} == {name}
    text = client.completions.create(model="tiny", prompt="a", max_tokens=2)
    assert text.system_fingerprint == name


def test_the_fingerprint_follows_weights_and_options(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    start = Start(model=str(folder))
    name = fingerprint(open_checkpoint(folder), start, "cpu")
    assert fingerprint(open_checkpoint(copy), Start(model=str(copy)), "cpu") == name
    assert fingerprint(open_checkpoint(folder), start, "cuda:0") != name
    assert fingerprint(open_checkpoint(folder), Start(model="", quantize=4), "cpu") != name
    shard = next(copy.glob("pytorch_model-00002*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert fingerprint(open_checkpoint(copy), start, "cpu") != name
