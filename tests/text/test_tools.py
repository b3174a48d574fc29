"""Function calls: the preamble as published, and answers taken apart at every split."""

import json
import random
from datetime import datetime

import pytest

from xverse.errors import XverseError
from xverse.text.tools import (
    INSTRUCTION,
    ParsedReply,
    ToolCall,
    ToolStream,
    parse_tool_calls,
    render_tool_calls,
    render_tools,
)

HOTEL = ToolCall(
    "hotel_search",
    {
        "city": "上海",
        "check_in": "2007-03-09",
        "check_out": "2007-03-10",
        "guests": 2,
        "rooms": 1,
        "price_min": 300,
        "price_max": 500,
        "rating_min": 8,
        "amenities": "停车场",
    },
)
# The shape of the published answer: prose, a fence, a space after "{", no url.
TRANSCRIPT = (
    "好的，马上为您查询。\n<|startofthink|>```JSON\n"
    + '{ \n   "api_name": "hotel_search","parameters": '
    + json.dumps(HOTEL.arguments, ensure_ascii=False, indent=3).replace("\n", "\n   ")
    + "\n}```<|endofthink|>"
)


def marked(body: str) -> str:
    return f"<|startofthink|>{body}<|endofthink|>"


def add(a: object) -> ToolCall:
    return ToolCall("add", {"a": a})


ADD = '{"api_name": "add", "parameters": {"a": 1}}'


def test_the_published_transcript() -> None:
    assert parse_tool_calls(TRANSCRIPT) == ParsedReply("好的，马上为您查询。", (HOTEL,))


@pytest.mark.parametrize(
    "body",
    [
        ADD,
        f"```JSON\n{ADD}\n```",
        f"```json\n{ADD}```",
        f"```\n{ADD}\n```",
        f"\n ```JSON{ADD}``` \n",
        f"[{ADD}]",
        '{"name": "add", "arguments": {"a": 1}}',
        '{"api_name": "add", "url": "http://x", "parameters": {"a": 1}}',
        '{"api_name": "add", "parameters": "{\\"a\\": 1}"}',
        '{"name": "add", "arguments": "{\\"a\\": 1}"}',
    ],
)
def test_lenient_forms(body: str) -> None:
    assert parse_tool_calls(marked(body)) == ParsedReply("", (add(1),))
    assert parse_tool_calls(f"<|startofthink|>{body}") == ParsedReply("", (add(1),))


def test_calls_without_arguments() -> None:
    for body in (
        '{"name": "now"}',
        '{"name": "now", "arguments": ""}',
        '{"name":"now","arguments":null}',
    ):
        assert parse_tool_calls(marked(body)).tool_calls == (ToolCall("now", {}),)


def test_several_calls_and_the_text_around_them() -> None:
    text = f"first\n{marked(ADD)}\n\n{marked(f'[{ADD}, {ADD}]')} then  {marked(ADD)}\n"
    assert parse_tool_calls(text) == ParsedReply("first then", (add(1),) * 4)
    assert parse_tool_calls(f"{marked(ADD)}\n\nlast ") == ParsedReply("last ", (add(1),))


MALFORMED = [
    "no call at all  ",
    marked("just a thought"),
    marked(""),
    marked("{"),
    marked("[]"),
    marked("5"),
    marked("null"),
    marked('"text"'),
    marked("{}"),
    marked('{"api_name": 5}'),
    marked('{"api_name": ""}'),
    marked('{"api_name": "f", "parameters": 5}'),
    marked('{"api_name": "f", "parameters": "not json"}'),
    marked('{"api_name": "f", "parameters": {"a": NaN}}'),
    marked('{"api_name": "f", "parameters": {"a": 1e999}}'),
    marked('{"api_name": "f", "parameters": {"a": "\\ud800"}}'),
    marked('{"api_name": "f", "parameters": {"a": %s}}' % ("9" * 5000)),
    marked("[" * 5000),
    "<|startofthink|>",
    "<|startofthink|>{",
    "<|startofth",
    "text <|endofthink|>",
    "  \n <|startofthink|> x <|endofthink|>\n ",
    "```JSON\n" + ADD + "\n```",
]


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_calls_stay_in_the_content(text: str) -> None:
    assert parse_tool_calls(text) == ParsedReply(text, ())


def streamed(pieces: list[str]) -> ParsedReply:
    stream = ToolStream()
    content, calls = "", []
    for delta in [*(d for piece in pieces for d in stream.feed(piece)), *stream.finish()]:
        if isinstance(delta, ToolCall):
            calls.append(delta)
        else:
            content += delta
    return ParsedReply(content, tuple(calls))


