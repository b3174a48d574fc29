"""CHUNKS -> TOKENS. One step of the decoder over what the scheduler planned, and the choices.

`PlainRunner` computes it here and now with the decoder itself; `DeviceRunner` (device_runner.py)
sends it to a GPU and returns at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from xverse.engine.adapted import Loaded
from xverse.engine.adapters import Adapters, decoder_for
from xverse.engine.packed_step import PackedStep, fits
from xverse.engine.paged import Paged, Part
from xverse.engine.request import Top
from xverse.engine.sampler import Sampler
from xverse.engine.scheduler import Chunk, Generation
from xverse.engine.transfer import fetch, upload
from xverse.errors import XverseError
from xverse.kernels.multiply import ROWS
from xverse.model.decoder import Decoder
from xverse.quant.prepare import rows_stand_alone

SCORED_AT_ONCE = 64  # rows of logits in fp32 that are held for prompt log-probabilities


@dataclass(frozen=True)
class Chosen:
    """A token and, where asked for, its log-probability and the best ids with theirs."""

    id: int
    logprob: float | None = None
    top: Top = ()


Choice = Chosen | XverseError | None  # None: all is computed, and nothing was to be chosen


@dataclass
class Flight:
    """A step under way, made before its chunks count as held. What is chosen in it goes to a place
    in the ids of each generation."""

    chunks: Sequence[Chunk]
    choosing: list[tuple[Generation, int]]
    choices: Callable[[], list[Choice]]  # waits for the step
    known: list[Choice] = field(default_factory=list)  # of the last ones of `choosing`
    labels: Callable[[], None] = lambda: None  # waits, and gives them out
    _read: list[Generation] = field(init=False)  # to their ends, where nothing is chosen

    def __post_init__(self) -> None:
        # The next step, which may be sent off before this one lands, may complete others of them.
        ended = (chunk.generation for chunk in self.chunks if chunk.complete)
        self._read = [generation for generation in ended if generation.sampler is None]

    def add(self, generation: Generation, found: Sequence[Choice]) -> None:
        """Tokens that are chosen already; what follows a right guess stands behind it."""
        place = len(generation.ids)
        self.choosing += [(generation, place + i) for i in range(len(found))]
        self.known += found

    def land(self) -> list[tuple[Generation, int, Choice]]:
        """Wait, and say for each generation that is complete what stands where in its ids."""
        choices = zip(self.choosing, [*self.choices(), *self.known], strict=True)
        found = [(generation, place, choice) for (generation, place), choice in choices]
        self.labels()
        return found + [(generation, len(generation.ids), None) for generation in self._read]


def choosing(chunks: Sequence[Chunk]) -> list[Generation]:
    """Whose next token a step of these chunks chooses."""
    return [chunk.generation for chunk in chunks if chunk.chooses]


class Runner(Protocol):
    """What computes steps. `launch` may return while the device is still at it."""

    def launch(self, chunks: Sequence[Chunk]) -> Flight: ...


class PlainRunner:
    """The decoder as it is, on any device; every step has ended when `launch` returns."""

    def __init__(self, decoder: Decoder, kv: Paged, adapters: Adapters | None = None) -> None:
        self.decoder, self.kv, self.adapters = decoder, kv, adapters
        self.step = PackedStep(decoder, kv) if fits(decoder, kv) else None

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> Flight:
        """Compute the chunks, and add the log-probabilities of prompt tokens to `scores`."""
        decoder, kv = self.decoder, self.kv
        together = _computed_together(kv, chunks)
        hidden_RD = torch.cat([self._hidden(some) for some in together])
        flight = Flight(chunks, [], list)
        if rows := choosing_rows(chunks):
            logits_BV = _logits(decoder, kv, hidden_RD[torch.tensor(rows, device=kv.device)])
            for generation, found in choose(chunks, logits_BV):
                flight.add(generation, found)
        flight.labels = score(decoder, kv, chunks, hidden_RD)
        return flight

    def _hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states [R, D] of those of the chunks' tokens that are read; keys and values of all
        are in the pages then."""
        kv, parts, ids = self.kv, list[Part](), list[int]()
        for chunk in chunks:
            generation, held = chunk.generation, chunk.generation.held
            parts.append(_part(chunk, apart=bool(chunk.draft) and kv.device.type == "cpu"))
            ids += [*generation.ids[held : held + chunk.count], *chunk.draft]
        owners, read = owners_of(chunks), reading_rows(chunks)
        everything = len(read) == len(ids)
        read_R = slice(None) if everything else torch.tensor(read, dtype=torch.int64).to(kv.device)
        if kv.fixed_rows is None:
            ids_T, positions_T = torch.tensor(ids, device=kv.device), kv.begin(parts)
            if self.step is not None and kv.alone is not None:
                return self.step(ids_T, positions_T)[read_R]
            if not owners and isinstance(read_R, Tensor):
                return self.decoder.hidden(ids_T, positions_T, kv, read_R)
            with decoder_for(self.decoder, self.adapters, owners) as decoder:
                return decoder.hidden(ids_T, positions_T, kv)[read_R]
        rows, found = kv.fixed_rows, []
        tokens = [Part(p.pages, p.held + i, 1, p.prompt) for p in parts for i in range(p.count)]
        for first in range(0, len(ids), rows):
            some = torch.zeros(rows, dtype=torch.int64, device=kv.device)
            count = min(rows, len(ids) - first)
            some[:count] = torch.tensor(ids[first : first + count])
            positions_T = kv.begin(tokens[first : first + count])
            with decoder_for(self.decoder, self.adapters, owners[first : first + count]) as decoder:
                found.append(decoder.hidden(some, positions_T, kv)[:count])
        return torch.cat(found)[read_R]


