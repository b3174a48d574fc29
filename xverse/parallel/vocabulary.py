"""IDS -> D, X -> LOSS. Embedding, head and cross-entropy whose vocabulary is spread over ranks."""

from typing import Any, NamedTuple

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
    if rows is None:
        return score.cross_entropy(x_TD, weight, targets_T, mask_T, z_factor=z_factor)
    chunk = max(score.STEP, score.LOGITS // len(weight) // score.STEP * score.STEP)
    loss, z_loss = _Chunks.apply(x_TD, weight, targets_T, mask_T, z_factor, rows, chunk)  # type: ignore[no-untyped-call]
    return Scored(loss, z_loss)


def _score(
    logits_TV: Tensor, targets_T: Tensor, mask_T: Tensor, z_factor: float, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_train.score_logits` of this rank's columns: sums over all, its own gradient."""
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
        torch.where(mask_T, lse_T - picked_T, zero).sum(),
        torch.where(mask_T, lse_T.square(), zero).sum(),
        gradient_TV.to(logits_TV.dtype),
    )


class _Chunks(torch.autograd.Function):
    """Loss and gradients in one pass, some rows of logits at a time, as kernels.score has it."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        head_VD: Tensor,
        targets_T: Tensor,
        mask_T: Tensor,
        z_factor: float,
        rows: Rows,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wants_x, wants_head = ctx.needs_input_grad[:2]
        x_gradient = torch.empty_like(x_TD) if wants_x else None
        head_gradient = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        sums = torch.zeros(2, dtype=torch.float32, device=x_TD.device)
        parts = (tensor.split(chunk) for tensor in (x_TD, targets_T, mask_T))
        for start, (x, targets, mask) in enumerate(zip(*parts, strict=True)):
            logits = functional.linear(x, head_VD)
            loss, z_loss, gradient = _score(logits, targets, mask, z_factor, rows)
            sums += torch.stack((loss, z_loss)) / rows.group.size()
            if x_gradient is not None:
                torch.mm(gradient, head_VD, out=x_gradient[start * chunk : (start + 1) * chunk])
            if head_gradient is not None:
                head_gradient += gradient.T @ x
        ctx.save_for_backward(x_gradient, head_gradient)
        ctx.head_dtype = head_VD.dtype
        loss_sum, z_sum = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(z_sum)
        return loss_sum, z_sum

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x_gradient, head_gradient = ctx.saved_tensors
        if x_gradient is not None:
            x_gradient = x_gradient * upstream.to(x_gradient.dtype)
        if head_gradient is not None:
            head_gradient = (head_gradient * upstream).to(ctx.head_dtype)
        return x_gradient, head_gradient, None, None, None, None, None


def _part(layer: nn.Module, first: int, last: int) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()[first:last].clone(memory_format=torch.contiguous_format)
