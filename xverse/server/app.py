"""ROUTES -> APP. The routes as a FastAPI app, its errors in one form, its OpenAPI complete."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

import xverse
from xverse.errors import XverseError
from xverse.server import body
from xverse.server.context import Context
from xverse.server.gate import OPEN, Traffic
from xverse.server.presence import ClientGoneError
from xverse.server.refusals import Refusal, of_model, our_failure
from xverse.server.replies import ErrorReply
from xverse.server.routes import ROUTES, Route
from xverse.server.service import Service

REF = "#/components/schemas/{model}"
ERRORS = (400, 401, 403, 404, 408, 413, 415, 421, 429, 431, 503)


def build_app(
    service: Service,
    traffic: Traffic,
    *,
    routes: Sequence[Route] = ROUTES,
    max_choices: int = 16,
) -> FastAPI:
    """The app without its gate: whoever serves it puts `Gate` around it."""
    app = FastAPI(
        title="XVERSE",
        version=xverse.__version__,
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # /v1/models/ is no route, and 307 is no answer of ours
    )
    for route in routes:
        _add(app, route, service, traffic, max_choices)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(XverseError, _mendable)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGoneError, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    _complete_openapi(app, routes)
    return app


def _add(app: FastAPI, route: Route, service: Service, traffic: Traffic, max_choices: int) -> None:
    async def endpoint(request: Request) -> Response:
        context = Context(service, traffic, request, max_choices)
        if route.asked is None:
            return await route.answer(context)
        context.admit()
        request.state.asked = asked = await body.read(request, route.asked)
        return await route.answer(context, asked)

    replies: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": "Refused."} for status in _errors(route)
    }
    replies[200] = {"description": route.says}
    if route.reply is not None:
        replies[200]["model"] = route.reply
    if route.streams:
        replies[200]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    more: dict[str, Any] = {}
    if route.asked is not None:
        schema = {"$ref": REF.format(model=route.asked.__name__)}
        more["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    if route.path not in OPEN:
        more["security"] = [{"key": []}]
    app.add_api_route(
        route.path,
        endpoint,
        methods=[route.method],
        summary=route.says,
        operation_id=f"{route.method} {route.path}",
        response_class=Response,
        responses=replies,
        openapi_extra=more,
    )


def _errors(route: Route) -> Sequence[int]:
    if route.asked is not None:
        return ERRORS
    return tuple(status for status in ERRORS if status not in (408, 413, 415))


def _complete_openapi(app: FastAPI, routes: Sequence[Route]) -> None:
    """Add the models of bodies, which FastAPI does not see: it never reads a body here."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            whole = made()
            asked = [route.asked for route in routes if route.asked is not None]
            _, found = models_json_schema(
                [(model, "validation") for model in dict.fromkeys(asked)], ref_template=REF
            )
            parts = whole.setdefault("components", {})
            parts.setdefault("schemas", {}).update(found["$defs"])
            parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = whole
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    request.state.facts["error"] = error.code or str(error.status)
    return error.response()


async def _mendable(request: Request, error: Exception) -> Response:
    assert isinstance(error, XverseError)
    return await _refused(request, of_model(error))


async def _http(request: Request, error: Exception) -> Response:
    """What the routing itself refuses: 404 and 405."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}."
    refusal = Refusal(error.status_code, message, headers=dict(error.headers or {}))
    return await _refused(request, refusal)


async def _failed(request: Request, error: Exception) -> Response:
    """A mistake of ours; the gate writes it down."""
    return await _refused(request, our_failure())


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log has it
