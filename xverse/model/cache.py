"""THE KV DOOR. Where attention leaves its keys and values and gets back what they mixed to.

A decoder runs over a flat row of tokens. Which sequence each belongs to, and what that sequence
has seen before, is known only here: `Packed` for whole documents in a row (training, scoring),
`Growing` for simple decoding.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from xverse.kernels import dispatch, native
from xverse.kernels.attend import attend_offsets, attend_rows, attend_sequence
from xverse.kernels.attend_cpu import store_attend
from xverse.model.shape import ModelShape

LONGEST = 1024  # least that is said of the longest of packed documents; idle blocks cost little
ROOM = 128  # tokens that the first slab has room for beyond the prompt


class KV(Protocol):
    """What attention asks for."""

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """Keep k and v of the new tokens, and mix what each q may see. -> [T, H, E]."""
        ...

    def lengths(self) -> Tensor:
        """For each new token, how many tokens its sequence holds by now: [T] int64."""
        ...


class Packed:
    """Documents one after another in one row, none of which sees another; nothing is kept."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert all(length > 0 for length in lengths), "a document has at least one token"
        self.documents = list(lengths)
        self.device = torch.device(device)
        equal = len(set(self.documents)) == 1
        self._call = dispatch.attend_documents(self.device, dtype, equal=equal).call
        self._cut: tuple[object, ...] = (self.documents,)
        if self._call is attend_rows:
            self._cut = (len(self.documents),)
        elif self._call is attend_offsets:
            offsets = torch.tensor([0, *accumulate(self.documents)], dtype=torch.int32)
            # A power of two, so that compiled code is not made anew for each longest document.
            longest = max(LONGEST, 1 << (max(self.documents) - 1).bit_length())
            self._cut = (offsets.to(self.device, non_blocking=True), longest)

    def positions(self) -> Tensor:
        """Place of each token in its document, [T] int64."""
        return torch.cat([torch.arange(n, device=self.device) for n in self.documents])

    def lengths(self) -> Tensor:
        counts = torch.tensor(self.documents, device=self.device)
        return counts.repeat_interleave(counts)

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        return self._call(q_THE, k_TKE, v_TKE, *self._cut)


class Growing:
    """One slab of memory for each of a few sequences, filled from the front, doubled when full.

    Call `extend` with how many new tokens each sequence brings, run the decoder over them in that
    order, and again. Sequences may bring different numbers of tokens, none included.
    """

    def __init__(
        self,
        shape: ModelShape,
        sequences: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        size = (sequences, shape.num_key_value_heads, 0, shape.head_dim)
        self.keys = [
            torch.empty(size, dtype=dtype, device=device) for _ in range(shape.num_hidden_layers)
        ]
        self.values = [torch.empty_like(key) for key in self.keys]
        self.device = torch.device(device)
        self.capacity = 0
        self.held = [0] * sequences  # tokens each sequence holds
        self.new = [0] * sequences  # of which this many came with the latest `extend`
        self.compiled = (
            self.device.type == "cpu" and dtype in native.FLOATS and not native.why_not()
        )
        self.alone: tuple[Tensor, Tensor] | None = None  # of single tokens: slab and length of each

    def extend(self, counts: Sequence[int]) -> Tensor:
        """Make room for `counts` new tokens; returns their positions, [T] int64."""
        assert len(counts) == len(self.held), "a count for every sequence, 0 for one that rests"
        starts = self.held
        self.held = [start + count for start, count in zip(starts, counts, strict=True)]
        if max(self.held) > self.capacity:
            self._reserve(max(2 * self.capacity, max(self.held) + ROOM))
        self.new = list(counts)
        self.alone = None
        if self.compiled and max(counts) == 1:
            rows = [row for row, count in enumerate(counts) if count]
            lengths = [self.held[row] for row in rows]
            self.alone = torch.tensor(rows)[:, None], torch.tensor(lengths)
        return torch.cat(
            [
                torch.arange(start, start + count, device=self.device)
                for start, count in zip(starts, counts, strict=True)
            ]
        )

    def lengths(self) -> Tensor:
        held = torch.tensor(self.held, device=self.device)
        return held.repeat_interleave(torch.tensor(self.new, device=self.device))

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        if self.alone is not None and not q_THE.requires_grad:
            # As serving computes it, to the bit: a slab is one long page.
            return store_attend(q_THE, k_TKE, v_TKE, keys, values, *self.alone)
        mixed, start = [], 0
        for row, (held, count) in enumerate(zip(self.held, self.new, strict=True)):
            if not count:
                continue
            new = slice(start, start + count)
            keys[row, :, held - count : held] = k_TKE[new].transpose(0, 1)
            values[row, :, held - count : held] = v_TKE[new].transpose(0, 1)
            mixed.append(attend_sequence(q_THE[new], keys[row, :, :held], values[row, :, :held]))
            start += count
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _reserve(self, capacity: int) -> None:
        """Move everything to larger slabs, one layer after another."""
        for slabs in (self.keys, self.values):
            for layer, slab in enumerate(slabs):
                sequences, heads, _, size = slab.shape
                slabs[layer] = slab.new_empty(sequences, heads, capacity, size)
                slabs[layer][:, :, : self.capacity] = slab
        self.capacity = capacity
