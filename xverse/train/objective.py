"""DECODER, BATCH -> LOSS. What is trained: one function for each way of learning.

An objective gives its part of the loss of a step, divided by the step's units (targets, pairs) over
all passes and ranks; the loop adds up the parts and knows nothing else of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from xverse.data.loader import Batch
from xverse.kernels.score import cross_entropy
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.train.balance import weigh


class Part(NamedTuple):
    """Of a step's loss. `also` are further numbers to report, which add up over passes."""

    loss: Tensor
    also: dict[str, Tensor]


Objective = Callable[[Decoder, Batch, int], Part]


def pretrain(
    decoder: Decoder, batch: Batch, units: int, *, z_factor: float = 0.0, balance: float = 0.0
) -> Part:
    """Cross-entropy of every next token of every document, in nats a token.

    With `z_factor`, the gradient is that of loss + z_factor * z_loss; with `balance`, times the
    balance loss of every mixture of experts too (see balance), which must be balanced decoders'.
    """
    if balance:
        weigh(decoder, balance * len(batch.ids) / units)
    kv = Packed(batch.documents, batch.ids.device, decoder.model.norm.weight.dtype)
    x_TD = decoder.hidden(batch.ids, batch.positions, kv)
    # The head is asked for after `hidden`, for which a sharded decoder gathers it.
    scored = cross_entropy(x_TD, head(decoder), batch.targets, batch.mask, z_factor=z_factor)
    also = {"z_loss": scored.z_loss / units} if z_factor else {}
    return Part(scored.loss / units, also)


def head(decoder: Decoder) -> Tensor:
    """The matrix that makes logits of hidden states, [V, D]."""
    layer = decoder.lm_head
    weight = decoder.model.embed_tokens.weight if layer is None else layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight
