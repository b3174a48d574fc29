"""TOKENS -> A GUESS OF THE NEXT. Drafts copied from what a sequence holds already.

Answers often repeat their prompt: names, code, quotations. Where the latest tokens have stood
before, those that followed then are proposed, and computed beside the token that is due. What the
sampler would not have chosen is thrown away, so an answer is the one it would be without.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from xverse.engine.paged import Paged
from xverse.engine.scheduler import Chunk, Generation, Scheduler
from xverse.kernels.multiply import ROWS

LONGEST, SHORTEST = 4, 2  # tokens that must have stood before; the longest that did is taken
SEQUENCES = 8  # beside more, the rows that a product computes anyway are taken
PAYS = 4  # a draft of which less than one in so many was right counts as wrong
FORGIVEN = 2  # wrong drafts in a row before a sequence rests
RESTS = (8, 64)  # tokens of the first rest, and of the longest: each is twice the one before


class Lookup:
    """Where the tokens of one sequence have stood before. `ids` is read, and only grows."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest follower is
        self._indexed = 0
        self._wrong = 0
        self._rest, self._next_rest = 0, RESTS[0]

    def draft(self, most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may come next; none while it rests, or where nothing is known.

        A draft that reaches the end of the sequence goes on with its own beginning.
        """
        if most < 1 or len(self.ids) < self._rest:
            return ()
        self._index()
        for size in range(LONGEST, SHORTEST - 1, -1):
            start = self._follows.get(tuple(self.ids[-size:]))
            if start is not None:
                known = tuple(self.ids[start : start + most])
                return (known * -(-most // len(known)))[:most]
        return ()

    def learn(self, proposed: int, accepted: int) -> None:
        """What came of a draft. A sequence whose drafts are wrong rests, longer each time."""
        if accepted * PAYS >= proposed:
            self._wrong, self._next_rest = 0, RESTS[0]
            return
        self._wrong += 1
        if self._wrong >= FORGIVEN:
            self._rest = len(self.ids) + self._next_rest
            self._next_rest = min(2 * self._next_rest, RESTS[1])

    def _index(self) -> None:
        """Note what each new token follows; the last n-gram has no follower yet, so that a lookup
        finds an earlier one."""
        for place in range(max(self._indexed, SHORTEST), len(self.ids)):
            for size in range(SHORTEST, min(LONGEST, place) + 1):
                self._follows[tuple(self.ids[place - size : place])] = place
        self._indexed = len(self.ids)


@dataclass
class Speculation:
    """Drafts of up to `longest` tokens, and how many were proposed and right so far."""

    longest: int
    proposed: int = 0
    accepted: int = 0
    _lookups: WeakKeyDictionary[Generation, Lookup] = field(default_factory=WeakKeyDictionary)

    def extend(self, scheduler: Scheduler, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The planned chunks, those that decode with drafts where rows and pages are left.

        All that decode bring ROWS rows together at most, which cost about what one does, and a
        step has no more than it may. Nobody gives up pages for a draft.
        """
        if len(scheduler.running) > SEQUENCES:
            return list(chunks)
        left = sum(chunk.count == 1 for chunk in chunks)  # who may still want some of the room
        prompts = sum(chunk.count for chunk in chunks if chunk.count > 1)
        room = min(ROWS - left, scheduler.step_tokens - prompts)
        extended: list[Chunk] = []
        for chunk in chunks:
            draft: tuple[int, ...] = ()
            if chunk.count == 1:
                draft = self._draft(scheduler, chunk, room // left)
                room, left = room - len(draft), left - 1
            extended.append(Chunk(chunk.generation, chunk.count, draft))
        return extended

    def settle(self, kv: Paged, chunks: Sequence[Chunk]) -> None:
        """After a step whose tokens are known: drafts that were right are computed already, of the
        others nothing stays."""
        for chunk in chunks:
            generation, table = chunk.generation, chunk.generation.table
            if not chunk.draft or table is None:
                continue  # or the request was aborted, and its pages are gone
            accepted = generation.missing - 1
            kv.erase(table.pages, generation.held + accepted, generation.held + len(chunk.draft))
            generation.held += accepted
            self.proposed += len(chunk.draft)
            self.accepted += accepted
            self._lookups[generation].learn(len(chunk.draft), accepted)

    def _draft(self, scheduler: Scheduler, chunk: Chunk, room: int) -> tuple[int, ...]:
        generation, sampling = chunk.generation, chunk.generation.request.sampling
        if generation.sampler is None or sampling is None or not chunk.complete:
            return ()
        if sampling.grammar is not None:
            return ()  # the next row's mask is known only once this one's token is chosen
        assert sampling.max_tokens is not None, "a request's sampling has max_tokens"
        assert generation.table is not None, "what runs has pages"
        allowed = sampling.max_tokens - (len(generation.ids) - len(generation.request.ids))
        lookup = self._lookups.get(generation)
        if lookup is None:
            lookup = self._lookups[generation] = Lookup(generation.ids)
        # A draft is followed by one token more, which the last row chooses.
        draft = lookup.draft(min(self.longest, room, allowed - 1))
        tokens = len(generation.ids) + len(draft)
        return draft if scheduler.pages.extend(generation.table, tokens) else ()
