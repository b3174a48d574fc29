"""DECODING ROWS -> LOGITS, ON A GPU. The fused decode step over the pages, as CUDA graphs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xverse.engine.paged import Paged, Part
from xverse.engine.step import DecodeStep, unfit
from xverse.kernels.multiply import ROWS
from xverse.log import warn_once
from xverse.model.decoder import Decoder

SIZES = (1, 2, 4, 8, ROWS)  # rows of the steps that are captured; fewer are filled up


class FusedDecode:
    """Decode steps of up to ROWS sequences each, captured when a size is first wanted.

    Rows without a sequence write to `spare`, a page of the pool that nobody else has.
    """

    def __init__(self, decoder: Decoder, kv: Paged, spare: int) -> None:
        self.decoder, self.kv, self.spare = decoder, kv, spare
        self.width = -(-decoder.shape.context_length // kv.page_size)
        self._steps: dict[int, tuple[DecodeStep, Callable[[], Tensor]]] = {}

    @classmethod
    def of(cls, decoder: Decoder, kv: Paged, spare: int) -> "FusedDecode | None":
        """For this decoder, or None where it has no fused step, which on a GPU is said once."""
        weight = decoder.model.embed_tokens.weight
        if weight.device.type != "cuda" or kv.fixed_rows is not None:
            return None
        why_not = unfit(decoder)
        if weight.dtype != torch.bfloat16:
            why_not = f"Its weights are {weight.dtype}, and the kernels are for bfloat16."
        if why_not:
            warn_once(f"decoding runs without the fused kernels, and slower: {why_not}")
            return None
        return cls(decoder, kv, spare)

    def __call__(self, ids: Sequence[int], parts: Sequence[Part]) -> Tensor:
        """Logits [B, V] of one new token each; valid until the next call of this size."""
        count = len(ids)
        size = next(size for size in SIZES if size >= count)
        step, run = self._steps.get(size) or self._capture(size)
        pages = torch.zeros(size, self.width, dtype=torch.int32)
        pages[:, 0] = self.spare
        for row, part in enumerate(parts):
            pages[row, : len(part.pages)] = torch.tensor(part.pages[: self.width])
        self.kv.clear(parts)
        step.pages.copy_(pages)
        fill = [0] * (size - count)
        step.ids.copy_(torch.tensor([*ids, *fill]))
        step.positions.copy_(torch.tensor([*(part.held for part in parts), *fill]))
        return run()[:count]

    def _capture(self, size: int) -> tuple[DecodeStep, Callable[[], Tensor]]:
        pages = torch.full((size, self.width), self.spare, dtype=torch.int32, device=self.kv.device)
        keys, values = list(self.kv.keys), list(self.kv.values)
        step = DecodeStep(self.decoder, keys, values, pages)
        # On a CPU, where the tests are, the step runs by the plain references and as it is.
        self._steps[size] = step, step.capture() if self.kv.device.type == "cuda" else step
        return self._steps[size]
