"""X, HEAD, TARGETS -> LOSS. Cross-entropy of a large vocabulary, without its logits ever whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xverse.kernels import dispatch
from xverse.kernels.reference_train import Scored

LOGITS = 2**28  # alive at a time: 0.5 GiB in bf16, and 2,560 tokens of a vocabulary of 100,534
STEP = 256  # rows are a multiple of it, which is whole tiles of the product

# Logits [T, V], targets, mask and z_factor -> (loss, z_loss, gradient of both for the logits).
Scorer = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


def cross_entropy(
    x_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    mask_T: Tensor,
    *,
    z_factor: float = 0.0,
    rows: int | None = None,
    scorer: Scorer | None = None,
) -> Scored:
    """Summed loss of the targets in the mask, as x @ head.T predicts them, `rows` at a time.

    Twin: `reference_train.cross_entropy`. `loss` carries the gradient of loss + z_factor * z_loss,
    which is computed on the way; `z_loss` carries none. `scorer` takes the place of the device's
    kernel, where logits are not all that a rank has of a row.
    """
    rows, scorer = rows or _rows(head_VD), scorer or dispatch.score(x_TD.device).call
    loss, z_loss = _Chunks.apply(x_TD, head_VD, targets_T, mask_T, z_factor, rows, scorer)  # type: ignore[no-untyped-call]
    return Scored(loss, z_loss)


def log_probabilities(
    x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, *, rows: int | None = None
) -> Tensor:
    """log softmax(x @ head.T) of each target, [T] in fp32, `rows` at a time.

    Unlike the loss above, what the gradient of each is multiplied by is known only in the backward
    pass, in which the logits are therefore made once more.
    """
    found: Tensor = _Each.apply(x_TD, head_VD, targets_T, rows or _rows(head_VD))  # type: ignore[no-untyped-call]
    return found


def _rows(head_VD: Tensor) -> int:
    return max(STEP, LOGITS // head_VD.shape[0] // STEP * STEP)


class _Each(torch.autograd.Function):
    """The log-probability of each target, and its gradient from logits that are made again."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(x_TD, head_VD, targets_T)
        ctx.rows = rows
        found = []
        for x, targets in zip(x_TD.split(rows), targets_T.split(rows), strict=True):
            logits = functional.linear(x, head_VD).float()
            picked = logits.gather(-1, targets[:, None])[:, 0]
            found.append(picked - logits.logsumexp(-1))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, upstream_T: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TD, head_VD, targets_T = ctx.saved_tensors
        wants_x, wants_head = ctx.needs_input_grad[:2]
        x_gradients = []
        head_gradient = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        parts = (tensor.split(ctx.rows) for tensor in (x_TD, targets_T, upstream_T))
        for x, targets, upstream in zip(*parts, strict=True):
            shares = functional.linear(x, head_VD).float().softmax(-1).neg_()
            shares.scatter_add_(-1, targets[:, None], torch.ones_like(shares[:, :1]))
            gradient = (shares * upstream[:, None]).to(x.dtype)
            if wants_x:
                x_gradients.append(gradient @ head_VD)
            if head_gradient is not None:
                head_gradient += gradient.T @ x
        x_gradient = torch.cat(x_gradients) if wants_x else None
        return (
            x_gradient,
            None if head_gradient is None else head_gradient.to(head_VD.dtype),
            None,
            None,
        )


class _Chunks(torch.autograd.Function):
    """Loss and gradients in one pass: logits of a chunk are made once, used, and forgotten."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        head_VD: Tensor,
        targets_T: Tensor,
        mask_T: Tensor,
        z_factor: float,
        rows: int,
        score: Scorer,
    ) -> tuple[Tensor, Tensor]:
        wants_x, wants_head = ctx.needs_input_grad[:2]
        x_gradient = torch.empty_like(x_TD) if wants_x else None
        # Summed in fp32: a chunk's part of a gradient is below bf16's last place of the sum.
        head_gradient = torch.zeros_like(head_VD, dtype=torch.float32) if wants_head else None
        sums = torch.zeros(2, dtype=torch.float32, device=x_TD.device)
        parts = (tensor.split(rows) for tensor in (x_TD, targets_T, mask_T))
        for start, (x, targets, mask) in enumerate(zip(*parts, strict=True)):
            logits = functional.linear(x, head_VD)
            loss, z_loss, gradient = score(logits, targets, mask, z_factor)
            sums += torch.stack((loss, z_loss))
            if x_gradient is not None:
                torch.mm(gradient, head_VD, out=x_gradient[start * rows : (start + 1) * rows])
            if head_gradient is not None:
                head_gradient += gradient.T @ x
        ctx.save_for_backward(x_gradient, head_gradient)
        ctx.head_dtype = head_VD.dtype
        loss_sum, z_sum = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(z_sum)
        return loss_sum, z_sum

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        x_gradient, head_gradient = ctx.saved_tensors
        if x_gradient is not None:
            x_gradient = x_gradient * upstream.to(x_gradient.dtype)
        if head_gradient is not None:
            head_gradient = (head_gradient * upstream).to(ctx.head_dtype)
        return x_gradient, head_gradient, None, None, None, None, None
