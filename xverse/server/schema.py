"""JSON -> ASKED. What requests may say: every field known, every number bounded."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from xverse.engine.request import Sampling

MAX_MESSAGES = 2048
MAX_PROMPTS = 128
MAX_TOOLS = 128
MAX_CHOICES = 128  # the ceiling; a server's own limit is --max-choices
INT64 = 2**63
LEAST_TEMPERATURE = 1e-6


class Strict(BaseModel):
    """Unknown fields are refused, and nothing is converted from another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _bias(bias: dict[str, float]) -> dict[str, float]:
    """Ids are the names of a JSON object, hence text."""
    for id, value in bias.items():
        if not id.isascii() or not id.isdecimal() or len(id) > 9:
            raise ValueError(f"{id[:40]!r} is no token id")
        if not -100 <= value <= 100:
            raise ValueError("a bias is a number from -100 to 100")
    return bias


def _heat(temperature: float) -> float:
    """Logits divided by less than this are no numbers any more."""
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"above 0 it is at least {LEAST_TEMPERATURE}; 0 takes the likeliest")
    return temperature


Name = Annotated[str, Field(max_length=200)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=2**22)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(Strict):
    """With `include_usage`, a last event tells how many tokens there were."""

    include_usage: bool = False


class SamplingFields(Strict):
    """How tokens are chosen. What is left out is the model's own generation_config.json's.

    top_k, min_p, repetition_penalty, min_tokens, ignore_eos and stop_token_ids are not OpenAI's.
    """

    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_heat)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, float], Field(max_length=1024), AfterValidator(_bias)] | None
    ) = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[Ids, Field(max_length=1024)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None

    def sampling(self, **more: Any) -> Sampling:
        """The options as the engine takes them."""
        stop = self.stop if isinstance(self.stop, list) else [self.stop] if self.stop else []
        bias = None
        if self.logit_bias:
            bias = {int(id): float(value) for id, value in self.logit_bias.items()}
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=bias,
            seed=self.seed,
            stop=tuple(stop),
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop_ids=tuple(self.stop_token_ids or ()),
            **more,
        )


class TextPart(Strict):
    """A piece of a message; pictures and sound are refused, since the models only read."""

    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    """A function that was called, its arguments as JSON in a string."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str


class ToolCallIn(Strict):
    """A call in an earlier answer, as it was given out."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Strict):
    """One message. What OpenAI's own answers carry as null may be sent back so."""

    role: Literal["system", "developer", "user", "assistant", "tool", "exec"]
    content: str | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    tool_calls: Annotated[list[ToolCallIn], Field(max_length=MAX_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[object], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, object]:
        """As the text room takes it."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, object] = {"role": role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return message


class FunctionSpec(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
    description: Annotated[str, Field(max_length=16384)] | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool of the one kind there is."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Strict):
    """The function that has to be called."""

    name: Annotated[str, Field(min_length=1, max_length=64)]


class NamedTool(Strict):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class JsonSchema(Strict):
    """A schema that the answer keeps to."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]{1,64}$")]
    description: Annotated[str, Field(max_length=16384)] | None = None
    schema_: Annotated[dict[str, object], Field(alias="schema")] = Field(default_factory=dict)
    strict: bool | None = None


class ResponseFormat(Strict):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    model: Name
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(SamplingFields):
    """POST /v1/completions. `prompt` is a text or ids, or a list of either."""

    model: Name
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[Ids, Field(min_length=1)]
        | Annotated[
            list[Annotated[Ids, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    max_tokens: Count | None = 16
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None


class TokenizeRequest(Strict):
    """POST /tokenize: the ids of a text, or of a conversation as the model gets it."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(Strict):
    """POST /detokenize: the text of ids."""

    model: Name | None = None
    tokens: Ids


class RenderRequest(Strict):
    """POST /render: the exact prompt that a conversation becomes."""

    model: Name | None = None
    messages: Messages
    tools: Tools | None = None


class GuideRequest(Strict):
    """POST / of the published FastAPI service."""

    prompt: Annotated[str, Field(min_length=1)]