def owners_of(chunks: Sequence[Chunk]) -> list[Loaded | None]:
    """The adapter of each row of these chunks; empty where no row has one."""
    if all(chunk.generation.adapter is None for chunk in chunks):
        return []
    return [chunk.generation.adapter for chunk in chunks for _ in range(chunk.rows)]


def reading_rows(chunks: Sequence[Chunk]) -> list[int]:
    """The rows of a step that are read at all: the R of T."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.rows
        rows += range(end - chunk.read, end)
    return rows


def choosing_rows(chunks: Sequence[Chunk]) -> list[int]:
    """The rows, of those that are read, whose logits choose a token: the last of a chunk that is
    complete, and its draft."""
    rows: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.read
        if chunk.chooses:
            rows += range(end - len(chunk.draft) - 1, end)
    return rows


def _part(chunk: Chunk, *, apart: bool = False) -> Part:
    generation = chunk.generation
    assert generation.table is not None, "what runs has pages"
    pages, prompt = generation.table.pages, len(generation.request.ids)
    return Part(pages, generation.held, chunk.rows, prompt, apart)


def _computed_together(kv: Paged, chunks: Sequence[Chunk]) -> list[Sequence[Chunk]]:
    """What goes through the decoder in one row. On a GPU everything: a step costs what it costs to
    read the weights. On a CPU each prompt alone, which fills it anyway, and as many decoding
    sequences as `multiply.linear` computes alike, their drafts included: so no row is computed
    otherwise than alone."""
    if kv.device.type != "cpu" or kv.fixed_rows is not None:
        return [chunks]
    decoding = [chunk for chunk in chunks if chunk.count == 1]
    assert list(chunks[len(chunks) - len(decoding) :]) == decoding, "the scheduler puts them last"
    prompts = chunks[: len(chunks) - len(decoding)]
    rows = [decoding[start : start + ROWS] for start in range(0, len(decoding), ROWS)]
    assert all(sum(chunk.rows for chunk in some) <= ROWS for some in rows), "drafts fill up rows"
    return [*([chunk] for chunk in prompts), *rows]


def _logits(decoder: Decoder, kv: Paged, hidden_TD: Tensor) -> Tensor:
    if kv.fixed_rows is None and (kv.device.type != "cpu" or rows_stand_alone(decoder)):
        return decoder.logits(hidden_TD)
    rows = kv.fixed_rows or ROWS
    found = []
    for some in hidden_TD.split(rows):
        fill = some.new_zeros(rows - len(some), some.shape[1])
        found.append(decoder.logits(torch.cat((some, fill)))[: len(some)])
    return torch.cat(found)


def choose(chunks: Sequence[Chunk], logits_BV: Tensor) -> Iterator[tuple[Generation, list[Choice]]]:
    """The next token of each that chooses, and after a draft that begins with it the one after
    that, and so on; the best ones of all are found in one operation."""
    best = logits_BV.max(-1)
    sound = (~best.values.isnan()).tolist()
    ids = [id if fine else None for id, fine in zip(best.indices.tolist(), sound, strict=True)]
    start = 0
    for chunk in chunks:
        if not chunk.chooses:
            continue
        rows = slice(start, start + 1 + len(chunk.draft))
        yield chunk.generation, _follow(chunk, logits_BV[rows], ids[rows])
        start = rows.stop


def _follow(chunk: Chunk, logits_RV: Tensor, best: Sequence[int | None]) -> list[Choice]:
    """What the sampler chooses, row by row for as long as that is what the draft says."""
    generation = chunk.generation
    known, found = len(generation.ids), list[Choice]()
    try:
        for logits_V, id, guess in zip(logits_RV, best, (*chunk.draft, None), strict=True):
            choice = _choose(generation, logits_V, id)
            found.append(choice)
            if not isinstance(choice, Chosen) or choice.id != guess:
                break
            generation.ids.append(choice.id)  # penalties count it
    finally:
        del generation.ids[known:]
    return found


def _choose(generation: Generation, logits_V: Tensor, best: int | None) -> Choice:
    """The next token; `best` is the likeliest, None where that is no number."""
    sampler = generation.sampler
    assert sampler is not None, "who chooses has a sampler"
    try:
        if best is None or not sampler.greedy:
            best = sampler.choose(logits_V, generation.ids, len(generation.request.ids))
        return _with_logprobs(sampler, best, logits_V)
    except XverseError as error:  # its own misfortune: the others go on
        return error


def _with_logprobs(sampler: Sampler, id: int, logits_V: Tensor) -> Chosen:
    wanted = sampler.sampling.logprobs
    if wanted is None:
        return Chosen(id)
    logprobs_V = logits_V.float().log_softmax(-1)
    return Chosen(id, float(logprobs_V[id]), _best(logprobs_V[None], wanted)[0])


def _best(logprobs_TV: Tensor, count: int) -> list[Top]:
    """The `count` best ids of each row."""
    best = logprobs_TV.topk(min(count, logprobs_TV.shape[-1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(zip(*row, strict=True)) for row in rows]


def score(
    decoder: Decoder, kv: Paged, chunks: Sequence[Chunk], hidden_RD: Tensor
) -> Callable[[], None]:
    """Add the log-probabilities of prompt tokens whose predecessors were computed now; those of
    the labels after prompts that are complete are added by the function that this gives."""
    labels = _read_labels(decoder, kv, chunks, hidden_RD)
    ends = list(accumulate(chunk.read for chunk in chunks))  # what is scored is not read again
    for chunk, rows in zip(chunks, ends, strict=True):
        generation, ids = chunk.generation, chunk.generation.request.ids
        row = rows - generation.held - chunk.rows  # of the token at position 0
        end = min(generation.held + chunk.count + 1, len(ids))
        for first in range(generation.unscored, end, SCORED_AT_ONCE):
            stop = min(first + SCORED_AT_ONCE, end)
            logits_TV = _logits(decoder, kv, hidden_RD[row + first - 1 : row + stop - 1])
            wanted = torch.tensor(ids[first:stop], device=logits_TV.device)
            logprobs_TV = logits_TV.float().log_softmax(-1)
            generation.scores += logprobs_TV.gather(1, wanted[:, None])[:, 0].tolist()
            if generation.request.best_scored:
                generation.tops += _best(logprobs_TV, generation.request.best_scored)
    return labels


def _read_labels(
    decoder: Decoder, kv: Paged, chunks: Sequence[Chunk], hidden_RD: Tensor
) -> Callable[[], None]:
    """Start to read the labels' log-probabilities, many prompts in one product; the function waits
    for them and gives them to their generations."""
    ends = accumulate(chunk.read for chunk in chunks)
    pairs = zip(chunks, ends, strict=True)
    found = [(c.generation, end) for c, end in pairs if c.complete and c.generation.request.labels]
    if not found:
        return lambda: None
    values = []
    for first in range(0, len(found), SCORED_AT_ONCE):
        some = found[first : first + SCORED_AT_ONCE]
        rows = upload([end - 1 for _, end in some], hidden_RD.device)
        logprobs_BV = _logits(decoder, kv, hidden_RD[rows]).float().log_softmax(-1)
        labels = [generation.request.labels for generation, _ in some]
        of_row = [row for row, ids in enumerate(labels) for _ in ids]
        row_N, id_N = upload([of_row, [id for ids in labels for id in ids]], hidden_RD.device)
        values.append(logprobs_BV[row_N, id_N])
    fetched = fetch([torch.cat(values)])

    def give() -> None:
        numbers = iter(fetched()[0] or ())
        for generation, _ in found:
            generation.labels = [next(numbers) for _ in generation.request.labels]

    return give
