"""PARTS OF ALL RANKS -> THEIR SUM. Sums and gathers of a few rows over GPUs that share memory.

Every rank writes what it has into the inboxes of the others, and adds what comes into its own. No
barrier and no fence stands between: each 8 bytes carry 4 of data and, in the same store, the number
of the turn they belong to, and a reader waits until every word it wants is of this turn (the "LL"
protocol of NCCL, Hu et al. 2025). One way over the link is all that a sum costs.

Turns are counted on the device, by each program for itself, so that graphs can be replayed. There
are two inboxes, used in turn: whoever is in turn t has read all of turn t-1, which the others wrote
after they had read all of t-2, so that its words may be overwritten. This holds as long as every
rank makes the same calls in the same order, on one stream. After 2^32 calls a turn comes again, and
could be mistaken only for words that lay untouched for exactly that long.

A program that waits for a rank that is gone waits until `abandoned` is set; there is no time limit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from xverse.kernels.multiply_triton import wait_for_input

REDUCED_ROWS = 64  # above, bandwidth counts and not the way, and NCCL moves fewer bytes
GATHERED_ROWS = 16
BLOCK = 256  # words a program, of two numbers each: ten programs for a row of 13B
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Exchange:
    """The inboxes of all ranks, as one rank sees them; for one kind of call only.

    `peers` [ranks] int64 has the address of each rank's memory, zero at first: `inbox_words` words
    of 8 bytes. `turns` [programs] int32 and `abandoned` [1] int32 are this rank's own, zero too.
    `memory` is whatever must stay alive as long.
    """

    peers: Tensor
    turns: Tensor
    abandoned: Tensor
    rank: int
    capacity: int  # words that one rank can send, a multiple of 16 for wide stores
    memory: object = None
    block: int = BLOCK

    @property
    def ranks(self) -> int:
        return len(self.peers)

    @staticmethod
    def inbox_words(capacity: int, ranks: int) -> int:
        """Words of 8 bytes of an inbox: two turns, from every rank."""
        return 2 * ranks * capacity

    @staticmethod
    def of(
        peers: list[int],
        rank: int,
        capacity: int,
        device: torch.device,
        memory: object = None,
        block: int = BLOCK,
    ) -> "Exchange":
        """The exchange over inboxes at these addresses, each with room for `capacity` words."""
        assert capacity % 16 == 0, "the next rank's part of the inbox is aligned"
        return Exchange(
            torch.tensor(peers, dtype=torch.int64, device=device),
            torch.zeros(triton.cdiv(capacity, block), dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            rank,
            capacity,
            memory,
            block,
        )


@triton.jit
def _memory(peers_ptr, rank):
    """The inboxes in the memory of a rank."""
    return tl.multiple_of(tl.load(peers_ptr + rank), 16).to(tl.pointer_type(tl.int64))


@triton.jit
def _inbox(memory, turn, writer, capacity, RANKS: tl.constexpr):
    """Where `writer` puts its words in this turn."""
    return memory + ((turn & 1) * RANKS + writer).to(tl.int64) * capacity


@triton.jit
def _send(
    own, peers_ptr, neighbour, turn, place, inside, capacity,
    RANK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Put data (int32) and turn side by side into the inboxes of all others."""
    tag = turn.to(tl.uint32, bitcast=True).to(tl.int64)
    words = (own.to(tl.int64) << 32) | tag
    for step in tl.static_range(1, RANKS):
        memory = neighbour
        if step > 1:
            memory = _memory(peers_ptr, (RANK + step) % RANKS)
        tl.store(_inbox(memory, turn, RANK, capacity, RANKS) + place, words, inside)
    tl.debug_barrier()  # the stores are made before any of the loads that wait


@triton.jit
def _missing(words, abandoned_ptr, turn, inside):
    """How many words are still to come; none if nobody waits any more. One number for the whole
    program: a part of it may see before the rest that `abandoned` is set."""
    waiting = tl.load(abandoned_ptr, volatile=True) == 0
    return tl.sum((inside & (words.to(tl.int32) != turn) & waiting).to(tl.int32))


@triton.jit
def _receive(
    home, abandoned_ptr, turn, writer, place, inside, capacity, RANKS: tl.constexpr
):  # fmt: skip
    """The data (int32) that `writer` sends in this turn, as soon as all of it is there."""
    at = _inbox(home, turn, writer, capacity, RANKS) + place
    words = tl.load(at, inside, 0, volatile=True)
    missing = _missing(words, abandoned_ptr, turn, inside)
    while missing > 0:
        words = tl.load(at, inside, 0, volatile=True)
        missing = _missing(words, abandoned_ptr, turn, inside)
    return (words >> 32).to(tl.int32)


@triton.jit
def _half(word, DTYPE: tl.constexpr):
    """The lower 16 bits as a number."""
    return word.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _finished(total, residual, RESIDUAL: tl.constexpr, DTYPE: tl.constexpr):
    """The sum, rounded, and the residual added, as `reference.add_parts` rounds."""
    y = total.to(DTYPE)
    if RESIDUAL:
        y = (residual + y.to(tl.float32)).to(DTYPE)
    return y


