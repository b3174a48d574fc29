"""ANSWERED -> JSON. What each route gives back, for OpenAPI; the tests hold the routes to it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Reply(BaseModel):
    """Exactly these fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class ErrorFacts(Reply):
    """What went wrong, which field it is about, and a name for it that programs can test."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Every answer with a status of 400 or above."""

    error: ErrorFacts


class Usage(Reply):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CacheUse(Reply):
    """Of the prompt's tokens, how many were found in shared pages, and how many went into such."""

    cached_tokens: int
    cache_write_tokens: int


class AnswerUsage(Usage):
    """Tokens of a prompt and its answers."""

    prompt_tokens_details: CacheUse


class ThoughtUse(Reply):
    """Tokens of an answer that are not told: none."""

    reasoning_tokens: Literal[0]


class ResponseUsage(Reply):
    """Tokens, in the words of /v1/responses."""

    input_tokens: int
    input_tokens_details: CacheUse
    output_tokens: int
    output_tokens_details: ThoughtUse
    total_tokens: int


class TopLogprob(Reply):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """Log-probabilities of a chat choice."""

    content: list[TokenLogprob]
    refusal: None


class FunctionReply(Reply):
    """A function to call; the arguments are JSON."""

    name: str
    arguments: str


class ToolCallReply(Reply):
    """One call."""

    id: str
    type: Literal["function"]
    function: FunctionReply


class MessageReply(Reply):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallReply] = []


class ChatChoice(Reply):
    """One of n answers."""

    index: int
    message: MessageReply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatReply(Reply):
    """An answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: AnswerUsage


class CompletionLogprobs(Reply):
    """Four lists of one length; the first prompt token has no number."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Reply):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(Reply):
    """An answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: AnswerUsage


class ModelReply(Reply):
    """The model that is served, or an adapter of it, whose `parent` is the model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None


class ModelsReply(Reply):
    """All models that are served: one, and its adapters."""

    object: Literal["list"]
    data: list[ModelReply]


class LabelReply(Reply):
    """A label; the probabilities of all sum to 1, the log-probability is the model's own."""

    label: str
    probability: float
    logprob: float


class PredicateResult(Reply):
    """How likely yes is, and whether it is likelier than no."""

    probability: float
    value: bool


class ChoiceResult(Reply):
    """The likeliest label."""

    label: str
    probability: float


class ScoreResult(Reply):
    """The mean of the levels' values by their probabilities, and the deviation from it."""

    expected: float
    deviation: float


class DecisionReply(Reply):
    """An answer of /v1/decisions; `end` tells whether the end of the answer was scored too."""

    id: str
    object: Literal["decision"]
    created: int
    model: str
    type: Literal["predicate", "choice", "score"]
    result: PredicateResult | ChoiceResult | ScoreResult
    labels: list[LabelReply]
    end: bool
    usage: Usage


class TokensReply(Reply):
    """Ids, how many, and how many the context holds."""

    tokens: list[int]
    count: int
    max_model_len: int


class TextReply(Reply):
    """A text."""

    prompt: str


class RenderReply(Reply):
    """The exact prompt, as text and as ids."""

    prompt: str
    tokens: list[int]
    count: int


class StateReply(Reply):
    """How the server is."""

    status: str


class GuideReply(Reply):
    """The three fields of the published service; `time` is local, to the second."""

    response: str
    status: Literal[200]
    time: str


class ResponseReply(BaseModel):
    """An answer of /v1/responses; `output` has messages and function calls, in order."""

    model_config = ConfigDict(extra="allow", strict=True)
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage
