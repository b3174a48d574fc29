"""OBJECTIVE -> OBJECTIVE WITH NOISE. NEFTune: token vectors a little off while training."""

from typing import Any

import torch
from torch import Tensor

from xverse.data.loader import Batch
from xverse.model.decoder import Decoder
from xverse.train.objective import Objective, Part


def noisy(objective: Objective, alpha: float) -> Objective:
    """The objective over token vectors with noise, while the decoder is in training mode.

    Uniform between -1 and 1 times alpha / sqrt(tokens of the document x width) (Jain et al. 2023).
    It is drawn from the process's generator, of which checkpoints keep where it stands.
    """

    def learn(decoder: Decoder, batch: Batch, units: int) -> Part:
        if not decoder.training:
            return objective(decoder, batch, units)
        lengths = torch.tensor(batch.documents, device=batch.ids.device)
        length_T1 = lengths.repeat_interleave(lengths)[:, None]

        def blur(_table: object, _ids: object, x_TD: Tensor) -> Tensor:
            size_T1 = alpha / (length_T1 * x_TD.shape[1]).sqrt()
            return x_TD + (torch.rand_like(x_TD) * 2 - 1) * size_T1.to(x_TD.dtype)

        table: Any = decoder.model.embed_tokens
        hook = table.register_forward_hook(blur)
        try:
            return objective(decoder, batch, units)
        finally:
            hook.remove()

    return learn
