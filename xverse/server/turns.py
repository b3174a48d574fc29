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
from xverse.text.tools import ToolCall, ToolStream

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
    reused: int = 0  # tokens of the prompt that were not computed again


@dataclass(frozen=True)
class Turn:
    """What the model is to answer: one prompt a choice.

    With `tools` calls are taken out of the text; without `parallel` the first one ends the answer.
    `opening` ends the prompts and begins the answers: a demanded call.
    """

    prompts: Sequence[Prompt]
    tools: bool = False
    parallel: bool = True
    opening: str = ""


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
    reused: int = 0

    def add(self, delta: Delta) -> None:
        """One more."""
        self.content += delta.content
        self.calls += delta.calls
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.reused += delta.reused
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
        self._stream = ToolStream() if turn.tools else None
        if self._stream is not None:
            early = self._stream.feed(turn.opening)
            assert not early, "the opening is the beginning of a call"
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
        tokens = len(piece.tokens)
        return Delta(
            self._choice, content, calls, tokens, tuple(logprobs), self.finish, piece.reused
        )

    def _apart(self, text: str, *, last: bool) -> tuple[str, tuple[Call, ...]]:
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
                calls.append(Call(self._calls, f"call_{uuid.uuid4().hex[:24]}", each))
                self._calls += 1
        return content, tuple(calls)

    def _reason(self, finish: Finish) -> TurnFinish:
        return "tool_calls" if finish == "stop" and self._calls else finish
