"""WHAT IS ASKED, WHAT COMES BACK. The door between LangChain's face and who answers."""

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Question:
    """A conversation and how to go on with it, in OpenAI's words.

    `options` are those of `Sampling`, under its names, without those that are None.
    """

    model: str
    messages: Sequence[Mapping[str, object]]
    options: Mapping[str, Any] = field(default_factory=dict)
    stop: Sequence[str] = ()
    tools: Sequence[Mapping[str, object]] = ()
    tool_choice: str | Mapping[str, object] | None = None
    response_format: Mapping[str, object] | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True)
class CallPart:
    """A function call, or the next part of one: of the arguments' JSON, after the first part."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt and of the answer."""

    prompt: int
    answer: int


@dataclass(frozen=True)
class Delta:
    """What of an answer has become final; `finish` and `usage` once, at its end."""

    text: str = ""
    calls: tuple[CallPart, ...] = ()
    finish: str | None = None
    usage: Usage | None = None


class Source(Protocol):
    """Who answers: a model in this process, or a server. Closing a stream ends the answer."""

    def answer(self, question: Question) -> list[Delta]:
        """The whole answer."""
        ...

    def stream(self, question: Question) -> Generator[Delta, None, None]:
        """The answer as it becomes final."""
        ...

    async def aanswer(self, question: Question) -> list[Delta]:
        """The whole answer; others go on meanwhile."""
        ...

    def astream(self, question: Question) -> AsyncGenerator[Delta, None]:
        """The answer as it becomes final; others go on meanwhile."""
        ...
