"""BYTES -> REQUEST. The body of a request: bounded, strict JSON, every field known by name."""

import asyncio
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from xverse.server.refusals import Refusal, invalid

MAX_BYTES = 8 * 2**20
MAX_DEPTH = 64
READ_S = 60.0  # to send a body; whoever is slower holds a connection for nothing
IN_LOOP = 2**15  # bytes; more is parsed in a thread, so that nobody's tokens wait for it

Asked = TypeVar("Asked", bound=BaseModel)


async def read(request: Request, model: type[Asked]) -> Asked:
    """The body as `model`; Refusal (400, 408, 413, 415) naming what is wrong with it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(
            415,
            f"The content type is {kind[:60]!r}, and has to be application/json.",
            code="unsupported_media_type",
        )
    data = await _bytes(request)
    if len(data) < IN_LOOP:
        return parse(data, model)
    return await run_in_threadpool(parse, data, model)


def parse(data: bytes, model: type[Asked]) -> Asked:
    """What the JSON says, checked."""
    try:
        content = msgspec.json.decode(data)
    except RecursionError as error:
        raise _too_deep() from error
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise invalid(f"The body is no JSON: {error}", code="invalid_json") from error
    # A walk is needed only where these bytes leave it open.
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH or b"\\u0000" in data:
        _walk(content)
    if not isinstance(content, dict):
        raise invalid("The body is no JSON object.", code="invalid_json")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from None


async def _bytes(request: Request) -> bytes:
    """The whole body; what is over the limit is read and dropped, so that the answer arrives."""
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(READ_S):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BYTES:
                    parts.append(part)
                elif size > 8 * MAX_BYTES:
                    break
    except TimeoutError as error:
        # What is left of the body would be taken for the next request.
        headers = {"connection": "close"}
        why = f"The body did not arrive within {READ_S:g} s."
        raise Refusal(408, why, code="request_timeout", headers=headers) from error
    if size > MAX_BYTES:
        raise Refusal(413, f"The body is longer than {MAX_BYTES} bytes.", code="request_too_large")
    return b"".join(parts)


def _walk(content: object) -> None:
    """Refuse what is nested too deeply, and text with a null character."""
    level: list[object] = [content]
    for _ in range(MAX_DEPTH + 1):
        if not level:
            return
        inside: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inside += value.keys()
                inside += value.values()
            elif isinstance(value, list):
                inside += value
            elif isinstance(value, str) and "\0" in value:
                raise invalid("A text has a null character (\\u0000).", code="null_character")
        level = inside
    raise _too_deep()


def _too_deep() -> Refusal:
    return invalid(f"The JSON is nested deeper than {MAX_DEPTH} levels.", code="json_too_deep")


def _refusal(error: ValidationError) -> Refusal:
    """The first thing that is wrong, in one sentence and with the name of its field."""
    first: Any = error.errors(include_url=False, include_input=False, include_context=False)[0]
    # In a union pydantic puts the name of the alternative into the path; those are no fields.
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return Refusal(
            400,
            f"Unknown or unsupported field: {param}.",
            param=param,
            code="unknown_parameter",
        )
    message = first["msg"].removeprefix("Value error, ")
    return invalid(f"{param or 'The body'}: {message}.".replace("..", "."), param, "invalid_value")


def _path(place: tuple[int | str, ...]) -> str | None:
    path = ""
    for step in place:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step.isidentifier() and step not in _ALTERNATIVES:
            path += f".{step}" if path else step
    return path[:200] or None


_ALTERNATIVES = {"str", "int", "float", "bool", "list", "dict", "none", "constrained-str"}
