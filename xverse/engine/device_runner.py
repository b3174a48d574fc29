"""CHUNKS -> TOKENS, ON A GPU. Steps that the host only sends off, and reads a step later.

What a step needs lies on the device: the page table of every slot, and the token last chosen for
it. So the host never waits for a token before it sends the next step: it knows which sequences
come along and how long they are, and not what they say.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from xverse.engine.adapters import Adapters, decoder_for
from xverse.engine.captured import CapturedSteps, padded
from xverse.engine.device_sampler import DeviceSampler, Picked, Row
from xverse.engine.grammar_rows import Allowed
from xverse.engine.paged import Paged
from xverse.engine.pages import Table
from xverse.engine.prompt_step import WHOLE_MULTIPLE, Prompts, PromptStep
from xverse.engine.request import Sampling
from xverse.engine.runner import (
    Choice,
    Chosen,
    Flight,
    choose,
    choosing,
    choosing_rows,
    owners_of,
    reading_rows,
    score,
)
from xverse.engine.sampler import Sampler, not_a_number
from xverse.engine.scheduler import Chunk, Generation
from xverse.engine.step import unfit
from xverse.engine.transfer import fetch, upload
from xverse.kernels.dispatch_quantized import WHOLE_ROWS
from xverse.log import warn_once
from xverse.model.decoder import Decoder


class DeviceRunner:
    """Decoding rows go through captured steps, prompts through `PromptStep`, all of one stream;
    rows whose adapter has no slot go the way of prompts, each of which may have another.

    `slots` sequences at most run at once; `spare` is a page of the pool that none of them has.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: Paged,
        *,
        slots: int,
        spare: int,
        adapters: Adapters | None = None,
    ) -> None:
        self.decoder, self.kv, self.slots, self.adapters = decoder, kv, slots, adapters
        width = -(-decoder.shape.context_length // kv.page_size)
        # Row `slots` of both is for rows of a captured step that nobody fills.
        self.tables_SP = torch.full((slots + 1, width), spare, dtype=torch.int32, device=kv.device)
        self.latest_S = torch.zeros(slots + 1, dtype=torch.int64, device=kv.device)
        self.sampler = DeviceSampler(slots, decoder.shape.vocab_size, kv.device)
        self.prompts = PromptStep(decoder, kv)
        turns = self.prompts.cos_SE, self.prompts.sin_SE
        in_slots = None if adapters is None else adapters.slots
        self.steps = CapturedSteps(decoder, kv, self.tables_SP, self.latest_S, turns, in_slots)
        self._seated: list[Table | None] = [None] * slots

    @classmethod
    def why_not(cls, decoder: Decoder, kv: Paged) -> str:
        """Why this decoder cannot be run so; empty where it can. On a GPU a reason is said once."""
        if decoder.device.type != "cuda":
            return "It is not on a GPU."
        why_not = unfit(decoder)
        if kv.fixed_rows is not None:
            why_not = "Deterministic mode computes every token in rows of one size."
        elif decoder.dtype != torch.bfloat16:
            why_not = f"Its weights are {decoder.dtype}, and the kernels are for bfloat16."
        if why_not:
            warn_once(f"steps run without the fused kernels, and slower: {why_not}")
        return why_not

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> Flight:
        """Send the step off. Waits for the device only where prompt tokens are to be scored, or
        guesses to be judged."""
        self._seat(chunks)
        if self.adapters is not None and self.adapters.slots is not None:
            self.adapters.slots.seat(chunk.generation.adapter for chunk in chunks)
        flight = Flight(chunks, [], list)
        # The longest first: they start together, and the short ones fill up behind them.
        decoding = [chunk for chunk in reversed(chunks) if self._decodes(chunk)]
        guessing = [chunk for chunk in chunks if chunk.draft]
        prompts = [chunk for chunk in chunks if not (chunk.draft or self._decodes(chunk))]
        others, found = [*guessing, *prompts], []
        if others:
            hidden_RD = self._prompts_hidden(others)
            flight.labels = score(self.decoder, self.kv, others, hidden_RD)
            if rows := choosing_rows(others):
                if len(rows) < len(hidden_RD):  # else they are the ones that are read
                    hidden_RD = hidden_RD[self._upload(rows)]
                found.append(self.decoder.logits(hidden_RD))
        if decoding:
            found.append(self.steps(self._inputs(decoding), len(decoding)))
        if not found:
            return flight
        logits_BV = found[0] if len(found) == 1 else torch.cat(found)
        guessed = sum(chunk.rows for chunk in guessing)
        if generations := choosing([*prompts, *decoding]):
            flight.choosing = [(generation, len(generation.ids)) for generation in generations]
            flight.choices = self._choose(generations, logits_BV[guessed:])
        if guessing:
            self._follow(flight, guessing, logits_BV[:guessed])
        return flight

    def _prompts_hidden(self, chunks: Sequence[Chunk]) -> Tensor:
        """Hidden states [R, D] of the rows that are read."""
        prompts, owners, read = self._prompts(chunks), owners_of(chunks), reading_rows(chunks)
        if owners:  # which say of every row in every layer whose it is
            with decoder_for(self.decoder, self.adapters, owners) as decoder:
                return self.prompts(prompts, decoder)[self._upload(read)]
        if len(read) < len(prompts.ids_T):
            prompts = replace(prompts, rows_R=self._upload(read))
        return self.prompts(prompts, self.decoder)

    def prepare(self) -> None:
        """Capture the steps of all sizes."""
        with torch.inference_mode():
            for size in sorted({padded(rows) for rows in range(1, self.slots + 1)}, reverse=True):
                self.steps.prepare(size)
                if self.steps.adapters is not None:
                    self.steps.prepare(size, adapted=True)

    def rehearse(self, step_tokens: int) -> int:
        """Run the largest steps on the spare page; the most bytes they took beside what stays.

        Quantized weights are widened whole for prompts of up to WHOLE_ROWS tokens, and part by part
        for longer ones, which may therefore take less memory: both are tried.
        """
        device, context = self.kv.device, self.decoder.shape.context_length
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        everything = Sampling(
            temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1, logprobs=20, seed=0
        )
        for slot in range(self.slots):
            self.sampler.enter(slot, Sampler(everything.over({})), [0], [])
        with torch.inference_mode():
            for tokens in {step_tokens, min(step_tokens, WHOLE_ROWS)}:
                counts = [min(context, tokens - start) for start in range(0, tokens, context)]
                rows = self._prompt_rows([(self.slots, 0, n) for n in counts])
                hidden_TD = self.prompts(rows, self.decoder)
                del hidden_TD
                if self.adapters is not None:
                    with self.adapters.over(()) as twin:
                        self.prompts(rows, twin)
            prompts = torch.cuda.max_memory_allocated(device) - before
            logits_BV = self.steps.rehearse(self.slots)
            if self.steps.adapters is not None:
                del logits_BV
                logits_BV = self.steps.rehearse(self.slots, adapted=True)
            slots_B = torch.arange(self.slots, device=device)
            self.sampler.choose(logits_BV, slots_B, [Row(i, 0) for i in range(self.slots)])
        torch.cuda.synchronize(device)
        # Captured steps keep what they work in, so both may be taken at once.
        return prompts + torch.cuda.max_memory_allocated(device) - before

    def _choose(
        self, generations: Sequence[Generation], logits_BV: Tensor
    ) -> Callable[[], list[Choice]]:
        slots_B = self._upload([g.slot for g in generations])
        rows = [Row(g.slot, len(g.ids) - len(g.request.ids)) for g in generations]
        samplers = [g.sampler for g in generations if g.sampler is not None]
        allowed = Allowed([sampler.grammar for sampler in samplers], logits_BV.shape[1])
        masks_BW = None if allowed.masks_BW is None else self._upload(allowed.masks_BW, numpy.int32)
        picked = self.sampler.choose(logits_BV, slots_B, rows, masks_BW)
        self.latest_S.index_copy_(0, slots_B, picked.ids_B.clamp(min=0))
        read = _read(picked, [sampler.sampling.logprobs for sampler in samplers])
        return lambda: allowed.accept(read())

    def _follow(self, flight: Flight, guessing: Sequence[Chunk], logits_RV: Tensor) -> None:
        """What is chosen after each token of a guess for as long as it is right: by the host, which
        must know anyhow before the next step."""
        for generation, found in choose(guessing, logits_RV):
            flight.add(generation, found)
            if generation.sampler is not None and generation.sampler.penalized:
                self._seated[generation.slot] = None  # the device has not counted these tokens

    def _seat(self, chunks: Sequence[Chunk]) -> None:
        """Bring the device's page tables up to date, and the options of who has just come."""
        places: list[int] = []
        pages: list[int] = []
        width = self.tables_SP.shape[1]
        for generation in (chunk.generation for chunk in chunks):
            table, slot = generation.table, generation.slot
            assert table is not None, "what runs has pages"
            if self._seated[slot] is not table:
                assert generation.sampler is None or not generation.pending
                self._seated[slot], table.stale = table, 0
                prompt = len(generation.request.ids)
                if generation.sampler is not None:
                    self.sampler.enter(
                        slot, generation.sampler, generation.ids[:prompt], generation.ids[prompt:]
                    )
            if table.stale < len(table.pages):
                start = slot * width
                places += range(start + table.stale, start + len(table.pages))
                pages += table.pages[table.stale :]
                table.stale = len(table.pages)
        if places:
            both = self._upload([places, pages])
            self.tables_SP.view(-1).index_copy_(0, both[0], both[1].int())

    def _inputs(self, chunks: Sequence[Chunk]) -> Tensor:
        """Slot, position and id (UNKNOWN: the slot's latest) of each decoding row, and the slot of
        its adapter where any has one; [3, B] or [4, B] int32."""
        some = [chunk.generation for chunk in chunks]
        rows: list[list[int | None]] = [
            [g.slot for g in some],
            [g.held for g in some],
            [g.ids[g.held] for g in some],
        ]
        if any(generation.adapter for generation in some):
            rows.append([self._adapter_slot(generation) for generation in some])
        return self._upload(rows, numpy.int32)

    def _prompts(self, chunks: Sequence[Chunk]) -> Prompts:
        spans = [(c.generation.slot, c.generation.held, c.rows) for c in chunks]
        ids = [
            [*c.generation.ids[c.generation.held : c.generation.held + c.count], *c.draft]
            for c in chunks
        ]
        return self._prompt_rows(spans, numpy.concatenate([numpy.array(i, "i4") for i in ids]))

    def _prompt_rows(
        self, spans: Sequence[tuple[int, int, int]], ids: NDArray[numpy.int32] | None = None
    ) -> Prompts:
        """Of (slot, held, count) each; without `ids` they are all 0."""
        whole = len(spans) == 1 and spans[0][1] == 0 and spans[0][2] >= self.prompts.whole_from
        if whole:
            spans = self._filled_up(spans[0])
        counts = [count for _, _, count in spans]
        rows = numpy.empty((3, sum(counts)), numpy.int32)  # slot, position, id
        rows[0] = numpy.repeat([slot for slot, _, _ in spans], counts)
        rows[1] = numpy.concatenate([numpy.arange(held, held + n) for _, held, n in spans])
        rows[2] = 0
        if ids is not None:
            rows[2, : len(ids)] = ids
        offsets = [0, *accumulate(counts)]
        ends = self._upload([offsets[:-1], offsets[1:], [held for _, held, _ in spans]], "i4")
        slot_T, positions_T, ids_T = self._upload(rows, numpy.int32)
        if ids is not None and (ids < 0).any():  # being chosen by the step under way
            ids_T = torch.where(ids_T < 0, self.latest_S[slot_T].int(), ids_T)
        slots_B = self._upload([slot for slot, _, _ in spans])
        size = self.kv.page_size
        page_T = self.tables_SP[slot_T, positions_T // size]
        return Prompts(
            ids_T=ids_T,
            positions_T=positions_T,
            places_T=page_T.long() * size + positions_T % size,
            tables_BP=self.tables_SP[slots_B],
            offsets_B1=torch.cat((ends[0], ends[1, -1:])),
            held_B=ends[2],
            longest=max(counts),
            whole=whole,
        )

    def _filled_up(self, span: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        """A long prompt, and after it rows that nobody reads."""
        more = -span[2] % WHOLE_MULTIPLE
        return [span, (self.slots, 0, more)] if more else [span]

    def _decodes(self, chunk: Chunk) -> bool:
        """Whether a captured step computes it."""
        generation = chunk.generation
        if generation.adapter is not None and self._adapter_slot(generation) is None:
            return False
        return chunk.rows == 1 and chunk.chooses and generation.unscored >= len(generation.ids)

    def _adapter_slot(self, generation: Generation) -> int | None:
        """The slot of a generation's adapter; None where it has none."""
        slots = None if self.adapters is None else self.adapters.slots
        return None if slots is None else slots.of(generation.adapter)

    def _upload(self, numbers: object, dtype: object = numpy.int64) -> Tensor:
        """A copy on the device that nobody waits for."""
        return upload(numbers, self.kv.device, dtype)


def _read(picked: Picked, wanted: Sequence[int | None]) -> Callable[[], list[Choice]]:
    """Start to copy what was chosen; the function waits for it and gives it as the host wants."""
    parts = (picked.ids_B, picked.logprobs_B, picked.top_ids_BN, picked.top_logprobs_BN)
    fetched = fetch(parts)

    def choices() -> list[Choice]:
        ids, *others = fetched()
        assert ids is not None, "something is always chosen"
        return [_choice(row, id, wanted[row], *others) for row, id in enumerate(ids)]

    return choices


def _choice(
    row: int,
    id: int,
    wanted: int | None,
    logprobs: list[float] | None,
    top_ids: list[list[int]] | None,
    top_logprobs: list[list[float]] | None,
) -> Choice:
    if id < 0:
        return not_a_number()
    if wanted is None:
        return Chosen(id)
    assert logprobs is not None, "whoever wants log-probabilities gets them"
    if not wanted:
        return Chosen(id, logprobs[row])
    assert top_ids is not None, "whoever wants the best gets them"
    assert top_logprobs is not None, "and their log-probabilities"
    pairs = zip(top_ids[row][:wanted], top_logprobs[row][:wanted], strict=True)
    return Chosen(id, logprobs[row], tuple(pairs))
