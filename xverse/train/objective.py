"""DECODER, BATCH -> LOSS. What is trained: one function for each way of learning.

An objective gives its part of the loss of a step, divided by the step's units (targets, pairs) over
all passes and ranks; the loop adds up the parts and knows nothing else of it.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from xverse.data.loader import Batch
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.parallel.vocabulary import cross_entropy


class Part(NamedTuple):
    """Of a step's loss. `also` are further numbers to report, which add up over passes."""

    loss: Tensor
    also: dict[str, Tensor]


Objective = Callable[[Decoder, Batch, int], Part]


def pretrain(decoder: Decoder, batch: Batch, units: int, *, z_factor: float = 0.0) -> Part:
    """Cross-entropy of every next token of every document, in nats a token.

    With `z_factor`, the gradient is that of loss + z_factor * z_loss.
    """
    kv = Packed(batch.documents, batch.ids.device, decoder.model.norm.weight.dtype)
    x_TD = decoder.hidden(batch.ids, batch.positions, kv)
    # The weight is asked for after `hidden`, for which a sharded decoder gathers it.
    layer = decoder.model.embed_tokens if decoder.lm_head is None else decoder.lm_head
    scored = cross_entropy(x_TD, layer, batch.targets, batch.mask, z_factor=z_factor)
    also = {"z_loss": scored.z_loss / units} if z_factor else {}
    return Part(scored.loss / units, also)
