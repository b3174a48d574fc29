"""GRADIENTS -> WEIGHTS ON A CPU. AdamW by PyTorch's fused loop, or by the reference in pieces."""

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from xverse.kernels import reference_train
from xverse.kernels.reference_train import AdamW

PIECE = 2**20  # numbers at a time: what is made on the way, 4 MiB a tensor, stays in the cache


def adamw(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rule: AdamW,
    copy: Tensor | None = None,
) -> None:
    """Twin: `reference_train.adamw`, whose temporaries are no larger than a piece here.

    Weight and moments all in fp32 are updated in one pass over memory; else as the reference does.
    """
    fp32 = all(kept.dtype == torch.float32 for kept in (weight, first, second))
    update = _fused if fp32 else reference_train.adamw
    flat = [part.detach().view(-1) for part in (weight, first, second)]
    gradients, copies = gradient.reshape(-1), None if copy is None else copy.view(-1)
    for begin in range(0, weight.numel(), PIECE):
        here = slice(begin, begin + PIECE)
        weight_, first_, second_ = (part[here] for part in flat)
        placed = rule._replace(start=rule.start + begin)
        copy_ = None if copies is None else copies[here]
        update(weight_, gradients[here], first_, second_, placed, copy_)


def _fused(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    rule: AdamW,
    copy: Tensor | None,
) -> None:
    torch_adamw(
        [weight],
        [gradient.float() * rule.scale],
        [first],
        [second],
        [],
        [torch.tensor(float(rule.step - 1))],  # which it counts up itself
        fused=True,
        amsgrad=False,
        beta1=rule.beta1,
        beta2=rule.beta2,
        lr=rule.rate,
        weight_decay=rule.decay,
        eps=rule.epsilon,
        maximize=False,
    )
    if copy is not None:
        copy.copy_(weight)
