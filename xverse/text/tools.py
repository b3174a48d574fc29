"""FUNCTION CALLS <-> TEXT. Tools into the prompt's preamble, calls out of the model's answer.

What XVERSE published (README of XVERSE-13B, Apache-2.0): the preamble is the first user message. It
tells how to call, lists the tools as numbered JSON, gives the current time, and ends with the
question. A call is a JSON object between <|startofthink|> and <|endofthink|>; the published answer
leaves `url` out and has a ```JSON fence. The two marks are ordinary text to the tokenizer.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from xverse.errors import XverseError

START, END = "<|startofthink|>", "<|endofthink|>"
# Word for word what the models were trained on: a constant of the format, as "Human: " is
# (docs/decisions/0005-preamble.md).
INSTRUCTION = (
    "你是个大语言模型，有多种能力，可以通过插件集成api来回复用户的问题，"
    "还能解答用户使用模型遇到的问题和模型知识相关问答。目前支持的插件信息如下，"
    "请自行判断是否需要调用插件来解决当前用户问题。若需要调用插件，"
    "则需要将插件调用请求按照json格式给出，必须包含api_name、url、parameters字段，"
    f"并在其前后使用{START}和{END}作为标志。然后你需要根据插件API调用结果生成合理的答复；"
    "若无需调用插件，则直接给出对应回复即可："
)
FIX = 'Give tools in OpenAI\'s form: {"type": "function", "function": {"name": ..., ...}}.'


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks for, and its arguments."""

    name: str
    arguments: dict[str, object]


@dataclass(frozen=True)
class ParsedReply:
    """A model's answer, taken apart: the text around the calls, and the calls in order."""

    content: str
    tool_calls: tuple[ToolCall, ...]


def render_tools(
    tools: Sequence[Mapping[str, object]], question: str, *, now: datetime | None = None
) -> str:
    """The first user message of a conversation with OpenAI-style `tools`, as published.

    Raises XverseError for a tool without a name or with a schema that is no JSON schema.
    """
    specs = [
        f"{number}. {json.dumps(_spec(tool), ensure_ascii=False)}"
        for number, tool in enumerate(tools, start=1)
    ]
    time = f"当前时间：{now or datetime.now():%Y-%m-%d %H:%M:%S}"
    return "\n".join([INSTRUCTION, *specs, time, question])


def render_tool_calls(calls: object) -> str:
    """The text of an assistant message's `tool_calls` (OpenAI's form), as the model writes them."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise XverseError(
            f"tool_calls is {calls!r:.80}.", "It is a list of function calls.", "Send a list."
        )
    return "\n".join(_written(_as_call(call)) for call in calls)


def _written(call: ToolCall) -> str:
    """A call in the spelling of the published transcript."""
    parameters = json.dumps(call.arguments, ensure_ascii=False, indent=3).replace("\n", "\n   ")
    name = json.dumps(call.name, ensure_ascii=False)
    body = f'{{ \n   "api_name": {name},"parameters": {parameters}\n}}'
    return f"{START}```JSON\n{body}```{END}"


def parse_tool_calls(text: str) -> ParsedReply:
    """Take a finished answer apart; what isn't a well-formed call stays in the content."""
    stream = ToolStream()
    deltas = [*stream.feed(text), *stream.finish()]
    return ParsedReply(
        content="".join(delta for delta in deltas if isinstance(delta, str)),
        tool_calls=tuple(delta for delta in deltas if isinstance(delta, ToolCall)),
    )


class ToolStream:
    """Takes an answer apart while it is written, with the same result at every split.

    White space around calls is dropped, unless it is between a text before and a text after.
    """

    def __init__(self) -> None:
        self._text = ""  # not yet given out: white space and the beginning of a mark, or a call
        self._inside = False  # _text is white space, START, and what follows it
        self._searched = 0  # END is not in _text before this position
        self._spoke = False  # there was content already
        self._after_call = False  # and no content since

    def feed(self, text: str) -> list[str | ToolCall]:
        """Add text; returns what is certain now, content and finished calls in order."""
        self._text += text
        deltas: list[str | ToolCall] = []
        while self._close(deltas) if self._inside else self._open(deltas):
            pass
        return [delta for delta in deltas if delta != ""]

    def finish(self) -> list[str | ToolCall]:
        """No more text comes; a call whose end mark is missing counts if it is complete."""
        text, self._text = self._text, ""
        calls = self._calls_of(text) if self._inside else []
        self._inside = False
        if calls or (self._after_call and text.isspace()):
            return [*calls]
        return [delta for delta in [self._content(text)] if delta]

    def _open(self, deltas: list[str | ToolCall]) -> bool:
        """Give out the text before a call; whether one begins."""
        at = self._text.find(START)
        self._inside = at >= 0
        if at < 0:
            at = len(self._text) - _overlap(self._text, START)
        end = len(self._text[:at].rstrip())
        deltas.append(self._content(self._text[:end]))
        self._text, self._searched = self._text[end:], 0
        return self._inside

    def _close(self, deltas: list[str | ToolCall]) -> bool:
        """Give out the calls up to the end mark; whether it is there."""
        at = self._text.find(END, self._searched)
        if at < 0:
            self._searched = max(0, len(self._text) - len(END))
            return False
        block, self._text = self._text[:at], self._text[at + len(END) :]
        calls = self._calls_of(block)
        deltas += calls or [self._content(block + END)]
        self._inside, self._after_call = False, bool(calls)
        return True

    def _content(self, text: str) -> str:
        if self._after_call and not self._spoke:
            text = text.lstrip()
        if text:
            self._spoke, self._after_call = True, False
        return text

    @staticmethod
    def _calls_of(block: str) -> list[ToolCall]:
        return _read_calls(block.lstrip().removeprefix(START))


