"""PROMPT -> DELTAS. The model's turn in a conversation, function calls taken out of its text."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from xverse.engine.request import Finish, Logprob, Piece
from xverse.server.limits import Tenant
from xverse.server.logprobs import Spoken
from xverse.server.service import Prompt, Service
from xverse.text.tools import END, START, ToolCall, ToolStream, parse_tool_calls

TurnFinish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Call:
    """A function call: its place among the answer's calls, and the name it goes by."""

    place: int
    id: str
    call: ToolCall


@dataclass(frozen=True)
class Delta:
    """What has become final of one choice: text and calls, the tokens they came from."""

    choice: int
    content: str = ""
    calls: tuple[Call, ...] = ()
    tokens: int = 0
    logprobs: tuple[Logprob, ...] = ()
    finish: TurnFinish | None = None


@dataclass(frozen=True)
class Turn:
    """What the model is to answer: one prompt a choice.

    With `tools` calls are taken out of the text; without `parallel` the first one ends the answer.
    With `forced` the whole text is one call, bare of its marks.
    """

    prompts: Sequence[Prompt]
    tools: bool = False
    parallel: bool = True
    forced: bool = False


async def deltas(
    service: Service, tenant: Tenant, turn: Turn, facts: dict[str, object]
) -> AsyncGenerator[list[Delta], None]:
    """The answer as it becomes final; all that is ready at once."""
    speakers = [Speaker(service, place, turn) for place in range(len(turn.prompts))]
    ended: set[int] = set()
    pieces = service.pieces(tenant, turn.prompts, facts, ended)
    async with aclosing(pieces):
        async for batch in pieces:
            found: list[Delta] = []
            for place, piece in batch:
                speaker = speakers[place]
                if place in ended:
                    continue  # it was asked to end, and had more under way
                found.append(speaker.hear(piece))
                if speaker.finish is not None:
                    ended.add(place)
            if found:
                yield found


@dataclass
class Whole:
    """All deltas of one choice in one."""

    content: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: int = 0
    logprobs: list[Logprob] = field(default_factory=list)
    finish: TurnFinish = "stop"

    def add(self, delta: Delta) -> None:
        """One more."""
        self.content += delta.content
        self.calls += delta.calls
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.finish = delta.finish or self.finish


async def whole(
    service: Service, tenant: Tenant, turn: Turn, facts: dict[str, object]
) -> list[Whole]:
    """The finished answer, choice by choice."""
    found = [Whole() for _ in turn.prompts]
    async for batch in deltas(service, tenant, turn, facts):
        for delta in batch:
            found[delta.choice].add(delta)
    return found


class Speaker:
    """One choice in the making."""

    def __init__(self, service: Service, choice: int, turn: Turn) -> None:
        self.finish: TurnFinish | None = None
        self._choice, self._parallel = choice, turn.parallel
        self._stream = ToolStream() if turn.tools and not turn.forced else None
        self._bare: str | None = "" if turn.forced else None  # a call as far as it has come
        tokenizer = service.tokenizer
        self._spoken = Spoken(tokenizer.special_ids, tokenizer.strips_leading_space)
        self._calls = 0

    def hear(self, piece: Piece) -> Delta:
        """What a piece of text makes final."""
        last = piece.finish is not None
        logprobs = self._spoken.take(piece.text, piece.logprobs, last=last)
        content, calls = self._apart(piece.text, last=last)
        if piece.finish:
            self.finish = self._reason(piece.finish)
        if calls and not self._parallel:
            self.finish = "tool_calls"
        return Delta(self._choice, content, calls, len(piece.tokens), tuple(logprobs), self.finish)

    def _apart(self, text: str, *, last: bool) -> tuple[str, tuple[Call, ...]]:
        if self._bare is not None:
            self._bare += text
            return self._forced(self._bare) if last else ("", ())
        if self._stream is None:
            return text, ()
        found = self._stream.feed(text)
        if last:
            found += self._stream.finish()
        content = ""
        calls: list[Call] = []
        for each in found:
            if isinstance(each, str):
                content += each
            elif self._parallel or not self._calls:
                calls.append(self._call(each))
        return content, tuple(calls)

    def _forced(self, text: str) -> tuple[str, tuple[Call, ...]]:
        """The call that the whole answer is; where it was cut short, its text."""
        found = parse_tool_calls(START + text + END).tool_calls
        return ("", (self._call(found[0]),)) if found else (text, ())

    def _call(self, call: ToolCall) -> Call:
        self._calls += 1
        return Call(self._calls - 1, f"call_{uuid.uuid4().hex[:24]}", call)

    def _reason(self, finish: Finish) -> TurnFinish:
        return "tool_calls" if finish == "stop" and self._calls else finish
