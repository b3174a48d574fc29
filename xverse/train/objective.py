"""DECODER, BATCH -> LOSS. What is trained: one function for each way of learning.

An objective gives its part of the loss of a step, divided by the step's units (targets, pairs) over
all passes and ranks; the loop adds up the parts and knows nothing else of it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager as ContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from xverse.data.loader import Batch
from xverse.kernels.score import log_probabilities
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder
from xverse.parallel.vocabulary import cross_entropy
from xverse.train.tuning import Dpo


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


def dpo(
    decoder: Decoder,
    batch: Batch,
    units: int,
    *,
    reference: Callable[[Decoder], ContextManager[Decoder]],
    options: Dpo,
) -> Part:
    """The loss of preferences, a pair: -log sigmoid(beta * (margin of the answer that was chosen
    over the rejected one, less the margin that the reference gives it)).

    Rafailov et al. 2023, eq. 7, with the label smoothing of Mitchell's "A note on DPO with noisy
    preferences" (2023). Of the documents that have something to learn, 2k and 2k + 1 are pair k.
    `reference` gives the model that the training began with, for as long as its context lasts.
    Also told: rewards of both, their margin, and how often it is the right way.
    """
    with torch.no_grad(), reference(decoder) as before:
        reference_D = answers(before, batch)
    answers_D = answers(decoder, batch)
    reward_D = options.beta * (answers_D - reference_D)
    chosen_P, rejected_P = reward_D[0::2], reward_D[1::2]
    margin_P = chosen_P - rejected_P
    right = (1 - options.label_smoothing) * functional.logsigmoid(margin_P)
    wrong = options.label_smoothing * functional.logsigmoid(-margin_P)
    told = {
        "rewards.chosen": chosen_P,
        "rewards.rejected": rejected_P,
        "rewards.margin": margin_P,
        "rewards.accuracy": (margin_P > 0).float(),
    }
    also = {name: value_P.detach().sum() / units for name, value_P in told.items()}
    return Part(-(right + wrong).sum() / units, also)


def answers(decoder: Decoder, batch: Batch) -> Tensor:
    """Log-probability of what is to be learned of each document that has any, in order, fp32."""
    kv = Packed(batch.documents, batch.ids.device, decoder.model.norm.weight.dtype)
    x_TD = decoder.hidden(batch.ids, batch.positions, kv)
    counted = batch.mask.nonzero()[:, 0]
    each = log_probabilities(x_TD[counted], head(decoder), batch.targets[counted])
    lengths = torch.tensor(batch.documents, device=batch.ids.device)
    document_T = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    _, place = document_T[counted].unique_consecutive(return_inverse=True)
    found = int(place[-1]) + 1 if len(place) else 0
    assert found % 2 == 0, "documents come in pairs, and each has something to learn"
    return torch.zeros(found, device=each.device).index_add(0, place, each)


def head(decoder: Decoder) -> Tensor:
    """The matrix that makes logits of hidden states, [V, D]."""
    layer = decoder.lm_head
    weight = decoder.model.embed_tokens.weight if layer is None else layer.weight
    assert isinstance(weight, torch.Tensor)
    assert weight.is_floating_point(), "a quantized head is made plain before the training"
    return weight
