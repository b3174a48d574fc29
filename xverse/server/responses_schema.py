"""JSON -> ASKED, FOR /v1/responses. Items of a conversation in OpenAI's newer form."""

from typing import Annotated, Literal

from pydantic import Field

from xverse.server.schema import (
    MAX_MESSAGES,
    MAX_TOOLS,
    FunctionSpec,
    Name,
    NamedTool,
    SamplingFields,
    Strict,
    Tool,
)

Id = Annotated[str, Field(max_length=256)]
Done = Literal["completed", "incomplete", "in_progress"]


class InputText(Strict):
    """A piece of text; what we gave out as output_text may be sent back as it was."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Annotated[list[object], Field(max_length=0)] | None = None
    logprobs: list[object] | None = None


class MessageItem(Strict):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[InputText], Field(max_length=1024)]
    id: Id | None = None
    status: Done | None = None


class CallItem(Strict):
    """A function call of an earlier answer."""

    type: Literal["function_call"]
    call_id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    id: Id | None = None
    status: Done | None = None


class CallOutputItem(Strict):
    """What a function gave."""

    type: Literal["function_call_output"]
    call_id: Id
    output: str
    id: Id | None = None
    status: Done | None = None


class FlatTool(FunctionSpec):
    """A function, without the box that chat completions put around it."""

    type: Literal["function"]

    def boxed(self) -> Tool:
        """As chat completions have it."""
        spec = self.model_dump(exclude={"type"})
        return Tool(type="function", function=FunctionSpec(**spec))


class FlatNamed(Strict):
    """The function that has to be called."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=64)]

    def boxed(self) -> NamedTool:
        """As chat completions have it."""
        return NamedTool.model_validate({"type": "function", "function": {"name": self.name}})


class TextFormat(Strict):
    """What form the answer has; name, schema and strict belong to json_schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(max_length=64)] | None = None
    description: Annotated[str, Field(max_length=16384)] | None = None
    schema_: Annotated[dict[str, object] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    """How the answer's text is."""

    format: TextFormat | None = None


class ResponseRequest(SamplingFields):
    """POST /v1/responses. Nothing is stored: a conversation is sent whole each time."""

    model: Name
    input: (
        str
        | Annotated[
            list[MessageItem | CallItem | CallOutputItem],
            Field(min_length=1, max_length=MAX_MESSAGES),
        ]
    )
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamed | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    include: (
        Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16)] | None
    ) = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    store: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    n: None = None
    stream_options: None = None