def _overlap(text: str, mark: str) -> int:
    """Length of the longest tail of `text` that begins `mark`."""
    longest = min(len(mark) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if mark.startswith(text[-n:])), 0)


def _read_calls(body: str) -> list[ToolCall]:
    """The calls in a block's JSON, one object or a list of them; [] if it is anything else."""
    body = body.strip().removeprefix("```").removesuffix("```").strip()
    if body[:4].lower() == "json":
        body = body[4:]
    try:
        found = json.loads(body, strict=False, parse_constant=_refuse, parse_float=_finite)
        calls = [_read_call(call) for call in (found if isinstance(found, list) else [found])]
        for call in calls:  # half a surrogate pair can't be sent on
            json.dumps([call.name, call.arguments], ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return []
    return calls


def _read_call(call: object) -> ToolCall:
    if not isinstance(call, dict):
        raise ValueError("a call is an object")
    name = call.get("api_name", call.get("name"))
    arguments = call.get("parameters", call.get("arguments", {}))
    if isinstance(arguments, str):
        arguments = json.loads(
            arguments or "{}", strict=False, parse_constant=_refuse, parse_float=_finite
        )
    if not isinstance(name, str) or not name or not isinstance(arguments or {}, dict):
        raise ValueError("a call has a name and arguments")
    return ToolCall(name, arguments or {})


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is too large")
    return value


def _as_call(call: object) -> ToolCall:
    """One entry of OpenAI's `tool_calls`: {"function": {"name", "arguments": JSON or object}}."""
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call) if isinstance(call, Mapping) else None
    try:
        return _read_call(dict(function) if isinstance(function, Mapping) else None)
    except (ValueError, RecursionError) as error:
        raise XverseError(f"This is no function call: {call!r:.80}.", str(error), FIX) from error


def _spec(tool: Mapping[str, object]) -> dict[str, object]:
    """The published spec of a tool: name, description, and a list of parameters."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise XverseError(f"This is no tool: {tool!r:.80}.", "It has no function name.", FIX)
    return {
        "name": function["name"],
        "description": str(function.get("description") or ""),
        "parameters": _parameters(function.get("parameters") or {}),
    }


def _parameters(schema: object) -> list[dict[str, object]]:
    """Parameters as the published list of {name, description, required}, from a JSON schema or
    from such a list; `required` may be written as a string there, as it is in the published one."""
    if isinstance(schema, Mapping):
        properties, required = schema.get("properties") or {}, schema.get("required") or []
    else:
        properties, required = None, []
    if isinstance(properties, Mapping) and isinstance(required, list):
        listed: object = [
            {
                **(entry if isinstance(entry, Mapping) else {}),
                "name": name,
                "required": name in required or _required(entry),
            }
            for name, entry in properties.items()
        ]
    else:
        listed = schema
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) for entry in listed):
        raise XverseError(
            f"These are no parameters of a tool: {schema!r:.80}.",
            "Parameters are a JSON schema with `properties`.",
            FIX,
        )
    return [_parameter(entry) for entry in listed]


def _parameter(entry: Mapping[str, object]) -> dict[str, object]:
    description = str(entry.get("description") or "")
    choices = entry.get("enum")
    if isinstance(choices, list):  # the published form has no place for them but here
        description += f"（可选值：{'、'.join(map(str, choices))}）"
    return {
        "name": str(entry.get("name")),
        "description": description,
        "required": _required(entry),
    }


def _required(entry: object) -> bool:
    value = entry.get("required") if isinstance(entry, Mapping) else None
    return (
        value.strip().lower() in {"true", "yes", "1"} if isinstance(value, str) else value is True
    )
