"""ROUTES -> ENGINE. What all routes share: the tokenizer, the queue, the engine, the counting."""

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from xverse.checkpoint.load import Checkpoint
from xverse.engine.output import Output
from xverse.engine.request import Piece, Request, Sampling, Scores
from xverse.errors import XverseError
from xverse.server import refusals
from xverse.server.fingerprint import fingerprint
from xverse.server.limits import Tenant
from xverse.server.lineup import Lineup
from xverse.server.link import EngineGoneError, FailedError, Flow
from xverse.server.messages import Load, Ready, Start
from xverse.server.metrics import Metrics
from xverse.server.queue import FairQueue
from xverse.server.supervisor import Supervisor
from xverse.server.watch import Watch
from xverse.text.message import ChatFormat, Message
from xverse.text.tokenizer import Tokenizer

INT64 = 2**63
IN_LOOP = 4096  # characters; more is encoded in a thread, so that nobody's tokens wait for it


def prompt_of(
    chat: ChatFormat,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, object]] | None,
    now: datetime | None = None,
) -> list[int]:
    """The ids that a conversation becomes here."""
    return chat.render(messages, tokenizer, tools=tools, add_generation_prompt=True, now=now).ids


@dataclass(frozen=True)
class Prompt:
    """Ids, and how tokens are to be chosen after them: every option set. By the model itself, or
    with an adapter."""

    ids: list[int]
    sampling: Sampling
    adapter: str | None = None


