"""Pages, tables and scales for the tests of the attention kernels; what is free holds NaN."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xverse.kernels import reference
from xverse.kernels.reference import Scales


def seeded(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + seed)).to(dtype)


def close(fast: Tensor, twin: Tensor) -> bool:
    tolerance = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[twin.dtype]
    return torch.allclose(fast, twin, rtol=tolerance, atol=4 * tolerance)


@dataclass
class Pool:
    """Keys and values of sequences whose first tokens are stored, and a table in random order."""

    keys: Tensor
    values: Tensor
    scales: Scales | None
    tables: Tensor

    @classmethod
    def of(
        cls,
        stored: list[int],
        kv_heads: int,
        size: int,
        dtype: torch.dtype,
        *,
        fp8: bool,
        page: int = 16,
    ) -> "Pool":
        width, count = max(stored) // page + 2, len(stored)
        generator = torch.Generator().manual_seed(1)
        tables = torch.randperm(count * width, generator=generator).view(count, width)
        stuff = torch.float8_e4m3fn if fp8 else dtype
        lead = (count * width, kv_heads, page)
        keys, values = (torch.full((*lead, size), torch.nan).to(stuff) for _ in range(2))
        scales = None
        if fp8:
            scale = torch.full(lead, torch.nan, dtype=torch.bfloat16)
            scales = scale, scale.clone()
        pool = cls(keys, values, scales, tables.int())
        slots = torch.cat([pool.slots(b, 0, tokens) for b, tokens in enumerate(stored)])
        past = seeded(len(slots), 3 * kv_heads * size, dtype=dtype)  # the queries are not used
        angles = torch.ones(1, size, dtype=dtype)
        nowhere = torch.zeros(len(slots), dtype=torch.int32)
        pages = (keys, values, scales)
        reference.rotate_store(past, angles, 0 * angles, nowhere, slots, *pages)
        return pool

    def slots(self, sequence: int, start: int, stop: int) -> Tensor:
        token, page = torch.arange(start, stop), self.keys.shape[2]
        return self.tables[sequence, token // page].long() * page + token % page

    def copy(self, device: str = "cpu") -> "Pool":
        keys, values, tables, *scales = (
            tensor.to(device, copy=True)
            for tensor in (self.keys, self.values, self.tables, *(self.scales or ()))
        )
        return Pool(keys, values, (scales[0], scales[1]) if scales else None, tables)

    def equals(self, other: "Pool") -> bool:
        ours, theirs = ([pool.keys, pool.values, *(pool.scales or ())] for pool in (self, other))
        return all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(ours, theirs, strict=True)
        )
