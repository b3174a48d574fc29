"""NO -> HTTP. What cannot be answered, as OpenAI says it: {"error": {message, type, ...}}."""

from typing import Any

import msgspec
from starlette.responses import Response

from xverse.errors import XverseError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class Refusal(Exception):
    """A request that is answered with an error: status, words, and which field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})
        if retry_after_s is not None:
            self.headers["retry-after"] = str(max(1, round(retry_after_s + 0.5)))

    def body(self) -> dict[str, Any]:
        """The object that the client gets."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The whole answer."""
        return json_response(self.body(), self.status, self.headers)


def json_response(
    content: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """JSON as it goes out; a number that is not finite would be null, and never comes here."""
    return Response(
        msgspec.json.encode(content), status, headers=headers, media_type="application/json"
    )


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """The request itself is wrong."""
    return Refusal(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> Refusal:
    """The request names something that OpenAI has and we do not."""
    return Refusal(
        400, f"{param!r} is not supported here: {why}", param=param, code="unsupported_parameter"
    )


def engine_restarted() -> Refusal:
    """The engine process ended under a request; nothing of it is left."""
    return Refusal(
        503,
        "The engine ended while it worked on this request, and starts again. Send it once more.",
        code="engine_restarted",
        retry_after_s=1,
    )


def failed(error: XverseError) -> Refusal:
    """The engine got no further with this request, and goes on with others."""
    return Refusal(
        503, f"{error.what} {error.why} {error.fix}", code="generation_failed", retry_after_s=5
    )


def our_failure() -> Refusal:
    """A mistake in the server itself."""
    return Refusal(500, "The server failed. Its log has more.", code="internal_error")


def not_ready(state: str) -> Refusal:
    """There is no engine now."""
    return Refusal(
        503,
        f"The model cannot answer now: its engine is {state}. /ready tells when it can.",
        code="not_ready",
        retry_after_s=2,
    )


def draining() -> Refusal:
    """The server is about to end."""
    return Refusal(503, "The server is shutting down.", code="shutting_down", retry_after_s=5)


def of_model(error: XverseError, param: str | None = None) -> Refusal:
    """What the text and engine rooms refuse, in their own words."""
    return invalid(f"{error.what} {error.why} {error.fix}", param)
