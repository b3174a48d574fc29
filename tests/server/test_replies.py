"""What is answered keeps to what OpenAPI says of it, and docs/server.md tells the same routes."""

from pathlib import Path

import httpx
import pytest

from xverse.server.replies import ErrorReply
from xverse.server.routes import GUIDE_ROUTES, ROUTES, Route

HELLO = [{"role": "user", "content": "Hello"}]
ASKS: list[tuple[str, dict[str, object]]] = [
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 3}),
    (
        "/v1/chat/completions",
        {"messages": HELLO, "max_tokens": 3, "n": 2, "logprobs": True, "top_logprobs": 2},
    ),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 3}),
    ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3, "echo": True, "logprobs": 2}),
    ("/v1/completions", {"prompt": "Hello", "max_tokens": 3, "logprobs": 0}),
    ("/v1/responses", {"input": "Hello", "max_output_tokens": 3}),
    (
        "/v1/responses",
        {"input": "Hello", "max_output_tokens": 3, "include": ["message.output_text.logprobs"]},
    ),
    ("/v1/decisions", {"prompt": "Hello", "decision": {"type": "predicate"}}),
    ("/v1/decisions", {"prompt": "Hello", "decision": {"type": "choice", "options": ["a", "b"]}}),
    ("/tokenize", {"prompt": "Hello"}),
    ("/tokenize", {"messages": HELLO}),
    ("/detokenize", {"tokens": [75, 104]}),
    ("/render", {"messages": HELLO}),
]


@pytest.mark.parametrize(("path", "body"), ASKS, ids=lambda value: str(value)[:40])
def test_answers_keep_to_their_model(
    http: httpx.Client, path: str, body: dict[str, object]
) -> None:
    answer = http.post(path, json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    (route,) = [route for route in ROUTES if route.path == path]
    assert route.reply is not None
    route.reply.model_validate_json(answer.content)
    refused = http.post(path, json={"model": "tiny", **body, "nothing_like_it": 1})
    assert refused.status_code == 400
    ErrorReply.model_validate_json(refused.content)


def test_states_keep_to_their_model(http: httpx.Client) -> None:
    for route in ROUTES:
        if route.method == "GET" and route.reply is not None:
            answer = http.get(route.path.replace("{model:path}", "tiny"))
            route.reply.model_validate_json(answer.content)


def test_metrics_have_the_names_that_dashboards_ask_for(http: httpx.Client) -> None:
    text = http.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_queue_time_seconds_bucket",
    ):
        assert f"\nxverse:{name}{{" in text, name


def test_tokenize_and_back(http: httpx.Client) -> None:
    for text in ("Hello", "北京 🎉", "", "a\n b"):
        ids = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == text
    wrong = http.post("/detokenize", json={"tokens": [10**6]})
    assert wrong.status_code == 400
    neither = http.post("/tokenize", json={})
    assert neither.status_code == 400


def test_render_gives_what_chat_reads(http: httpx.Client) -> None:
    found = http.post("/render", json={"messages": HELLO}).json()
    assert found["prompt"] == "Human: Hello\n\nAssistant: "
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 1}
    answer = http.post("/v1/chat/completions", json=asked).json()
    assert answer["usage"]["prompt_tokens"] == found["count"] == len(found["tokens"])


def test_the_page_has_every_route() -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text("utf-8")

    def row(route: Route) -> str:
        path = route.path.replace(":path", "")
        key = "no" if route.path in ("/health", "/ready") else "yes"
        return f"| `{route.method} {path}` | {key} | {route.says} |"

    for routes in (ROUTES, GUIDE_ROUTES):
        assert "\n".join(map(row, routes)) in page
