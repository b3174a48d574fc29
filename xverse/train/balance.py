"""EXPERTS -> ALL OF THEM USED. A loss that spreads tokens, put on mixtures of experts from outside.

Without it a router that learns from scratch soon sends every token to the same few experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from xverse.model.decoder import Decoder
from xverse.model.feedforward import MixtureOfExperts
from xverse.parallel.grid import Grid


def balanced(decoder: Decoder, grid: Grid) -> Decoder:
    """Mixtures whose backward pass adds the gradient of the balance loss, by their `.weight`.

    Ranks along `tensor` all compute it of the same tokens, and each counts it by its share; those
    along `context` count the choices of all their tokens together.
    """
    for block in decoder.model.layers:
        if isinstance(block.mlp, MixtureOfExperts):
            mixture: Any = block.mlp
            mixture.balance = None
            mixture.same = grid.size("tensor")
            mixture.count = functools.partial(_counted, grid)
            mixture.forward = functools.partial(_forward, mixture, mixture.forward)
    return decoder


def weigh(decoder: Decoder, factor: float, device: torch.device) -> None:
    """How much the loss counts in the next pass: its factor, times the pass's share of a step."""
    for block in decoder.model.layers:
        if isinstance(block.mlp, MixtureOfExperts):
            # A tensor: compiled code would be made anew for every other number.
            share = factor / getattr(block.mlp, "same", 1)
            block.mlp.balance = torch.full((), share, device=device)


def balance_loss(
    scores_TX: Tensor, top_k: int, count: Callable[[Tensor], Tensor] = lambda counts_X: counts_X
) -> Tensor:
    """X / k * sum over experts of (share of the choices x mean score): 1 where all are used alike
    (Fedus et al. 2021, Switch Transformer, eq. 4). `count` adds the choices of other tokens."""
    experts = scores_TX.shape[1]
    chosen_TC = scores_TX.topk(top_k, dim=-1).indices
    counts_X = count(functional.one_hot(chosen_TC, experts).sum((0, 1)).float())
    return experts * (counts_X / counts_X.sum() * scores_TX.mean(0)).sum()


def _counted(grid: Grid, counts_X: Tensor) -> Tensor:
    if grid.size("context") > 1:
        dist.all_reduce(counts_X, group=grid.group("context"))
    return counts_X


def _forward(mixture: Any, forward: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
    mixed_TD = forward(x_TD)
    if not torch.is_grad_enabled() or mixture.balance is None:
        return mixed_TD
    loss = balance_loss(mixture.router.scores(x_TD), mixture.router.top_k, mixture.count)
    also: Tensor = _Also.apply(mixed_TD, loss, mixture.balance)  # type: ignore[no-untyped-call]
    return also


class _Also(torch.autograd.Function):
    """The first argument, with the gradient of the second, times a factor, beside its own."""

    @staticmethod
    def forward(ctx: Any, mixed_TD: Tensor, loss: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return mixed_TD.view_as(mixed_TD)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        (factor,) = ctx.saved_tensors
        return upstream, factor, None
