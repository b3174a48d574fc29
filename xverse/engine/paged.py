"""THE KV DOOR OF SERVING. Keys and values of many sequences in the pages of one pool.

A step is one flat row of tokens: chunks of prompts, and one token each of sequences that decode.
The door is told whose they are by `begin`, and the decoder never knows. The pool never moves, so
that a captured step may point into it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy
import torch
from torch import Tensor

from xverse.errors import XverseError
from xverse.kernels import native, reference
from xverse.kernels.attend import attend_batch, attend_sequence, gather_pages
from xverse.kernels.attend_cpu import store_attend
from xverse.model.shape import ModelShape


@dataclass(frozen=True)
class Part:
    """What one sequence brings to a step: `count` new tokens after `held` ones, in `pages`.

    Rope that scales with the length counts at least the `prompt`'s tokens, however it is cut.
    Tokens that come `apart` are attended to as each would be in a step of its own, to the bit.
    """

    pages: Sequence[int]
    held: int
    count: int
    prompt: int
    apart: bool = False


@dataclass(frozen=True)
class _Group:
    """Neighbours in the row that are attended to in one call: B of one token each, whose table may
    be the same one; or several tokens of one sequence."""

    rows: slice
    tables_BP: Tensor
    lengths_B: Tensor
    seen: int  # by the longest


class Paged:
    """The pool: [layers, pages, key heads, page size, head size] for keys, and for values."""

    def __init__(
        self,
        shape: ModelShape,
        pages: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        fixed_rows: int | None = None,
    ) -> None:
        """With `fixed_rows`, every step is filled up to that many rows, each attended to alone: a
        token's numbers then depend on its own past only, to the last bit."""
        self.fixed_rows = fixed_rows
        self.page_size, self.heads = page_size, shape.num_key_value_heads
        self.device = torch.device(device)
        size = (shape.num_hidden_layers, pages, self.heads, page_size, shape.head_dim)
        self.pages = pages
        self.keys = _zeros(size, dtype, self.device)
        self.values = _zeros(size, dtype, self.device)
        # Of fp8 keys and values: one scale for each token and head.
        rounded = dtype == torch.float8_e4m3fn
        self._scales = [
            _zeros(size[:-1], torch.bfloat16, self.device) for _ in range(2 if rounded else 0)
        ]
        self._groups: list[_Group] = []
        compiled = self.device.type == "cpu" and dtype in native.FLOATS and not native.why_not()
        self.compiled = compiled and fixed_rows is None
        self.alone: tuple[Tensor, Tensor] | None = None  # of a step of single tokens: see `begin`
        self._lengths_T = self._places = torch.empty(0, dtype=torch.int64, device=self.device)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return sum(pool.nbytes for pool in (self.keys, self.values, *self._scales))

    def begin(self, parts: Sequence[Part]) -> Tensor:
        """Start a step of these parts, in this order; returns the positions, [T] int64.

        Sequences that bring one token each are computed together where they stand side by side
        and are about equally long.
        """
        for part in parts:
            assert part.count > 0, "a part brings tokens"
            assert part.held + part.count <= len(part.pages) * self.page_size, "pages suffice"
        self.clear(parts)
        self.alone = None
        if self.compiled and all(part.count == 1 or part.apart for part in parts):
            self.alone = self._rows_alone(parts)
        else:
            self._groups = list(self._grouped(parts))
        positions = [p.held + i for p in parts for i in range(p.count)]
        lengths = [max(p.prompt, p.held + i + 1) for p in parts for i in range(p.count)]
        rows = [
            (part.pages[place // self.page_size] * self.heads, place % self.page_size)
            for part in parts
            for place in range(part.held, part.held + part.count)
        ]
        page_T, slot_T = self._tensor(rows).unbind(1)
        heads_K = torch.arange(self.heads, device=self.device)
        self._places = ((page_T[:, None] + heads_K) * self.page_size + slot_T[:, None]).flatten()
        self._lengths_T = self._tensor(lengths)
        if self.fixed_rows is not None:
            fill = self.fixed_rows - len(positions)
            assert fill >= 0, "the step has no more rows than every step"
            assert all(part.count == 1 for part in parts), "a token is a part"
            positions += [0] * fill
            self._lengths_T = self._tensor(lengths + [1] * fill)
        return self._tensor(positions)

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Scales [P, K, S] of fp8 keys and values; None where they are kept as they are."""
        if not self._scales:
            return None
        keys, values = self._scales
        return keys[layer], values[layer]

    def lengths(self) -> Tensor:
        return self._lengths_T

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        keys, values, scales = self.keys[layer], self.values[layer], self.scales(layer)
        if self.alone is not None:
            return store_attend(q_THE, k_TKE, v_TKE, keys, values, *self.alone)
        key_scales, value_scales = scales or (None, None)
        self._store(keys, key_scales, k_TKE)
        self._store(values, value_scales, v_TKE)
        mixed = []
        for group in self._groups:
            q = q_THE[group.rows]
            k_BKSE = _gather(keys, key_scales, group.tables_BP, q.dtype)
            v_BKSE = _gather(values, value_scales, group.tables_BP, q.dtype)
            if len(group.lengths_B) == len(q) and self.fixed_rows is None:
                seen = torch.arange(k_BKSE.shape[2], device=self.device)
                k, v = (side.expand(len(q), -1, -1, -1) for side in (k_BKSE, v_BKSE))
                mixed.append(attend_batch(q, k, v, seen < group.lengths_B[:, None]))
            else:
                k_KSE, v_KSE = (side[0, :, : group.seen] for side in (k_BKSE, v_BKSE))
                mixed.append(attend_sequence(q, k_KSE, v_KSE))
        if self.fixed_rows is not None:
            mixed.append(torch.zeros_like(q_THE[len(mixed) :]))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _store(self, pages: Tensor, scales: Tensor | None, new_TKE: Tensor) -> None:
        rows = new_TKE.flatten(0, 1)[: len(self._places)]
        if scales is not None:
            rounded, scale = reference.quantize_kv(rows[:, None])
            scales.flatten().index_copy_(0, self._places, scale[:, 0])
            # Not every operation knows fp8; moving it is moving bytes.
            pages, rows = pages.view(torch.uint8), rounded[:, 0].view(torch.uint8)
        pages.flatten(0, 2).index_copy_(0, self._places, rows)

    def clear(self, parts: Sequence[Part]) -> None:
        """Zero the pages that begin in this step: what a mask hides is still multiplied, and
        another request may have left NaN there."""
        fresh = [
            part.pages[place // self.page_size]
            for part in parts
            for place in range(part.held, part.held + part.count)
            if place % self.page_size == 0
        ]
        if fresh:
            pages = self._tensor(fresh)
            for pool in self._pools():
                pool.index_fill_(1, pages, 0)

    def erase(self, pages: Sequence[int], first: int, last: int) -> None:
        """Zero the places from `first` to before `last` of a sequence, for the same reason."""
        if first < last:
            places = torch.arange(first, last, device=self.device)
            page, slot = self._tensor(pages)[places // self.page_size], places % self.page_size
            for pool in self._pools():
                pool[:, page, :, slot] = 0

    def _pools(self) -> list[Tensor]:
        """All memory, as types that every operation knows."""
        return [self.keys.view(torch.uint8), self.values.view(torch.uint8), *self._scales]

    def _grouped(self, parts: Sequence[Part]) -> Iterator[_Group]:
        start = 0
        for _, members in groupby(enumerate(parts), self._alike):
            group = [part for _, part in members]
            seen = [part.held + part.count for part in group]
            used = -(-max(seen) // self.page_size)
            # Shorter tables are filled up with their own last page, which a mask hides.
            tables = [
                [part.pages[min(place, (tokens - 1) // self.page_size)] for place in range(used)]
                for part, tokens in zip(group, seen, strict=True)
            ]
            count = sum(part.count for part in group)
            if group[0].apart:
                seen = list(range(group[0].held + 1, group[0].held + count + 1))
            yield _Group(
                slice(start, start + count), self._tensor(tables), self._tensor(seen), max(seen)
            )
            start += count

    def _rows_alone(self, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Pages [T, P] and lengths [T] of rows each of which is attended to by itself."""
        most = max(len(part.pages) for part in parts)
        tables = [[*p.pages, *[0] * (most - len(p.pages))] for p in parts for _ in range(p.count)]
        lengths = [p.held + i + 1 for p in parts for i in range(p.count)]
        return self._tensor(tables), self._tensor(lengths)

    def _alike(self, numbered: tuple[int, Part]) -> tuple[int, int]:
        """What neighbours share to be computed together: padding at most doubles the work."""
        number, part = numbered
        if part.count > 1 or self.fixed_rows is not None:
            return number, 0
        return -1, (part.held // self.page_size).bit_length()

    def _tensor(self, numbers: object) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)


def _gather(pages: Tensor, scales: Tensor | None, tables_BP: Tensor, dtype: torch.dtype) -> Tensor:
    """The pages of B sequences as they are computed with, [B, K, P * S, E] in `dtype`."""
    if scales is None:
        return gather_pages(pages, tables_BP)
    rounded = gather_pages(pages.view(torch.uint8), tables_BP).view(pages.dtype)
    return reference.dequantize_kv(
        rounded, gather_pages(scales[..., None], tables_BP)[..., 0], dtype
    )


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is zero; on a CPU the system hands it out only as it is used."""
    try:
        if device.type != "cpu":
            return torch.zeros(size, dtype=dtype, device=device)
        # NumPy's zeros are the system's: pages of memory without an address until written to.
        return torch.from_numpy(numpy.zeros((*size[:-1], size[-1] * dtype.itemsize), "u1")).view(
            dtype
        )
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        raise XverseError(
            f"There is no memory for {size[1] * size[3]} tokens of KV cache.",
            str(error).splitlines()[0] if str(error) else "The system refused it.",
            "Ask for fewer with kv_tokens, or free memory.",
        ) from error
