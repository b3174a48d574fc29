"""TEXT <-> IDS OVER HTTP. /tokenize, /detokenize and /render: what the model really reads."""

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from xverse.server.constraint import check_tools
from xverse.server.context import Context
from xverse.server.refusals import invalid, json_response
from xverse.server.schema import (
    ChatMessage,
    DetokenizeRequest,
    RenderRequest,
    TokenizeRequest,
    Tool,
)
from xverse.server.service import mended


async def tokenize(context: Context, asked: TokenizeRequest) -> Response:
    """The ids of a text, or of a conversation."""
    service = context.service
    if asked.model is not None:
        service.models.require(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise invalid("Give either a prompt or messages.", "prompt")
    if asked.messages is not None:
        ids = await _rendered(context, asked.messages, asked.tools, asked.model)
    elif asked.tools is not None:
        raise invalid("Tools belong to messages.", "tools")
    else:
        ids = await service.encode(asked.prompt or "", add_special=asked.add_special_tokens)
    return json_response({"tokens": ids, "count": len(ids), "max_model_len": service.context})


async def detokenize(context: Context, asked: DetokenizeRequest) -> Response:
    """The text of ids, special tokens by their names."""
    service = context.service
    if asked.model is not None:
        service.models.require(asked.model)
    return json_response({"prompt": await _decoded(context, asked.tokens)})


async def render(context: Context, asked: RenderRequest) -> Response:
    """The exact prompt that a conversation becomes, as text and as ids."""
    if asked.model is not None:
        context.service.models.require(asked.model)
    ids = await _rendered(context, asked.messages, asked.tools, asked.model)
    return json_response({"prompt": await _decoded(context, ids), "tokens": ids, "count": len(ids)})


async def _rendered(
    context: Context, messages: list[ChatMessage], tools: list[Tool] | None, model: str | None
) -> list[int]:
    check_tools(tools)
    plain = [tool.model_dump(exclude_none=True) for tool in tools] if tools else None
    return await context.service.render([message.plain() for message in messages], plain, model)


async def _decoded(context: Context, ids: list[int]) -> str:
    tokenizer = context.service.tokenizer
    with mended("tokens"):
        return await run_in_threadpool(tokenizer.decode, ids, skip_special=False)
