"""REQUESTS -> STEPS. Which sequence brings how many tokens to the next step, and who must wait.

First come, first served. Sequences that decode bring their one token to every step, and prompts
fill up what the step's budget leaves, chunk by chunk. Where pages run out, whoever came last gives
all of its own back and is computed again when there is room.
"""

from bisect import insort
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from xverse.engine.adapted import Loaded
from xverse.engine.pages import Pages, Table
from xverse.engine.request import Request, Top
from xverse.engine.sampler import Sampler
from xverse.errors import XverseError

_arrival = attrgetter("number")
UNKNOWN = -1  # in the place of a token that a step under way is choosing


@dataclass(eq=False)
class Generation:
    """One answer in the making. `number` is its place in the order of arrival.

    `ids` are prompt and answer so far; keys and values of the first `held` are in `table`. The
    last `pending` of them are being chosen by steps under way: until those land, UNKNOWN stands
    there. While it runs it has a `slot`, a row of what the device keeps for each sequence.
    `reused` is how many tokens it found in shared pages when it first ran. `adapter` changes the
    decoder's layers for its tokens.
    """

    number: int
    request: Request
    sampler: Sampler | None
    namespace: str
    ids: list[int]
    scores: list[float] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)  # beside the scores
    labels: list[float] = field(default_factory=list)
    held: int = 0
    table: Table | None = None
    pending: int = 0
    slot: int = -1
    reused: int | None = None
    adapter: Loaded | None = None
    twins: int = field(init=False)  # the same number for the same prompt in the same namespace

    def __post_init__(self) -> None:
        # Prompts are compared by it once for each request that comes in; a tuple's is not kept.
        self.twins = hash((self.namespace, self.request.ids))

    def put(self, place: int, id: int) -> None:
        """The token chosen for `place`: one that was pending, or one after a guess that was
        right."""
        if place < len(self.ids):
            self.ids[place] = id
            self.pending -= 1
        else:
            assert place == len(self.ids), "tokens come in order"
            self.ids.append(id)

    @property
    def unscored(self) -> int:
        """The next prompt token whose log-probability is wanted; past all tokens if none is."""
        start, prompt = self.request.score_from, len(self.request.ids)
        if start is None or start + len(self.scores) >= prompt:
            return len(self.ids)
        return start + len(self.scores)

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while it decodes."""
        return len(self.ids) - self.held

    @property
    def exhausted(self) -> bool:
        """Whether its last token is chosen, or being chosen, and nothing more is computed."""
        if self.sampler is None:
            return False
        return len(self.ids) - len(self.request.ids) == self.sampler.sampling.max_tokens

    @property
    def waits_for_host(self) -> bool:
        """Whether its next step depends on what the host makes of the one before."""
        sampling = self.request.sampling
        return self.request.score_from is not None or bool(sampling and sampling.grammar)


@dataclass(frozen=True)
class Chunk:
    """`count` tokens of a generation that the next step computes, and after them a guess of the
    next ones: its `draft`."""

    generation: Generation
    count: int
    draft: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Tokens that are computed."""
        return self.count + len(self.draft)

    @property
    def complete(self) -> bool:
        """Whether all tokens there are will be computed then, and the next can be chosen."""
        return self.count == self.generation.missing

    @property
    def chooses(self) -> bool:
        """Whether a token is chosen after it; of prompts that are only scored, none is."""
        return self.complete and self.generation.sampler is not None

    @property
    def read(self) -> int:
        """Of how many of its rows, the last ones, anybody reads what the decoder says of them."""
        generation = self.generation
        held, request = generation.held, generation.request
        first = self.rows
        if self.complete and (request.labels or generation.sampler is not None):
            first = self.count - 1
        if generation.unscored < min(held + self.count + 1, len(request.ids)):
            first = min(first, generation.unscored - 1 - held)
        return self.rows - first


