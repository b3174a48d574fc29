"""VALID REQUESTS. One for each thing that a route does, and targets that are no route."""

from typing import Any

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHAT, TEXT, ITEMS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
FOUR: dict[str, Any] = {"messages": HELLO, "max_tokens": 4}

# Path, whether it is the published service's, and the body without the model's name.
SEEDS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    (CHAT, False, FOUR),
    (CHAT, False, {**FOUR, "stream": True, "stream_options": {"include_usage": True}}),
    (CHAT, False, {**FOUR, "n": 2, "logprobs": True, "top_logprobs": 2, "seed": 7}),
    (CHAT, False, {**FOUR, "stream": True, "n": 2, "logprobs": True, "top_logprobs": 1}),
    (CHAT, False, {**FOUR, "tools": [TOOL], "parallel_tool_calls": False}),
    (CHAT, False, {**FOUR, "tools": [TOOL], "tool_choice": "required", "stream": True}),
    (CHAT, False, {**FOUR, "response_format": {"type": "json_object"}}),
    (
        CHAT,
        False,
        {
            **FOUR,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA, "strict": True},
            },
        },
    ),
    (
        CHAT,
        False,
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                *HELLO,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "rain", "tool_call_id": "c1"},
            ],
            "max_completion_tokens": 4,
            "temperature": 1.5,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "presence_penalty": -1,
            "frequency_penalty": 1.0,
            "logit_bias": {"7": 2},
            "stop": ["x", "yy"],
            "user": "someone",
        },
    ),
    (TEXT, False, {"prompt": "Hello", "max_tokens": 4}),
    (TEXT, False, {"prompt": "Hello", "max_tokens": 4, "stream": True, "logprobs": 2}),
    (TEXT, False, {"prompt": ["a", "bc"], "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2}),
    (TEXT, False, {"prompt": [70, 71, 72], "max_tokens": 0, "echo": True, "logprobs": 1}),
    (TEXT, False, {"prompt": [[70], [71, 72]], "max_tokens": 2, "ignore_eos": True}),
    (ITEMS, False, {"input": "Hello", "max_output_tokens": 4}),
    (ITEMS, False, {"input": "Hello", "max_output_tokens": 4, "stream": True}),
    (
        ITEMS,
        False,
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "rain"},
            ],
            "instructions": "Be brief.",
            "max_output_tokens": 4,
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 1,
            "stream": True,
        },
    ),
    (
        ITEMS,
        False,
        {
            "input": "Hello",
            "max_output_tokens": 4,
            "tools": [{"type": "function", "name": "weather", "parameters": SCHEMA}],
            "tool_choice": {"type": "function", "name": "weather"},
        },
    ),
    ("/v1/decisions", False, {"messages": HELLO, "decision": {"type": "predicate"}}),
    (
        "/v1/decisions",
        False,
        {"prompt": "A", "decision": {"type": "choice", "options": ["1", "10"]}, "end": True},
    ),
    (
        "/v1/decisions",
        False,
        {
            "prompt": "A",
            "decision": {
                "type": "score",
                "levels": [{"label": "a", "value": 1}, {"label": "b", "value": -2.5}],
            },
        },
    ),
    ("/tokenize", False, {"prompt": "Hello 北京 🎉"}),
    ("/tokenize", False, {"messages": HELLO, "tools": [TOOL]}),
    ("/detokenize", False, {"tokens": [70, 71, 72]}),
    ("/render", False, {"messages": HELLO, "tools": [TOOL]}),
    ("/", True, {"prompt": "Hello, who are you?"}),
)

TARGETS: tuple[bytes, ...] = (
    b"/nothing",
    b"/v1/models/",
    b"/v1/models/%00",
    b"/v1/models/..%2f..%2fetc%2fpasswd",
    b"/v1/models/" + b"a" * 5000,
    b"/v1/models/%ff%fe",
    b"/v1/chat/completions/",
    b"/v1//chat/completions",
    b"/../../etc/passwd",
    b"/docs",
    b"/redoc",
    b"/openapi.json",
    b"/openapi.json/",
    b"/health/",
    b"/ready/%2e%2e/metrics",
    b"/%2e%2e/metrics",
    b"//evil.example/health",
    b"http://evil.example/health",
    b"/web",
    b"*",
    b"/?" + b"a=b&" * 500,
    b"/\xe4\xbd\xa0",
)
