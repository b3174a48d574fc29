"""ROWS -> CONVERSATIONS. Alpaca, ShareGPT and OpenAI rows as messages; what is none says why."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xverse.data.layout import MEDIA, Layout
from xverse.data.source import flaw_of
from xverse.text.message import Message

ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")


class Unfit(Exception):
    """A row that cannot be learned from: the kind of reason, and what exactly."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Conversation(NamedTuple):
    """Messages as the renderer takes them. `unlearned` are the numbers of the assistant's messages
    (from 0, among these) that are only to be read."""

    messages: list[Message]
    tools: list[Any] | None = None
    unlearned: frozenset[int] = frozenset()


class Choice(NamedTuple):
    """Two conversations that differ in what is said after a common beginning."""

    chosen: Conversation
    rejected: Conversation


def read_text(row: Mapping[str, Any], layout: Layout) -> str:
    """The text of a row of plain text."""
    return _said(layout.get(row, "text"), "text")


def read_conversation(row: Mapping[str, Any], layout: Layout) -> Conversation:
    """The conversation of a row; Unfit where it is none, or has no answer at its end."""
    _refuse_media(row)
    if layout.kind == "alpaca":
        answer = _said(layout.get(row, "response"), layout.columns["response"])
        said = [*_alpaca(row, layout), {"role": "assistant", "content": answer}]
    else:
        said = _messages(layout.get(row, "messages"), layout)
    return _checked(said, row, layout)


def read_choice(row: Mapping[str, Any], layout: Layout) -> Choice:
    """The two conversations of a row of preferences; Unfit where they are none, or the same."""
    _refuse_media(row)
    better, worse = layout.get(row, "chosen"), layout.get(row, "rejected")
    answers = layout.get(row, "response") if better is None and worse is None else None
    if isinstance(answers, list):  # alpaca's older way: [better, worse]
        if len(answers) != 2:
            raise Unfit("no two answers", f"{len(answers)} of them")
        better, worse = answers
    if better is None or worse is None:
        raise Unfit("missing field", "chosen and rejected")
    if layout.kind == "alpaca":
        before = _alpaca(row, layout)
    else:
        asked = layout.get(row, "messages") or layout.get(row, "prompt")
        if isinstance(asked, str) and not asked.lstrip().startswith("["):
            before = [{"role": "user", "content": _said(asked, "prompt")}]
        else:
            before = _messages(asked, layout) if asked is not None else []
    chosen, rejected = (
        _checked(_answered(before, answer, layout), row, layout) for answer in (better, worse)
    )
    if chosen == rejected:
        raise Unfit("chosen and rejected are the same")
    return Choice(chosen, rejected)


def _answered(before: list[dict[str, Any]], answer: Any, layout: Layout) -> list[dict[str, Any]]:
    """The messages of an answer behind what came before it, which some data repeats there."""
    if isinstance(answer, str):
        return [*before, {"role": "assistant", "content": _said(answer, "answer")}]
    said = _messages([answer] if isinstance(answer, Mapping) else answer, layout)
    repeats = bool(before) and said[: len(before)] == before
    return said if repeats else [*before, *said]


def _alpaca(row: Mapping[str, Any], layout: Layout) -> list[dict[str, Any]]:
    """What comes before the answer: earlier rounds, and the question with its input below it."""
    said: list[dict[str, Any]] = []
    history = _parsed(layout.get(row, "history"), "history") or []
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise Unfit("bad history", "no list")
    for turn in history:
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise Unfit("bad history", "a round is [question, answer]")
        said.append({"role": "user", "content": _said(turn[0], "history")})
        said.append({"role": "assistant", "content": _said(turn[1], "history")})
    parts = [layout.get(row, column) for column in ("prompt", "query")]
    question = "\n".join(_said(part, "question") for part in parts if part is not None)
    return [*said, {"role": "user", "content": _said(question, layout.columns["prompt"])}]


def _messages(value: Any, layout: Layout) -> list[dict[str, Any]]:
    listed = _parsed(value, "messages")
    if not isinstance(listed, list) or not listed:
        raise Unfit("missing field", layout.columns.get("messages", "messages"))
    return [_message(entry, layout) for entry in listed]