class Service:
    """One model behind one queue, and its adapters."""

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        checkpoint: Checkpoint,
        supervisor: Supervisor,
        queue: FairQueue,
        metrics: Metrics,
        start: Start,
        adapters_dir: Path | None = None,
    ) -> None:
        self.name, self.tokenizer, self.checkpoint = name, tokenizer, checkpoint
        self.supervisor, self.queue, self.metrics = supervisor, queue, metrics
        self._start, self._shared_page = start, 0
        self.models = Lineup(name, checkpoint, tokenizer, start.adapters, adapters_dir)

    @property
    def context(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self.checkpoint.shape.context_length

    @property
    def vocab_size(self) -> int:
        """Ids go from 0 to below this."""
        return self.checkpoint.shape.vocab_size

    def note_load(self, load: Load) -> None:
        """Called with the engine's load after each step."""
        self.metrics.note_load(load, self.queue.waiting)

    def note_ready(self, ready: Ready) -> None:
        """Called whenever an engine is ready. A few more than can run at once are let through, so
        that a place that becomes free is taken in the very next step."""
        self.queue.slots = ready.max_running + max(2, ready.max_running // 8)
        self._shared_page = ready.shared_page
        told = fingerprint(self.checkpoint, self._start, ready.device)
        self.models.note_ready(told, ready.lost)
        if ready.lost:  # what nobody can ask for is not loaded again either
            self.supervisor.keep_adapters(self.models.folders)

    async def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a text, without blocking others."""
        with mended("prompt"):
            if len(text) < IN_LOOP:
                return self.tokenizer.encode(text, add_special=add_special)
            return await run_in_threadpool(self.tokenizer.encode, text, add_special=add_special)

    async def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None,
        model: str | None = None,
    ) -> list[int]:
        """The exact prompt of a conversation, as `model` reads it (the model itself, or with an
        adapter); nothing of it is ever cut."""

        def rendered() -> list[int]:
            return prompt_of(self.models.chat_format(model), self.tokenizer, messages, tools)

        size = sum(len(str(message.get("content"))) for message in messages)
        with mended("messages"):
            small = size < IN_LOOP and not tools
            # A Jinja template may take a second, and is stopped then: too long for the loop.
            if small and self.tokenizer.chat_template is None:
                return rendered()
            return await run_in_threadpool(rendered)

    def prompt(
        self, ids: list[int], sampling: Sampling, max_param: str, model: str | None = None
    ) -> Prompt:
        """The ids with every option set; Refusal (400) with counts where it cannot fit.

        `max_param` is how this route calls the limit of the answer; `model` is the one that is
        asked for, by default the model itself.
        """
        if not ids:
            raise refusals.invalid("The prompt is empty: there is nothing to continue.", "prompt")
        self._known(ids, "prompt")
        self._known((sampling.logit_bias or {}).keys(), "logit_bias")
        self._known(sampling.stop_ids, "stop_token_ids")
        filled = sampling.over(self.checkpoint.generation_config)
        asked = sampling.max_tokens
        room, least = self.context - len(ids), 1 if asked is None else asked
        if least > room:
            raise refusals.invalid(
                f"This model's context holds {self.context} tokens for prompt and answer. The "
                f"prompt has {len(ids)} tokens and the answer may have {least}, together "
                f"{len(ids) + least}. Shorten the prompt or lower {max_param}.",
                max_param if len(ids) < self.context else "messages",
                "context_length_exceeded",
            )
        capacity = self.supervisor.ready.capacity if self.supervisor.ready else self.context
        if len(ids) + least > capacity:
            raise refusals.invalid(
                f"This server's memory holds {capacity} tokens of all requests together. The "
                f"prompt has {len(ids)} tokens and the answer may have {least}.",
                max_param,
                "memory_exceeded",
            )
        if asked is None:  # then the answer ends where memory does
            room = min(room, capacity - len(ids))
        most = room if filled.max_tokens is None else min(filled.max_tokens, room)
        return Prompt(
            ids, replace(filled, max_tokens=most), self.models.adapter(model or self.name)
        )

    def choices(self, prompt: Prompt, n: int) -> list[Prompt]:
        """`n` prompts alike; with a seed, each has the one after the one before it."""
        first, seed = prompt.sampling, prompt.sampling.seed
        # What is scored is computed: one does it for all, who share its pages.
        others = replace(first, prompt_logprobs=None) if first.max_tokens else first
        found = [prompt]
        for place in range(1, n):
            own = None if seed is None else (seed + place + INT64) % (2 * INT64) - INT64
            found.append(Prompt(prompt.ids, replace(others, seed=own), prompt.adapter))
        return found

    def _known(self, ids: Iterable[int], param: str) -> None:
        wrong = next((id for id in ids if not 0 <= id < self.vocab_size), None)
        if wrong is not None:
            raise refusals.invalid(
                f"There is no token {wrong}; ids go from 0 to {self.vocab_size - 1}.", param
            )

    def cache_use(self, prompts: Sequence[Prompt], reused: int) -> dict[str, int]:
        """Of these prompts' tokens, how many came from shared pages, and how many went into such:
        only full pages are shared."""
        page = self._shared_page
        full = sum(len(each.ids) // page * page for each in prompts) if page else 0
        return {"cached_tokens": reused, "cache_write_tokens": full - reused}

    async def pieces(
        self,
        tenant: Tenant,
        prompts: Sequence[Prompt],
        facts: dict[str, object],
        ended: Collection[int] = (),
    ) -> AsyncGenerator[list[tuple[int, Piece]], None]:
        """Text as it becomes final, with the place of its prompt; all that is ready at once.

        A prompt ends early when the reader has put its place into `ended`. `facts` are told what
        this took, for the log.
        """
        open_places = set(range(len(prompts)))
        outputs = [Output(self.tokenizer, each.sampling, each.ids) for each in prompts]
        requests = [
            Request(tuple(each.ids), each.sampling, tenant.namespace, adapter=each.adapter)
            for each in prompts
        ]
        watch = Watch(self.metrics, sum(len(each.ids) for each in prompts))
        async with self._flow(tenant, requests, watch) as flow:
            try:
                async for batch in flow.batches():
                    watch.tokens(sum(not isinstance(given, Scores) for _, given in batch))
                    found: list[tuple[int, Piece]] = []
                    for place, given in batch:
                        output = outputs[place]
                        if place not in open_places:
                            continue  # computed before the engine heard of the stop string
                        piece = output.take(given)
                        if output.finish:
                            open_places.remove(place)
                            flow.end({place})
                            self.metrics.finished(output.finish)
                        if piece is not None:
                            found.append((place, piece))
                    if found:
                        yield found
                    for place in open_places.intersection(ended):
                        open_places.remove(place)
                        flow.end({place})
                        self.metrics.finished("stop")
            finally:
                tenant.spend_tokens(watch.prompt_tokens + watch.answer_tokens)
                watch.end(facts)
                for _ in open_places:
                    self.metrics.finished("abort")

    async def scores(
        self, tenant: Tenant, requests: Sequence[Request], facts: dict[str, object]
    ) -> list[Scores]:
        """Log-probabilities of what each request wants scored."""
        asked = [replace(request, namespace=tenant.namespace) for request in requests]
        found: dict[int, Scores] = {}
        watch = Watch(self.metrics, sum(len(request.ids) for request in requests))
        async with self._flow(tenant, asked, watch) as flow:
            async for batch in flow.batches():
                found |= {place: each for place, each in batch if isinstance(each, Scores)}
        tenant.spend_tokens(watch.prompt_tokens)
        watch.end(facts)
        return [found[place] for place in range(len(requests))]

    @asynccontextmanager
    async def _flow(
        self, tenant: Tenant, requests: Sequence[Request], watch: Watch
    ) -> AsyncIterator[Flow]:
        """The engine at work on these, once it is their turn. Whatever ends this ends them too."""
        if self.supervisor.link is None:
            raise refusals.not_ready(self.supervisor.state)
        tokens = watch.prompt_tokens
        with tenant.working():
            async with self.queue.turn(tenant.namespace, len(requests), tokens) as waited_s:
                link = self.supervisor.link
                if link is None:
                    raise refusals.engine_restarted()
                watch.begin(waited_s)
                with mended(None), closing(link.ask(requests)) as flow:
                    try:
                        yield flow
                    except EngineGoneError as error:
                        raise refusals.engine_restarted() from error
                    except FailedError as failure:
                        why = failure.error
                        held = any(each.sampling and each.sampling.grammar for each in requests)
                        if held and not watch.answer_tokens:  # it was never compiled
                            raise refusals.of_model(why, "response_format") from failure
                        raise refusals.failed(why) from failure


@contextmanager
def mended(param: str | None) -> Iterator[None]:
    """What the rooms below refuse becomes a 400 about `param`."""
    try:
        yield
    except XverseError as error:
        raise refusals.of_model(error, param) from error
