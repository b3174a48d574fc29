"""REQUESTS -> TOKENS, ALL AT ONCE. Many requests through one decoder, step by step.

Requests may come and go between any two steps; each gets the tokens that it would get alone.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property, partial

import torch

from xverse.checkpoint.adapter import Adapter
from xverse.engine.adapters import Adapters
from xverse.engine.device_runner import DeviceRunner
from xverse.engine.grammar_compile import Ask, Grammars, vocabulary_of
from xverse.engine.memory import (
    out_of_memory,
    pool_tokens,
    pool_tokens_beside,
    too_little_memory,
)
from xverse.engine.options import EngineOptions
from xverse.engine.paged import Paged
from xverse.engine.pages import Pages
from xverse.engine.request import Failed, Finish, Request, Scores, Token
from xverse.engine.runner import Choice, Chosen, Flight, PlainRunner, Runner
from xverse.engine.sampler import Sampler, not_a_number, refuse_unknown
from xverse.engine.scheduler import Chunk, Generation, Scheduler
from xverse.engine.speculate import Speculation
from xverse.errors import XverseError
from xverse.log import logger
from xverse.model.decoder import Decoder
from xverse.text.tokenizer import Tokenizer

Output = Token | Scores | Failed


# Matrix products of one size give a row the same bits wherever it stands among the others; with
# another number of rows the libraries sum in another order.
FIXED_ROWS = 16
COMPILING_WAIT_S = 0.02  # of a step with nothing else to do; new requests wait as long


class Engine:
    """A decoder, its KV memory and its queue. One thread at a time may use it."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        end_ids: Collection[int] = (),
        options: EngineOptions | None = None,
        tokenizer: Tokenizer | None = None,
        least: Callable[[int], int] | None = None,
    ) -> None:
        """`tokenizer` is needed for grammars, and for nothing else.

        `least` is for an engine that computes a part of what several do together: the least of a
        number that each of them gives. What they do then follows from what is asked alone.
        """
        self._least = least
        self.decoder = decoder
        self.end_ids = frozenset(end_ids)
        self.options = (options or EngineOptions()).on(decoder.device)
        most, nbytes = self.options.max_adapters, self.options.adapter_bytes
        self._adapters = Adapters(decoder, most, nbytes) if most else None
        size = self.options.page_size
        self.pages = Pages(-(-self._kv_tokens() // size), size, share=self.options.share_prefixes)
        self.kv = self._pool(self.pages.count)
        self.runner: Runner = self._runner(self.kv)
        # Whether a step is read only when the next one is under way; see `step`.
        self.overlap = isinstance(self.runner, DeviceRunner)
        self.scheduler = Scheduler(self.pages, self.step_tokens, self.max_running)
        self._flight: Flight | None = None  # the step under way
        self._landed: list[Generation] = []  # whose pages are still to be settled
        logger.info("the KV cache has room for %d tokens", self.capacity)
        self.speculation = Speculation(self.options.speculate)
        self._generations: dict[int, Generation] = {}
        self._tokenizer = tokenizer
        self._compiling: dict[int, Ask] = {}  # requests that wait for their grammar
        self._next = 0

    @property
    def capacity(self) -> int:
        """Tokens that the KV memory holds, of all requests together."""
        return self.pages.count * self.pages.size

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._generations)

    @property
    def step_tokens(self) -> int:
        """Prompt tokens that a step takes at most."""
        assert self.options.step_tokens is not None, "EngineOptions.on leaves nothing open"
        return self.options.step_tokens

    @property
    def max_running(self) -> int:
        """Sequences that run at once at most."""
        assert self.options.max_running is not None, "EngineOptions.on leaves nothing open"
        return self.options.max_running

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars; XverseError where this engine does not know its tokenizer."""
        if self._tokenizer is None:
            raise XverseError(
                "This engine cannot hold answers to a grammar.",
                "It was made without a tokenizer, and does not know what its ids spell.",
                "Give Engine(..., tokenizer=...).",
            )
        count = self.decoder.shape.vocab_size
        words = partial(vocabulary_of, self._tokenizer, self.end_ids, count)
        return Grammars(words, self.options.grammar_seconds)

    @property
    def adapters(self) -> Adapters:
        """Those that are loaded; XverseError where this engine takes none."""
        if self._adapters is None:
            raise XverseError(
                "There are no adapters here.",
                "The model was loaded without room for any.",
                "Give max_adapters, or adapters, where it is loaded.",
            )
        return self._adapters

    def load_adapter(self, name: str, adapter: Adapter, *, replace: bool = False) -> None:
        """As `Adapters.load`."""
        self.adapters.load(name, adapter, replace=replace)

    def unload_adapter(self, name: str) -> None:
        """As `Adapters.unload`: requests that have it go on with it."""
        self.adapters.unload(name)

    def add(self, request: Request) -> int:
        """Queue a request; its number. XverseError where it can never fit."""
        assert request.ids, "a prompt has tokens"
        assert request.score_from != 0, "nothing foretells the first token"
        assert not (request.labels and request.answers), "labels stand in the answer's place"
        known, ids = self.decoder.shape.vocab_size, (*request.ids, *request.labels)
        if not 0 <= min(ids) <= max(ids) < known:
            raise XverseError(
                "The prompt has ids that the model does not know.",
                f"They go from 0 to {known - 1}.",
                "Encode it with this model's own tokenizer.",
            )
        number, sampling = self._next, request.sampling
        sampler = Sampler(sampling, self.end_ids) if sampling and request.answers else None
        if sampler is not None:
            refuse_unknown(sampler.additions(0), known)
        self.scheduler.require_room(request)
        grammar = sampler.sampling.grammar if sampler is not None else None
        ask = None if grammar is None else self.grammars.ask(grammar)
        adapter = None if request.adapter is None else self.adapters.hold(request.adapter)
        generation = Generation(
            number,
            request,
            sampler,
            f"{adapter.number if adapter else 0}:{self._namespace(request)}",
            list(request.ids),
            adapter=adapter,
        )
        if ask is not None:
            self._compiling[number] = ask
        else:
            self.scheduler.add(generation)
        self._generations[number] = generation
        self._next += 1
        return number

    def prepare(self) -> None:
        """Capture every step that decoding may want now, so that no request waits for it later.

        About a second for ten sizes on a GPU; nothing where steps are not captured.
        """
        if isinstance(self.runner, DeviceRunner):
            self.runner.prepare()

    def abort(self, number: int) -> None:
        """Forget a request and take its memory back; nothing where it has ended already."""
        generation = self._generations.pop(number, None)
        self._compiling.pop(number, None)
        if generation is not None:
            self.scheduler.remove(generation)
            if generation.adapter is not None:
                self.adapters.release(generation.adapter)

    def step(self) -> Sequence[Output]:
        """Compute one step; what came of it in the order of requests. Empty where none waits.

        With `overlap` the step before is read only once this one is under way, so that the device
        never waits for the host: tokens come one call later, and a sequence that ends by what it
        says has been computed one token too far.
        """
        found = self._admit_compiled()
        guesses = self.speculation.wanted(self.scheduler)
        if guesses or any(generation.waits_for_host for generation in self.scheduler.running):
            found += self._land()
        chunks = self.scheduler.plan()
        if guesses:
            chunks = self.speculation.extend(self.scheduler, chunks)
        if not (chunks or self._flight):
            assert len(self._generations) == len(self._compiling), "who fits, fits when alone"
            if self._compiling and not found:
                self.grammars.wait(COMPILING_WAIT_S)
        flight, shed = self._launch(chunks) if chunks else (None, [])
        self._settle()  # while the device is busy
        found += [*self._land(), *shed]
        self._flight = flight
        if not self.overlap:
            found += self._land()
        if self._flight is None:
            self._settle()
        return found

    def _settle(self) -> None:
        """What is done for later requests: pages of the tokens that landed can be shared, and so
        many pages are free that the next ones need not be taken from the tree one by one."""
        self.scheduler.landed(g for g in self._landed if self._alive(g))
        self._landed = []
        self.pages.free_up(min(self.step_tokens // self.pages.size, self.pages.count // 16))

    def _pool(self, pages: int) -> Paged:
        """Memory for so many pages, and one more for rows of a captured step that nobody fills."""
        return Paged(
            self.decoder.shape,
            pages + 1,
            self.options.page_size,
            dtype=self._kv_type(),
            device=self.decoder.device,
            fixed_rows=_fixed_rows(self.decoder) if self.options.deterministic else None,
        )

    def _kv_type(self) -> torch.dtype:
        if self.options.kv_dtype == "fp8":
            return torch.float8_e4m3fn
        return self.decoder.dtype

    def _runner(self, kv: Paged) -> Runner:
        if DeviceRunner.why_not(self.decoder, kv):
            return PlainRunner(self.decoder, kv, self._adapters)
        if self._adapters is not None:
            assert self.options.adapter_slots is not None, "EngineOptions.on leaves nothing open"
            self._adapters.take_slots(self.options.adapter_slots, self.options.adapter_rank)
        spare = kv.pages - 1
        return DeviceRunner(
            self.decoder, kv, slots=self.max_running, spare=spare, adapters=self._adapters
        )

    def _kv_tokens(self) -> int:
        """As asked, or by the machine; on a GPU beside the largest steps, which are tried out."""
        if self.options.kv_tokens is not None:
            return self.options.kv_tokens
        room = self._room()
        return room if self._least is None else self._least(room)

    def _room(self) -> int:
        shape, dtype = self.decoder.shape, self._kv_type()
        device = self.decoder.device
        runner = self._runner(self._pool(0))
        if not isinstance(runner, DeviceRunner):
            return pool_tokens(shape, dtype, device, self.max_running)
        peak = runner.rehearse(self.step_tokens)
        del runner
        peak += self.options.adapter_bytes if self._adapters else 0
        return pool_tokens_beside(peak, shape, dtype, device, self.max_running)

    def _launch(self, chunks: Sequence[Chunk]) -> tuple[Flight | None, list[Output]]:
        """The step under way; where memory runs out, whoever came last goes without an answer."""
        try:
            flight = self.runner.launch(chunks)
        except (MemoryError, RuntimeError) as error:
            if self._least is not None or not out_of_memory(error):
                raise  # the others would go on with a request that was given up here
            last = max(chunk.generation.number for chunk in chunks)
            self.abort(last)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None, [Failed(last, too_little_memory(error))]
        self.scheduler.launched(chunks)
        return flight, []

    def _land(self) -> list[Output]:
        """What came of the step under way, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        landed = [found for found in flight.land() if self._alive(found[0])]
        for generation, place, choice in landed:
            if isinstance(choice, Chosen):
                generation.put(place, choice.id)
        self.speculation.settle(self.kv, flight.chunks)
        self._landed += [chunk.generation for chunk in flight.chunks]
        landed.sort(key=lambda found: found[0].number)
        return [output for found in landed for output in self._take(*found)]

    def _alive(self, generation: Generation) -> bool:
        return generation.number in self._generations

    def _admit_compiled(self) -> list[Output]:
        """Queue whose grammar is compiled by now; those fail whose grammar cannot be."""
        failed: list[Output] = []
        for number, ask in list(self._compiling.items()):
            answer = self.grammars.answer(ask)
            generation = self._generations[number]
            if isinstance(answer, XverseError):
                self.abort(number)
                failed.append(Failed(number, answer))
            elif answer is not None:
                del self._compiling[number]
                assert generation.sampler is not None, "a grammar is an option of sampling"
                generation.sampler.grammar = self.grammars.state(answer)
                self.scheduler.add(generation)
        return failed

    def _namespace(self, request: Request) -> str:
        """Past the trained length, dynamic rope makes keys depend on how long the prompt is."""
        shape, tokens = self.decoder.shape, len(request.ids)
        scaling = shape.rope_scaling
        dynamic = scaling is not None and scaling.rope_type == "dynamic"
        long = dynamic and tokens > shape.max_position_embeddings
        return f"{tokens}:{request.namespace}" if long else f":{request.namespace}"

    def _take(self, generation: Generation, place: int, choice: Choice) -> Iterator[Output]:
        """The outputs of a generation whose ids before `place` are all computed."""
        number, request = generation.number, generation.request
        if not self._alive(generation):
            return  # it ended within its draft
        first = place == len(request.ids)
        if first and any(map(math.isnan, (*generation.scores, *generation.labels))):
            choice = not_a_number()
        if isinstance(choice, XverseError):
            self.abort(number)
            yield Failed(number, choice)
            return
        if first and (request.score_from is not None or choice is None):
            scores, tops = tuple(generation.scores), tuple(generation.tops)
            labels = tuple(generation.labels)
            yield Scores(number, scores, last=choice is None, tops=tops, labels=labels)
        if choice is None:
            self.scheduler.landed([generation])
            self.abort(number)
            return
        finish = self._finish(generation, place)
        if finish:
            self.scheduler.landed([generation])
            self.abort(number)
        reused = (generation.reused or 0) if first else 0
        yield Token(number, choice.id, finish, choice.logprob, choice.top, reused)

    def _finish(self, generation: Generation, place: int) -> Finish | None:
        sampling, latest = generation.request.sampling, generation.ids[place]
        assert sampling is not None, "who chooses has options"
        state = generation.sampler.grammar if generation.sampler else None
        if state is not None and state.terminated:
            return "stop"
        ends = latest in self.end_ids and not sampling.ignore_eos
        if ends or latest in sampling.stop_ids:
            return "stop"
        new = place + 1 - len(generation.request.ids)
        return "length" if new == sampling.max_tokens else None


def _fixed_rows(decoder: Decoder) -> int:
    if decoder.shape.num_experts:
        raise XverseError(
            "A mixture of experts cannot run in deterministic mode.",
            "How many tokens meet in an expert depends on what else is asked.",
            "Leave deterministic out.",
        )
    return FIXED_ROWS
