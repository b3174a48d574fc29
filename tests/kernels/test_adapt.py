"""What adapters add to rows of a batch, against its plain twin, in Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

from xverse.kernels import reference_adapt
from xverse.kernels.reference_adapt import JOINED, Slots, empty_slots

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a check by Triton's interpreter", allow_module_level=True)

from xverse.kernels import adapt_triton
from xverse.kernels.adapt_triton import FEW

INPUTS = 136  # no multiple of a block
HALF_ROUNDING = 2**-11  # the interpreter has no products of bf16


def seeded(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + seed))


def filled(outputs: tuple[int, ...], dtype: torch.dtype, *, rank: int = 40) -> Slots:
    """Four slots: of all ranks that there is room for, of few, of one part alone, and of none."""
    ranks_SL = torch.zeros(4, JOINED, dtype=torch.int32)
    ranks_SL[:2, : len(outputs)] = torch.tensor([[rank], [5]])
    ranks_SL[2, len(outputs) - 1] = 17
    slots = empty_slots(4, rank, INPUTS, outputs, torch.empty(0, dtype=dtype), ranks_SL)
    first = 0
    for part, last in enumerate(slots.ends):
        for slot in range(3):
            own = int(ranks_SL[slot, part])
            slots.a_SLRD[slot, part, :own] = seeded(own, INPUTS, seed=part).to(dtype) / 8
            slots.b_SRN[slot, :own, first:last] = seeded(own, last - first, seed=slot).to(dtype) / 8
        first = last
    slots.gain_SN[1] = 1 + seeded(slots.ends[-1]) / 8
    return slots


def both(
    slots: Slots, slot_T: Tensor, dtype: torch.dtype, *, more: int = 0, biased: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y before, and as the kernel and as its twin change it; `more` rows have no slot at all."""
    tokens, outputs = len(slot_T) + more, slots.ends[-1]
    x_TD, y_TN = seeded(tokens, INPUTS).to(dtype), seeded(tokens, outputs, seed=1).to(dtype)
    bias_N = seeded(outputs).to(dtype) if biased else None
    ours, twins = y_TN.clone(), y_TN.clone()
    adapt_triton.add_adapters(ours, x_TD, slot_T, slots, bias_N)
    reference_adapt.add_adapters(twins, x_TD, slot_T, slots, bias_N)
    return y_TN, ours, twins


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("outputs", [(200,), (96, 150), (130, 30, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_of_several_adapters(
    dtype: torch.dtype, outputs: tuple[int, ...], biased: bool
) -> None:
    slots = filled(outputs, dtype)
    slot_T = torch.tensor([0, -1, 1, 2, 1, 3, 0, -1, 2], dtype=torch.int32)
    before, ours, twins = both(slots, slot_T, dtype, more=2, biased=biased)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * HALF_ROUNDING
    assert torch.allclose(ours, twins, rtol=tolerance, atol=tolerance * float(twins.abs().max()))
    alone = torch.tensor([1, 5, 7, 9, 10])  # without an adapter, of an empty slot, without a slot
    assert torch.equal(ours[alone], before[alone])
    changed = (ours != before).float().mean(1)
    assert (changed[[0, 2, 4, 6]] > 0.9).all()
    # Of slot 2 the last of the joined layers alone.
    first = slots.ends[-2] if len(outputs) > 1 else 0
    assert torch.equal(ours[[3, 8], :first], before[[3, 8], :first])
    assert (ours[[3, 8], first:] != before[[3, 8], first:]).float().mean() > 0.9


@pytest.mark.parametrize("tokens", [1, 17, 40, 70, FEW + 5])
def test_any_number_of_rows(tokens: int) -> None:
    slots = filled((48, 48), torch.float32)
    slot_T = (torch.arange(tokens) % 5 - 1).int()
    _, ours, twins = both(slots, slot_T, torch.float32)
    assert torch.allclose(ours, twins, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [9, FEW + 5])
def test_not_a_bit_of_a_row_depends_on_whose_its_neighbours_are(tokens: int) -> None:
    slots = filled((64, 40), torch.float16)
    mixed = (torch.arange(tokens) % 5 - 1).int()
    _, together, _ = both(slots, mixed, torch.float16)
    for slot in range(4):
        rows = mixed == slot
        only = torch.where(rows, mixed, -1).int()
        _, alone, _ = both(slots, only, torch.float16)
        assert torch.equal(alone[rows], together[rows])


def test_what_lies_in_other_slots_is_not_read() -> None:
    slots = filled((64,), torch.float32)
    slot_T = torch.tensor([1, -1, 1], dtype=torch.int32)
    _, expected, _ = both(slots, slot_T, torch.float32)
    for tensor in (slots.a_SLRD, slots.b_SRN, slots.gain_SN):
        tensor[[0, 2, 3]] = torch.nan
    slots.b_SRN[1, 16:], slots.a_SLRD[1, :, 16:] = torch.nan, torch.nan  # beyond the rank's block
    _, found, _ = both(slots, slot_T, torch.float32)
    assert torch.equal(found, expected)
