"""TEXT -> MORE TEXT. POST /v1/completions: one prompt or many, whole or streamed."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from xverse.engine.request import Finish, Logprob, Piece
from xverse.server.chat import bounded_choices, usage
from xverse.server.context import Context
from xverse.server.logprobs import Spoken, completion_logprobs, token_text
from xverse.server.refusals import invalid, json_response, unsupported
from xverse.server.schema import MAX_PROMPTS, CompletionRequest
from xverse.server.service import Prompt, Service
from xverse.server.sse import DONE, EventStream, event


async def complete(context: Context, asked: CompletionRequest) -> Response:
    """The prompts continued."""
    service = context.service
    prompts = await plan(service, asked, context.max_choices)
    reply = _Reply(service, asked, prompts)
    if asked.stream:
        return EventStream(reply.events(context))
    return json_response(await context.attend(reply.whole(context)))


async def plan(service: Service, asked: CompletionRequest, max_choices: int) -> list[Prompt]:
    """What the engine is to do, choice by choice; Refusal for what cannot be done."""
    service.models.require(asked.model)
    choices = bounded_choices(asked.n, max_choices)
    if asked.best_of not in (None, choices):
        raise unsupported("best_of", "every choice that is computed is given out; leave it out.")
    if asked.stream_options is not None and not asked.stream:
        raise invalid("stream_options are for streams.", "stream_options")
    if asked.max_tokens == 0 and not (asked.echo or asked.logprobs is not None):
        raise invalid("max_tokens 0 asks for nothing, unless with echo or logprobs.", "max_tokens")
    texts: list[Any] = [asked.prompt] if isinstance(asked.prompt, str) else [*asked.prompt]
    if texts and isinstance(texts[0], int):
        texts = [texts]
    if len(texts) * choices > MAX_PROMPTS:
        raise invalid(f"There may be {MAX_PROMPTS} choices in all.", "n")
    sampling = asked.sampling(
        max_tokens=asked.max_tokens,
        echo=bool(asked.echo),
        logprobs=asked.logprobs,
        prompt_logprobs=asked.logprobs if asked.echo else None,
    )
    prompts: list[Prompt] = []
    for text in texts:
        ids = await service.encode(text) if isinstance(text, str) else text
        prompt = service.prompt(ids, sampling, "max_tokens", asked.model)
        prompts += service.choices(prompt, choices)
    return prompts


@dataclass
class _Choice:
    """One choice in the making: what has come of it, and how far its text has got."""

    spoken: Spoken
    offset: int = 0
    tokens: int = 0
    reused: int = 0
    text: str = ""
    finish: Finish | None = None
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)


class _Reply:
    """The JSON of one answer, in chunks or in one."""

    def __init__(
        self, service: Service, asked: CompletionRequest, prompts: Sequence[Prompt]
    ) -> None:
        self._service, self._asked, self._prompts = service, asked, prompts
        tokenizer = service.tokenizer
        self._choices = [
            # With echo the prompt's beginning has lost its space already.
            _Choice(
                Spoken(tokenizer.special_ids, tokenizer.strips_leading_space and not asked.echo)
            )
            for _ in prompts
        ]
        self._led: set[int] = set()  # leaders that have begun
        self._held: dict[int, list[tuple[int, Piece]]] = {}  # by leader
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": service.models.fingerprint(asked.model),
        }

    async def whole(self, context: Context) -> dict[str, Any]:
        """The answer in one."""
        pieces = self._service.pieces(context.tenant, self._prompts, context.facts)
        async for batch in pieces:
            for place, piece in batch:
                self._hear(place, piece)
        choices = []
        for place, choice in enumerate(self._choices):
            logprobs = self._logprobs(place, choice.logprobs, 0)
            choices.append(self._json(place, choice.text, choice.finish, logprobs))
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self, context: Context) -> AsyncGenerator[bytes, None]:
        """The answer in chunks, as they become final."""
        options = self._asked.stream_options
        with_usage = bool(options and options.include_usage)
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        found = self._service.pieces(context.tenant, self._prompts, context.facts)
        async with aclosing(found):
            async for batch in found:
                chunk = b""
                for place, piece in self._in_turn(batch):
                    offset = len(self._choices[place].text)
                    logprobs = self._logprobs(place, self._hear(place, piece), offset)
                    content = self._json(place, piece.text, piece.finish, logprobs)
                    chunk += event({**self._head, "choices": [content], **more})
                if chunk:
                    yield chunk
        if with_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    def _hear(self, place: int, piece: Piece) -> list[Logprob]:
        """Take a piece in; the log-probabilities that belong to its text."""
        choice = self._choices[place]
        mine = choice.spoken.take(piece.text, piece.logprobs, last=piece.finish is not None)
        choice.text += piece.text
        choice.tokens += len(piece.tokens)
        choice.reused += piece.reused
        choice.finish = piece.finish
        choice.logprobs += mine
        choice.prompt_logprobs += piece.prompt_logprobs
        return mine

    def _leader(self, place: int) -> int:
        """The choice that computes the prompt's log-probabilities for all its like."""
        return place - place % (self._asked.n or 1)

    def _in_turn(self, batch: Iterable[tuple[int, Piece]]) -> Iterator[tuple[int, Piece]]:
        """The pieces that can be told. Where they begin with what the leader computes, those of
        others wait for it."""
        waits = self._asked.echo and self._asked.logprobs is not None
        for place, piece in batch:
            leader = self._leader(place)
            if waits and place != leader and leader not in self._led:
                self._held.setdefault(leader, []).append((place, piece))
                continue
            yield place, piece
            if place == leader:
                self._led.add(leader)
                yield from self._held.pop(leader, [])

    def _logprobs(self, place: int, mine: Sequence[Logprob], offset: int) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        if not self._asked.echo or offset:
            return completion_logprobs(mine, self._asked.logprobs, offset)
        first = token_text(self._service.tokenizer.token_bytes(self._prompts[place].ids[0]))
        prompt = self._choices[self._leader(place)].prompt_logprobs
        return completion_logprobs([*prompt, *mine], self._asked.logprobs, 0, first=first)

    def _json(
        self, place: int, text: str, finish: Finish | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has; echoed tokens are no new ones."""
        each = self._asked.n or 1
        reused = sum(choice.reused for choice in self._choices[::each])
        answer = sum(choice.tokens for choice in self._choices)
        if self._asked.echo:
            answer -= sum(len(prompt.ids) for prompt in self._prompts)
        return usage(self._service, self._prompts[::each], reused, answer)
