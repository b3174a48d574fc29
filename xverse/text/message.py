"""WHAT IS SAID -> WHAT IS READ. Messages, their encoding, and what was cut to make them fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from xverse.errors import XverseError
from xverse.text.tokenizer import Tokenizer

# {"role": "system" | "user" | "assistant" | "exec" | "tool", "content": str, "tool_calls": [...]}
Message = Mapping[str, object]


@dataclass(frozen=True)
class Cut:
    """What of a conversation did not fit: whole messages dropped (the oldest, the system message
    among them if `system`), and tokens cut off the last one."""

    messages: int
    tokens: int
    system: bool

    def __str__(self) -> str:
        parts = [f"{self.messages} earlier messages left out"] if self.messages else []
        parts += ["the system message among them"] if self.system else []
        parts += [f"the last message cut by {self.tokens} tokens"] if self.tokens else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Encoded:
    """A conversation as ids; `mask` is True where a token is trained on: the assistant's contents
    and the end that follows each."""

    ids: list[int]
    mask: list[bool]
    cut: Cut | None


class ChatFormat(Protocol):
    """How a model's conversations are written."""

    @property
    def name(self) -> str:
        """Short name, recorded as `xverse_chat_format` when a tokenizer is saved."""

    @property
    def template(self) -> str:
        """The same format as a Jinja chat template, for other programs."""

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        max_prompt_tokens: int | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool | None = None,
        now: datetime | None = None,
    ) -> Encoded:
        """Encode `messages`. The beginning of an answer follows if `add_generation_prompt`, or,
        where that is None, if the last message asks for one. A format that tells the time tells
        `now`, or else the clock's. Raises XverseError for messages that the format can't hold."""

    def lessons(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        now: datetime | None = None,
    ) -> list[Encoded]:
        """What is learned from a conversation, each answer once, and each behind the very ids that
        the model is asked with when it is to give it. One Encoded where that holds for all answers
        at once; else several, which repeat what came before. Raises XverseError as `render`."""


def check_messages(messages: Sequence[Message]) -> None:
    """Raise XverseError unless these are messages: a role and a content each, in a list."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise XverseError(
            "There are no messages.",
            f"A conversation is a list of one or more messages, not {messages!r:.60}.",
            'Give for example [{"role": "user", "content": "你好"}].',
        )
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise XverseError(
                f"Message {number} has no role.",
                f"A message is an object with a role and a content, not {message!r:.60}.",
                'Write {"role": "user", "content": "..."}.',
            )
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise XverseError(
                f"Message {number} has no text.",
                f"Its content is {content!r:.60}, not a string.",
                "Give the content as one string.",
            )
