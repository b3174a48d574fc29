"""PARTS OF TOKENS <-> TOKENS. What ranks give each other in a step, and back for its gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 has given them other names, and warns of the old ones.
_gather_into = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_into = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather_tokens(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tokens of all ranks one after another. Each rank's gradient of them is added up."""
    gathered: Tensor = _Gather.apply(x_TD, group)  # type: ignore[no-untyped-call]
    return gathered


def add_tokens(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of what all ranks have of each token; every rank gets its part of the tokens."""
    added: Tensor = _Add.apply(x_TD, group)  # type: ignore[no-untyped-call]
    return added


def exchange(
    x_TD: Tensor, sent: list[int] | None, got: list[int] | None, group: dist.ProcessGroup
) -> Tensor:
    """Rows for each rank in order, `sent` of them; what the others have for this one, `got` rows.
    None: equally many from each to each."""
    rows: Tensor = _Exchange.apply(x_TD, sent, got, group)  # type: ignore[no-untyped-call]
    return rows


def gather(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`gather_tokens` without a gradient."""
    whole = x_TD.new_empty(group.size() * x_TD.shape[0], *x_TD.shape[1:])
    _gather_into(whole, x_TD.contiguous(), group=group)
    return whole


def _add(x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
    part = x_TD.new_empty(x_TD.shape[0] // group.size(), *x_TD.shape[1:])
    _reduce_into(part, x_TD.contiguous(), group=group)
    return part


def _exchange(
    x_TD: Tensor, sent: list[int] | None, got: list[int] | None, group: dist.ProcessGroup
) -> Tensor:
    rows = x_TD.shape[0] if got is None else sum(got)
    found = x_TD.new_empty(rows, *x_TD.shape[1:])
    dist.all_to_all_single(found, x_TD.contiguous(), got, sent, group=group)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(x_TD, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _add(upstream, ctx.group), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _add(x_TD, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return gather(upstream, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        sent: list[int] | None,
        got: list[int] | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.back = (got, sent, group)
        return _exchange(x_TD, sent, got, group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(upstream, *ctx.back), None, None, None