@dataclass
class Scheduler:
    """The queue of those who wait, and those who run, both in order of arrival."""

    pages: Pages
    step_tokens: int
    max_running: int
    waiting: list[Generation] = field(default_factory=list)
    running: list[Generation] = field(default_factory=list)
    slots: list[int] = field(init=False)
    preempted: int = 0  # how often pages were taken from a sequence that ran
    reused_tokens: int = 0  # found in shared pages instead of computed

    def __post_init__(self) -> None:
        self.slots = list(range(self.max_running - 1, -1, -1))  # popped from the end

    def add(self, generation: Generation) -> None:
        """Queue it; XverseError where even the whole memory would not do."""
        self.require_room(generation.request)
        insort(self.waiting, generation, key=_arrival)

    def require_room(self, request: Request) -> None:
        """XverseError where a request would not fit, even alone."""
        answer = request.sampling.max_tokens if request.sampling else 0
        most = len(request.ids) + (answer or 0)
        if self.pages.needed(most) > self.pages.count:
            raise XverseError(
                f"A prompt of {len(request.ids)} tokens with an answer of up to "
                f"{most - len(request.ids)} does not fit in memory.",
                f"The KV cache holds {self.pages.count * self.pages.size} tokens in all.",
                "Lower max_tokens, shorten the prompt, or give more memory with kv_tokens.",
            )

    def remove(self, generation: Generation) -> None:
        """Take it out, wherever it is, and all of its pages back."""
        for queue in (self.waiting, self.running):
            if generation in queue:
                queue.remove(generation)
        self._give_back(generation)

    def plan(self) -> list[Chunk]:
        """The next step: chunks of prompts first, then those who decode, the longest last."""
        self._grow()
        counts = {g: 1 for g in self.running if g.missing == 1 and not g.exhausted}
        budget = self.step_tokens
        for generation in self.running:
            if generation.missing > 1 and (chunk := self._chunk(generation)) <= budget:
                counts[generation] = chunk
                budget -= chunk
        # Prompts that are being computed this moment: their twins share the pages a step later.
        begun = {g.twins for g in self.running if self._in_the_making(g)}
        while budget > 0 and (admitted := self._admit(budget, begun)) is not None:
            counts[admitted] = self._chunk(admitted)
            budget -= counts[admitted]
            if self._in_the_making(admitted):
                begun.add(admitted.twins)
        chunks = [Chunk(generation, count) for generation, count in counts.items()]
        return sorted(chunks, key=lambda chunk: (chunk.count == 1, chunk.generation.held))

    def launched(self, chunks: Iterable[Chunk]) -> None:
        """The step is under way: whatever comes after it finds its keys and values in the pages."""
        for chunk in chunks:
            generation, chooses = chunk.generation, chunk.chooses
            generation.held += chunk.count
            if chooses:
                generation.ids.append(UNKNOWN)
                generation.pending += 1

    def landed(self, generations: Iterable[Generation]) -> None:
        """The tokens of a step are known: full pages of them can be shared."""
        for generation in generations:
            if generation.table is not None:
                known = len(generation.ids) - generation.pending
                self.pages.settle(generation.table, generation.ids, min(generation.held, known))

    def check(self) -> None:
        """Assert that nothing is lost."""
        for queue in (self.waiting, self.running):
            assert queue == sorted(queue, key=_arrival), "first come, first served"
        assert all(g.table is None and g.held == 0 for g in self.waiting)
        self.pages.check([g.table for g in self.running if g.table is not None])
        slots = [*self.slots, *(g.slot for g in self.running)]
        assert sorted(slots) == list(range(self.max_running)), "a slot is lost or has two owners"

    def _grow(self) -> None:
        """A place for every token that is to be computed, at the cost of those who came last."""
        for generation in [g for g in self.running if not g.exhausted]:
            while generation.table is not None and not self.pages.extend(
                generation.table, len(generation.ids)
            ):
                self._preempt(self.running[-1])

    def _chunk(self, generation: Generation) -> int:
        """Tokens of it that one step computes: the same number whatever else is in the step."""
        return min(generation.missing, self.step_tokens)

    def _admit(self, budget: int, begun: Collection[int]) -> Generation | None:
        """The next in the queue whose twin is not `begun`, if its first chunk is within the budget,
        and all it has so far fits and leaves a page to decode into."""
        if len(self.running) >= self.max_running:
            return None
        generation = next((g for g in self.waiting if g.twins not in begun), None)
        if generation is None or generation.pending:
            return None
        spare = len(self.running)  # each may want a page soon
        table = self.pages.open(
            generation.namespace,
            generation.ids,
            # The last token, or the one before the next to be scored, must be computed.
            generation.unscored - 1,
            spare,
        )
        if table is None:
            return None
        held = len(table.path) * self.pages.size
        if min(len(generation.ids) - held, self.step_tokens) > budget:
            self.pages.close(table)
            return None
        generation.table, generation.held, generation.slot = table, held, self.slots.pop()
        self.reused_tokens += held
        if generation.reused is None:
            generation.reused = held
        self.waiting.remove(generation)
        insort(self.running, generation, key=_arrival)
        return generation

    def _in_the_making(self, generation: Generation) -> bool:
        """Whether pages of its prompt are still to come into the tree."""
        if generation.missing > 1:
            return True
        settled = len(generation.table.path) if generation.table is not None else 0
        return self.pages.share and settled < len(generation.request.ids) // self.pages.size

    def _preempt(self, generation: Generation) -> None:
        self.preempted += 1
        self.running.remove(generation)
        self._give_back(generation)
        insort(self.waiting, generation, key=_arrival)

    def _give_back(self, generation: Generation) -> None:
        if generation.table is not None:
            self.pages.close(generation.table)
            self.slots.append(generation.slot)
        generation.table, generation.held, generation.slot = None, 0, -1
