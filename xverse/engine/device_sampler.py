"""LOGITS -> IDS, ALL ROWS AT ONCE. What `Sampler` does for one, where the logits are.

Nothing waits for the device: what the host knows of a step goes there in one copy, and ids stay
there. Points are drawn on the host from each request's own random numbers, so that a seed gives the
answer that it gives alone.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xverse.engine.sampler import Sampler, refuse_unknown
from xverse.kernels import dispatch_sampling
from xverse.kernels.reference_sample import MOST, mark_prompt

SCORED_AT_ONCE = 64  # rows of logits in fp32 that are held for log-probabilities
# What the host sends of each row: the options of its slot, and its point.
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency")


class Row(NamedTuple):
    """What the host knows of a row of logits: its slot, and how many tokens its answer has."""

    slot: int
    answer_tokens: int


class Picked(NamedTuple):
    """What was chosen, on the device: ids [B] int64, -1 where the logits are NaN.

    Where any request asks for them: log-probabilities [B] by the model itself, NaN for others; and
    the N best ids [B, N], best first, with theirs, for the request that wants most; -1 for others.
    """

    ids_B: Tensor
    logprobs_B: Tensor | None = None
    top_ids_BN: Tensor | None = None
    top_logprobs_BN: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Entry:
    """Who is in a slot, and what a step must do for it."""

    sampler: Sampler
    number: int  # no two that ever enter have the same
    samples: bool
    penalized: bool
    biased: bool
    min_tokens: int  # 0 where no token is held off
    logprobs: int | None


class DeviceSampler:
    """Choices for up to `slots` sequences that run at once, on one stream of the device."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self._entries: list[_Entry | None] = [None] * slots
        self._entered = 0
        self._options = torch.zeros(len(OPTIONS), slots, dtype=torch.float64)
        self._counts: Tensor | None = None  # [slots, V] int16, when first wanted
        self._additions: tuple[object, Tensor, Tensor] | None = None
        self._best = dispatch_sampling.best_rows(device, slots, vocab_size).call
        self._sample = dispatch_sampling.sample_rows(device, slots, vocab_size).call
        self._mask = dispatch_sampling.mask_rows(device).call
        self._penalize = dispatch_sampling.penalize_rows(device).call
        self._count = dispatch_sampling.count_rows(device).call

    def enter(
        self,
        slot: int,
        sampler: Sampler,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int] = (),
    ) -> None:
        """Give a slot to a request: its prompt, and its answer so far where it comes back.

        Raises XverseError where its options name ids that the model does not know.
        """
        options = sampler.sampling
        refuse_unknown(sampler.additions(0), self.vocab_size)
        self._entered += 1
        self._entries[slot] = _Entry(
            sampler,
            self._entered,
            samples=bool(options.temperature),
            penalized=sampler.penalized,
            biased=bool(options.logit_bias),
            min_tokens=(options.min_tokens or 0) if sampler.end_ids else 0,
            logprobs=options.logprobs,
        )
        repetition = options.repetition_penalty
        self._options[:, slot] = torch.tensor(
            [
                options.temperature or 0.0,
                min(options.top_k or 0, self.vocab_size),
                1.0 if options.top_p is None else options.top_p,
                options.min_p or 0.0,
                1.0 if repetition is None else repetition,
                options.presence_penalty or 0.0,
                options.frequency_penalty or 0.0,
            ],
            dtype=torch.float64,
        )
        if sampler.penalized:
            self._remember(slot, prompt_ids, answer_ids)

    def leave(self, slot: int) -> None:
        """Take a slot back from its request."""
        self._entries[slot] = None

    def choose(
        self,
        logits_BV: Tensor,
        slots_B: Tensor,
        rows: Sequence[Row],
        masks_BW: Tensor | None = None,
    ) -> Picked:
        """One token for each row, counted as seen; no slot may come twice.

        `slots_B` (int64, on the device) and `rows` name the same slots. `masks_BW` (int32, on the
        device) has bit v % 32 of word v // 32 set where token v is allowed. Logits stay as they
        are.
        """
        entries = [self._entry(row.slot) for row in rows]
        additions = self._added(entries, rows)
        penalized = any(entry.penalized for entry in entries)
        samples = any(entry.samples for entry in entries)
        changed_BV = logits_BV
        if additions is not None or penalized:
            changed_BV = torch.empty(logits_BV.shape, dtype=torch.float32, device=self.device)
            changed_BV.copy_(logits_BV)
        elif masks_BW is not None:
            changed_BV = logits_BV.clone()
        if masks_BW is not None:
            self._mask(changed_BV, masks_BW)
        if additions is not None:
            changed_BV.view(-1).index_add_(0, *additions)
        if samples or penalized:
            temperature_B, top_k_B, top_p_B, min_p_B, *penalties, points_B = self._sent(
                entries, rows
            )
        if penalized:
            assert self._counts is not None, "whoever is penalized has entered"
            self._penalize(changed_BV, self._counts, slots_B, *penalties)
        if samples:
            ids_B = self._sample(changed_BV, temperature_B, top_k_B, top_p_B, min_p_B, points_B)
        else:
            ids_B = self._best(changed_BV)
        if penalized:
            self._count(self._counts, slots_B, ids_B)
        return Picked(ids_B, *self._logprobs(entries, logits_BV, ids_B))

    def _entry(self, slot: int) -> _Entry:
        entry = self._entries[slot]
        assert entry is not None, f"nobody is in slot {slot}"
        return entry

    def _remember(self, slot: int, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> None:
        if self._counts is None:
            size = len(self._entries), self.vocab_size
            self._counts = torch.zeros(size, dtype=torch.int16, device=self.device)
        mark_prompt(self._counts, slot, self._whole(prompt_ids))
        counts = Counter(answer_ids)
        if counts:
            most = [min(count, MOST) for count in counts.values()]
            self._counts[slot].index_add_(0, self._whole(counts), self._whole(most).short())

    def _sent(self, entries: Sequence[_Entry], rows: Sequence[Row]) -> Sequence[Tensor]:
        """On the device, for each row: what OPTIONS name, and its point."""
        packed = torch.empty(len(OPTIONS) + 1, len(rows), dtype=torch.float64)
        torch.index_select(
            self._options, 1, torch.tensor([row.slot for row in rows]), out=packed[:-1]
        )
        points = [entry.sampler.point() if entry.samples else 0.0 for entry in entries]
        packed[-1] = torch.tensor(points, dtype=torch.float64)
        return self._upload(packed).unbind()

    def _added(
        self, entries: Sequence[_Entry], rows: Sequence[Row]
    ) -> tuple[Tensor, Tensor] | None:
        """Places in the flattened logits and what is added there; sent again where it changes."""
        held_off = [
            entry.min_tokens > row.answer_tokens and entry.sampler.holds_off(row.answer_tokens)
            for entry, row in zip(entries, rows, strict=True)
        ]
        key = tuple(
            (place, entry.number, held)
            for place, (entry, held) in enumerate(zip(entries, held_off, strict=True))
            if entry.biased or held
        )
        if not key:
            return None
        if self._additions is None or self._additions[0] != key:
            found = [
                (place * self.vocab_size + id, value)
                for place, _, _ in key
                for id, value in entries[place].sampler.additions(rows[place].answer_tokens).items()
            ]
            values = torch.tensor([value for _, value in found], dtype=torch.float32)
            self._additions = key, self._whole(p for p, _ in found), self._upload(values)
        return self._additions[1:]

    def _logprobs(
        self, entries: Sequence[_Entry], logits_BV: Tensor, ids_B: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        wanted = {row: e.logprobs for row, e in enumerate(entries) if e.logprobs is not None}
        if not wanted:
            return None, None, None
        most = min(max(wanted.values()), self.vocab_size)
        logprobs_B = torch.full(ids_B.shape, float("nan"), device=self.device)
        top_logprobs_BN = torch.full((len(ids_B), most), float("nan"), device=self.device)
        top_ids_BN = torch.full((len(ids_B), most), -1, dtype=torch.int64, device=self.device)
        for some_B in self._whole(wanted).split(SCORED_AT_ONCE):
            scores_BV = logits_BV[some_B].float().log_softmax(-1)
            chosen_B = ids_B[some_B].clamp(min=0)
            logprobs_B[some_B] = scores_BV.gather(1, chosen_B[:, None])[:, 0]
            top = scores_BV.topk(most)
            top_ids_BN[some_B], top_logprobs_BN[some_B] = top.indices, top.values
        return (logprobs_B, top_ids_BN, top_logprobs_BN) if most else (logprobs_B, None, None)

    def _whole(self, numbers: Iterable[int]) -> Tensor:
        return self._upload(torch.tensor(list(numbers), dtype=torch.int64))

    def _upload(self, x: Tensor) -> Tensor:
        """To the device without waiting; pinned memory is not given out again before it is read."""
        if self.device.type != "cuda":
            return x.to(self.device)
        return x.pin_memory().to(self.device, non_blocking=True)
