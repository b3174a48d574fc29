"""ITEMS -> ITEMS. POST /v1/responses: the answer in OpenAI's newer form, whole or in events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response

from xverse.server.constraint import answer_form
from xverse.server.context import Context
from xverse.server.logprobs import chat_logprobs
from xverse.server.refusals import Refusal, invalid, json_response
from xverse.server.responses_schema import (
    CallItem,
    CallOutputItem,
    FlatNamed,
    MessageItem,
    ResponseRequest,
    TextFormat,
)
from xverse.server.schema import JsonSchema, ResponseFormat
from xverse.server.service import Prompt, Service
from xverse.server.sse import EventStream, event
from xverse.server.turns import Call, Delta, Turn, deltas

__all__ = ["ResponseRequest", "respond"]

Event = dict[str, Any]


async def respond(context: Context, asked: ResponseRequest) -> Response:
    """The answer to a conversation given as items."""
    turn = await plan(context.service, asked)
    reply = _Reply(context.service, asked, turn.prompts[0])
    if asked.stream:
        return EventStream(_streamed(context, reply, turn))

    async def whole() -> Event:
        async for batch in deltas(context.service, context.tenant, turn, context.facts):
            for delta in batch:
                reply.hear(delta)
        return reply.end()[-1]["response"]

    return json_response(await context.attend(whole()))


async def plan(service: Service, asked: ResponseRequest) -> Turn:
    """What the engine is to do; Refusal for what cannot be done."""
    service.models.require(asked.model)
    tools = [tool.boxed() for tool in asked.tools or ()]
    choice = asked.tool_choice
    form = answer_form(
        tools,
        choice.boxed() if isinstance(choice, FlatNamed) else choice,
        _boxed(asked.text.format if asked.text else None),
    )
    if asked.top_logprobs is not None and not asked.include:
        raise invalid("top_logprobs needs message.output_text.logprobs in include.", "include")
    usable = bool(tools) and choice != "none"
    plain = [tool.model_dump(exclude_none=True) for tool in tools] if usable else None
    ids = await service.render(_messages(asked), plain, asked.model)
    ids += await service.encode(form.opening, add_special=False)
    sampling = asked.sampling(
        max_tokens=asked.max_output_tokens,
        logprobs=(asked.top_logprobs or 0) if asked.include else None,
        grammar=form.grammar,
    )
    prompt = service.prompt(ids, sampling, "max_output_tokens", asked.model)
    return Turn([prompt], usable, asked.parallel_tool_calls is not False, form.opening)


async def _streamed(context: Context, reply: "_Reply", turn: Turn) -> AsyncGenerator[bytes, None]:
    opening = b"".join(_bytes(each) for each in reply.begin())
    try:
        found = deltas(context.service, context.tenant, turn, context.facts)
        async with aclosing(found):
            async for batch in found:
                events = [each for delta in batch for each in reply.hear(delta)]
                yield opening + b"".join(map(_bytes, events))
                opening = b""
    except Refusal as refusal:
        if opening:
            raise  # nothing was said yet: the refusal has a status of its own
        yield _bytes(reply.failed(refusal))
        return
    yield b"".join(map(_bytes, reply.end()))


def _bytes(content: Event) -> bytes:
    return event(content, content["type"])


class _Reply:
    """One answer in the making: its items so far, and the events that tell of them."""

    def __init__(self, service: Service, asked: ResponseRequest, prompt: Prompt) -> None:
        self._service, self._asked, self._prompt = service, asked, prompt
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created, self._model = int(time.time()), asked.model
        self._items: list[Event] = []
        self._message: Event | None = None  # the item that text is being added to
        self._tokens = self._reused = self._sequence = 0
        self._cut = False

    def begin(self) -> list[Event]:
        """What is said before anything is known."""
        return [
            self._event("response.created", response=self._response("in_progress")),
            self._event("response.in_progress", response=self._response("in_progress")),
        ]

    def hear(self, delta: Delta) -> list[Event]:
        """Add what has become final; the events of it."""
        events: list[Event] = []
        self._tokens += delta.tokens
        self._reused += delta.reused
        self._cut = self._cut or delta.finish == "length"
        if delta.content or delta.logprobs:
            events += self._say(delta)
        for call in delta.calls:
            events += [*self._close(), *self._call(call)]
        return events

    def end(self) -> list[Event]:
        """Nothing more comes; the last event has the whole response."""
        events = [] if self._items else self._open()
        events += self._close()
        status = "incomplete" if self._cut else "completed"
        events.append(self._event(f"response.{status}", response=self._response(status)))
        return events

    def failed(self, refusal: Refusal) -> Event:
        """The engine got no further."""
        response = self._response("failed")
        response["error"] = {"code": "server_error", "message": refusal.message}
        return self._event("response.failed", response=response)

    def _say(self, delta: Delta) -> list[Event]:
        events = [] if self._message else self._open()
        assert self._message is not None, "it was opened"
        part = self._message["content"][0]
        part["text"] += delta.content
        logprobs = chat_logprobs(delta.logprobs, self._asked.top_logprobs or 0)
        if self._asked.include:
            part["logprobs"] += logprobs
        where = self._place(self._message)
        said = self._event(
            "response.output_text.delta", **where, delta=delta.content, logprobs=logprobs
        )
        return [*events, said]

    def _open(self) -> list[Event]:
        item: Event = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._items.append(item)
        place = len(self._items) - 1
        added = self._event(
            "response.output_item.added", output_index=place, item={**item, "content": []}
        )
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"] = [part]
        self._message = item
        opened = self._event(
            "response.content_part.added", **self._place(item), part={**part, "logprobs": []}
        )
        return [added, opened]

    def _close(self) -> list[Event]:
        """The message that is open is complete."""
        item, self._message = self._message, None
        if item is None:
            return []
        item["status"] = "incomplete" if self._cut else "completed"
        part, where = item["content"][0], self._place(item)
        text, logprobs = part["text"], part["logprobs"]
        place = where["output_index"]
        return [
            self._event("response.output_text.done", **where, text=text, logprobs=logprobs),
            self._event("response.content_part.done", **where, part=part),
            self._event("response.output_item.done", output_index=place, item=item),
        ]

    def _call(self, call: Call) -> list[Event]:
        arguments = json.dumps(call.call.arguments, ensure_ascii=False)
        item = {
            "id": f"fc_{uuid.uuid4().hex}",
            "type": "function_call",
            "status": "completed",
            "call_id": call.id,
            "name": call.call.name,
            "arguments": arguments,
        }
        place, id = len(self._items), item["id"]
        self._items.append(item)
        begun = {**item, "status": "in_progress", "arguments": ""}
        said = "response.function_call_arguments"
        where = {"output_index": place, "item_id": id}
        return [
            self._event("response.output_item.added", output_index=place, item=begun),
            self._event(f"{said}.delta", **where, delta=arguments),
            self._event(f"{said}.done", **where, name=item["name"], arguments=arguments),
            self._event("response.output_item.done", output_index=place, item=item),
        ]

    def _place(self, item: Event) -> Event:
        return {"item_id": item["id"], "output_index": self._items.index(item), "content_index": 0}

    def _event(self, kind: str, **content: Any) -> Event:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **content}

    def _response(self, status: str) -> Event:
        asked, ended = self._asked, status in ("completed", "incomplete")
        choice = asked.tool_choice
        chosen = choice.model_dump() if isinstance(choice, FlatNamed) else choice or "auto"
        form = asked.text.format if asked.text else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "model": self._model,
            "output": list(self._items) if ended else [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": form.type if form else "text"}},
            "tool_choice": chosen,
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            "user": asked.user,
        }

    def _usage(self) -> Event:
        prompt = len(self._prompt.ids)
        return {
            "input_tokens": prompt,
            "input_tokens_details": self._service.cache_use([self._prompt], self._reused),
            "output_tokens": self._tokens,
            "output_tokens_details": {"reasoning_tokens": 0},  # all that is written is told
            "total_tokens": prompt + self._tokens,
        }


def _messages(asked: ResponseRequest) -> list[dict[str, object]]:
    """The items as messages; calls that follow one another are of one message."""
    found: list[dict[str, object]] = []
    if asked.instructions:
        found.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*found, {"role": "user", "content": asked.input}]
    for item in asked.input:
        if isinstance(item, MessageItem):
            role = "system" if item.role == "developer" else item.role
            found.append({"role": role, "content": _text(item)})
        elif isinstance(item, CallOutputItem):
            found.append({"role": "tool", "content": item.output})
        else:
            _add_call(found, item)
    return found


def _text(item: MessageItem) -> str:
    if isinstance(item.content, str):
        return item.content
    return "".join(part.text for part in item.content)


def _add_call(messages: list[dict[str, object]], item: CallItem) -> None:
    """Put a call into the assistant's message before it, or into one of its own."""
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None, "tool_calls": []})
    calls = messages[-1].setdefault("tool_calls", [])
    assert isinstance(calls, list)
    calls.append(call)


def _boxed(form: TextFormat | None) -> ResponseFormat | None:
    """The form of the answer as chat completions have it."""
    if form is None:
        return None
    rest: Sequence[object] = (form.name, form.schema_, form.description, form.strict)
    if form.type != "json_schema":
        if any(each is not None for each in rest):
            raise invalid("Only the type json_schema has a schema.", "text.format")
        return ResponseFormat(type=form.type)
    if not form.name or form.schema_ is None:
        raise invalid("json_schema needs a name and a schema.", "text.format")
    named = {"name": form.name, "schema": form.schema_, "strict": form.strict}
    return ResponseFormat(type="json_schema", json_schema=JsonSchema.model_validate(named))
