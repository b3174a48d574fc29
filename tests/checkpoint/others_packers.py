"""FIXTURE. GPTQ and AWQ checkpoints as their authors describe them, packed number by number.

Nothing here is shared with the reader: words are built from Python integers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def word(values: Sequence[int], bits: int) -> int:
    """Values of `bits` bits as one signed 32-bit integer, the first lowest."""
    total = 0
    for place, value in enumerate(values):
        assert 0 <= value < 2**bits
        total |= value << bits * place
    return total - 2**32 if total >= 2**31 else total


def gptq(
    steps_ND: Tensor,
    zeros_NG: Tensor,
    scales_NG: Tensor,
    group_of_D: Tensor,
    bits: int,
    version: int,
) -> dict[str, Tensor]:
    """qweight, qzeros, scales, g_idx of a layer whose steps are 0..2^bits-1.

    Version 1 stores each zero less one.
    """
    per_word = 32 // bits
    rows, columns = steps_ND.shape
    groups = zeros_NG.shape[1]
    steps, zeros = steps_ND.tolist(), zeros_NG.tolist()
    less = 1 if version == 1 else 0
    qweight = [
        [word([steps[n][d + i] for i in range(per_word)], bits) for n in range(rows)]
        for d in range(0, columns, per_word)
    ]
    qzeros = [
        [
            word([(zeros[n + i][g] - less) % 2**bits for i in range(per_word)], bits)
            for n in range(0, rows, per_word)
        ]
        for g in range(groups)
    ]
    return {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": scales_NG.t().contiguous().half(),
        "g_idx": group_of_D.int(),
    }


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: the i-th nibble holds the output of this number


def awq(steps_ND: Tensor, zeros_NG: Tensor, scales_NG: Tensor) -> dict[str, Tensor]:
    """qweight, qzeros and scales of a layer whose steps are 0..15."""

    def words(numbers_NK: Tensor) -> Tensor:
        lists = numbers_NK.t().tolist()
        return torch.tensor(
            [
                [word([row[n + i] for i in AWQ_ORDER], 4) for n in range(0, len(row), 8)]
                for row in lists
            ],
            dtype=torch.int32,
        )

    return {
        "qweight": words(steps_ND),
        "qzeros": words(zeros_NG),
        "scales": scales_NG.t().contiguous().half(),
    }


def numbers(steps_ND: Tensor, zeros_NG: Tensor, scales_NG: Tensor, group_of_D: Tensor) -> Tensor:
    """What the layer stands for, column by column: (q - zero) * scale of the column's group."""
    columns = [
        (steps_ND[:, d] - zeros_NG[:, g]).float() * scales_NG[:, g].half().float()
        for d, g in enumerate(group_of_D.tolist())
    ]
    return torch.stack(columns, dim=1)
