"""LANGCHAIN'S MESSAGES <-> OURS. Conversations into OpenAI's form, deltas into chunks."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk

from xverse.errors import XverseError
from xverse.interop.langchain.question import CallPart, Delta

NO_OBJECT = "The arguments are no JSON object."
# Blocks of an assistant's content that say again what tool_calls says, or what is not sent back.
_SILENT = frozenset({"tool_use", "tool_call", "tool_call_chunk", "reasoning", "thinking"})


def to_openai(messages: Sequence[BaseMessage]) -> list[dict[str, object]]:
    """Messages as dicts. System messages one after another become one, as the models know one.

    The formats have no place for names of speakers. XverseError for what is no text.
    """
    turns: list[dict[str, object]] = []
    for message in messages:
        turn = _turn(message)
        if turns and turn["role"] == turns[-1]["role"] == "system":
            turns[-1] = {"role": "system", "content": f"{turns[-1]['content']}\n{turn['content']}"}
        else:
            turns.append(turn)
    return turns


def _turn(message: BaseMessage) -> dict[str, object]:
    turn: dict[str, object] = {"role": _role(message), "content": _text(message.content)}
    if isinstance(message, AIMessage) and message.tool_calls:
        turn["tool_calls"] = [_sent_call(call) for call in message.tool_calls]
    if isinstance(message, ToolMessage):
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _role(message: BaseMessage) -> str:
    match message:
        case SystemMessage():
            return "system"
        case HumanMessage():
            return "user"
        case AIMessage():
            return "assistant"
        case ToolMessage():
            return "tool"
        case FunctionMessage():
            return "exec"
        case ChatMessage():
            return "system" if message.role == "developer" else message.role
    raise XverseError(
        f"A message of type {type(message).__name__} cannot be sent.",
        "The models know the roles system, user, assistant and exec (the result of a tool).",
        "Use SystemMessage, HumanMessage, AIMessage, ToolMessage, or ChatMessage with a role.",
    )


def _text(content: str | list[str | dict[Any, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else _block_text(part) for part in content)


def _block_text(block: Mapping[str, object]) -> str:
    kind = block.get("type")
    if kind in ("text", None) and isinstance(block.get("text"), str):
        return str(block["text"])
    if kind in _SILENT:
        return ""
    raise XverseError(
        f"A message has content of type {kind!r:.60}.",
        "XVERSE models read text, and nothing else.",
        "Send the text only.",
    )


def _sent_call(call: ToolCall) -> dict[str, object]:
    arguments = json.dumps(call["args"], ensure_ascii=False)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": call["id"] or call["name"], "type": "function", "function": function}


def chunk_of(delta: Delta, model: str) -> AIMessageChunk:
    """A delta as LangChain streams it."""
    parts = [
        tool_call_chunk(name=call.name, args=call.arguments, id=call.id, index=call.index)
        for call in delta.calls
    ]
    return AIMessageChunk(
        content=delta.text,
        tool_call_chunks=parts,
        usage_metadata=_usage(delta),
        response_metadata=_metadata(delta, model) if delta.finish else {},
    )


def message_of(deltas: Sequence[Delta], model: str) -> AIMessage:
    """A whole answer as one message. A call whose arguments are no JSON object is kept aside, as
    LangChain does."""
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for part in (part for delta in deltas for part in delta.calls):
        arguments = _arguments(part)
        if arguments is None:
            invalid.append(
                invalid_tool_call(name=part.name, args=part.arguments, id=part.id, error=NO_OBJECT)
            )
        else:
            calls.append(tool_call(name=part.name or "", args=arguments, id=part.id))
    last = deltas[-1]
    return AIMessage(
        content="".join(delta.text for delta in deltas),
        tool_calls=calls,
        invalid_tool_calls=invalid,
        usage_metadata=_usage(last),
        response_metadata=_metadata(last, model),
    )


def _arguments(part: CallPart) -> dict[str, Any] | None:
    try:
        found = json.loads(part.arguments or "{}")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _metadata(delta: Delta, model: str) -> dict[str, object]:
    return {"finish_reason": delta.finish, "model_name": model, "model_provider": "xverse"}


def _usage(delta: Delta) -> UsageMetadata | None:
    if delta.usage is None:
        return None
    prompt, answer = delta.usage.prompt, delta.usage.answer
    return UsageMetadata(input_tokens=prompt, output_tokens=answer, total_tokens=prompt + answer)
