"""IDS -> D, X -> LOSS. Embedding, head and cross-entropy whose vocabulary is spread over ranks."""

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from xverse.kernels import score
from xverse.kernels.reference_train import Scored
from xverse.model.embedding import Embedding
from xverse.model.linear import Linear
from xverse.parallel.collect import add_tokens, gather


class Rows(NamedTuple):
    """Which entries of the vocabulary a rank has: those from `first` on."""

    first: int
    group: dist.ProcessGroup


class SpreadEmbedding(Embedding):
    """Some rows of the table. All T ids -> the vectors of this rank's part of them, [T / n, D]."""

    rows: Rows

    def forward(self, ids_T: Tensor) -> Tensor:
        own_T = ids_T - self.rows.first
        here_T = (own_T >= 0) & (own_T < len(self.weight))
        found_TD = functional.embedding(torch.where(here_T, own_T, 0), self.weight)
        return add_tokens(found_TD * here_T[:, None], self.rows.group)


class SpreadHead(Linear):
    """Some rows of the head. Its logits are not gathered: see `cross_entropy`."""

    rows: Rows


def spread_embedding(whole: nn.Embedding, first: int, last: int, rows: Rows) -> SpreadEmbedding:
    """Rows first..last of a table, with memory of their own."""
    made = SpreadEmbedding.__new__(SpreadEmbedding)
    nn.Embedding.__init__(
        made, last - first, whole.embedding_dim, _weight=_part(whole, first, last)
    )
    made.rows = rows
    return made


def spread_head(whole: Linear, first: int, last: int, rows: Rows) -> SpreadHead:
    """Rows first..last of a head, with memory of their own."""
    made = SpreadHead.of(_part(whole, first, last), None)
    made.rows = rows
    return made


def rows_of(layer: nn.Module) -> Rows | None:
    """Which entries of the vocabulary the layer has; None where it has all."""
    return layer.rows if isinstance(layer, SpreadEmbedding | SpreadHead) else None


def cross_entropy(
    x_TD: Tensor, layer: nn.Module, targets_T: Tensor, mask_T: Tensor, *, z_factor: float = 0.0
) -> Scored:
    """As kernels.score.cross_entropy, of the logits that `layer`, head or embedding, makes of x.

    Where the vocabulary is spread, each rank tells its equal share of the sums, with the whole
    gradient of its rows and its part of x's; all ranks call it with the same tokens.
    """
    weight, rows = layer.weight, rows_of(layer)
    assert isinstance(weight, Tensor)
    scorer = None if rows is None else functools.partial(_score, rows=rows)
    return score.cross_entropy(x_TD, weight, targets_T, mask_T, z_factor=z_factor, scorer=scorer)


def _score(
    logits_TV: Tensor, targets_T: Tensor, mask_T: Tensor, z_factor: float, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_train.score_logits` of this rank's columns: its equal share of the sums over all,
    and its own gradient."""
    logits = logits_TV.float()
    own_T = targets_T - rows.first
    here_T = (own_T >= 0) & (own_T < logits.shape[1])
    place_T1 = torch.where(here_T, own_T, 0)[:, None]
    picked_T = logits.gather(-1, place_T1)[:, 0] * here_T
    told_2T = torch.stack((logits.logsumexp(-1), picked_T))
    all_N2T = gather(told_2T, rows.group).unflatten(0, (-1, 2))
    lse_T, picked_T = all_N2T[:, 0].logsumexp(0), all_N2T[:, 1].sum(0)
    zero = torch.zeros_like(lse_T)
    share_T1 = torch.where(mask_T, 1 + 2 * z_factor * lse_T, zero)[:, None]
    gradient_TV = (logits - lse_T[:, None]).exp() * share_T1
    gradient_TV.scatter_add_(-1, place_T1, -(here_T & mask_T).float()[:, None])
    return (
        torch.where(mask_T, lse_T - picked_T, zero).sum() / rows.group.size(),
        torch.where(mask_T, lse_T.square(), zero).sum() / rows.group.size(),
        gradient_TV.to(logits_TV.dtype),
    )


def _part(layer: nn.Module, first: int, last: int) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()[first:last].clone(memory_format=torch.contiguous_format)
