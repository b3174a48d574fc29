"""ANSWER -> FAULTS. What an answer must be: as our OpenAPI has it, and a stream to its end."""

import json
from collections.abc import Iterator
from typing import Any, get_args

import jsonschema_rs
from openai.types.chat import ChatCompletionChunk
from openai.types.completion import Completion
from openai.types.responses import ResponseStreamEvent
from pydantic import ValidationError

from bench.fuzz_http import LEAVING, Answer
from bench.fuzz_mutants import Case

CHUNKS = {"/v1/chat/completions": ChatCompletionChunk, "/v1/completions": Completion}
# An annotated union of models, each with a `type` of its own.
EVENTS: dict[str, Any] = {
    get_args(m.model_fields["type"].annotation)[0]: m
    for m in get_args(get_args(ResponseStreamEvent)[0])
}
LAST = ("response.completed", "response.incomplete", "response.failed")


class Judge:
    """Knows the OpenAPI documents of both ports, and holds answers to them."""

    def __init__(self, specs: dict[bool, dict[str, Any]]) -> None:
        self._specs = specs
        self._known: dict[tuple[bool, str], Any] = {}

    def faults(self, case: Case, answer: Answer) -> list[str]:
        """All that is wrong with it, in words; none is right."""
        if answer.status == 0:
            # Who leaves gets nothing, and a parser may hang up on what is no HTTP.
            return [] if case.manner in LEAVING or not case.plain else ["hung up"]
        if answer.status >= 500:
            return [f"status {answer.status}: {answer.body[:200]!r}"]
        found = [] if "x-request-id" in answer.headers or not case.plain else ["no x-request-id"]
        low, high = case.expects
        if not low <= answer.status <= high and case.plain:
            found.append(f"status {answer.status} instead of {low} to {high}")
        return found + list(self._form(case, answer))

    def _form(self, case: Case, answer: Answer) -> Iterator[str]:
        if case.method == "HEAD":
            return
        kind = answer.headers.get("content-type", "").partition(";")[0]
        schema = self._declared(case, answer.status)
        if schema is None and answer.status < 400 and case.route is not None:
            yield f"status {answer.status} is not declared"
            return
        if kind == "text/event-stream":
            if schema is None or kind not in schema["content"]:
                yield "a stream that is not declared"
            yield from _stream_faults(case.route or "", answer.body)
        elif kind == "application/json":
            yield from self._json_faults(case, answer, schema)
        elif schema is not None and kind not in schema.get("content", {kind: None}):
            yield f"content type {kind!r} is not declared"
        elif answer.status >= 400:
            yield f"an error as {kind!r}"

    def _declared(self, case: Case, status: int) -> dict[str, Any] | None:
        """What OpenAPI says of this status of the route, None where it says nothing."""
        operations = self._specs[case.guide]["paths"].get(case.route or "", {})
        operation: dict[str, Any] = (
            operations.get(case.method.lower(), {}) if case.method.isupper() else {}
        )
        found: dict[str, Any] | None = operation.get("responses", {}).get(str(status))
        if operation and found is None:
            return {"content": {}}  # a status that is not declared has no content either
        return found

    def _json_faults(
        self, case: Case, answer: Answer, declared: dict[str, Any] | None
    ) -> Iterator[str]:
        try:
            content = json.loads(answer.body, parse_constant=_no_constant)
            answer.body.decode()
        except ValueError as error:
            yield f"no JSON: {error}"
            return
        error_of = {"$ref": "#/components/schemas/ErrorReply"}
        if declared is None:  # no route of ours: errors have their form all the same
            schema: dict[str, Any] | None = error_of if answer.status >= 400 else {}
        else:
            schema = declared["content"].get("application/json", {}).get("schema")
        if schema is None:
            yield f"JSON with status {answer.status} is not declared"
            return
        for wrong in self._validator(case.guide, schema).iter_errors(content):
            yield f"not as OpenAPI has it: {wrong.message[:200]}"

    def _validator(self, guide: bool, schema: dict[str, Any]) -> Any:
        name = (guide, json.dumps(schema))
        if name not in self._known:
            components = self._specs[guide]["components"]
            self._known[name] = jsonschema_rs.validator_for({**schema, "components": components})
        return self._known[name]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} in an answer")


def _stream_faults(route: str, body: bytes) -> Iterator[str]:
    """Every event is what the openai package knows, and the last one says that it is the last."""
    last = ""
    for block in body.decode().split("\n\n"):
        data = "".join(
            line.removeprefix("data: ") for line in block.split("\n") if line.startswith("data: ")
        )
        if not data:
            continue
        if last == "[DONE]":
            yield "an event after the end"
        last = data
        if data == "[DONE]":
            continue
        content = json.loads(data, parse_constant=_no_constant)
        if "error" in content and "object" not in content and "type" not in content:
            continue
        yield from _event_faults(route, content)
    if route == "/v1/responses":
        ended = json.loads(last or "{}").get("type") in LAST
    else:
        ended = last == "[DONE]" or '"error"' in last[:12]
    if not ended:
        yield f"the stream ends with {last[:80]!r}"


def _without_null(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice without the nulls that OpenAI's streams have and the package's type has not: before
    the end, and beside the first token of a prompt that is echoed."""
    found = {**choice, "finish_reason": choice.get("finish_reason") or "stop"}
    logprobs = found.get("logprobs") or {}
    numbers = logprobs.get("token_logprobs") or []
    if numbers and numbers[0] is None:
        found["logprobs"] = {**logprobs, "token_logprobs": [0.0, *numbers[1:]]}
        if tops := logprobs.get("top_logprobs"):
            found["logprobs"]["top_logprobs"] = [tops[0] or {}, *tops[1:]]
    return found


def _event_faults(route: str, content: dict[str, Any]) -> Iterator[str]:
    """What the openai package's own types say against it; it does not ask them itself."""
    model: Any = CHUNKS.get(route) or EVENTS.get(str(content.get("type")))
    if model is None:
        yield f"an event of no known type: {str(content)[:80]}"
        return
    if route == "/v1/completions":
        content = {**content, "choices": [*map(_without_null, content.get("choices", []))]}
    try:
        model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        yield f"no {model.__name__}: {first['loc']} {first['msg']}"
