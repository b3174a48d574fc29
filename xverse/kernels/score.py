"""X, HEAD, TARGETS -> LOSS. Cross-entropy of a large vocabulary, without its logits ever whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xverse.kernels import dispatch
from xverse.kernels.reference_train import Scored

LOGITS = 2**28  # alive at a time beside their gradient; in its place, twice as many: 1 GiB in bf16
STEP = 256  # rows are a multiple of it, which is whole tiles of the product
WIDE = 128  # that the rows of the head become a multiple of, on a GPU

# Logits [T, V], targets, mask and z_factor -> (loss, z_loss, gradient of both for the logits),
# which may take the place of the logits, then with zeros in what their rows have as padding.
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
    scorer = scorer or dispatch.score(x_TD.device).call
    rows = rows or chunk_rows(len(x_TD), len(head_VD), in_place=x_TD.is_cuda)
    loss, z_loss = _Chunks.apply(x_TD, head_VD, targets_T, mask_T, z_factor, rows, scorer)  # type: ignore[no-untyped-call]
    return Scored(loss, z_loss)


def log_probabilities(
    x_TD: Tensor, head_VD: Tensor, targets_T: Tensor, *, rows: int | None = None
) -> Tensor:
    """log softmax(x @ head.T) of each target, [T] in fp32, `rows` at a time.

    Unlike the loss above, what the gradient of each is multiplied by is known only in the backward
    pass, in which the logits are therefore made once more.
    """
    rows = rows or chunk_rows(len(x_TD), len(head_VD), in_place=False)
    found: Tensor = _Each.apply(x_TD, head_VD, targets_T, rows)  # type: ignore[no-untyped-call]
    return found


def chunk_rows(tokens: int, vocabulary: int, *, in_place: bool) -> int:
    """Rows of logits at a time, as even as may be: each chunk reads and writes the head's gradient,
    3.3 GB at 7B, whatever its size."""
    most = max(STEP, LOGITS * (1 + in_place) // vocabulary // STEP * STEP)
    even = -(-tokens // max(1, -(-tokens // most)))
    return max(STEP, -(-even // STEP) * STEP)


def _wide(head_VD: Tensor) -> Tensor:
    """The head [W, D]; on a GPU with rows of zeros up to a multiple of WIDE. Products of which a
    side is not a multiple of 8 are left to slow kernels there, and 100,534 is 2 x 50,267."""
    more = -len(head_VD) % WIDE if head_VD.is_cuda else 0
    return functional.pad(head_VD, (0, 0, 0, more)) if more else head_VD


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
        wide_WD, room_TW = _wide(head_VD), None
        parts = (tensor.split(rows) for tensor in (x_TD, targets_T, mask_T))
        for start, (x, targets, mask) in enumerate(zip(*parts, strict=True)):
            room_TW = x.new_empty(len(x), len(wide_WD)) if room_TW is None else room_TW[: len(x)]
            logits = torch.mm(x, wide_WD.T, out=room_TW)[:, : len(head_VD)]
            loss, z_loss, gradient = score(logits, targets, mask, z_factor)
            sums += torch.stack((loss, z_loss))
            if gradient.data_ptr() == logits.data_ptr():
                gradient = room_TW  # the padding included, in which its scorer left zeros
            else:
                gradient = functional.pad(gradient, (0, len(wide_WD) - len(head_VD)))
            if x_gradient is not None:
                torch.mm(gradient, wide_WD, out=x_gradient[start * rows : (start + 1) * rows])
            if head_gradient is not None:
                head_gradient += (gradient.T @ x)[: len(head_VD)]
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
        if head_gradient is not None:  # rounded on the way, without a copy in fp32
            rounded = torch.empty_like(head_gradient, dtype=ctx.head_dtype)
            head_gradient = torch.mul(head_gradient, upstream, out=rounded)
        return x_gradient, head_gradient, None, None, None, None, None
