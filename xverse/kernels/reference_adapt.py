"""THE SPECIFICATION OF ADAPTERS. What those of each row add behind a linear layer, plainly.

Letters as in `reference.py`; S slot, R rank, N outputs, L a published layer of those joined in one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

RANKS = 16  # ranks that a program computes together at least: the least of tensor cores
JOINED = 3  # published layers in one at most: q, k and v


class Slots(NamedTuple):
    """Adapters of one layer, each in a slot of memory that stays in place.

    `a` [S, L, R, D] and `b` [S, R, N], the adapter's scale in it, zero beyond an adapter's rank;
    `gain` [S, N] as `Change` has it, 1 without DoRA. `ranks` [S, JOINED] int32: 0 where an adapter
    leaves a published layer alone. `ends`: where the outputs of each published layer end. R is a
    multiple of RANKS.
    """

    a_SLRD: Tensor
    b_SRN: Tensor
    gain_SN: Tensor
    ranks_SL: Tensor
    ends: tuple[int, ...]


def add_adapters(
    y_TN: Tensor, x_TD: Tensor, slot_T: Tensor, slots: Slots, bias_N: Tensor | None = None
) -> None:
    """Make (y + B A x) of y in place, by the adapter in the slot of each row; -1 leaves a row as it
    is, and so does having no slot: `slot` (int32) may be shorter than y.

    With DoRA (y - bias + B A x) * gain + bias. A x is rounded to x's dtype, sums are in fp32.
    """
    for slot in slot_T.unique().tolist():
        if slot < 0:
            continue
        rows = (slot_T == slot).nonzero()[:, 0]
        first = 0
        for part, last in enumerate(slots.ends):
            rank = int(slots.ranks_SL[slot, part])
            if rank:
                low_TR = (x_TD[rows].float() @ slots.a_SLRD[slot, part, :rank].float().T).to(
                    x_TD.dtype
                )
                more_TN = low_TR.float() @ slots.b_SRN[slot, :rank, first:last].float()
                bias = 0.0 if bias_N is None else bias_N[first:last].float()
                sums_TN = y_TN[rows, first:last].float() - bias + more_TN
                changed = sums_TN * slots.gain_SN[slot, first:last].float() + bias
                y_TN[rows, first:last] = changed.to(y_TN.dtype)
            first = last


def empty_slots(
    count: int, rank: int, inputs: int, outputs: tuple[int, ...], like: Tensor, ranks_SL: Tensor
) -> Slots:
    """Slots of a layer that nobody has; of `rank` or the next multiple of RANKS, in the dtype and
    on the device of `like`."""
    wide, total = -(-rank // RANKS) * RANKS, sum(outputs)
    ends = tuple(sum(outputs[: part + 1]) for part in range(len(outputs)))
    return Slots(
        torch.zeros(count, len(outputs), wide, inputs, dtype=like.dtype, device=like.device),
        torch.zeros(count, wide, total, dtype=like.dtype, device=like.device),
        torch.ones(count, total, dtype=like.dtype, device=like.device),
        ranks_SL,
        ends,
    )
