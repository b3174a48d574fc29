"""Hostile requests at a served model, a sample of what bench/server_fuzz.py sends."""

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("schemathesis", reason="hostile requests are made by schemathesis")
pytest.importorskip("jsonschema_rs", reason="answers are checked by jsonschema_rs")

from bench.fuzz_check import Judge
from bench.fuzz_http import Answer
from bench.fuzz_mutants import Case
from bench.server_fuzz import aftermath, fuzz, served, write_model

REQUESTS = 800


def test_no_request_brings_the_server_down(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    with served(tmp_path / "model", tmp_path) as server:
        tally = asyncio.run(fuzz(server, REQUESTS, seed=11, patience_s=240))
        after = aftermath(server)
    assert not tally.told, "\n".join(tally.told)
    assert not after["wrong"]
    assert tally.requests == REQUESTS
    reached = {route for route, came in tally.by_route.items() if came["200"]}
    assert {f"POST {path}" for path in ("/", "/v1/chat/completions", "/v1/responses")} <= reached
    assert tally.streams > 10


SPEC = {
    "components": {"schemas": {"ErrorReply": {"type": "object", "required": ["error"]}}},
    "paths": {
        "/v1/completions": {
            "post": {
                "responses": {
                    "200": {
                        "content": {
                            "application/json": {"schema": {"required": ["usage"]}},
                            "text/event-stream": {"schema": {"type": "string"}},
                        }
                    }
                }
            }
        }
    },
}
CASE = Case("valid", False, "POST", b"/v1/completions", "/v1/completions", (), b"{}")
JSON = {"content-type": "application/json", "x-request-id": "1"}
EVENTS = {"content-type": "text/event-stream", "x-request-id": "1"}
CHUNK = (
    b'data: {"id": "a", "object": "text_completion", "created": 1, "model": "m", "choices": []}\n\n'
)


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer(200, JSON, b'{"usage": 1}'), ""),
        (Answer(200, EVENTS, CHUNK + b"data: [DONE]\n\n"), ""),
        (Answer(200, EVENTS, CHUNK + b'data: {"error": {}}\n\n'), ""),
        (Answer(503, JSON, b"{}"), "status 503"),
        (Answer(0), "hung up"),
        (Answer(200, {"content-type": "application/json"}, b'{"usage": 1}'), "no x-request-id"),
        (Answer(200, JSON, b"{}"), "not as OpenAPI has it"),
        (Answer(200, JSON, b'{"usage": NaN}'), "no JSON"),
        (Answer(201, JSON, b'{"usage": 1}'), "not declared"),
        (Answer(409, JSON, b'{"error": 1}'), "not declared"),
        (Answer(400, {**JSON, "content-type": "text/plain"}, b"no"), "text/plain"),
        (Answer(200, EVENTS, CHUNK), "the stream ends"),
        (Answer(200, EVENTS, b"data: {}\n\ndata: [DONE]\n\n"), "no Completion"),
        (Answer(200, EVENTS, b"data: [DONE]\n\n" + CHUNK), "after the end"),
    ],
)
def test_the_judge_sees_it(answer: Answer, fault: str) -> None:
    found = Judge({False: SPEC, True: SPEC}).faults(CASE, answer)
    assert fault in "; ".join(found)
    assert bool(found) == bool(fault)