MIXED = [
    TRANSCRIPT,
    TRANSCRIPT + "\n再见 " + marked("oops") + " \n" + marked(ADD) + " ",
    f"{marked(ADD)}  {marked('x')}  {marked(ADD)}  <|startof",
    "a < b <| c <|start <|startofthink|> " + ADD,
    "<<|startofthink|>" + ADD + "<|endofthink|<|endofthink|>",
    *(text for text in MALFORMED if len(text) < 200),
]


@pytest.mark.parametrize("text", MIXED)
def test_streams_parse_alike_at_every_split(text: str) -> None:
    whole = parse_tool_calls(text)
    assert streamed(list(text)) == whole
    for at in range(len(text) + 1):
        assert streamed([text[:at], text[at:]]) == whole
    dice = random.Random(7)
    for _ in range(50):
        cuts = sorted(dice.randint(0, len(text)) for _ in range(4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert streamed(pieces) == whole


def test_a_stream_gives_no_part_of_a_mark_and_holds_nothing_else() -> None:
    stream = ToolStream()
    assert stream.feed("one two") == ["one two"]
    assert stream.feed(" <|start") == []
    assert stream.feed("er") == [" <|starter"]
    assert stream.feed("<|startofthink|>" + ADD) == []
    assert stream.feed("<|endofthink|> more") == [add(1), " more"]
    assert stream.finish() == []


def test_calls_written_back_are_read_alike() -> None:
    calls = [
        {"type": "function", "function": {"name": "add", "arguments": '{"a": "你\\n"}'}},
        add(2),
    ]
    text = render_tool_calls(calls)
    assert text.startswith('<|startofthink|>```JSON\n{ \n   "api_name": "add","parameters": {\n')
    assert parse_tool_calls("Let me see.\n" + text) == ParsedReply(
        "Let me see.", (add("你\n"), add(2))
    )


def test_the_published_call_is_written_back_as_published() -> None:
    call = {"function": {"name": HOTEL.name, "arguments": HOTEL.arguments}}
    assert f"好的，马上为您查询。\n{render_tool_calls([call])}" == TRANSCRIPT


@pytest.mark.parametrize(
    "calls", [None, "x", 5, [5], [{}], [{"function": {"name": "f", "arguments": "{"}}]]
)
def test_bad_calls_are_named(calls: object) -> None:
    with pytest.raises(XverseError):
        render_tool_calls(calls)


def test_the_preamble() -> None:
    tools = [
        {
            "type": "function",
            "function": {
                "name": "hotel_search",
                "description": "查询酒店",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "description": "城市"},
                        "stars": {"type": "integer", "enum": [3, 4]},
                        "pool": {"description": "泳池", "required": "True"},
                    },
                    "required": ["city"],
                },
            },
        },
        {"name": "now"},
    ]
    text = render_tools(tools, "有什么酒店？", now=datetime(2007, 3, 9, 7, 2, 15))
    assert text == (
        f"{INSTRUCTION}\n"
        '1. {"name": "hotel_search", "description": "查询酒店", "parameters": ['
        '{"name": "city", "description": "城市", "required": true}, '
        '{"name": "stars", "description": "（可选值：3、4）", "required": false}, '
        '{"name": "pool", "description": "泳池", "required": true}]}\n'
        '2. {"name": "now", "description": "", "parameters": []}\n'
        "当前时间：2007-03-09 07:02:15\n"
        "有什么酒店？"
    )
    for word in ("api_name", "url", "parameters", "<|startofthink|>", "<|endofthink|>"):
        assert word in INSTRUCTION


def test_published_parameter_lists_pass_through() -> None:
    listed = [
        {"name": "city", "description": "城市", "required": "True"},
        {"name": "price", "description": "价格", "required": "False"},
        {"name": "limit", "description": "数量"},
    ]
    text = render_tools([{"name": "f", "description": "d", "parameters": listed}], "q")
    spec = json.loads(text.splitlines()[1].removeprefix("1. "))
    assert [entry["required"] for entry in spec["parameters"]] == [True, False, False]


@pytest.mark.parametrize(
    "tool",
    [
        5,
        {},
        {"type": "function"},
        {"function": {"name": 5}},
        {"name": "f", "parameters": 5},
        {"name": "f", "parameters": [5]},
        {"name": "f", "parameters": {"properties": 5}},
        {"name": "f", "parameters": {"required": "city"}},
    ],
)
def test_bad_tools_are_named(tool: dict[str, object]) -> None:
    with pytest.raises(XverseError):
        render_tools([tool], "q")
