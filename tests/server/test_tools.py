"""Function calls: the published transcript parses at every split; forced calls are refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.server.inside import Inside, Scripted, inside
from xverse.engine.request import Piece
from xverse.server.turns import Delta, Speaker, Turn, Whole
from xverse.text.tokenizer import Tokenizer

BEFORE = "好的，我来为您查询。\n"
ARGUMENTS = {
    "city": "上海",
    "check_in": "2007-03-09",
    "check_out": "2007-03-10",
    "guests": 2,
    "rooms": 1,
    "price_min": 300,
    "price_max": 500,
    "rating_min": 8,
    "amenities": "停车场",
}
CALL = (
    '<|startofthink|>```JSON\n{ \n   "api_name": "hotel_search","parameters": '
    + json.dumps(ARGUMENTS, ensure_ascii=False, indent=3).replace("\n", "\n   ")
    + "\n}```<|endofthink|>"
)
TRANSCRIPT = BEFORE + CALL
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "hotel_search",
            "description": "搜索酒店",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ASKED = [{"role": "user", "content": "订上海酒店"}]


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text, one byte a token."""
    return [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


@pytest.fixture(scope="module")
def scripted(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Inside, list[str]]]:
    roomy = tmp_path_factory.mktemp("roomy") / "model"  # a preamble of bytes is long
    shutil.copytree(folder, roomy)
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    folder = roomy
    says = [TRANSCRIPT]
    tokenizer = Tokenizer.load(folder)
    engine = Scripted(lambda _: [*byte_ids(tokenizer, says[0]), 3])
    with inside(folder, engine) as server:
        yield server, says


@pytest.fixture
def caller(scripted: tuple[Inside, list[str]]) -> Iterator[OpenAI]:
    scripted[1][0] = TRANSCRIPT
    with OpenAI(base_url=f"{scripted[0].url}/v1", api_key="none", max_retries=0) as found:
        yield found


def expect_call(name: str, arguments: str) -> None:
    assert name == "hotel_search"
    assert json.loads(arguments) == ARGUMENTS


def test_the_published_transcript_over_http(caller: OpenAI) -> None:
    answer = caller.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content or "").strip() == BEFORE.strip()
    (call,) = choice.message.tool_calls or []
    expect_call(call.function.name, call.function.arguments)


