"""LOGITS -> ID. The choice of one token, in the order and by the definitions of Hugging Face."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from xverse.engine.grammar_state import GrammarState
from xverse.engine.request import Sampling
from xverse.errors import XverseError


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

    @property
    def greedy(self) -> bool:
        """Whether the choice is always the best logit as it is."""
        return self.sampling.temperature == 0.0 and not self._changes and not self.sampling.grammar

    @property
    def _changes(self) -> bool:
        options = self.sampling
        return bool(
            options.repetition_penalty not in (None, 1.0)
            or options.presence_penalty
            or options.frequency_penalty
            or options.logit_bias
            or (options.min_tokens and self.end_ids)
        )

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
        temperature = self.sampling.temperature
        if self._changes or temperature != 0.0:
            logits_V = logits_V.float()
        if self._changes:
            logits_V = self._changed(logits_V, seen, seen[start:] if start is not None else ())
        if temperature is None or temperature == 0.0:
            best = logits_V.argmax()
            _refuse_nan(logits_V[best])
            return int(best)
        probabilities = self._probabilities(logits_V / temperature)
        point = torch.rand((), generator=self.generator, dtype=torch.float64)
        sums = probabilities.double().cpu().cumsum(0)
        _refuse_nan(sums[-1])
        return int(torch.searchsorted(sums, point * sums[-1], right=True).clamp(max=len(sums) - 1))

    def _changed(self, logits_V: Tensor, seen: Sequence[int], answer: Sequence[int]) -> Tensor:
        options = self.sampling
        early = len(answer) < (options.min_tokens or 0) and self.end_ids
        if early and not (self.grammar and self.grammar.only_end):
            logits_V = add(logits_V, dict.fromkeys(self.end_ids, float("-inf")))
        if options.logit_bias:
            logits_V = add(logits_V, options.logit_bias)
        if options.repetition_penalty is not None and options.repetition_penalty != 1.0:
            logits_V = penalize_repetition(logits_V, seen, options.repetition_penalty)
        presence, frequency = options.presence_penalty or 0.0, options.frequency_penalty or 0.0
        if presence or frequency:
            counts = Counter(answer)
            logits_V = add(
                logits_V, {id: -presence - frequency * count for id, count in counts.items()}
            )
        return logits_V

    def _probabilities(self, scores_V: Tensor) -> Tensor:
        top_k, top_p, min_p = self.sampling.top_k, self.sampling.top_p, self.sampling.min_p
        if top_k:
            scores_V = keep_top_k(scores_V, top_k)
        if top_p is not None and top_p < 1.0:
            scores_V = keep_top_p(scores_V, top_p)
        if min_p:
            scores_V = keep_min_p(scores_V, min_p)
        return scores_V.softmax(-1)


def _refuse_nan(value: Tensor) -> None:
    if value.isnan():
        raise not_a_number()


def not_a_number() -> XverseError:
    """What to say where the model's numbers cannot be used."""
    return XverseError(
        "The model computed numbers that are no numbers (NaN).",
        "Weights are damaged, or too large for the dtype they are computed in.",
        "Verify the folder, or run it with dtype bfloat16 or float32.",
    )


def add(logits_V: Tensor, changes: Mapping[int, float]) -> Tensor:
    """The logits with something added to those of some ids; XverseError for an unknown id."""
    if max(changes, default=0) >= len(logits_V):
        raise XverseError(
            f"There is no token {max(changes)}.",
            f"The model knows ids from 0 to {len(logits_V) - 1}.",
            "Correct logit_bias or stop_ids.",
        )
    ids = torch.tensor(list(changes), dtype=torch.int64, device=logits_V.device)
    values = torch.tensor(list(changes.values()), dtype=logits_V.dtype, device=logits_V.device)
    return logits_V.index_add(0, ids, values)


def penalize_repetition(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Divide positive logits of tokens already seen by `penalty`, multiply negative ones.

    Keskar et al. 2019 (CTRL) in Hugging Face's form; prompt tokens count as seen.
    """
    ids = torch.tensor(list(set(seen)), dtype=torch.int64, device=logits_V.device)
    old = logits_V[ids]
    return logits_V.index_put((ids,), torch.where(old < 0, old * penalty, old / penalty))


def keep_top_k(scores_V: Tensor, top_k: int) -> Tensor:
    """Minus infinity for all but the `top_k` best; ties with the last of them stay."""
    least = scores_V.topk(min(top_k, len(scores_V))).values[-1]
    return scores_V.masked_fill(scores_V < least, float("-inf"))


def keep_top_p(scores_V: Tensor, top_p: float) -> Tensor:
    """Keep the fewest best tokens whose probabilities reach `top_p` (Holtzman et al. 2019)."""
    ascending, order = scores_V.sort(stable=True)
    out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    out[-1] = False  # one token always stays
    return scores_V.masked_fill(torch.empty_like(out).scatter(0, order, out), float("-inf"))


def keep_min_p(scores_V: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest."""
    probabilities = scores_V.softmax(-1)
    return scores_V.masked_fill(probabilities < min_p * probabilities.max(), float("-inf"))
