"""THE SPECIFICATION OF CHOOSING. From logits to ids, as plain PyTorch; Hugging Face's definitions.

Letters as in `reference.py`; here S counts slots: one for each sequence that runs, kept while it
runs. What a slot has seen of a token is an int16: the low 15 bits are how often the token stands in
the answer, and the sign bit says that it stands in the prompt.
"""

import torch
from torch import Tensor

MOST = 0x7FFF  # occurrences that are counted
IN_PROMPT = -0x8000


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


def choose_row(
    logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, point: float
) -> int:
    """One token by its options, and by `point` from 0 to 1; -1 where probabilities would be NaN.

    Temperature 0 is the best logit, the first of equals. top_k 0, top_p 1 and min_p 0 are off.
    Otherwise the id at which the sums of probabilities, in the order of ids, first exceed `point`.
    """
    if temperature == 0.0:
        best = logits_V.argmax()
        return -1 if logits_V[best].isnan() else int(best)
    scores_V = logits_V.float() / temperature
    if top_k:
        scores_V = keep_top_k(scores_V, top_k)
    if top_p < 1.0:
        scores_V = keep_top_p(scores_V, top_p)
    if min_p:
        scores_V = keep_min_p(scores_V, min_p)
    sums = scores_V.softmax(-1).double().cpu().cumsum(0)
    if sums[-1].isnan():
        return -1
    return int(torch.searchsorted(sums, point * sums[-1], right=True).clamp(max=len(sums) - 1))


def sample_rows(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    points_B: Tensor,
) -> Tensor:
    """`choose_row` for each row with options of its own. -> ids [B] int64."""
    options = (temperature_B, top_k_B, top_p_B, min_p_B, points_B)
    found = [
        choose_row(logits_V, temperature, int(top_k), top_p, min_p, point)
        for logits_V, temperature, top_k, top_p, min_p, point in zip(
            logits_BV, *(option.tolist() for option in options), strict=True
        )
    ]
    return torch.tensor(found, dtype=torch.int64, device=logits_BV.device)


def best_rows(logits_BV: Tensor) -> Tensor:
    """The best logit of each row, the first of equals; -1 where one is NaN. -> ids [B] int64."""
    best = logits_BV.max(-1)
    return best.indices.masked_fill(best.values.isnan(), -1)


def mask_rows(logits_BV: Tensor, masks_BW: Tensor) -> Tensor:
    """Minus infinity, in place, for tokens that are not allowed; returns the logits.

    Bit v % 32 of int32 word v // 32 of a row's mask is 1 where token v is allowed.
    """
    bits = masks_BW[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks_BW.device) & 1
    return logits_BV.masked_fill_(bits.flatten(1)[:, : logits_BV.shape[1]] == 0, float("-inf"))


def penalize_rows(
    logits_BV: Tensor,
    counts_SV: Tensor,
    slots_B: Tensor,
    repetition_B: Tensor,
    presence_B: Tensor,
    frequency_B: Tensor,
) -> Tensor:
    """Penalties on fp32 logits, in place, by what each row's slot has seen; returns the logits.

    Repetition divides positive logits of all that was seen and multiplies negative ones (Keskar et
    al. 2019). Then logit - count * frequency - presence for tokens of the answer (OpenAI's).
    Repetition 1, presence 0 and frequency 0 leave a row as it is, whatever its slot has seen.
    """
    counts_BV = counts_SV[slots_B]
    answer_BV = counts_BV & MOST
    repetition = repetition_B.to(logits_BV.dtype)[:, None]
    changed = torch.where(logits_BV < 0, logits_BV * repetition, logits_BV / repetition)
    changes = -presence_B.double()[:, None] - frequency_B.double()[:, None] * answer_BV
    changes = changes.masked_fill(answer_BV == 0, 0.0).to(logits_BV.dtype)
    return logits_BV.copy_(torch.where(counts_BV != 0, changed, logits_BV) + changes)


def count_rows(counts_SV: Tensor, slots_B: Tensor, ids_B: Tensor) -> Tensor:
    """Count, in place, one more of each id in its slot, but for ids below 0; returns the counts.

    No slot may come twice.
    """
    known = ids_B.clamp(min=0)
    old = counts_SV[slots_B, known]
    more = (ids_B >= 0) & (old & MOST < MOST)
    counts_SV[slots_B, known] = old + more.to(old.dtype)
    return counts_SV


def mark_prompt(counts_SV: Tensor, slot: int, ids: Tensor) -> None:
    """Let a slot have seen the prompt `ids` (int64, where the counts are) and nothing else."""
    counts_SV[slot].zero_()
    counts_SV[slot, ids] = IN_PROMPT
