"""CONVERSATION -> NEXT MESSAGE. POST /v1/chat/completions, whole or streamed."""

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
from xverse.server.refusals import invalid, json_response
from xverse.server.schema import ChatRequest
from xverse.server.service import Prompt, Service
from xverse.server.sse import DONE, EventStream, event
from xverse.server.turns import Call, Delta, Turn, Whole, deltas, whole


async def chat(context: Context, asked: ChatRequest) -> Response:
    """The answer to a conversation."""
    service = context.service
    turn = await plan(service, asked, context.max_choices)
    reply = _Reply(service, asked)
    if asked.stream:
        return EventStream(reply.events(context, turn))
    found = await context.attend(whole(service, context.tenant, turn, context.facts))
    return json_response(reply.whole(found, turn))


async def plan(service: Service, asked: ChatRequest, max_choices: int) -> Turn:
    """What the engine is to do; Refusal for what cannot be done."""
    service.models.require(asked.model)
    form = answer_form(asked.tools, asked.tool_choice, asked.response_format)
    choices = bounded_choices(asked.n, max_choices)
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options are for streams.", "stream_options")
    if asked.top_logprobs is not None and not asked.logprobs:
        raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise invalid("Give max_tokens or max_completion_tokens, not both.", "max_tokens")
    usable = bool(asked.tools) and asked.tool_choice != "none"
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()] if usable else None
    ids = await service.render([message.plain() for message in asked.messages], tools, asked.model)
    ids += await service.encode(form.opening, add_special=False)
    most = asked.max_completion_tokens
    sampling = asked.sampling(
        max_tokens=asked.max_tokens if most is None else most,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        grammar=form.grammar,
    )
    limit = "max_tokens" if most is None else "max_completion_tokens"
    prompt = service.prompt(ids, sampling, limit, asked.model)
    prompts = service.choices(prompt, choices)
    return Turn(prompts, usable, asked.parallel_tool_calls is not False, form.opening)


def bounded_choices(n: int | None, most: int) -> int:
    """How many answers; Refusal over the server's own limit."""
    if n is not None and n > most:
        raise invalid(f"n may be {most} at most on this server.", "n")
    return n or 1


class _Reply:
    """The JSON of one answer, in chunks or in one."""

    def __init__(self, service: Service, asked: ChatRequest) -> None:
        self._service, self._asked = service, asked
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": service.models.fingerprint(asked.model),
        }

    def whole(self, found: Sequence[Whole], turn: Turn) -> dict[str, Any]:
        """The answer in one."""
        choices = [self._choice(place, choice) for place, choice in enumerate(found)]
        tokens = sum(choice.tokens for choice in found)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(self._service, turn.prompts[:1], found[0].reused, tokens),
        }

    async def events(self, context: Context, turn: Turn) -> AsyncGenerator[bytes, None]:
        """The answer in chunks, as they become final."""
        with_usage = bool(self._asked.stream_options and self._asked.stream_options.include_usage)
        begun: set[int] = set()
        tokens = reused = 0
        found = deltas(self._service, context.tenant, turn, context.facts)
        async with aclosing(found):
            async for batch in found:
                chunk = b""
                for delta in batch:
                    tokens += delta.tokens
                    reused += delta.reused if delta.choice == 0 else 0
                    if delta.choice not in begun:
                        begun.add(delta.choice)
                        opening = {"role": "assistant", "content": ""}
                        chunk += self._chunk(delta.choice, opening, with_usage=with_usage)
                    chunk += self._delta(delta, with_usage=with_usage)
                yield chunk
        if with_usage:
            counts = usage(self._service, turn.prompts[:1], reused, tokens)
            yield event({**self._chunk_head(), "choices": [], "usage": counts})
        yield DONE

    def _choice(self, place: int, choice: Whole) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.calls:
            message["content"] = choice.content or None
            message["tool_calls"] = [_call(call) for call in choice.calls]
        return {
            "index": place,
            "message": message,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish,
        }

    def _delta(self, delta: Delta, *, with_usage: bool) -> bytes:
        """The chunks of a delta: text and calls, and the reason on a chunk of its own."""
        content: dict[str, Any] = {"content": delta.content} if delta.content else {}
        if delta.calls:
            content["tool_calls"] = [{"index": c.place, **_call(c)} for c in delta.calls]
        logprobs = self._logprobs(delta)
        chunk = b""
        if content or delta.logprobs:
            chunk = self._chunk(delta.choice, content, logprobs, with_usage=with_usage)
        if delta.finish:
            chunk += self._chunk(delta.choice, {}, finish=delta.finish, with_usage=with_usage)
        return chunk

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        *,
        with_usage: bool,
    ) -> bytes:
        content = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._chunk_head(), "choices": [content]}
        return event({**chunk, "usage": None} if with_usage else chunk)

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _logprobs(self, found: Whole | Delta) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        return {
            "content": chat_logprobs(found.logprobs, self._asked.top_logprobs or 0),
            "refusal": None,
        }


def usage(service: Service, prompts: Sequence[Prompt], reused: int, answer: int) -> dict[str, Any]:
    """Tokens, as OpenAI counts them: a prompt once, however many answers it has. Of the prompts'
    tokens `reused` were found in shared pages."""
    prompt = sum(len(each.ids) for each in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": service.cache_use(prompts, reused),
    }


def _call(call: Call) -> dict[str, Any]:
    arguments = json.dumps(call.call.arguments, ensure_ascii=False)
    function = {"name": call.call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
