"""REQUESTS -> TOKENS, ALL AT ONCE. Many requests through one decoder, step by step.

Requests may come and go between any two steps; each gets the tokens that it would get alone.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from xverse.engine.fused import FusedDecode
from xverse.engine.memory import pool_tokens
from xverse.engine.paged import Paged
from xverse.engine.pages import Pages
from xverse.engine.request import Failed, Finish, Request, Scores, Token
from xverse.engine.runner import Choice, run_step
from xverse.engine.sampler import Sampler, not_a_number
from xverse.engine.scheduler import Generation, Scheduler
from xverse.engine.speculate import Speculation
from xverse.errors import XverseError
from xverse.kernels.multiply import ROWS
from xverse.log import logger
from xverse.model.decoder import Decoder

Output = Token | Scores | Failed


@dataclass(frozen=True)
class EngineOptions:
    """How much is done at once. `kv_tokens` None sizes the KV memory by the machine.

    `step_tokens` bounds the prompt tokens beside those who decode, hence how long these wait.
    `deterministic`: equal to the last bit, alone or among others, at some cost in speed.
    `share_prefixes`: what many prompts begin with is computed once. Where the rest is then computed
    in another shape, its last bits differ, unless `deterministic`.
    `speculate`: so many tokens at most are guessed from what a sequence holds already and computed
    beside the one that is due, while few run; answers stay the same. 0 is off.
    """

    kv_tokens: int | None = None
    page_size: int = 16
    step_tokens: int = 512
    max_running: int = 64
    deterministic: bool = False
    share_prefixes: bool = True
    speculate: int = 0

    def __post_init__(self) -> None:
        for name in ("kv_tokens", "page_size", "step_tokens", "max_running"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise XverseError(
                    f"{name} cannot be {value!r:.60}.",
                    "It counts tokens or sequences.",
                    "Give a whole number of at least 1.",
                )
        if type(self.speculate) is not int or not 0 <= self.speculate < ROWS:
            raise XverseError(
                f"speculate cannot be {self.speculate!r:.60}.",
                f"It is a whole number from 0 to {ROWS - 1}: with the token that is due, what a "
                "product computes at the price of one.",
                "Give 8, or 0 to guess nothing.",
            )
        if self.max_running > self.step_tokens:
            raise XverseError(
                f"{self.max_running} sequences cannot run in steps of {self.step_tokens} tokens.",
                "Each that decodes brings a token to every step.",
                "Raise step_tokens or lower max_running.",
            )


# Matrix products of one size give a row the same bits wherever it stands among the others; with
# another number of rows the libraries sum in another order.
FIXED_ROWS = 16


class Engine:
    """A decoder, its KV memory and its queue. One thread at a time may use it."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        end_ids: Collection[int] = (),
        options: EngineOptions | None = None,
    ) -> None:
        self.decoder = decoder
        self.end_ids = frozenset(end_ids)
        self.options = options or EngineOptions()
        weight = decoder.model.embed_tokens.weight
        size = self.options.page_size
        tokens = self.options.kv_tokens or pool_tokens(
            decoder.shape, weight.dtype, weight.device, self.options.max_running
        )
        self.pages = Pages(-(-tokens // size), size, share=self.options.share_prefixes)
        self.kv = Paged(
            decoder.shape,
            self.pages.count + 1,  # the last is for rows of a captured step that nobody fills
            size,
            dtype=weight.dtype,
            device=weight.device,
            fixed_rows=_fixed_rows(decoder) if self.options.deterministic else None,
        )
        self._fused = FusedDecode.of(decoder, self.kv, spare=self.pages.count)
        self.scheduler = Scheduler(self.pages, self.options.step_tokens, self.options.max_running)
        logger.info("the KV cache has room for %d tokens", self.capacity)
        self.speculation = Speculation(self.options.speculate)
        self._generations: dict[int, Generation] = {}
        self._next = 0

    @property
    def capacity(self) -> int:
        """Tokens that the KV memory holds, of all requests together."""
        return self.pages.count * self.pages.size

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._generations)

    def add(self, request: Request) -> int:
        """Queue a request; its number. XverseError where it can never fit."""
        assert request.ids, "a prompt has tokens"
        assert request.score_from != 0, "nothing foretells the first token"
        known = self.decoder.shape.vocab_size
        if not all(0 <= id < known for id in request.ids):
            raise XverseError(
                "The prompt has ids that the model does not know.",
                f"They go from 0 to {known - 1}.",
                "Encode it with this model's own tokenizer.",
            )
        number, sampling = self._next, request.sampling
        sampler = Sampler(sampling, self.end_ids) if sampling and request.answers else None
        generation = Generation(
            number, request, sampler, self._namespace(request), list(request.ids)
        )
        self.scheduler.add(generation)
        self._generations[number] = generation
        self._next += 1
        return number

    def abort(self, number: int) -> None:
        """Forget a request and take its memory back; nothing where it has ended already."""
        generation = self._generations.pop(number, None)
        if generation is not None:
            self.scheduler.remove(generation)

    def step(self) -> Sequence[Output]:
        """Compute one step; what came of it in the order of requests. Empty where none waits."""
        chunks = self.scheduler.plan()
        assert chunks or not self.busy, "whoever fits at all fits when alone"
        if not chunks:
            return []
        if self.options.speculate:
            chunks = self.speculation.extend(self.scheduler, chunks)
        choices = run_step(self.decoder, self.kv, chunks, self._fused)
        self.scheduler.computed(chunks)
        choices.sort(key=lambda choice: choice[0].number)
        outputs = [output for choice in choices for output in self._take(*choice)]
        self.speculation.settle(self.scheduler, self.kv, chunks)
        return outputs

    def _namespace(self, request: Request) -> str:
        """Past the trained length, dynamic rope makes keys depend on how long the prompt is."""
        shape, tokens = self.decoder.shape, len(request.ids)
        scaling = shape.rope_scaling
        dynamic = scaling is not None and scaling.rope_type == "dynamic"
        long = dynamic and tokens > shape.max_position_embeddings
        return f"{tokens}:{request.namespace}" if long else f":{request.namespace}"

    def _take(self, generation: Generation, choice: Choice) -> Iterator[Output]:
        number, request = generation.number, generation.request
        if number not in self._generations:
            return  # it ended within its draft
        first = len(generation.ids) == len(request.ids)
        if first and any(map(math.isnan, generation.scores)):
            choice = not_a_number()
        if isinstance(choice, XverseError):
            self.abort(number)
            yield Failed(number, choice)
            return
        if first and (request.score_from is not None or choice is None):
            scores, tops = tuple(generation.scores), tuple(generation.tops)
            yield Scores(number, scores, last=choice is None, tops=tops)
        if choice is None:
            self.abort(number)
            return
        generation.ids.append(choice.id)
        finish = self._finish(generation)
        if finish:
            self.abort(number)
        yield Token(number, choice.id, finish, choice.logprob, choice.top)

    def _finish(self, generation: Generation) -> Finish | None:
        sampling, latest = generation.request.sampling, generation.ids[-1]
        assert sampling is not None, "who chooses has options"
        ends = latest in self.end_ids and not sampling.ignore_eos
        if ends or latest in sampling.stop_ids:
            return "stop"
        new = len(generation.ids) - len(generation.request.ids)
        return "length" if new == sampling.max_tokens else None


def _fixed_rows(decoder: Decoder) -> int:
    if decoder.shape.num_experts:
        raise XverseError(
            "A mixture of experts cannot run in deterministic mode.",
            "How many tokens meet in an expert depends on what else is asked.",
            "Leave deterministic out.",
        )
    return FIXED_ROWS