def _message(entry: Any, layout: Layout) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise Unfit("bad message", "no object")
    role_keys = (layout.tags["role_tag"],) if "role_tag" in layout.tags else ROLE_KEYS
    content_keys = (layout.tags["content_tag"],) if "content_tag" in layout.tags else CONTENT_KEYS
    named = next((entry[key] for key in role_keys if isinstance(entry.get(key), str)), None)
    if named is None:
        raise Unfit("bad message", f"no {' or '.join(role_keys)}")
    role = layout.role(named)
    if role is None:
        raise Unfit("unknown role", repr(named)[:60])
    content = next((entry[key] for key in content_keys if entry.get(key) is not None), None)
    if role == "call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(content)}
    message: dict[str, Any] = {"role": role}
    calls = entry.get("tool_calls")
    if role == "assistant" and calls is not None and len(calls):
        message |= {"tool_calls": list(calls), "content": _plain(content) or None}
    elif role == "assistant" and isinstance(entry.get("function_call"), Mapping):
        call = {"type": "function", "function": dict(entry["function_call"])}
        message |= {"tool_calls": [call], "content": _plain(content) or None}
    elif role == "system":
        message["content"] = _plain(content)  # an empty one is told apart from none
    else:
        message["content"] = _said(content, role)
    if entry.get("weight") is not None:
        message["weight"] = entry["weight"]
    return message


def _plain(content: Any) -> str:
    """A content as one text: a text, or OpenAI's list of parts that are texts."""
    if isinstance(content, list):
        parts = [_part(part) for part in content]
        content = "".join(parts)
    if content is None:
        return ""
    if not isinstance(content, str):
        raise Unfit("no text", repr(content)[:60])
    if (flaw := flaw_of(content)) and flaw != "empty":
        raise Unfit(flaw)
    return content


def _part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    raise Unfit("no text", f"a part of a message is {part!r:.60}")


def _said(content: Any, what: str) -> str:
    """A content that says something."""
    text = _plain(content)
    if not text.strip():
        raise Unfit("empty", what)
    return text


def _calls(content: Any) -> list[dict[str, Any]]:
    """ShareGPT's function_call, JSON of one call or of a list of them, as OpenAI has it."""
    parsed = _parsed(content, "function_call", also="{[")
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(
        isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls
    ):
        raise Unfit("bad function call", repr(content)[:80])
    return [{"type": "function", "function": dict(call)} for call in calls]


def _parsed(value: Any, what: str, also: str = "[") -> Any:
    """`value`, or what it is as JSON where it is a text, as csv has it."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith(tuple(also)):
        raise Unfit(f"bad {what}", "no JSON")
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Unfit(f"bad {what}", str(error)[:120]) from error


def _checked(said: list[dict[str, Any]], row: Mapping[str, Any], layout: Layout) -> Conversation:
    """The conversation, its system message in front; Unfit where an answer answers nothing."""
    system = layout.get(row, "system")
    if system is not None and said[0]["role"] != "system":
        said = [{"role": "system", "content": _said(system, "system")}, *said]
    roles = [message["role"] for message in said]
    first = roles[1:2] if roles[0] == "system" else roles[:1]
    if first != ["user"]:
        raise Unfit("begins without a question", f"the first is of the role {first or 'system'}")
    if roles[-1] != "assistant":
        raise Unfit("no answer at the end", f"the last is of the role {roles[-1]}")
    answers = [message for message in said if message["role"] == "assistant"]
    weights = [message.pop("weight", 1) for message in answers]
    if any(weight not in (0, 1) for weight in weights):
        raise Unfit("bad weight", "0 or 1")
    unlearned = frozenset(at for at, weight in enumerate(weights) if weight == 0)
    if len(unlearned) == len(answers):
        raise Unfit("nothing to learn", "every answer has the weight 0")
    for message in said:
        message.pop("weight", None)
    return Conversation([*said], _tools(layout.get(row, "tools")), unlearned)


def _tools(value: Any) -> list[Any] | None:
    """Tools as OpenAI has them: each {"type": "function", "function": ...}."""
    tools = _parsed(value, "tools") or None
    if tools is not None and not isinstance(tools, list):
        raise Unfit("bad tools", "no list")
    return tools and [
        tool if not isinstance(tool, Mapping) or "function" in tool
        else {"type": "function", "function": tool}
        for tool in tools
    ]  # fmt: skip


def _refuse_media(row: Mapping[str, Any]) -> None:
    found = [name for name in MEDIA if row.get(name)]
    if found:
        raise Unfit("not text alone", ", ".join(found))