@triton.jit
def _add_parts(
    x_ptr, residual_ptr, out_ptr, peers_ptr, turns_ptr, abandoned_ptr, words, capacity,
    RANK: tl.constexpr, RANKS: tl.constexpr, DTYPE: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pointers to int32: two numbers of 16 bits in each."""
    program = tl.program_id(0)
    place = program * BLOCK + tl.arange(0, BLOCK)
    inside = place < words
    home, neighbour = _memory(peers_ptr, RANK), _memory(peers_ptr, (RANK + 1) % RANKS)
    wait_for_input(PDL)
    turn = tl.load(turns_ptr + program, volatile=True) + 1
    own = tl.load(x_ptr + place, inside, 0)
    _send(own, peers_ptr, neighbour, turn, place, inside, capacity, RANK, RANKS)
    residual = own
    if RESIDUAL:
        residual = tl.load(residual_ptr + place, inside, 0)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for writer in tl.static_range(RANKS):
        word = own
        if writer != RANK:
            word = _receive(home, abandoned_ptr, turn, writer, place, inside, capacity, RANKS)
        low += _half(word, DTYPE)
        high += _half(word >> 16, DTYPE)
    y_low = _finished(low, _half(residual, DTYPE), RESIDUAL, DTYPE)
    y_high = _finished(high, _half(residual >> 16, DTYPE), RESIDUAL, DTYPE)
    bits = y_low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    bits |= y_high.to(tl.int16, bitcast=True).to(tl.int32) << 16
    tl.store(out_ptr + place, bits, inside)
    tl.store(turns_ptr + program, turn)


@triton.jit
def _gather_columns(
    x_ptr, out_ptr, peers_ptr, turns_ptr, abandoned_ptr, tokens, share, columns, capacity,
    RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pointers to int16; a word carries one number, so that rows may be of odd width."""
    program = tl.program_id(0)
    place = program * BLOCK + tl.arange(0, BLOCK)
    token, column = place // share, place % share
    known = token < tokens
    count = tl.minimum(columns - RANK * share, share)  # the last rank may have fewer
    mine = known & (column < count)
    home, neighbour = _memory(peers_ptr, RANK), _memory(peers_ptr, (RANK + 1) % RANKS)
    wait_for_input(PDL)
    turn = tl.load(turns_ptr + program, volatile=True) + 1
    own = tl.load(x_ptr + token * count + column, mine, 0)
    _send(own.to(tl.int32), peers_ptr, neighbour, turn, place, mine, capacity, RANK, RANKS)
    tl.store(out_ptr + token * columns + RANK * share + column, own, mine)
    for writer in tl.static_range(RANKS):
        if writer != RANK:
            theirs = known & (writer * share + column < columns)
            word = _receive(home, abandoned_ptr, turn, writer, place, theirs, capacity, RANKS)
            at = out_ptr + token * columns + writer * share + column
            tl.store(at, word.to(tl.int16), theirs)
    tl.store(turns_ptr + program, turn)


def add_parts(
    x_TD: Tensor, exchange: Exchange, residual_TD: Tensor | None = None, *, pdl: bool = False
) -> Tensor:
    """The sum of all ranks' x, and the residual on top. Twin: `reference.add_parts`.

    Tensors contiguous, of one dtype of 16 bits, an even number of elements in all. All ranks get
    the same bits. `pdl` as in `multiply_rows`.
    """
    assert x_TD.is_contiguous(), "rows lie one after another"
    assert residual_TD is None or residual_TD.is_contiguous(), "rows lie one after another"
    words = x_TD.numel() // 2
    assert words <= exchange.capacity, "the inbox has room"
    out_TD = torch.empty_like(x_TD)
    _add_parts[(triton.cdiv(words, exchange.block),)](
        x_TD.view(torch.int32),
        None if residual_TD is None else residual_TD.view(torch.int32),
        out_TD.view(torch.int32),
        exchange.peers, exchange.turns, exchange.abandoned, words, exchange.capacity,
        RANK=exchange.rank, RANKS=exchange.ranks, DTYPE=_TRITON_DTYPES[x_TD.dtype],
        RESIDUAL=residual_TD is not None, BLOCK=exchange.block, PDL=pdl,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out_TD


def gather_columns(
    x_TN: Tensor, exchange: Exchange, share: int, columns: int, *, pdl: bool = False
) -> Tensor:
    """The columns of all ranks side by side, [T, columns]; each has `share`, the last what is left.
    Twin: `reference.gather_columns`."""
    tokens, own = x_TN.shape
    assert x_TN.is_contiguous(), "rows lie one after another"
    assert own == max(0, min(share, columns - exchange.rank * share)), "this rank's share"
    assert tokens * share <= exchange.capacity, "the inbox has room"
    out_TV = x_TN.new_empty(tokens, columns)
    _gather_columns[(triton.cdiv(tokens * share, exchange.block),)](
        x_TN.view(torch.int16), out_TV.view(torch.int16),
        exchange.peers, exchange.turns, exchange.abandoned,
        tokens, share, columns, exchange.capacity,
        RANK=exchange.rank, RANKS=exchange.ranks, BLOCK=exchange.block, PDL=pdl,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out_TV
