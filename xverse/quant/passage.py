"""SAMPLES, BLOCK BY BLOCK. Hidden states on their way through a decoder of which one block is at
hand at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xverse.model.cache import Packed
from xverse.model.decoder import Decoder


class Passage:
    """The hidden states [T, D] of each sample before the next block, kept in the CPU's memory."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, samples: Sequence[Sequence[int]]) -> None:
        """Embed the ids of `samples`; the decoder's embedding must be there, and its norm."""
        self.decoder, self.samples = decoder, samples
        self.device = decoder.device
        embed = decoder.model.embed_tokens
        self.hidden: list[Tensor] = [_away(embed(self._on(ids))) for ids in samples]

    @property
    def tokens(self) -> int:
        """Of all samples together."""
        return sum(map(len, self.samples))

    @torch.no_grad()
    def pass_by(self, block: nn.Module) -> None:
        """Show the samples to the block, and leave them before it."""
        for number in range(len(self.hidden)):
            self._through(block, number)

    @torch.no_grad()
    def advance(self, block: nn.Module) -> None:
        """Take the samples through the block."""
        for number in range(len(self.hidden)):
            self.hidden[number] = _away(self._through(block, number))

    @torch.no_grad()
    def final(self, number: int) -> Tensor:
        """Normalized hidden states [T, D] of a sample that has passed all blocks."""
        x_TD: Tensor = self.decoder.model.norm(self.hidden[number].to(self.device))
        return x_TD

    def _through(self, block: nn.Module, number: int) -> Tensor:
        x_TD = self.hidden[number].to(self.device, non_blocking=True)
        kv = Packed([len(x_TD)], self.device)
        scaling = self.decoder.shape.rope_scaling
        dynamic = scaling is not None and scaling.rope_type == "dynamic"
        lengths = kv.lengths() if dynamic else None
        cos_TE, sin_TE = self.decoder.rope.tables(kv.positions(), lengths, x_TD.dtype)
        y_TD: Tensor = block(x_TD, cos_TE, sin_TE, kv)
        return y_TD

    def _on(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, device=self.device)


def _away(x_TD: Tensor) -> Tensor:
    """A copy in the CPU's memory; from a GPU one that nobody waits for, nor for its way back."""
    if not x_TD.is_cuda:
        return x_TD
    kept_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, pin_memory=True)
    return kept_TD.copy_(x_TD, non_blocking=True)
