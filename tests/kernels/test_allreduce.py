"""Sums and gathers through shared memory, in Triton's interpreter: the ranks are inboxes here."""

import dataclasses
import os
import threading
import time

import pytest
import torch
from torch import Tensor

from xverse.kernels import reference

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("these are checks by Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed, and its interpreter is the test")

from xverse.kernels.allreduce_triton import Exchange, add_parts, gather_columns

CAPACITY, BLOCK = 128, 32


class Ranks:
    """Exchanges over inboxes in this process. A turn is taken by one rank after another: those
    that come before the last do not wait (`abandoned`), so that theirs is only to send."""

    def __init__(self, size: int) -> None:
        words = Exchange.inbox_words(CAPACITY, size)
        self.inboxes = [torch.zeros(words, dtype=torch.int64) for _ in range(size)]
        addresses = [inbox.data_ptr() for inbox in self.inboxes]
        device = torch.device("cpu")
        self.exchanges = [
            Exchange.of(addresses, rank, CAPACITY, device, memory=self.inboxes, block=BLOCK)
            for rank in range(size)
        ]

    def sending(self, rank: int) -> Exchange:
        """The exchange of a rank that sends and does not wait; its turns are counted."""
        return dataclasses.replace(self.exchanges[rank], abandoned=torch.ones(1, dtype=torch.int32))


def parts_of(ranks: int, *size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ranks, *size, generator=generator).to(dtype)


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_sum_turn_after_turn(size: int) -> None:
    """Bit by bit that of the reference; rows come and go, so that blocks rest for some turns."""
    for reader in (0, size - 1):
        ranks = Ranks(size)
        for turn, tokens in enumerate((1, 3, 1, 2, 3)):
            parts = parts_of(size, tokens, 40, dtype=torch.float16, seed=turn)
            residual = (
                parts_of(1, tokens, 40, dtype=torch.float16, seed=99)[0] if turn % 2 else None
            )
            for rank in range(size):
                if rank != reader:
                    add_parts(parts[rank], ranks.sending(rank), residual)
            y = add_parts(parts[reader], ranks.exchanges[reader], residual)
            assert torch.equal(y, reference.add_parts(parts, residual)), turn


def test_bfloat16() -> None:
    """The interpreter cuts off where a GPU rounds: one step apart at most."""
    ranks, parts = Ranks(2), parts_of(2, 3, 40, dtype=torch.bfloat16, seed=1)
    residual = parts_of(1, 3, 40, dtype=torch.bfloat16, seed=2)[0]
    add_parts(parts[1], ranks.sending(1), residual)
    y = add_parts(parts[0], ranks.exchanges[0], residual)
    expected = reference.add_parts(parts, residual)
    assert torch.allclose(y, expected, rtol=2**-6, atol=2**-6)


def test_infinities_and_nan_come_through() -> None:
    ranks, parts = Ranks(2), torch.zeros(2, 1, 40, dtype=torch.float16)
    parts[1, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    add_parts(parts[1], ranks.sending(1))
    y = add_parts(parts[0], ranks.exchanges[0])
    assert torch.equal(y.nan_to_num(7.0), parts[1].nan_to_num(7.0))


def test_a_word_of_another_turn_is_waited_for() -> None:
    ranks = Ranks(2)
    for turn in range(2):  # both sides of the inbox hold old words then
        parts = parts_of(2, 1, 40, dtype=torch.float16, seed=turn)
        add_parts(parts[1], ranks.sending(1))
        add_parts(parts[0], ranks.exchanges[0])
    parts = parts_of(2, 1, 40, dtype=torch.float16, seed=5)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(add_parts(parts[0], ranks.exchanges[0])))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    numbers = parts[1].view(torch.int32)[0].long() & 0xFFFFFFFF
    words = numbers << 32 | 3
    inbox = ranks.inboxes[0].view(2, 2, CAPACITY)[3 % 2, 1]
    inbox[:19] = words[:19]
    time.sleep(0.2)
    assert thread.is_alive()  # for the last word
    inbox[19] = words[19]
    thread.join(20)
    assert torch.equal(found[0], reference.add_parts(parts))


def test_who_waits_can_be_let_go() -> None:
    ranks = Ranks(2)
    x = torch.ones(1, 40, dtype=torch.float16)
    thread = threading.Thread(target=add_parts, args=[x, ranks.exchanges[0]])
    thread.start()
    time.sleep(0.1)
    assert thread.is_alive()
    ranks.exchanges[0].abandoned.fill_(1)
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize(("size", "columns"), [(2, 37), (2, 38), (4, 37), (3, 4)])
def test_columns_are_gathered(size: int, columns: int) -> None:
    """The last rank has fewer, or none."""
    share = -(-columns // size)
    for reader in {0, size - 1}:
        ranks = Ranks(size)
        for turn, tokens in enumerate((1, 3, 2)):
            whole = parts_of(1, tokens, columns, dtype=torch.bfloat16, seed=turn)[0]
            mine = [
                whole[:, rank * share : (rank + 1) * share].contiguous() for rank in range(size)
            ]
            for rank in range(size):
                if rank != reader:
                    gather_columns(mine[rank], ranks.sending(rank), share, columns)
            y = gather_columns(mine[reader], ranks.exchanges[reader], share, columns)
            assert torch.equal(y, whole), turn
