"""LOGITS -> ID. The choice of one token, in the order and by the definitions of Hugging Face."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from xverse.engine.grammar_state import GrammarState
from xverse.engine.request import Sampling
from xverse.errors import XverseError
from xverse.kernels.reference_sample import choose_row

DRAWN_AT_ONCE = 32  # random numbers; one by one each takes ten times as long


class Sampler:
    """The choice of tokens for one request; it has its own random numbers."""

    def __init__(self, sampling: Sampling, end_ids: Collection[int] = ()) -> None:
        """`sampling` must be filled: `Sampling.over` leaves no option open. `end_ids` are held
        off until min_tokens."""
        self.sampling = sampling
        self.end_ids = {*end_ids, *sampling.stop_ids}
        self.grammar: GrammarState | None = None  # set when it is compiled, if one is asked for
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._points: list[float] = []

    @property
    def greedy(self) -> bool:
        """Whether the choice is always the best logit as it is."""
        return self.sampling.temperature == 0.0 and not self._changes and not self.sampling.grammar

    @property
    def penalized(self) -> bool:
        """Whether what was seen counts for the choice."""
        options = self.sampling
        return bool(
            options.repetition_penalty not in (None, 1.0)
            or options.presence_penalty
            or options.frequency_penalty
        )

    @property
    def _changes(self) -> bool:
        options = self.sampling
        held_off = bool(options.min_tokens and self.end_ids)
        return self.penalized or bool(options.logit_bias) or held_off

    def additions(self, answer_tokens: int) -> dict[int, float]:
        """What is added to the logits of ids when the answer has so many tokens."""
        found = dict(self.sampling.logit_bias or {})
        if self.holds_off(answer_tokens):
            found |= dict.fromkeys(self.end_ids, float("-inf"))
        return found

    def holds_off(self, answer_tokens: int) -> bool:
        """Whether the answer may not end yet. It may where its grammar allows nothing else."""
        early = bool(self.end_ids) and answer_tokens < (self.sampling.min_tokens or 0)
        return early and not (self.grammar is not None and self.grammar.only_end)

    def choose(self, logits_V: Tensor, seen: Sequence[int], start: int | None = None) -> int:
        """The next token after `seen`, from its logits [V]; the answer's own part of `seen` begins
        at `start`, by default at its end. Where there is a grammar it goes on by that token."""
        if self.sampling.grammar is None:
            return self._choose(logits_V, seen, start)
        assert self.grammar is not None, "whoever chooses has its grammar compiled"
        id = self._choose(self.grammar.masked(logits_V), seen, start)
        self.grammar.accept(id)
        return id

    def _choose(self, logits_V: Tensor, seen: Sequence[int], start: int | None) -> int:
        if self._changes:
            answer = seen[start:] if start is not None else ()
            logits_V = self._changed(logits_V.float(), seen, answer)
        options, temperature = self.sampling, self.sampling.temperature or 0.0
        id = choose_row(
            logits_V,
            temperature,
            options.top_k or 0,
            1.0 if options.top_p is None else options.top_p,
            options.min_p or 0.0,
            self.point() if temperature else 0.0,
        )
        if id < 0:
            raise not_a_number()
        return id

    def point(self) -> float:
        """The next of this request's own random numbers, from 0 to 1: one for each choice that is
        not greedy. They are the same however many are drawn at once."""
        if not self._points:
            drawn = torch.rand(DRAWN_AT_ONCE, generator=self.generator, dtype=torch.float64)
            self._points = drawn.flip(0).tolist()
        return self._points.pop()

    def _changed(self, logits_V: Tensor, seen: Sequence[int], answer: Sequence[int]) -> Tensor:
        options = self.sampling
        if additions := self.additions(len(answer)):
            logits_V = add(logits_V, additions)
        if options.repetition_penalty is not None and options.repetition_penalty != 1.0:
            logits_V = penalize_repetition(logits_V, seen, options.repetition_penalty)
        presence, frequency = options.presence_penalty or 0.0, options.frequency_penalty or 0.0
        if presence or frequency:
            counts = Counter(answer)
            logits_V = add(
                logits_V, {id: -presence - frequency * count for id, count in counts.items()}
            )
        return logits_V


def not_a_number() -> XverseError:
    """What to say where the model's numbers cannot be used."""
    return XverseError(
        "The model computed numbers that are no numbers (NaN).",
        "Weights are damaged, or too large for the dtype they are computed in.",
        "Verify the folder, or run it with dtype bfloat16 or float32.",
    )


def add(logits_V: Tensor, changes: Mapping[int, float]) -> Tensor:
    """The logits with something added to those of some ids; XverseError for an unknown id."""
    refuse_unknown(changes, len(logits_V))
    ids = torch.tensor(list(changes), dtype=torch.int64, device=logits_V.device)
    values = torch.tensor(list(changes.values()), dtype=logits_V.dtype, device=logits_V.device)
    return logits_V.index_add(0, ids, values)


def refuse_unknown(ids: Collection[int], vocab_size: int) -> None:
    """XverseError where an id that is to be changed is none of the model's."""
    if max(ids, default=0) >= vocab_size:
        raise XverseError(
            f"There is no token {max(ids)}.",
            f"The model knows ids from 0 to {vocab_size - 1}.",
            "Correct logit_bias or stop_ids.",
        )


def penalize_repetition(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Divide positive logits of tokens already seen by `penalty`, multiply negative ones.

    Keskar et al. 2019 (CTRL) in Hugging Face's form; prompt tokens count as seen.
    """
    ids = torch.tensor(list(set(seen)), dtype=torch.int64, device=logits_V.device)
    old = logits_V[ids]
    return logits_V.index_put((ids,), torch.where(old < 0, old * penalty, old / penalty))