def test_streamed_byte_by_byte(caller: OpenAI) -> None:
    chunks = list(
        caller.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS, stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    text = "".join(delta.content or "" for delta in deltas)
    assert text.strip() == BEFORE.strip()
    assert "startofthink" not in text
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.index for call in calls] == [0]
    assert calls[0].id
    expect_call(calls[0].function.name, calls[0].function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_same_at_every_byte_split(scripted: tuple[Inside, list[str]]) -> None:
    service = scripted[0].running.service
    data = TRANSCRIPT.encode()
    whole = heard(service, [data])
    expect_call(whole.calls[0].call.name, json.dumps(whole.calls[0].call.arguments))
    for at in range(1, len(data)):
        split = heard(service, [data[:at], data[at:]])
        assert split.content == whole.content
        assert [c.call for c in split.calls] == [c.call for c in whole.calls]
        assert split.finish == "tool_calls"


def heard(service: object, parts: list[bytes]) -> Whole:
    """What comes of the parts of an answer, decoded as a stream of text is."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    found = Whole()
    listening = Speaker(service, 0, Turn([], tools=True))  # type: ignore[arg-type]
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        text = decoder.decode(part, final=last)
        delta: Delta = listening.hear(Piece(text, (), "stop" if last else None))
        found.add(delta)
    return found


def test_two_calls_come_in_order_and_one_alone_where_they_may_not_be_parallel(
    scripted: tuple[Inside, list[str]], caller: OpenAI
) -> None:
    scripted[1][0] = CALL + CALL + "Done."
    answer = caller.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS)
    calls = answer.choices[0].message.tool_calls or []
    assert len(calls) == 2
    assert calls[0].id != calls[1].id
    assert answer.choices[0].message.content == "Done."
    one = caller.chat.completions.create(
        model="tiny", messages=ASKED, tools=TOOLS, parallel_tool_calls=False
    )
    assert len(one.choices[0].message.tool_calls or []) == 1
    assert one.choices[0].finish_reason == "tool_calls"
    assert one.choices[0].message.content is None


def test_a_broken_call_is_text(scripted: tuple[Inside, list[str]], caller: OpenAI) -> None:
    scripted[1][0] = '<|startofthink|>```JSON\n{"api_name": ```<|endofthink|>'
    answer = caller.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS)
    assert answer.choices[0].message.content == scripted[1][0]
    assert answer.choices[0].finish_reason == "stop"


def test_without_tools_nothing_is_parsed(caller: OpenAI) -> None:
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = caller.chat.completions.create(model="tiny", messages=ASKED, **more)
        assert answer.choices[0].message.content == TRANSCRIPT
        assert answer.choices[0].message.tool_calls is None


def test_the_results_of_tools_are_read(scripted: tuple[Inside, list[str]], caller: OpenAI) -> None:
    scripted[1][0] = "OK"
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "hotel_search", "arguments": '{"city": "上海"}'},
    }
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "[3]"},
    ]
    answer = caller.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "OK"
    server = scripted[0]
    prompt = server.running.service.tokenizer.decode(server.engine.requests[-1].ids)  # type: ignore[attr-defined]
    assert "hotel_search" in prompt
    assert "Exec: [3]" in prompt


def test_an_answer_is_json_of_a_schema(client: OpenAI) -> None:
    pytest.importorskip("xgrammar")
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = client.chat.completions.create(
        model="tiny", messages=ASKED, response_format=form, max_tokens=60
    )
    assert isinstance(json.loads(answer.choices[0].message.content or "")["yes"], bool)


def test_what_cannot_be_held_is_refused_by_name(caller: OpenAI) -> None:
    odd = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": odd}}
    with pytest.raises(openai.BadRequestError) as caught:
        caller.chat.completions.create(model="tiny", messages=ASKED, response_format=form)
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as caught:
        caller.chat.completions.create(
            model="tiny", messages=ASKED, tools=TOOLS, response_format={"type": "json_object"}
        )
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("depth", [40, 60])
def test_a_schema_nested_too_deeply_is_refused(caller: OpenAI, depth: int) -> None:
    schema: dict[str, object] = {"type": "object"}
    for _ in range(depth):
        schema = {"not": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(openai.BadRequestError, match="nested"):
        caller.chat.completions.create(model="tiny", messages=ASKED, tools=[tool])


def test_a_schema_that_is_too_large_is_refused(caller: OpenAI) -> None:
    schema = {"description": "x" * 2**16}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    with pytest.raises(openai.BadRequestError, match="65536"):
        caller.chat.completions.create(model="tiny", messages=ASKED, tools=[tool])


# --- /v1/responses, on the same transcript


def test_responses_give_the_call_as_an_item(caller: OpenAI) -> None:
    tool = {"type": "function", **TOOLS[0]["function"]}  # type: ignore[dict-item]
    answer = caller.responses.create(model="tiny", input="订上海酒店", tools=[tool])
    message, call = answer.output
    assert message.type == "message"
    assert answer.output_text.strip() == BEFORE.strip()
    assert call.type == "function_call"
    expect_call(call.name, call.arguments)
    again = caller.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": "订上海酒店"},
            {"type": "function_call", "call_id": "c", "name": call.name, "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "[]"},
        ],
        tools=[tool],
    )
    assert again.status == "completed"


def test_responses_stream_the_events_of_a_call(caller: OpenAI) -> None:
    tool = {"type": "function", **TOOLS[0]["function"]}  # type: ignore[dict-item]
    events = list(
        caller.responses.create(model="tiny", input="订上海酒店", tools=[tool], stream=True)
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert (
        kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 2
    )
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text.strip() == BEFORE.strip()
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert json.loads(done.arguments) == ARGUMENTS
    assert [item.type for item in events[-1].response.output] == ["message", "function_call"]
