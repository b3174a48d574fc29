"""W, H -> INTEGERS. Rounding column by column, each error made good in the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, with columns in order of importance and the groups' scales fixed before
("act-order" with static groups).
"""

import torch
from torch import Tensor

from xverse.quant.rounding import TINY, Rounded, searched
from xverse.quant.scheme import Scheme

DAMPING = 0.01  # of the mean of the diagonal (the paper's), so that H can be inverted
COLUMNS = 128  # whose corrections are applied to the rest at once


def solve(
    weight_XND: Tensor, hessian_XDD: Tensor, scheme: Scheme, dtype: torch.dtype | None = None
) -> Rounded:
    """X matrices rounded so that (w - w') @ x is small for the inputs x that were seen.

    `hessian_XDD` is the mean of x.T @ x over these, fp32. Scales come in `dtype`, by default the
    weight's own; groups are those of the columns as they stand on disk.
    """
    assert scheme.kind == "int", "fp8 has steps of many sizes, and is rounded to the nearest"
    diagonal_XD = hessian_XDD.diagonal(dim1=-2, dim2=-1)
    start = searched(weight_XND, scheme, importance(hessian_XDD), dtype)
    size = scheme.group_size or weight_XND.shape[-1]
    order_XD = diagonal_XD.argsort(dim=-1, descending=True, stable=True)
    steps_XND = _round_columns(
        _columns(weight_XND.float(), order_XD),
        _sorted_root(hessian_XDD, order_XD),
        _of_columns(start.scale.float(), order_XD, size, scheme),
        None if start.zero is None else _of_columns(start.zero.float(), order_XD, size, scheme),
        scheme,
    )
    back_XD = order_XD.argsort(dim=-1)
    return Rounded(_columns(steps_XND, back_XD).to(torch.int8), start.scale, start.zero)


def importance(hessian_XDD: Tensor) -> Tensor:
    """How much an error in each column matters, [X, D]; what was never seen still does a little."""
    diagonal_XD = hessian_XDD.diagonal(dim1=-2, dim2=-1)
    return diagonal_XD + DAMPING * diagonal_XD.mean(dim=-1, keepdim=True)


def _round_columns(
    weight_XND: Tensor,
    root_XDD: Tensor,
    scale_XND: Tensor,
    zero_XND: Tensor | None,
    scheme: Scheme,
) -> Tensor:
    """Steps, in fp32, of columns from the first to the last; `weight_XND` is used up."""
    steps_XND = torch.empty_like(weight_XND)
    scale_XND = scale_XND.clamp(min=TINY)
    columns = weight_XND.shape[-1]
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        root = root_XDD[:, start:stop, start:stop]
        errors = torch.empty_like(weight_XND[..., start:stop])
        now = weight_XND[..., start:stop].clone()
        for column in range(stop - start):
            place = start + column
            weight_XN, scale_XN = now[..., column], scale_XND[..., place]
            shift = 0.0 if zero_XND is None else zero_XND[..., place]
            steps = (weight_XN / scale_XN).round_() + shift
            steps = steps.clamp_(scheme.smallest, scheme.largest)
            steps_XND[..., place] = steps
            error = (weight_XN - (steps - shift) * scale_XN) / root[:, column, column, None]
            now[..., column:] -= error[..., None] * root[:, column, None, column:]
            errors[..., column] = error
        weight_XND[..., stop:] -= errors @ root_XDD[:, start:stop, stop:]
    return steps_XND


def _sorted_root(hessian_XDD: Tensor, order_XD: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse, of columns in `order_XD`; fp32, found in fp64.

    Inputs that are always zero count as independent of all others.
    """
    roots = []
    for hessian, order in zip(hessian_XDD, order_XD, strict=True):
        sorted_DD = hessian[order][:, order].double()
        diagonal = sorted_DD.diagonal()
        diagonal[diagonal == 0] = 1.0
        damping = DAMPING * diagonal.mean()
        while True:
            damped_DD = sorted_DD.clone()
            damped_DD.diagonal().add_(damping)
            lower_DD, failed = torch.linalg.cholesky_ex(damped_DD)
            if not failed:
                break
            damping = 10 * damping  # sums in fp32 can leave it a little short of positive
        inverse_DD = torch.cholesky_inverse(lower_DD)
        roots.append(torch.linalg.cholesky(inverse_DD, upper=True).float())
    return torch.stack(roots)


def _columns(weight_XND: Tensor, order_XD: Tensor) -> Tensor:
    return weight_XND.gather(-1, order_XD[:, None].expand_as(weight_XND))


def _of_columns(scale: Tensor, order_XD: Tensor, size: int, scheme: Scheme) -> Tensor:
    """The scale of every weight, [X, N, D], in the order of columns."""
    groups_XNG = scale[..., None] if scheme.group_size is None else scale
    index_XND = (order_XD // size)[:, None].expand(-1, groups_XNG.shape[1], -1)
    return groups_XNG.gather(-1, index_XND)
