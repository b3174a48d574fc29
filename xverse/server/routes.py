"""THE ROUTES. One table: where, what it takes, what it gives, whether it streams."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from xverse.server import (
    adapters,
    chat,
    completions,
    decisions,
    guide_api,
    replies,
    responses,
    schema,
    status,
    texts,
)
from xverse.server.context import Context


@dataclass(frozen=True)
class Route:
    """One route. `asked` is the model of its body, None where it has none."""

    method: str
    path: str
    says: str
    answer: Callable[..., Awaitable[Response]]
    reply: type[BaseModel] | None
    asked: type[BaseModel] | None = None
    streams: bool = False


def post(
    path: str,
    says: str,
    answer: Callable[[Context, Any], Awaitable[Response]],
    asked: type[BaseModel],
    reply: type[BaseModel],
    *,
    streams: bool = False,
) -> Route:
    """A route with a JSON body."""
    return Route("POST", path, says, answer, reply, asked, streams)


ROUTES = (
    Route("GET", "/health", "The API process lives.", status.health, replies.StateReply),
    Route("GET", "/ready", "Requests can be answered.", status.ready, replies.StateReply),
    Route("GET", "/metrics", "Numbers for Prometheus.", status.metrics, None),
    Route("GET", "/v1/models", "The models served.", status.models, replies.ModelsReply),
    Route("GET", "/v1/models/{model:path}", "One of them.", status.model, replies.ModelReply),
    post(
        "/v1/chat/completions",
        "The next message of a conversation.",
        chat.chat,
        schema.ChatRequest,
        replies.ChatReply,
        streams=True,
    ),
    post(
        "/v1/completions",
        "A text continued.",
        completions.complete,
        schema.CompletionRequest,
        replies.CompletionReply,
        streams=True,
    ),
    post(
        "/v1/responses",
        "The next items of a conversation, in OpenAI's newer form.",
        responses.respond,
        responses.ResponseRequest,
        replies.ResponseReply,
        streams=True,
    ),
    post(
        "/v1/decisions",
        "How likely the model finds each of some labels.",
        decisions.decide,
        decisions.DecisionRequest,
        replies.DecisionReply,
    ),
    post(
        "/tokenize",
        "The ids of a text or a conversation.",
        texts.tokenize,
        schema.TokenizeRequest,
        replies.TokensReply,
    ),
    post(
        "/detokenize",
        "The text of ids.",
        texts.detokenize,
        schema.DetokenizeRequest,
        replies.TextReply,
    ),
    post(
        "/render",
        "The exact prompt that a conversation becomes.",
        texts.render,
        schema.RenderRequest,
        replies.RenderReply,
    ),
    post(
        "/v1/load_lora_adapter",
        "Load an adapter, which requests may name as their model.",
        adapters.load,
        adapters.LoadAdapterRequest,
        replies.StateReply,
    ),
    post(
        "/v1/unload_lora_adapter",
        "Forget an adapter.",
        adapters.unload,
        adapters.UnloadAdapterRequest,
        replies.StateReply,
    ),
)

GUIDE_ROUTES = (
    *ROUTES[:2],
    post(
        "/",
        "The published FastAPI service: a prompt answered.",
        guide_api.answer,
        schema.GuideRequest,
        replies.GuideReply,
    ),
)
